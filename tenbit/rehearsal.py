"""`tenbit train RECIPE --dry-run`: what a run would be, with everything checked that can be without weights.

    found = rehearse(recipe, out=None, resume=False)
    show(found, console)

Goes through what `run.open_run` goes through before it trains: the folder, whether it can be written and is free, the
checkpoint that a resumed run goes on from, the model's architecture and tokenizer, data read and tokenised, prompts
against the context, the grader, the precision plan. Bad input raises the same ValueErrors. Weights are not read, so
that of a checkpoint's files only their sizes are held against its index, and nothing is left behind. What only this
machine lacks, such as vLLM or a launcher's other processes, is said and not raised: a recipe is often written elsewhere
than where it runs.

A model of the hub is looked for in the local cache first; then the hub is asked once, where a run would try for a
minute.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tenbit import world
from tenbit.backends.choose import check_backend
from tenbit.checkpoint import HELD, TRAINER, Progress, load_held
from tenbit.console import plan_table
from tenbit.engines import vllm_fit
from tenbit.engines.choose import check_engine
from tenbit.folder import locked
from tenbit.models import loading
from tenbit.models.experts import refuse_replay
from tenbit.models.fit import fit, refuse_own_formats
from tenbit.models.lora import Adapter, described, is_adapter
from tenbit.prompts import Asked, ask, ask_evals
from tenbit.recipe import ModelSpec, Recipe
from tenbit.run import NO_CHECKPOINT, find_folder, find_start, make_grader, refuse_comparison
from tenbit.runlog import read_rows

SHAPES = Path(loading.__file__).parent / "shapes"
SOON = 10.0  # seconds that the hub has to answer


@dataclass(frozen=True)
class Rehearsal:
    """`model` has no weights. `lacking` is what a run would stop at on this machine, as messages with the remedy.
    `start` is where a resumed run would go on, `checkpoint` from which one."""

    recipe: Recipe
    folder: Path
    model: loading.Model
    train: Sequence[Asked]
    evals: Mapping[str, Sequence[Asked]]
    lacking: Sequence[str]
    start: Progress = field(default_factory=Progress)
    checkpoint: Path | None = None
    resume: bool = False


def rehearse(recipe: Recipe, out: Path | None = None, resume: bool = False) -> Rehearsal:
    """Checks a recipe. Raises ValueError with the remedy, as a run would."""
    if recipe.backend.name == "deepspeed":
        recipe.precision.deepspeed()
    refuse_comparison(recipe)
    folder = find_folder(recipe, out, resume)
    if world.is_first():
        try_folder(folder)
    start, found = find_start(recipe, folder, resume)
    if found is not None:
        refuse_damaged(folder, found, recipe)
    model = loading.load_outline(at_hand(recipe), recipe.rollout.stop_tokens, Adapter.of(recipe))
    refuse_for_model(recipe, model)
    train = ask(recipe.task.data, recipe, model, recipe.rollout.max_tokens, recipe.task.limit)
    evals = ask_evals(recipe, model)
    with make_grader(recipe):
        pass
    lacking = []
    for check in (
        lambda: check_weights(recipe.model),
        lambda: check_engine(recipe.rollout),
        lambda: check_backend(recipe.backend, recipe.precision, model.device),
    ):
        try:
            check()
        except ValueError as error:
            lacking.append(str(error))
    return Rehearsal(recipe, folder, model, train, evals, lacking, start, found, resume)


def refuse_for_model(recipe: Recipe, model: loading.Model) -> None:
    """Raises ValueError for what the recipe asks of a model of another kind, as backend and engine would."""
    if recipe.rollout.replay:
        refuse_replay(model.module)
    refuse_own_formats(model.module.config, recipe.precision)
    fit(model.module, recipe.precision)
    if recipe.rollout.kind == "vllm":
        vllm_fit.refuse(recipe.precision, model.module, model.adapter is not None and model.adapter.apart)


def check_weights(spec: ModelSpec) -> None:
    """Raises ValueError for a folder of the user's without weights, which a dry run does not read."""
    folder = Path(spec.path).expanduser()
    if folder.is_dir() and not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        raise ValueError(
            f"model.path = {spec.path!r}: the folder holds a configuration but no weights (*.safetensors); the checks "
            "above needed none. Complete the download"
        )


