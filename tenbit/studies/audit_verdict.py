"""What measurements mean: findings, each with a module's name and a remedy, and the verdict. Nothing is measured here.

    findings = judge(anatomy, precision, weights, forward, backward)
    plan = remedied(precision, findings)                 the same plan with every remedy in it, or the plan itself
    verdict_of(precision, plan, cured, left, trial)      safe, safe with ..., unsafe

A remedy is a key of the recipe's `[precision]` table. What each is for:

    head = "fp32"          logits that do not fit
    residual_scale = 2^-k  the residual stream, or what a branch adds to it, does not fit; norms hide that
    fp32 = [module]        what is inside a module does not fit, and its input and output do
    loss_scale             gradients fit, at another loss scale than the plan starts with
    reduce = "fp32"        sums of gradients in FP16 grow with a step's answers, of which an audit sees a few
    router = "fp32"        a mixture that chooses other experts in 16 bits
    none                   weights: their 16-bit copy itself is wrong, whatever is computed with it

A remedy that did not help is followed by a stronger one (the whole layer in FP32), then by none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tenbit.loss_scale import LARGEST_SCALE
from tenbit.precision import Format, Precision
from tenbit.studies.audit_anatomy import INSIDE, Anatomy, adds_to_stream, is_stream, is_wide
from tenbit.studies.audit_backward import Histogram, Window, window
from tenbit.studies.audit_forward import Place, Range
from tenbit.studies.audit_run import Trial
from tenbit.studies.audit_weights import Weight

HEADROOM = 4.0
"""Activations must stay this far below the largest number: the audit saw some prompts, and training moves weights."""


@dataclass(frozen=True)
class Stretch:
    """Where a run's answers may be longer than those that were seen: gradients may be so many times smaller (`low`), or
    larger (`high`), both powers of two."""

    low: float = 1.0
    high: float = 1.0


AS_SEEN = Stretch()

Kind = Literal["weights", "forward", "stream", "logits", "gradient", "sums"]


@dataclass(frozen=True)
class Remedy:
    """A key of `[precision]` with its value. Values of `fp32` add up; of `residual_scale` the smallest is taken."""

    key: Literal["head", "fp32", "residual_scale", "loss_scale", "reduce", "router"]
    value: Any

    @property
    def toml(self) -> str:
        return f"{self.key} = {_toml(self.value)}"


@dataclass(frozen=True)
class Finding:
    """Something that does not fit. `beyond`: out of the format's range, not only of the headroom below it. `size` is
    how large it is beside others of its kind."""

    kind: Kind
    where: str
    what: str
    beyond: bool
    remedy: Remedy | None
    place: Place | None = None
    size: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "module": self.where,
            "what": self.what,
            "beyond": self.beyond,
            "remedy": self.remedy.toml if self.remedy else None,
        }


def narrowest(*formats: Format) -> Format:
    """The one whose largest number is the smallest."""
    return min(formats, key=lambda f: f.largest)


def loss_share(format: Format) -> float:
    """The share of a squared norm that rounding may take anyway: (epsilon / 2)^2."""
    return (format.epsilon / 2) ** 2


def judge(
    anatomy: Anatomy,
    precision: Precision,
    weights: Sequence[Weight],
    forward: Mapping[Place, Range],
    backward: Mapping[Place, Histogram],
    stretch: Stretch = AS_SEEN,
) -> list[Finding]:
    """Everything that does not fit under this plan, weights first."""
    found = [f for w in weights if (f := _judge_weight(w)) is not None]
    found += _judge_forward(anatomy, precision, forward)
    found += _judge_sums(precision)
    return found + _judge_backward(anatomy, precision, backward, stretch)


def _judge_sums(precision: Precision) -> list[Finding]:
    """FP16 sums may pass 65504 where no micro-batch's gradient does, and an audit sees few of a step's answers."""
    if precision.loss_scale is None or precision.reduce == precision.master:
        return []
    what = f"gradients add up in {precision.reduce.value} over a step's micro-batches, more of them than an audit sees"
    return [Finding("sums", "precision.reduce", what, False, Remedy("reduce", precision.master.value))]


def _judge_weight(w: Weight) -> Finding | None:
    if w.not_finite:
        return Finding(
            "weights", w.name, f"{w.not_finite:,} of {w.count:,} values are inf or NaN before any cast", True, None
        )
    if w.overflowed:
        what = f"{w.overflowed:,} of {w.count:,} weights become inf in {w.format}; the largest is {w.largest:.3g}"
        return Finding("weights", w.name, what, True, None)
    if w.lossy and not w.harmless:
        what = (
            f"the cast to {w.format} takes {w.rms_error:.1%} of the tensor's norm: {w.flushed:,} of {w.count:,} "
            f"weights become zero, {w.subnormal:,} subnormal"
        )
        return Finding("weights", w.name, what, True, None)
    return None


def _judge_forward(anatomy: Anatomy, precision: Precision, forward: Mapping[Place, Range]) -> list[Finding]:
    format = narrowest(precision.compute, precision.rollout)
    found = []
    for place, seen in forward.items():
        if seen.not_finite:
            what = f"{seen.not_finite:,} values are inf or NaN in FP32"
            found.append(Finding("forward", place.module, what, True, None, place))
        elif seen.largest * HEADROOM > format.largest and not is_wide(place, precision, anatomy):
            kind, remedy = _remedy(place, seen, format, anatomy, precision, forward)
            called = _called(place, anatomy, forward)
            what = f"{called} reaches {seen.largest:.3g}; {format.value} ends at {format.largest:.6g}"
            beyond = seen.largest > format.largest
            found.append(Finding(kind, place.module, what, beyond, remedy, place, seen.largest / format.largest))
    return found


def _called(place: Place, anatomy: Anatomy, forward: Mapping[Place, Range]) -> str:
    if place.kind == "logits":
        return "the head's product"
    if place.kind == "table":
        return "the embedding of some token"
    if place.kind in ("product", "scores"):
        return "query times key" if place.kind == "product" else "an attention score"
    if is_stream(place, anatomy, forward):
        return f"the residual stream ({place.kind})"
    return f"its {place.kind}"


def _remedy(
    place: Place, seen: Range, format: Format, anatomy: Anatomy, precision: Precision, forward: Mapping[Place, Range]
) -> tuple[Kind, Remedy | None]:
    if place.kind == "logits":
        return "logits", Remedy("head", "fp32")
    itself = is_stream(place, anatomy, forward)
    stream = itself or (precision.residual_scale == 1 and adds_to_stream(place, anatomy, forward))
    if stream and not anatomy.no_rescale:
        factor = 2.0 ** math.ceil(math.log2(seen.largest * HEADROOM / format.largest))
        return "stream", Remedy("residual_scale", precision.residual_scale / factor)
    if itself:
        return "stream", None
    return "forward", _widened(place, anatomy, precision)


def _widened(place: Place, anatomy: Anatomy, precision: Precision) -> Remedy | None:
    """The layer's part in FP32 if the place is inside it, the layer if it is at the edge or the part has not helped."""
    part, layer = anatomy.part_of(place.module), anatomy.layer_of(place.module)
    if part is None or layer is None or layer in precision.fp32:
        return None
    inside = place.module != part or place.kind in INSIDE
    return Remedy("fp32", (part if inside and part not in precision.fp32 else layer,))


