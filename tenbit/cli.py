"""The command line: `tenbit train`, `evaluate`, `probe`, `plan`, `report`, `recipes`, `algorithms`, `precisions`.

Bad input ends with one message that names the file, the key and the remedy, and exit status 2; a stopped run that
can go on ends with 130. `TENBIT_TRACEBACK=1` shows where an error came from.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="RL fine-tuning of language models in FP16, where the sampler and the trainer run the same policy.",
)
BAD_INPUT, STOPPED = 2, 130


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/demo.toml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as optim.lr=2e-5")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the run folder; else runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint of the run folder")] = False,
) -> None:
    """Fine-tune a model by reinforcement learning as a recipe says."""
    from tenbit import vigil, world
    from tenbit.loop import Interrupted
    from tenbit.loop import train as run_training
    from tenbit.recipe import Recipe
    from tenbit.report import write_report
    from tenbit.runlog import default_console, show_summary

    with world.joined(), vigil.kept():
        console = default_console() if world.is_first() else Console(quiet=True)
        try:
            folder = run_training(Recipe.load(recipe, overrides or []), out, resume=resume, console=console)
        except Interrupted as stop:
            if world.is_first():
                write_report(stop.folder)
            launcher = ["torchrun", "...", "-m"] if world.size() > 1 else []
            again = [
                *launcher,
                "tenbit",
                "train",
                str(recipe),
                *(overrides or []),
                "--out",
                str(stop.folder),
                "--resume",
            ]
            how = Text(shlex.join(again), style="bold")
            console.print(Text(f"Stopped after step {stop.step}. To go on:"), how, sep="\n  ")
            stopped = True
        except KeyboardInterrupt:
            if vigil.failed_first("stopped at once"):
                print("tenbit: stopped at once; a run goes on from its last checkpoint with --resume", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
        else:
            stopped = False
            if world.is_first():
                write_report(folder)
                show_summary(folder, console)
    if stopped:
        raise typer.Exit(STOPPED)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run folder, finished or not")],
    out: Annotated[Path | None, typer.Option(help="the page; else report.html in the folder")] = None,
) -> None:
    """Draw a run folder as one self-contained HTML page."""
    from tenbit.report import write_report

    print(write_report(run, out))


@app.command()
def recipes(folder: Annotated[Path, typer.Argument(help="where to look")] = Path("recipes")) -> None:
    """List the recipes in a folder."""
    from tenbit.recipe import Recipe

    files = sorted(folder.glob("*.toml"))
    if not files:
        raise ValueError(f"{folder}: no recipes (*.toml) here. Name the folder that holds them: tenbit recipes FOLDER")
    rows = []
    for file in files:
        first = next((line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")), "#")
        recipe = Recipe.load(file)
        rows.append((str(file), recipe.precision.name, recipe.algorithm.name, first.lstrip("# ")))
    _print_table(("recipe", "precision", "algorithm", "what it does"), rows)


@app.command()
def algorithms() -> None:
    """List the algorithms and what each is made of."""
    from tenbit.algorithms import ALGORITHMS

    rows = []
    for name, a in ALGORITHMS.items():
        correction = getattr(a.objective, "correction", None)
        if correction is None:
            weight = "–"
        elif correction.beyond == "keep":
            weight = f"{correction.level}"
        else:
            bounds = f"{correction.floor:g} to {correction.cap:g}" if correction.floor else f"{correction.cap:g}"
            weight = f"{correction.level}, {correction.beyond} at {bounds}"
        passes = "2" if a.needs_old else "1"
        rows.append((name, weight, a.advantage, a.reduction, passes, a.equation))
    heads = ("algorithm", "correction by π/μ", "advantage", "reduction", "passes", "source")
    _print_table(heads, rows)


@app.command()
def precisions() -> None:
    """List the number formats and the presets, and the plan that each preset stands for."""
    from tenbit.precision import Format, Precision
    from tenbit.runlog import plan_table

    rows = [
        (
            f.value,
            f"{f.exponent_bits} / {f.mantissa_bits}",
            f"{f.smallest_normal:.1e}",
            f"{f.smallest_subnormal:.1e}",
            f"{f.largest:.6g}",
            f"1 + 2^-{f.mantissa_bits}",
        )
        for f in Format
    ]
    heads = ("format", "exponent / mantissa bits", "smallest normal", "subnormal", "largest", "next above 1")
    _print_table(heads, rows)
    console = Console(highlight=False)
    console.print("\nA preset is a format, or training/rollout: fp16, bf16, fp32, bf16/fp32, ... The default, fp16:\n")
    console.print(plan_table(Precision.parse("fp16"), {}))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="'builtin', a model folder, or a run folder")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE|KEY=VALUE]...", help="more sets, and a recipe's keys")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="FILE...", help="sets: shipped ones, files")] = None,
    samples: Annotated[int | None, typer.Option(help="K, responses to each problem (default 8)")] = None,
    engine: Annotated[str | None, typer.Option(help="torch (built in), vllm or ray (default torch)")] = None,
    precision: Annotated[str | None, typer.Option(help="a format, or training/rollout (default fp16)")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (default 0.6)")] = None,
    top_p: Annotated[float | None, typer.Option(help="nucleus sampling (default 0.95)")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="token budget, or several: 8192,32768 (default 8192)")] = None,
    template: Annotated[str | None, typer.Option(help="plain, chat, r1-distill, ... or a text (default plain)")] = None,
    grader: Annotated[str | None, typer.Option(help="math, exact, or module:function (default math)")] = None,
    limit: Annotated[int | None, typer.Option(help="only the first so many problems of each set")] = None,
    seed: Annotated[int | None, typer.Option(help="decides every response (default 0)")] = None,
    both: Annotated[bool, typer.Option("--both", help="the training policy too: the deployment gap")] = False,
    texts: Annotated[bool, typer.Option("--texts", help="keep the responses' texts")] = False,
    chunk: Annotated[int | None, typer.Option(help="problems sampled, and written, at a time")] = None,
    out: Annotated[Path | None, typer.Option(help="the folder; else runs/evaluate-NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the evaluation in the folder")] = False,
) -> None:
    """Score a model as it will be deployed: avg@k, pass@k, maj@k with intervals. A run folder brings its settings."""
    from tenbit.studies.evaluation import run
    from tenbit.studies.evaluation_plan import make_plan

    keys = [item for item in more or [] if "=" in item and not Path(item).exists()]
    sets = [*(data or []), *(item for item in more or [] if item not in keys)]
    plan = make_plan(
        model, data=sets, samples=samples, engine=engine, precision=precision, temperature=temperature, top_p=top_p,
        max_tokens=max_tokens, template=template, grader=grader, limit=limit, seed=seed, both=both, texts=texts,
        chunk=chunk, overrides=keys,
    )  # fmt: skip
    try:
        run(plan, out, resume=resume)
    except KeyboardInterrupt:
        print("tenbit: stopped; what is done is saved, and the same command with --resume goes on", file=sys.stderr)
        raise typer.Exit(STOPPED) from None


@app.command()
def probe(
    model: Annotated[str | None, typer.Argument(help="'builtin', a model folder or name, or a run folder")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="a recipe's keys, such as model.pad_token=</s>")
    ] = None,
    rows: Annotated[Path | None, typer.Option("--from", help="log-probabilities that were recorded elsewhere")] = None,
    named: Annotated[str | None, typer.Option("--model", help="with --from: the model that sampled them")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="problems: a shipped set, a file")] = None,
    engine: Annotated[str | None, typer.Option(help="torch (built in), vllm or ray  [torch]")] = None,
    precision: Annotated[
        str | None, typer.Option(help="formats, or training/rollout: fp16,bf16,fp32,bf16/fp16  [fp16,bf16]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="responses to each problem  [4]")] = None,
    prompts: Annotated[int | None, typer.Option(help="problems  [32]")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="the longest response  [1024, or half the context]")] = None,
    temperature: Annotated[float | None, typer.Option(help="of sampling  [1]; of rows that name none")] = None,
    template: Annotated[str | None, typer.Option(help="plain, chat, r1-distill, ... or a text  [plain]")] = None,
    limit: Annotated[int | None, typer.Option(help="only the first so many problems, or rows")] = None,
    seed: Annotated[int | None, typer.Option(help="decides problems, responses and intervals  [0]")] = None,
    attribute: Annotated[bool, typer.Option("--attribute", help="split the gap by cause")] = False,
    out: Annotated[Path | None, typer.Option(help="a new folder; else runs/probe")] = None,
) -> None:
    """Measure how far sampler and trainer are apart on the same weights, in each format."""
    from tenbit.studies.probe_run import probe_command

    options = {
        "data": data, "engine": engine, "samples": samples, "prompts": prompts, "max_tokens": max_tokens,
        "template": template, "precision": precision, "temperature": temperature, "limit": limit, "seed": seed,
    }  # fmt: skip
    try:
        probe_command(model, named, rows, options, overrides or [], out, attribute)
    except KeyboardInterrupt:
        print("tenbit: stopped; what was scored is in probe.jsonl.gz, which --from reads", file=sys.stderr)
        raise typer.Exit(STOPPED) from None


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/dense_14b.toml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as optim.token_budget=8192")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the whole run")] = 1,
    memory: Annotated[float, typer.Option(metavar="GB", help="memory of one GPU")] = 80,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs in one machine")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="the longest prompt")] = 2048,
    json_output: Annotated[bool, typer.Option("--json", help="everything, in bytes, for machines")] = False,
) -> None:
    """Say what fits on given GPUs, item by item, and the command that runs it. Needs no GPU and no weights."""
    import json

    from tenbit.recipe import Recipe
    from tenbit.studies.plan import Machine, as_json, make_plan
    from tenbit.studies.plan_screen import show

    machine = Machine(gpus, memory, gpus_per_node)
    found = make_plan(Recipe.load(recipe, overrides or []), str(recipe), machine, prompt_tokens)
    if json_output:
        print(json.dumps(as_json(found), indent=2))
    else:
        show(found, Console(highlight=False, width=max(100, Console().width)), overrides or [])


def _print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for i, head in enumerate(heads):
        last = i == len(heads) - 1
        table.add_column(head, style="bold" if i == 0 else "", overflow="fold", no_wrap=not last)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False, width=max(100, Console().width)).print(table)


def main() -> None:
    """Entry point: user errors become one message and exit status 2. Of several ranks, the first to fail speaks."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # where DeepSpeed is installed, other libraries import it, and it announces on what
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    from tenbit import vigil, world
    from tenbit.types import EngineFailed, Overflow

    try:
        if world.launched() and int(os.environ["WORLD_SIZE"]) > 1 and not _training():
            raise ValueError("only `tenbit train` runs in several processes. Start this command without torchrun")
        app()
    except ValueError as error:
        if os.environ.get("TENBIT_TRACEBACK"):
            raise
        _say(error)
        sys.exit(BAD_INPUT)
    except (OSError, Overflow, EngineFailed) as error:  # a full disk, a run that diverged, an engine that died
        if os.environ.get("TENBIT_TRACEBACK"):
            raise
        _say(error, "The run ends here; it goes on from its last checkpoint with --resume" if _training() else "")
        sys.exit(1)
    except Exception as error:
        if vigil.alone():
            raise
        vigil.wait_for_cause(error)
        if vigil.failed_first(f"{type(error).__name__}: {error}"):
            raise
        sys.exit(1)


def _training() -> bool:
    return sys.argv[1:2] == ["train"]


def _say(error: Exception, more: str = "") -> None:
    from tenbit import vigil, world

    if vigil.failed_first(str(error)):
        where = "" if vigil.alone() or isinstance(error, ValueError) else f"rank {world.rank()}: "
        print(f"tenbit: {where}{error}", *([f"tenbit: {more}"] if more else []), sep="\n", file=sys.stderr, flush=True)
