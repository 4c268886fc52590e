"""`tenbit audit MODEL --data FILE`: is this model safe in FP16, before a week is spent on it?

    audit = run(make_plan("builtin", {"data": "arithmetic_test"}), out=None)
    audit.verdict                      safe | safe with ... | unsafe, with the modules and the remedies

In five steps: the weights' cast is measured; answers are sampled in FP32, so that a model that is not safe in FP16 can
be sampled at all; the same tokens go forward and backward in FP32, watched; what does not fit gets remedies, and is
looked at again with them; and the plan that comes out is run by tenbit's own backend and engine. A verdict of `safe` or
`safe with` is printed only if that run was finite and close to FP32. docs/audit.md says what an audit cannot see.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tenbit.batching import Row
from tenbit.console import default_console
from tenbit.folder import holds_something, make_folder
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.report.audit import write_page
from tenbit.runlog import write_atomic
from tenbit.scoring import sample
from tenbit.studies.audit_anatomy import Anatomy, anatomy_of, is_wide
from tenbit.studies.audit_backward import Histogram, Window, strict_scale
from tenbit.studies.audit_forward import Place
from tenbit.studies.audit_notes import few, of_recipe, unfollowed
from tenbit.studies.audit_plan import AuditPlan, make_plan, write_applied
from tenbit.studies.audit_run import MOST_BENT, Seen, Trial, confirm, rows_of, watch
from tenbit.studies.audit_verdict import (
    HEADROOM,
    Finding,
    Verdict,
    changes,
    drifted,
    judge,
    loss_share,
    met,
    narrowest,
    remedied,
    verdict_of,
    window_of,
)
from tenbit.studies.audit_weights import Weight, measure_weights
from tenbit.studies.options import said_in_options
from tenbit.studies.probe import chosen_prompts, clean
from tenbit.studies.probe_plan import OPTIONS
from tenbit.types import Totals

SCHEMA = "tenbit.audit/1"
ROUNDS = 8  # of remedies: each makes the plan wider, and the last one left is none
FILE = "audit.json"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Audit:
    """Everything an audit found. `first` was found under the plan that was asked about, `left` under the one that came
    out; `seen` is of the latter."""

    settings: dict[str, Any]
    anatomy: Anatomy
    base: Precision
    plan: Precision
    weights: tuple[Weight, ...]
    before: Seen
    seen: Seen
    first: tuple[Finding, ...]
    left: tuple[Finding, ...]
    trial: Trial | None
    verdict: Verdict
    notes: tuple[str, ...] = ()
    totals: Totals = field(default_factory=lambda: Totals(0, 0, 0))
    answers: int = 0
    tokens: int = 0  # of the answers
    unfollowed: tuple[str, ...] = ()  # what the recipe's engine will refuse of `plan`

    @property
    def window(self) -> Window:
        return window_of(self.anatomy, self.plan, self.seen.backward)

    @property
    def window_before(self) -> Window:
        return window_of(self.anatomy, self.base, self.before.backward)

    @property
    def scale(self) -> float:
        """The loss scale that the plan starts with; 1 without one."""
        return self.plan.loss_scale.initial if self.plan.loss_scale else 1.0

    def as_dict(self) -> dict[str, Any]:
        """What audit.json holds; docs/audit.md describes it."""
        format = narrowest(self.plan.compute, self.plan.rollout)
        return {
            "schema": SCHEMA,
            **self.settings,
            "precision": self.base.name,
            "format": format.value,
            "largest": format.largest,
            "scaled": self.plan.loss_scale is not None,
            "headroom_wanted": HEADROOM,
            "share_that_may_vanish": loss_share(self.plan.compute),
            "totals": vars(self.totals),
            "seen": {"answers": self.answers, "tokens": self.tokens},
            "verdict": self.verdict.as_dict(),
            "findings": [f.as_dict() for f in self.first],
            "left": [f.as_dict() for f in self.left],
            "window": _window(self.window),
            "window_before": _window(self.window_before),
            "loss_scale": self.scale,
            "trial": self.trial.as_dict() if self.trial else None,
            "layers": list(self.anatomy.layers),
            "weights": [w.as_dict() for w in self.weights],
            "forward": [
                {"module": p.module, "kind": p.kind, **r.as_dict(), "headroom": _ratio(format.largest, r.largest),
                 "fp32": is_wide(p, self.plan, self.anatomy)}
                for p, r in self.seen.forward.items()
            ],
            "backward": [self._gradient(p, h) for p, h in self.seen.backward.items()],
            "notes": list(self.notes),
            "unfollowed": list(self.unfollowed),
        }  # fmt: skip

    def _gradient(self, place: Place, h: Histogram) -> dict[str, Any]:
        held = {"fp32": is_wide(place, self.plan, self.anatomy)}
        if not h.values:
            return {"module": place.module, "kind": place.kind, **h.as_dict(), **held}
        at = {"at_1": h.at(1.0).as_dict(), "at_loss_scale": h.at(self.scale).as_dict()}
        return {
            "module": place.module, "kind": place.kind, **h.as_dict(), **at, **held,
            "nothing_flushed_from": strict_scale(h),
        }  # fmt: skip


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _window(w: Window) -> dict[str, Any]:
    return {
        "low": w.low,
        "high": w.high if w.high_at else None,
        "low_at": str(w.low_at) if w.low_at else None,
        "high_at": str(w.high_at) if w.high_at else None,
    }


def audit_model(
    model: Model, recipe: Recipe, rows: Sequence[Row], totals: Totals, note: Note, settings: dict[str, Any]
) -> Audit:
    """Measures, judges, looks again with the remedies, and tries the plan. `recipe.precision` is what is judged."""
    base = plan = recipe.precision
    anatomy = anatomy_of(model.module)
    formats = dict.fromkeys(f for f in (base.copy_format, base.compute, base.rollout) if f != base.master)
    weights = tuple(w for f in formats for w in measure_weights(model.module.named_parameters(), f))
    note(f"going through {sum(r.length for r in rows):,} tokens in {base.master.value}, forward and backward")
    before = seen = watch(model, recipe, plan, rows, totals)
    responses, tokens = len(rows), sum(r.rollout.completion.length for r in rows)
    notes = few(responses, tokens)
    first = left = judge(anatomy, plan, weights, seen.forward, seen.backward)
    cured: list[Finding] = []
    for _ in range(ROUNDS):
        wider = remedied(plan, met(left))
        if wider == plan:
            break
        note(f"looking again with {', '.join(f'{k} = {v}' for k, v in changes(plan, wider).items())}")
        if wider.residual_scale != plan.residual_scale:
            try:
                seen = watch(model, recipe, wider, rows, totals)
            except ValueError as error:  # a family whose stream cannot be rescaled
                notes.append(str(error))
                anatomy = Anatomy(**{**vars(anatomy), "no_rescale": str(error)})
                wider = plan
        cured += met(left) if wider != plan else []
        plan = wider
        left = judge(anatomy, plan, weights, seen.forward, seen.backward)
    if not any(h.values for h in seen.backward.values()):
        notes.append("every gradient is zero: these answers say nothing of the backward pass. Try others")
    trial = None
    if not left:
        note(f"one gradient step and one scoring in {plan.name}")
        trial = confirm(model, recipe, plan, rows, totals, before)
    if trial is not None and trial.finite and not trial.passed and plan.head == "model":
        note(f"{trial.failed}; once more with head = fp32")
        drift = drifted(anatomy, trial)
        wider = remedied(plan, [drift])
        again = confirm(model, recipe, wider, rows, totals, before)
        if again.passed:
            cured, plan, trial = [*cured, drift], wider, again
    if trial is not None and trial.doubt > MOST_BENT:
        notes.append(
            f"FP32 itself knows the gradient's norm only to {trial.doubt:.0%}, for large terms cancel in it: it is not "
            "compared with that of the plan"
        )
    verdict = verdict_of(base, plan, cured, left, trial)
    return Audit(
        settings, anatomy, base, plan, weights, before, seen, tuple(first), tuple(left), trial, verdict,
        tuple(notes), totals, responses, tokens,
    )  # fmt: skip


def run(plan: AuditPlan, out: Path | None, console: Console) -> Audit:
    """The command, from the plan to the folder."""
    from tenbit.studies.audit_screen import show

    folder = free_folder(out)
    model, asked, recipe = plan.open()
    prompts = chosen_prompts(recipe, asked)
    note = _noter(console)
    with said_in_options(OPTIONS):
        note(f"sampling {len(prompts)} answers in fp32")
        completions = sample(recipe, model, Precision.parse("fp32"), prompts)
    rows = rows_of(completions, plan.advantage)
    audit = audit_model(model, recipe, rows, plan.totals(rows), note, settings_of(recipe, model, rows, plan))
    beside = of_recipe(recipe, plan.own, plan.target)
    refused = unfollowed(audit.plan, plan.own, model.module)
    audit = replace(audit, notes=(*beside, *audit.notes), unfollowed=tuple(refused))
    make_folder(folder)
    (folder / ".lock").unlink(missing_ok=True)  # an audit is never gone on with
    page = save(audit, folder)
    show(audit, console)
    if plan.target is not None and plan.own is not None:
        _apply(audit, plan.target, plan.own.precision, console)
    console.print(f"\n{page}\n{folder / FILE}", soft_wrap=True)
    return audit


def _apply(audit: Audit, target: Path, before: Precision, console: Console) -> None:
    """Writes the recipe with the plan that was audited, where that is another than the recipe has."""
    kind, model = audit.verdict.kind, audit.settings["model"]
    if kind == "unsafe" or audit.plan == before:
        why = "it needs no remedy" if kind != "unsafe" else "no remedy was found"
        console.print(Text(f"{target}: nothing is written, for {why}"), soft_wrap=True)
        return
    said = [f"{target.name} with the plan of `tenbit audit {model}`", *audit.unfollowed]
    path = write_applied(target, audit.plan, "\n".join(said))
    word = ("written, but its engine does not follow it  ", "bold red") if audit.unfollowed else ("applied  ", "dim")
    console.print(Text.assemble(word, str(path)), soft_wrap=True)


def save(audit: Audit, folder: Path) -> Path:
    """audit.json, and the page that is made from it."""
    tree = clean(audit.as_dict())
    write_atomic(folder / FILE, json.dumps(tree, indent=1, allow_nan=False).encode() + b"\n")
    return write_page(tree, folder)


def settings_of(recipe: Recipe, model: Model, rows: Sequence[Row], plan: AuditPlan) -> dict[str, Any]:
    return {
        "model": recipe.model.path,
        "data": recipe.task.data,
        "answers": {
            "prompts": recipe.rollout.prompts,
            "samples": recipe.rollout.samples,
            "max_tokens": recipe.rollout.max_tokens,
            "temperature": recipe.rollout.temperature,
            "seed": recipe.seed,
            "tokens": sum(r.length for r in rows),
            "longest": max(r.length for r in rows),
        },
        "training": {
            "algorithm": recipe.algorithm.name,
            "advantage": plan.advantage,
            "token_budget": recipe.optim.token_budget,
            "attention": recipe.model.attention,
            "recipe": str(plan.target) if plan.target else None,
        },
        "device": str(model.device),
        "versions": {name: importlib.metadata.version(name) for name in ("tenbit", "torch", "transformers")},
    }


def free_folder(out: Path | None) -> Path:
    """`out`, or runs/audit, runs/audit-2, ...: a new or empty folder. Nothing is made yet."""
    if out is None:
        others = (Path("runs", f"audit-{n}") for n in itertools.count(2))
        out = next(p for p in itertools.chain([Path("runs", "audit")], others) if not p.exists())
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file. Name a folder")
    if holds_something(out):
        raise ValueError(f"--out {out}: the folder is not empty. Name another one")
    return out


def _noter(console: Console) -> Note:
    began = time.perf_counter()

    def note(text: str) -> None:
        console.print(Text.assemble((f"{time.perf_counter() - began:6.1f} s  ", "dim"), text), soft_wrap=True)

    return note


def audit_command(
    model: str,
    options: dict[str, Any],
    precision: str | None,
    apply: Path | None,
    overrides: Sequence[str],
    out: Path | None,
) -> Audit:
    """The command: options -> plan -> folder. Ctrl-C is status 130, for 1 is a verdict."""
    try:
        return run(make_plan(model, options, precision, apply, overrides), out, default_console())
    except KeyboardInterrupt:
        print("tenbit: stopped; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