def window_of(
    anatomy: Anatomy, precision: Precision, backward: Mapping[Place, Histogram], stretch: Stretch = AS_SEEN
) -> Window:
    """Loss scales for what the plan holds in the training format."""
    held = {p: h for p, h in backward.items() if not is_wide(p, precision, anatomy)}
    found = window(held, loss_share(precision.compute))
    return replace(found, low=found.low * stretch.low, high=found.high / stretch.high)


def _judge_backward(
    anatomy: Anatomy, precision: Precision, backward: Mapping[Place, Histogram], stretch: Stretch
) -> list[Finding]:
    for place, h in backward.items():
        if h.not_finite:
            what = f"{h.not_finite:,} gradients are inf or NaN in FP32"
            return [Finding("gradient", place.module, what, True, None, place)]
    found = window_of(anatomy, precision, backward, stretch)
    if found.high_at is None:
        return []
    low_at, high_at = found.low_at or found.high_at, found.high_at
    if precision.loss_scale is None:
        if found.low <= 1 <= found.high:
            return []
        place = high_at if found.high < 1 else low_at
        what = f"gradients (of its {place.kind}) do not fit {precision.compute.value}, which has no loss scale here"
        return [Finding("gradient", place.module, what, True, None, place)]
    if found.empty:
        return [_no_scale(found, low_at, high_at, anatomy, precision)]
    initial = precision.loss_scale.initial
    if found.low <= initial <= found.high:
        return []
    place, does = (high_at, "overflow") if initial > found.high else (low_at, "vanish")
    what = (
        f"gradients (of its {place.kind}) {does} at the loss scale of {initial:g}; between {found.low:g} and "
        f"{found.high:g} none do"
    )
    best = min(max(found.high / HEADROOM, found.low), found.high)
    fits = max(best, 1.0) <= min(found.high, LARGEST_SCALE)
    remedy = Remedy("loss_scale", {"initial": max(best, 1.0), "limit": max(best, 1.0)}) if fits else None
    return [Finding("gradient", place.module, what, True, remedy, place)]


