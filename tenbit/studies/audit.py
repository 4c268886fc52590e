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
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tenbit.batching import Row
from tenbit.console import default_console
from tenbit.folder import make_folder
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.report.audit import write_page
from tenbit.runlog import write_atomic
from tenbit.scoring import sample
from tenbit.studies.audit_anatomy import Anatomy, anatomy_of, is_wide
from tenbit.studies.audit_backward import Histogram, Window, strict_scale
from tenbit.studies.audit_cure import cure, settled, steadied
from tenbit.studies.audit_forward import Place
from tenbit.studies.audit_notes import cut_short, few, instead, narrow, of_recipe, unfollowed
from tenbit.studies.audit_plan import AuditPlan, make_plan, write_applied
from tenbit.studies.audit_run import Seen, Trial, most_bent, rows_of, watch
from tenbit.studies.audit_verdict import (
    AS_SEEN,
    HEADROOM,
    Finding,
    Stretch,
    Verdict,
    judge,
    loss_share,
    narrowest,
    verdict_of,
    window_of,
)
from tenbit.studies.audit_weights import Weight, measure_weights
from tenbit.studies.folders import Note, free_folder, noter
from tenbit.studies.options import said_in_options
from tenbit.studies.probe import chosen_prompts, clean
from tenbit.studies.probe_plan import OPTIONS
from tenbit.types import EngineFailed, Overflow, Totals

SCHEMA = "tenbit.audit/1"
FILE = "audit.json"
FAILED = 4  # the status of an audit that broke off, which says nothing of the model


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
    stretch: Stretch = AS_SEEN  # for answers that are longer than those that were seen

    @property
    def window(self) -> Window:
        return window_of(self.anatomy, self.plan, self.seen.backward, self.stretch)

    @property
    def window_before(self) -> Window:
        return window_of(self.anatomy, self.base, self.before.backward, self.stretch)

    @property
    def instead(self) -> tuple[str, ...]:
        """What to train an unsafe model in."""
        return instead(self.base, rounding=self.trial is not None and self.trial.finite)

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
            "stretch": vars(self.stretch),
            "instead": list(self.instead),
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
    model: Model, recipe: Recipe, rows: Sequence[Row], totals: Totals, note: Note, settings: dict[str, Any],
    stretch: Stretch = AS_SEEN,
) -> Audit:  # fmt: skip
    """Measures, judges, looks again with the remedies, and tries the plan. `recipe.precision` is what is judged.

    Raises ValueError where there is nothing to judge: every gradient is zero.
    """
    base, anatomy = recipe.precision, anatomy_of(model.module)
    formats = dict.fromkeys(f for f in (base.copy_format, base.compute, base.rollout) if f != base.master)
    cast = [w for f in formats for w in measure_weights(model.module.named_parameters(), f)]
    note(f"going through {sum(r.length for r in rows):,} tokens in {base.master.value}, forward and backward")
    before = watch(model, recipe, base, rows, totals)
    weights, unhurt = settled(model, recipe, rows, cast, before)
    first = judge(anatomy, base, weights, before.forward, before.backward, stretch)
    found = cure(model, recipe, rows, totals, anatomy, weights, before, stretch, note)
    if not found.left:
        refuse_no_gradients(before.backward)
        found = steadied(model, recipe, rows, totals, found, before, note)
    responses, tokens = len(rows), sum(r.rollout.completion.length for r in rows)
    trial, plan = found.trial, found.plan
    notes = [*few(responses, tokens), *unhurt, *found.notes]
    if plan.loss_scale is not None and not found.left:
        notes += narrow(window_of(found.anatomy, plan, found.seen.backward, stretch))
    if trial is not None and trial.doubt > most_bent(plan.compute.epsilon):
        notes.append(
            f"FP32 itself knows the gradient's norm only to {trial.doubt:.0%}, for large terms cancel in it: it is not "
            "compared with that of the plan"
        )
    verdict = verdict_of(base, plan, found.cured, found.left, trial)
    return Audit(
        settings, found.anatomy, base, plan, tuple(weights), before, found.seen, tuple(first), found.left, trial,
        verdict, tuple(notes), totals, responses, tokens, stretch=stretch,
    )  # fmt: skip


def refuse_no_gradients(backward: Mapping[Place, Histogram]) -> None:
    if not any(h.values for h in backward.values()):
        raise ValueError(
            "every gradient is zero, so nothing was judged of the backward pass: the model is certain of every token "
            "of these answers, or the loss does not move. Raise --prompts, --samples or rollout.temperature"
        )


def run(plan: AuditPlan, out: Path | None = None, console: Console | None = None) -> Audit:
    """The command, from the plan to the folder; on the screen, if no console is given."""
    from tenbit.studies.audit_screen import show

    folder = free_folder(out, "audit")
    model, asked, recipe = plan.open()
    prompts = chosen_prompts(recipe, asked)
    console = console or default_console()
    note = noter(console)
    with said_in_options(OPTIONS):
        note(f"sampling {len(prompts)} answers in fp32, asked with template {recipe.task.template!r}")
        completions = sample(recipe, model, Precision.parse("fp32"), prompts)
    rows = rows_of(completions, plan.advantage)
    stretch, settings = plan.stretch(rows), settings_of(recipe, model, rows, plan)
    audit = audit_model(model, recipe, rows, plan.totals(rows), note, settings, stretch)
    beside = [*of_recipe(recipe, plan.own, plan.target), *plan.probe.notes]
    beside += cut_short(plan.cut_off(rows), len(rows), recipe, plan.own, stretch)
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
            "template": recipe.task.template,
            "stop_tokens": list(recipe.rollout.stop_tokens),
            "cut_off": sum(r.rollout.completion.finish == "length" for r in rows),
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


def audit_command(
    model: str,
    options: dict[str, Any],
    precision: str | None,
    apply: Path | None,
    overrides: Sequence[str],
    out: Path | None,
) -> Audit:
    """The command: options -> plan -> folder. 1 is a verdict, so Ctrl-C is status 130 and what failed is `FAILED`."""
    try:
        return run(make_plan(model, options, precision, apply, overrides), out)
    except KeyboardInterrupt:
        print("tenbit: stopped; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    except ValueError:  # bad input, which the command line says and ends with 2
        raise
    except Exception as error:
        if isinstance(error, OSError | Overflow | EngineFailed) and not os.environ.get("TENBIT_TRACEBACK"):
            print(f"tenbit: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        raise SystemExit(FAILED) from None