def try_folder(folder: Path) -> None:
    """Raises ValueError if the folder could not be made or written, or another process has it. What it makes to find
    out is gone when this returns."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".tenbit-", dir=above) as place:
            if not folder.exists():
                (Path(place) / folder.name).mkdir()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written ({error.strerror}). Name another folder") from None
    if (folder / ".lock").is_file():
        with locked(folder):
            pass


def refuse_damaged(folder: Path, found: Path, recipe: Recipe) -> None:
    """Raises ValueError if a resumed run could not read what it goes on from, as far as sizes and the small files tell.

    The index of a checkpoint says where in which file each tensor lies, so that one that was cut short is seen.
    """
    for name in ("metrics", "samples", "alarms"):
        file = folder / f"{name}.jsonl"
        if file.is_file():
            read_rows(file)
    cause = ""
    try:
        ends: dict[str, int] = {}
        for place in FileSystemReader(found / TRAINER).read_metadata().storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in sorted(ends.items()):
            size = (found / TRAINER / name).stat().st_size
            if size < end:
                cause = cause or f"{TRAINER}/{name} has {size:,} bytes of {end:,}"
    except Exception as error:  # a pickle that is damaged raises a dozen kinds
        cause = f"{TRAINER}: {type(error).__name__}: {error}"
    torn = [p.name for p in sorted(found.glob("*.pt")) if not zipfile.is_zipfile(p)]
    if torn or cause:
        raise ValueError(
            f"{found}: cannot be read: {cause or f'{torn[0]} is damaged'}. It is damaged. Without this folder --resume "
            "goes on from the checkpoint before it"
        )
    if recipe.rollout.ahead and (found / HELD).exists():
        load_held(found)


def at_hand(recipe: Recipe) -> ModelSpec:
    """The model as its folder, from the hub's local cache where it is there. Raises ValueError if the hub would have to
    be asked and does not answer."""
    spec = recipe.model
    if Path(loading.model_folder(spec.path)).is_dir():
        return spec
    try:
        cached = Path(snapshot_download(spec.path, local_files_only=True))
    except Exception:  # not there, or no name that the hub could have
        cached = None
    if cached is not None and (cached / "config.json").is_file() and any(cached.glob("tokenizer*")):
        return spec.model_copy(update={"path": str(cached)})
    if why := out_of_reach(spec.path):
        refuse_short_context(recipe)
        raise ValueError(
            f"model.path = {spec.path!r}: there is no such folder here, so it is taken as a name; it is not in the "
            f"local cache, and the hub cannot be reached ({why}). Download the model where there is a network, and "
            "name its folder; its tokenizer and config.json are enough for --dry-run"
        )
    return spec


def out_of_reach(path: str) -> str:
    """Why the hub cannot be asked for a model, found with one try; empty if it can, whatever it answers."""
    try:
        HfApi().model_info(path, timeout=SOON)
    except (HfHubHTTPError, ValueError):
        return ""  # it answered, or the name is none: loading says what is wrong
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""


def known_context(path: str) -> int | None:
    """The context of a model whose configuration comes with tenbit, by the last part of its name."""
    own = loading.BUILTIN / "config.json" if path == "builtin" else SHAPES / f"{Path(path).name}.json"
    if not own.is_file():
        return None
    config: dict[str, Any] = json.loads(own.read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])


def longest_response(recipe: Recipe) -> tuple[str, int]:
    """The key that asks for the longest response, and its tokens."""
    asked = {"rollout.max_tokens": recipe.rollout.max_tokens}
    if recipe.eval.data and recipe.eval.every and recipe.eval.max_tokens:
        asked["eval.max_tokens"] = recipe.eval.max_tokens
    return max(asked.items(), key=lambda item: item[1])


def refuse_short_context(recipe: Recipe) -> None:
    """What can be said of the context without the model's tokenizer."""
    context, (key, tokens) = known_context(recipe.model.path), longest_response(recipe)
    if context is not None and tokens >= context:
        raise ValueError(
            f"{key} = {tokens} leaves no room for a prompt in the context of {recipe.model.path}, {context}. Lower it"
        )


def rows(found: Rehearsal) -> list[tuple[str, str]]:
    """(what, in words), for the screen."""
    recipe, rollout, optim = found.recipe, found.recipe.rollout, found.recipe.optim
    responses = rollout.prompts * rollout.samples
    module = found.model.module
    size = sum(p.numel() for name, p in module.named_parameters() if not is_adapter(name))
    longest = max(len(a.ids) for a in found.train)
    seen = recipe.steps * rollout.prompts / len(found.train)  # groups that are dropped come on top
    passes = "two passes" if recipe.algorithm.build().needs_old else "one pass"
    most = f", up to {responses * rollout.max_rounds:,} where groups are dropped" if recipe.dynamic_sampling else ""
    per_update = -(-rollout.prompts // optim.updates) * rollout.samples
    model = f"{module.config.model_type}, {size:,} parameters, context {found.model.context:,}, {found.model.device}"
    out = [
        ("model", f"{recipe.model.path}: {model}"),
        *([("adapter", described(module, found.recipe.lora))] if found.recipe.lora else []),
        ("problems", f"{len(found.train):,} of {recipe.task.data}, prompts up to {longest:,} tokens"),
        (
            "sampling",
            f"{rollout.engine}; {rollout.prompts:,} × {rollout.samples} = {responses:,} responses a step{most}, of up "
            f"to {rollout.max_tokens:,} tokens",
        ),
        (
            "training",
            f"{recipe.algorithm.name}, {passes}; gradient steps in each step: {optim.updates}, of {per_update:,} "
            f"responses; backend {recipe.backend.name}",
        ),
        (
            "run",
            f"{recipe.steps:,} steps, {recipe.steps * responses:,} responses, {recipe.steps * optim.updates:,} "
            f"gradient steps; each problem {seen:.3g} times",
        ),
    ]
    if found.resume:
        after = f"after step {found.start.step:,}, from {found.checkpoint}" if found.checkpoint else NO_CHECKPOINT
        out.append(("resume", after))
    for name, asked in found.evals.items():
        spec = recipe.eval
        often = recipe.steps // spec.every + 1 + (recipe.steps % spec.every > 0)
        out.append(("evaluation", f"{name}: {len(asked):,} × {spec.samples}, {often} times"))
    return out


def show(found: Rehearsal, console: Console) -> None:
    console.print(
        Text.assemble(
            ("dry run", "bold"), f"  {found.recipe.name}  it would run in {found.folder}; nothing is written"
        ),
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, words in rows(found):
        table.add_row(Text(what), Text(words))
    console.print(table)
    console.print()
    console.print(plan_table(found.recipe.precision, {}))
    for text in found.lacking:
        console.print(Text.assemble(("\non this machine it would stop  ", "bold red"), text), soft_wrap=True)