def _no_scale(found: Window, low_at: Place, high_at: Place, anatomy: Anatomy, precision: Precision) -> Finding:
    """Gradients span more than the format has. FP32 for one of the two modules helps if they are inside it."""
    what = (
        f"no loss scale fits: gradients of {low_at} need {found.low:g} not to vanish, those of {high_at} overflow "
        f"above {found.high:g}"
    )
    for place in (high_at, low_at):
        remedy = _inside(place, anatomy, precision)
        if remedy is not None:
            return Finding("gradient", place.module, what, True, remedy, place)
    return Finding("gradient", high_at.module, what, True, None, high_at)


def _inside(place: Place, anatomy: Anatomy, precision: Precision) -> Remedy | None:
    """FP32 for the part that a gradient is inside of; a gradient at a part's edge, or of a weight, is 16-bit anyway."""
    part = anatomy.part_of(place.module)
    edge = place.module == part and place.kind not in INSIDE
    if part is None or place.kind == "weight" or edge or part in precision.fp32:
        return None
    return Remedy("fp32", (part,))


def steadier(anatomy: Anatomy, precision: Precision, forward: Mapping[Place, Range]) -> list[tuple[str, Remedy]]:
    """What the plan has to offer where all is finite and too far from FP32, each with the module that it is about.

    Cheapest first: large logits are what rounding moves most directly; then a mixture's choices, then attention and
    MLPs of all layers.
    """
    if precision.compute == precision.rollout == precision.master:
        return []
    found: list[tuple[str, Remedy]] = []
    if precision.head == "model":
        found.append((anatomy.head, Remedy("head", "fp32")))
    if precision.router == "model" and anatomy.routers:
        found.append((min(anatomy.routers), Remedy("router", "fp32")))
    kinds: dict[str, list[str]] = {}
    for part in dict.fromkeys(filter(None, (anatomy.part_of(place.module) for place in forward))):
        if part not in anatomy.norms and not is_wide(Place(f"{part}.any", "output"), precision, anatomy):
            kinds.setdefault(part.rpartition(".")[2], []).append(part)
    return found + [(parts[0], Remedy("fp32", tuple(parts))) for parts in kinds.values()]


def drifted(where: str, remedy: Remedy, trial: Trial) -> Finding:
    """All is finite and too far from FP32."""
    return Finding("logits" if remedy.key == "head" else "forward", where, trial.failed or trial.rough, False, remedy)


