"""Why mu and pi are apart: the gap split by switching one cause at a time and scoring the same tokens again.

    found = attribute(recipe, model, precision, scored)
    show(found, console)              a table: cause, KL before and after the switch, share, remedy

**What is asked.** For small gaps k3 is l^2 / 2, and rounding errors of independent sources add in variance, so the
KLs of independent causes add. A cause's share is therefore what its removal takes off, in units of the whole gap,

    share = (KL before - KL after) / KL of the samples as they came

with a bootstrap over sequences that resamples all three alike. It can be negative: the switch made it larger.

**Two kinds of causes**, treated differently, because one must not hide the other.

1. *The record is not what it is taken for*: other token ids were scored (retokenisation), another trainer, another
   sampling transform (temperature, top-p), other weights. These are settled first, in this order and each on the
   recorded tokens, and each that is found to hold becomes the starting point of the next. Without that, a stale engine
   would be blamed on decoding: scoring the tokens again, by whatever path, removes everything that was wrong with
   the record.
2. *Numerics*: dtype, decode against prefill, batch composition, kernels, the head's format. How a trainer rounds is
   measured on the recorded tokens. How an engine rounds *while it decodes* cannot be asked about given tokens, as
   prefill is another computation (on the built-in model in BF16 prefill agrees with the trainer 100 times better than
   decode does, so whatever is measured by prefill is not about the gap that is trained on). So the engine draws a
   *control*: fresh responses to the same prompts. The same seeds drawn by a changed engine give the same tokens until a
   rounding error pushes a random number over a boundary, and up to there the two runs decoded the same tokens with one
   cause switched.

The control is also the test for stale weights: a fresh engine, with the weights just loaded, shows how far a genuine
record is from the trainer. A record twice as far, also beside a second control, is not this engine's at these weights
(`attribution_record` has the rule and its rate of false alarms); if an engine in another
16-bit format draws one that is as far, the format is named instead. Staleness below the rounding noise stays unseen.

**Shares need not add up to 1.** Rounding needs a short format *and* two computations that differ; take away either and
the gap is gone, so dtype and kernels may carry 100% each. A switch of kernels in a 16-bit format only draws other
rounding errors; `moved` (the KL between before and after on the switched side alone) says whether it matters at all.
So dtype is shown apart, as the bound of what all rounding does, and causes are ranked at the dtype as it is.
`residual` is what is left there without decoding and without batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.report.words import scientific
from tenbit.scoring import Scored
from tenbit.studies import attribution_numerics as numerics
from tenbit.studies import attribution_record as record
from tenbit.studies import attribution_transform as transforms
from tenbit.studies.attribution_bench import Bench, Bootstrap, Control, Gap, gap
from tenbit.studies.attribution_cause import Case, Cause, part

CONTROL = 32  # responses drawn anew
CARRIES = 0.2  # a share that the verdict names
ENOUGH = 0.9  # a share that is as good as all
BOUND = "dtype"  # the row that is no cause among others


@dataclass(frozen=True)
class Attribution:
    """`total` is KL(mu || pi) by k3 per token of the samples as they came, `residual` what is left of the gap at the
    same dtype, prefilled and one response at a time, in the same unit. `rows` are sorted by share, then dtype, the
    bound of all rounding; those not measured come last."""

    total: float
    interval: tuple[float, float]
    residual: float | None
    rows: tuple[Cause, ...]
    sequences: int
    tokens: int
    precision: str
    engine: str
    left_out: int = 0

    def __getitem__(self, name: str) -> Cause:
        return _named(self.rows, name)

    @property
    def verdict(self) -> str:
        return _verdict(self)

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "verdict": self.verdict}


def attribute(
    recipe: Recipe,
    model: Model,
    precision: Precision,
    scored: Sequence[Scored],
    *,
    older: Model | None = None,
    note: Callable[[str], None] = lambda s: None,
) -> Attribution:
    """Splits the gap of the given samples. `model` holds FP32 weights and is not changed; nor is `older`, an earlier
    checkpoint to test the record against. `note` is told what is being done.

    Raises ValueError without a sample that can be used, and Overflow if the model does not fit the precision.
    """
    usable = [s for s in scored if s.length and _finite(s)]
    if not usable:
        raise ValueError("attribution needs at least one response with finite log-probabilities on both sides")
    bench = Bench(recipe, model, precision, recipe.sampling(model.stop_token_ids))
    case, rows = _settle_record(bench, usable, older, note)
    total = case.total
    note("drawing a control")
    with case.bench.engine() as engine:
        control = Control.draw(case.bench, engine, case.sequences, min(CONTROL, len(usable)))
        stale, genuine = record.staleness(case, control, engine, transforms.tried(_named(rows, transforms.NAME)))
        at = numerics.Numerics(case, control, genuine, trusted=stale.share is None)
        note("decode against prefill")
        rows.append(numerics.decoding(at, engine))
        note("batch composition")
        rows.append(numerics.batching(at, engine))
        residual = numerics.left_over(at, engine)
    rows += _of_another_engine(stale, case, control, genuine, rows, note)
    note("dtype")
    rows.append(numerics.dtype(at))
    note("attention kernel")
    rows.append(numerics.attention(at))
    if not _has(rows, "FP32 head"):
        note("FP32 head")
        rows.append(numerics.head(at))
    note("compiled kernels")
    compiled = numerics.kernels(at)
    rows += [compiled] if compiled is not None else []
    rows.sort(key=lambda row: (row.share is None, row.name == BOUND, -(row.share or 0.0)))
    return Attribution(
        total=total.value,
        interval=total.interval,
        residual=residual,
        rows=tuple(rows),
        sequences=len(usable),
        tokens=sum(s.length for s in usable),
        precision=precision.name,
        engine=recipe.rollout.engine,
        left_out=len(scored) - len(usable),
    )


def _named(rows: Sequence[Cause], name: str) -> Cause:
    return next(row for row in rows if row.name == name)


def _has(rows: Sequence[Cause], name: str) -> bool:
    return any(row.name == name for row in rows)


def _of_another_engine(
    stale: Cause, case: Case, control: Control, genuine: Gap, rows: Sequence[Cause], note: Callable[[str], None]
) -> list[Cause]:
    """The row on stale weights; and where another format accounts for the same excess, that row in its place."""
    if _has(rows, stale.name):
        return []  # an older checkpoint has explained it
    if stale.share is None:
        return [stale]
    note("rollout format")
    form = record.other_format(case, control, genuine)
    if form is None:
        return [stale]
    return [form, replace(stale, share=None, interval=None, note=f"no sign of it beyond the format: {form.note}")]


def _finite(s: Scored) -> bool:
    return bool(s.logp_rollout.isfinite().all()) and bool(s.logp_train.isfinite().all())


def _settle_record(
    bench: Bench, scored: Sequence[Scored], older: Model | None, note: Callable[[str], None]
) -> tuple[Case, list[Cause]]:
    """What the record is, before numerics are looked at: the case to go on with, and the causes on the way."""
    sequences = [(s.prompt_ids, s.response_ids) for s in scored]
    recorded, given = [s.logp_rollout for s in scored], [s.logp_train for s in scored]
    bootstrap = Bootstrap.of(len(scored), "record")
    case = Case(bench, sequences, recorded, given, bootstrap, gap(recorded, given, bootstrap))
    note("retokenisation")
    here: list[Tensor] = bench.trainer(sequences)
    rows: list[Cause] = []
    cause, case = record.retokenisation(case, here)
    rows.append(cause)
    other, case = record.other_trainer(case, here)
    note("sampling transform")
    cause, case = transforms.transform(case)
    rows = _not_theirs(rows, other, cause, case) if other is not None else [*rows, cause]
    stale, case = record.older_weights(case, older)
    rows += [stale] if stale is not None else []
    wide, case = record.wide_head(case)
    rows += [wide] if wide is not None else []
    return case, rows


def _not_theirs(rows: list[Cause], other: Cause, cause: Cause, case: Case) -> list[Cause]:
    """The rows with another trainer and the transform; unless our trainer is off only by the recipe's transform.

    Numbers that came from both sides at temperature 0.6 agree; if the recipe says 1, it is the recipe that is wrong
    about both, which makes no gap between them.
    """
    if other.share is None or other.share >= 0 or cause.share is None:
        return [*rows, other, cause]
    now = case.against(case.trained)
    note = f"not a cause: {cause.note}, and so do the trainer's that came with them; tell the probe how they were drawn"
    total, share = case.total, part(case.total, now, case.total)
    what = f"{other.what}, at the transform of the samples"
    settled = replace(
        other, what=what, kl_before=total.value, kl_after=now.value, share=share.value, interval=share.interval
    )
    return [*rows, settled, replace(cause, share=None, interval=None, note=note)]


# --- in words


def _verdict(found: Attribution) -> str:
    """A few sentences: what carries the gap at the dtype as it is, what to do about it, and what the dtype bounds."""
    if found.total == 0:
        return "The two sides agree exactly: there is no gap to split."
    text = f"KL(μ‖π) is {scientific(found.total)} per token. "
    carriers = [row for row in found.rows if _carries(row) and row.name != BOUND]
    if not carriers:
        text += f"At this dtype no single switch takes off {CARRIES:.0%} of it."
    else:
        parts = ", ".join(f"{row.name} {_share(row.share)}" for row in carriers)
        text += f"At this dtype a switch takes off: {parts}. First: {carriers[0].remedy}."
    if sum(row.share or 0.0 for row in carriers) > 1 + CARRIES:
        text += " The shares overlap and do not add up."
        if sum((row.share or 0.0) >= ENOUGH for row in carriers) > 1:
            text += " Either of the largest is enough to close nearly all of it."
    bound = [row for row in found.rows if row.name == BOUND and _carries(row)]
    if bound:
        text += (
            f" Rounding as a whole ({found.precision} against FP32 on both sides, an upper bound for every cause in "
        )
        text += f"the arithmetic): dtype {_share(bound[0].share)}; remedy: {bound[0].remedy}."
    return text


def _carries(row: Cause) -> bool:
    return row.share is not None and row.share >= CARRIES and row.interval is not None and row.interval[0] > 0


def show(found: Attribution, console: Console) -> None:
    """A table with a line for each cause; below it, for what carries the gap, what was switched and the remedy."""
    title = f"KL(μ‖π) by cause, k3 per token: {found.precision}, {found.engine} engine"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("cause", no_wrap=True)
    for head in ("before", "after", "share", "95%"):
        table.add_column(head, justify="right", no_wrap=True)
    low, high = found.interval
    table.add_row("all of it", scientific(found.total), "", "", f"{scientific(low)} .. {scientific(high)}")
    for row in found.rows:
        label = f"{row.name} (a bound)" if row.name == BOUND else row.name
        table.add_row(label, _number(row.kl_before), _number(row.kl_after), _share(row.share), _range(row.interval))
    if found.residual is not None:
        share = found.residual / found.total if found.total else 0.0
        table.add_row("left, one by one and prefilled", "", scientific(found.residual), _share(share), "")
    console.print(table)
    print_ = partial(console.print, markup=False, highlight=False)
    print_(f"{found.sequences} responses, {found.tokens} tokens.")
    for row in found.rows:
        if _carries(row):
            print_(f"{row.name}: {row.what}.{f' {_capital(row.note)}.' if row.note else ''} Remedy: {row.remedy}.")
    print_(found.verdict)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: float | None) -> str:
    return "–" if value is None else scientific(value)


def _share(value: float | None) -> str:
    """In per cent; a switch that made the gap many times larger is not counted out."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.0%}" if value >= -1 else "below -100%"


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{_share(interval[0])} .. {_share(interval[1])}"
