"""Remedies, tried out: from measurements to a plan that fits, or to what no key of the plan takes away.

    weights = settled(model, recipe, rows, weights, seen)      which lossy tensors change what the model computes
    cured = cure(model, recipe, rows, totals, ...)             remedies one after another, looked at again after each
    steady = steadied(model, recipe, rows, totals, cured, ...) the plan is run; keys against rounding that is too large

Nothing here decides what fits: that is `audit_verdict.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tenbit.batching import Row
from tenbit.models.experts import is_mixture
from tenbit.models.loading import Model
from tenbit.precision import Format, Precision
from tenbit.recipe import Recipe
from tenbit.studies.audit_anatomy import Anatomy
from tenbit.studies.audit_passes import copied, kl, logps_of
from tenbit.studies.audit_run import Seen, Trial, confirm, most_drift, scored, watch
from tenbit.studies.audit_verdict import Finding, Stretch, changes, drifted, judge, met, remedied, steadier, toml_lines
from tenbit.studies.audit_weights import Weight
from tenbit.studies.folders import Note
from tenbit.types import Totals

ROUNDS = 8  # of remedies: each makes the plan wider, and the last one left is none
ALONE = 16  # lossy tensors that are looked at one by one; of more of them that matter together, all are named
WORTH = 10.0  # times smaller: a key that makes a mismatch so much smaller is told of where nothing is wrong, too


@dataclass(frozen=True)
class Cured:
    """The plan with its remedies: what they took away (`cured`), what none did (`left`), what was seen with them."""

    anatomy: Anatomy
    plan: Precision
    seen: Seen
    cured: tuple[Finding, ...]
    left: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    trial: Trial | None = None


def settled(
    model: Model, recipe: Recipe, rows: Sequence[Row], weights: Sequence[Weight], seen: Seen
) -> tuple[list[Weight], list[str]]:
    """The weights, lossy ones `harmless` where the FP32 model computes the same with them as they were cast; notes.

    A bias of 1e-6 loses most of itself in FP16, and nothing depends on it.
    """
    done, notes = list(weights), []
    for name in dict.fromkeys(w.format for w in weights):
        format = Format(name)
        lossy = [w.name for w in weights if w.format == name and w.lossy and w.fits]
        most = most_drift(format.epsilon, is_mixture(model.module.config))
        together = _effect(model, recipe, rows, lossy, format, seen) if lossy else 0.0
        matter = set[str]()
        if not together <= most:
            if len(lossy) <= ALONE:
                matter = {n for n in lossy if not _effect(model, recipe, rows, [n], format, seen) <= most}
            matter = matter or set(lossy)
        harmless = [n for n in lossy if n not in matter]
        done = [replace(w, harmless=True) if w.format == name and w.name in harmless else w for w in done]
        if harmless:
            shown = ", ".join(harmless[:4]) + (f" and {len(harmless) - 4} more" if len(harmless) > 4 else "")
            so = f"KL {together:.1g} per token with them cast" if not matter else "next to what the others change"
            notes.append(f"the cast to {name} loses much of {shown}, and nothing depends on it: {so}")
    return done, notes


@torch.no_grad()
def _effect(
    model: Model, recipe: Recipe, rows: Sequence[Row], names: Sequence[str], format: Format, seen: Seen
) -> float:
    """KL per token of the FP32 model with these tensors rounded, from the model itself."""
    module = copied(model)
    held = dict(module.named_parameters())
    for name in names:
        held[name].copy_(held[name].to(format.dtype))
    return kl(logps_of(module, model, recipe, rows), seen.logps)


def cure(
    model: Model, recipe: Recipe, rows: Sequence[Row], totals: Totals, anatomy: Anatomy, weights: Sequence[Weight],
    before: Seen, stretch: Stretch, note: Note,
) -> Cured:  # fmt: skip
    """Remedies for what does not fit, in turn; after each the model is looked at again."""
    plan, seen, notes, cured = recipe.precision, before, [], list[Finding]()
    left = judge(anatomy, plan, weights, seen.forward, seen.backward, stretch)
    for _ in range(ROUNDS):
        wider = remedied(plan, met(left))
        if wider == plan:
            break
        note(f"looking again with {said(plan, wider)}")
        if wider.residual_scale != plan.residual_scale:
            try:
                seen = watch(model, recipe, wider, rows, totals)
            except ValueError as error:  # a family whose stream cannot be rescaled
                notes.append(str(error))
                anatomy = replace(anatomy, no_rescale=str(error))
                wider = plan
        cured += met(left) if wider != plan else []
        plan = wider
        left = judge(anatomy, plan, weights, seen.forward, seen.backward, stretch)
    return Cured(anatomy, plan, seen, tuple(cured), tuple(left), tuple(notes))


def steadied(
    model: Model, recipe: Recipe, rows: Sequence[Row], totals: Totals, found: Cured, before: Seen, note: Note
) -> Cured:
    """The plan is run. Where all is finite and further off than rounding explains, keys are tried: each, then all."""

    def run(plan: Precision) -> Trial:
        return confirm(model, recipe, plan, rows, totals, before)

    plan = found.plan
    note(f"one gradient step and one scoring in {plan.name}")
    trial = run(plan)
    if not trial.finite:
        return replace(found, trial=trial)
    if trial.steady:
        hint = _worth(model, recipe, rows, found, trial, before)
        return replace(found, trial=trial, notes=(*found.notes, *hint))
    keys = [drifted(where, remedy, trial) for where, remedy in steadier(found.anatomy, plan, before.forward)]
    tried: list[tuple[list[Finding], Precision, Trial]] = []
    for findings in [*([f] for f in keys), *([keys] if len(keys) > 1 else [])]:
        wider = remedied(plan, findings)
        note(f"{trial.failed or trial.rough}; once more with {said(plan, wider)}")
        tried.append((findings, wider, run(wider)))
        if tried[-1][2].steady:
            break
    better = [t for t in tried if t[2].steady] or [t for t in tried if t[2].passed and trial.failed]
    if better:
        findings, plan, trial = better[0]
        found = replace(found, plan=plan, cured=(*found.cured, *findings))
    notes = list(found.notes)
    if trial.rough:
        tells = "; ".join(_tried(findings) for findings, wider, _ in tried if wider != plan) or "nothing to try"
        notes.append(f"{trial.rough}, and no key of [precision] brings it within that ({tells}). Watch the mismatch")
    return replace(found, trial=trial, notes=tuple(notes))


def _worth(model: Model, recipe: Recipe, rows: Sequence[Row], found: Cured, trial: Trial, before: Seen) -> list[str]:
    """A note where rounding is as large as a format may have it, and a cheap key makes it much smaller."""
    plan = found.plan
    if trial.drift <= plan.compute.epsilon**2:  # as small as rounding ever is
        return []
    for where, remedy in steadier(found.anatomy, plan, before.forward):
        if remedy.key == "fp32":
            continue
        off, apart = scored(model, recipe, remedied(plan, [drifted(where, remedy, trial)]), rows, before)
        if max(off, apart) * WORTH <= trial.drift:
            return [
                f"precision.{remedy.toml} would make the mismatch smaller: KL per token from FP32 {trial.trainer:.1e} "
                f"-> {off:.1e}, between training and sampling {trial.engine:.1e} -> {apart:.1e}. It is within what "
                f"{plan.compute.value}'s rounding explains, so the verdict does not ask for it"
            ]
    return []


def said(before: Precision, after: Precision) -> str:
    return ", ".join(toml_lines(changes(before, after)))


def _tried(findings: Sequence[Finding]) -> str:
    """Keys in few words: of lists of modules the first."""
    words = []
    for r in (f.remedy for f in findings if f.remedy is not None):
        more = f" and {len(r.value) - 1} more" if r.key == "fp32" and len(r.value) > 1 else ""
        words.append(f"{r.key} = {r.value[0]}{more}" if r.key == "fp32" else r.toml)
    return " with ".join(words)