TURNS = (("head", "residual_scale", "reduce"), ("fp32",), ("loss_scale",))
"""Which remedies are tried together: a rescaled stream may make others needless, and gradients come after both."""


def met(findings: Sequence[Finding]) -> list[Finding]:
    """Those whose remedies are tried next."""
    for keys in TURNS:
        chosen = [f for f in findings if f.remedy is not None and f.remedy.key in keys]
        if chosen:
            return chosen
    return []


def remedied(precision: Precision, findings: Sequence[Finding]) -> Precision:
    """The plan with the remedies that findings have."""
    tree = precision.model_dump()
    for r in (f.remedy for f in findings if f.remedy is not None):
        if r.key == "fp32":
            tree["fp32"] = _outermost((*tree["fp32"], *r.value))
        elif r.key == "residual_scale":
            tree["residual_scale"] = min(tree["residual_scale"], r.value)
        elif r.key == "loss_scale":
            tree["loss_scale"] = tree["loss_scale"] | r.value
        else:
            tree[r.key] = r.value
    return Precision.model_validate(tree)


def _outermost(names: Sequence[str]) -> tuple[str, ...]:
    """Each once, without those that are inside another one."""
    once = dict.fromkeys(names)
    return tuple(n for n in once if not any(n.startswith(f"{other}.") for other in once))


def changes(before: Precision, after: Precision) -> dict[str, Any]:
    """Keys of `[precision]` that differ, as a recipe writes them."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    out: dict[str, Any] = {}
    for key in new:
        if new[key] == old[key]:
            continue
        if key == "loss_scale":
            out[key] = {k: v for k, v in new[key].items() if v != (old[key] or {}).get(k)}
        else:
            out[key] = new[key]
    return out


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def toml_lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items()]


@dataclass(frozen=True)
class Verdict:
    """`kind` with its reasons. `remedies` are the keys to set; `modules` those that the verdict names."""

    kind: Literal["safe", "safe with", "unsafe"]
    because: tuple[str, ...]
    remedies: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "because": list(self.because),
            "remedies": dict(self.remedies),
            "toml": toml_lines(self.remedies),
            "modules": list(self.modules),
        }


def verdict_of(
    base: Precision, plan: Precision, cured: Sequence[Finding], left: Sequence[Finding], trial: Trial | None
) -> Verdict:
    """`cured`: what remedies took away; `left`: what none did; `trial`: what came of `plan`."""
    if left:
        hopeless = [f for f in left if f.remedy is None] or list(left)
        return Verdict("unsafe", reasons(hopeless), {}, tuple(dict.fromkeys(f.where for f in worst_first(hopeless))))
    assert trial is not None
    table = changes(base, plan)
    modules = tuple(dict.fromkeys(f.where for f in worst_first(cured) if f.kind != "sums"))
    if not trial.passed:
        where = " with every remedy" if table else ""
        modules = tuple(dict.fromkeys(filter(None, (trial.where, *modules))))
        return Verdict("unsafe", (f"the plan was run{where} and failed: {trial.failed}",), {}, modules)
    if not table:
        return Verdict("safe", ())
    return Verdict("safe with", reasons(cured), table, modules)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda f: (not f.beyond, -f.size))


def reasons(findings: Sequence[Finding]) -> tuple[str, ...]:
    """The worst of each remedy in words, with how many more there are; of what has none, all."""
    said: dict[Any, list[Finding]] = {}
    for f in worst_first(findings):
        r = f.remedy
        key = (f.where, f.what) if r is None else (r.key, r.value if r.key == "fp32" else None)
        said.setdefault(key, []).append(f)
    out = []
    for worst, *others in said.values():
        more = f" (and {len(others)} more place{'s' if len(others) > 1 else ''})" if others else ""
        out.append(f"{worst.where}: {worst.what}{more}")
    return tuple(out)
