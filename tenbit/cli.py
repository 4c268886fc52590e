"""The command line: `tenbit train`, `evaluate`, `probe`, `plan`, `report`, `watch`, ...; `tenbit --help` lists them.

Bad input ends with one message that names the file, the key and the remedy, and exit status 2; a stopped run that
can go on ends with 130, one that an alarm of `watch.act = "stop"` ended with 3. Status 1 of `audit` is a verdict; what
fails there has 4. `TENBIT_TRACEBACK=1` shows where an error came from.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from tenbit import listings

if TYPE_CHECKING:
    from tenbit.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="RL fine-tuning of language models in FP16, where the sampler and the trainer run the same policy.",
)
BAD_INPUT, HALTED, STOPPED = 2, 3, 130


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/demo.toml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as optim.lr=2e-5")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the run folder; else runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint of the run folder")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check it, say what would run, write nothing")] = False,
) -> None:
    """Fine-tune a model by reinforcement learning as a recipe says."""
    from tenbit import vigil, world
    from tenbit.loop import Halted, Interrupted
    from tenbit.loop import train as run_training
    from tenbit.recipe import Recipe
    from tenbit.report import write_report
    from tenbit.runlog import default_console, show_summary

    if dry_run:
        _rehearse(Recipe.load(recipe, overrides or []), out, resume)
        return
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
            why = f" by an alarm ({stop.why})" if stop.why else ""
            console.print(Text(f"Stopped after step {stop.step}{why}. To go on:"), how, sep="\n  ", soft_wrap=True)
            status = STOPPED
        except Halted as end:
            if world.is_first():
                write_report(end.folder)
                show_summary(end.folder, console)
            ended = Text(f"Ended for good after step {end.step} by an alarm: {end.why}", style="bold red")
            console.print(ended, soft_wrap=True)
            status = HALTED
        except KeyboardInterrupt:
            if vigil.failed_first("stopped at once"):
                print("tenbit: stopped at once; a run goes on from its last checkpoint with --resume", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
        else:
            status = 0
            if world.is_first():
                write_report(folder)
                show_summary(folder, console)
    if status:
        raise typer.Exit(status)


def _rehearse(recipe: Recipe, out: Path | None, resume: bool) -> None:
    from tenbit import world
    from tenbit.console import default_console
    from tenbit.rehearsal import rehearse, show

    with world.joined():
        found = world.together(lambda: rehearse(recipe, out, resume))
        if world.is_first():
            show(found, default_console())


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, or folders that hold some")],
    out: Annotated[Path | None, typer.Option(help="the page; else report.html in the one folder")] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="of several runs, every plot also as a PNG")] = True,
) -> None:
    """Draw runs, finished or not, as one self-contained HTML page: one run in full, several side by side."""
    from tenbit.report import report as draw

    print(draw(runs, out, png=png))


@app.command()
def watch(
    runs: Annotated[list[str], typer.Argument(metavar="RUN... [KEY=VALUE]...", help="runs, or folders of some")],
    json_output: Annotated[bool, typer.Option("--json", help="for machines, one run a line")] = False,
) -> None:
    """Judge runs of the past by the rules of early warning: alarms, and how long before a collapse they came."""
    from tenbit.studies.watching import watch_command

    watch_command(runs, json_output)


for listing in (listings.recipes, listings.algorithms, listings.precisions):
    app.command()(listing)


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
def perfectible(
    model: Annotated[str, typer.Argument(help="'builtin', a model folder or name, or a run folder")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="a recipe's keys, such as rollout.max_batch=64")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="problems: a shipped set, a file")] = None,
    samples: Annotated[int, typer.Option(help="responses to each problem, at most")] = 40,
    low: Annotated[float, typer.Option(help="the lowest share of right responses that is kept")] = 0.2,
    high: Annotated[float, typer.Option(help="the highest")] = 0.8,
    engine: Annotated[str | None, typer.Option(help="torch (built in), vllm or ray  [torch]")] = None,
    precision: Annotated[str | None, typer.Option(help="a format, or training/rollout  [fp16]")] = None,
    temperature: Annotated[float, typer.Option(help="of sampling")] = 1.0,
    top_p: Annotated[float, typer.Option(help="nucleus sampling")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="the longest response  [8192, or what fits]")] = None,
    template: Annotated[str | None, typer.Option(help="plain, chat, r1-distill, ... or a text  [plain]")] = None,
    grader: Annotated[str | None, typer.Option(help="math, exact, or module:function  [math]")] = None,
    limit: Annotated[int | None, typer.Option(help="only the first so many problems")] = None,
    seed: Annotated[int | None, typer.Option(help="decides every response  [0]")] = None,
    full: Annotated[bool, typer.Option("--full", help="sample all, also where the verdict is settled")] = False,
    round: Annotated[int, typer.Option(help="responses to a problem sampled at a time, at least")] = 4,
    chunk: Annotated[int | None, typer.Option(help="problems sampled, and written, at a time")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="the kept problems, .jsonl")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is beside FILE")] = False,
) -> None:
    """Keep the problems that a model solves sometimes: neither too easy nor unsolvable."""
    from tenbit.studies.perfectible import run
    from tenbit.studies.perfectible_plan import make_plan

    plan = make_plan(
        model, data=data, samples=samples, low=low, high=high, engine=engine, precision=precision,
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, template=template, grader=grader, limit=limit,
        seed=seed, full=full, round=round, chunk=chunk, overrides=overrides or [],
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
def audit(
    model: Annotated[str, typer.Argument(help="'builtin', a model folder or name, or a run folder")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="a recipe's keys, such as precision.head=fp32")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="problems: a shipped set, a file")] = None,
    precision: Annotated[str | None, typer.Option(help="what is judged  [fp16, or the recipe's]")] = None,
    prompts: Annotated[int | None, typer.Option(help="problems  [32]")] = None,
    samples: Annotated[int | None, typer.Option(help="answers to each problem  [2]")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="the longest answer  [256]")] = None,
    template: Annotated[str | None, typer.Option(help="plain, chat, r1-distill, ... or a text  [plain]")] = None,
    seed: Annotated[int | None, typer.Option(help="decides problems and answers  [0]")] = None,
    apply: Annotated[Path | None, typer.Option(metavar="RECIPE", help="write it with the remedies")] = None,
    out: Annotated[Path | None, typer.Option(help="a new folder; else runs/audit")] = None,
) -> None:
    """Is this model safe in FP16? Weights, activations, gradients; names modules and remedies. Status 1 if unsafe."""
    from tenbit.studies.audit import audit_command

    options = {"data": data, "prompts": prompts, "samples": samples, "max_tokens": max_tokens} | {"template": template}
    if audit_command(model, {**options, "seed": seed}, precision, apply, overrides or [], out).verdict.kind == "unsafe":
        raise typer.Exit(1)


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


@app.command()
def ablate(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/cpu/sanity.toml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="of every cell, such as steps=100")
    ] = None,
    precision: Annotated[str, typer.Option(help="formats, or training/rollout: fp16,bf16,bf16/fp32")] = "",
    algorithm: Annotated[str, typer.Option(help="as in `tenbit algorithms`: pg-is,grpo")] = "",
    seeds: Annotated[str, typer.Option(help="how many, 3, or which, 0,5,7")] = "3",
    jobs: Annotated[
        int | None, typer.Option(help="runs at a time; else one a GPU, or as many as there is room")
    ] = None,
    ranks: Annotated[
        int, typer.Option(help="processes of one run, under torchrun; each a GPU where there are some")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="the folder; else runs/ablation-NAME")] = None,
) -> None:
    """Run a recipe as a grid of precisions, algorithms and seeds. The same command again goes on where it stopped."""
    from tenbit.studies.ablation import ablate_command

    try:
        finished = ablate_command(recipe, overrides or [], precision, algorithm, seeds, jobs, ranks, out)
    except KeyboardInterrupt:
        print("tenbit: stopped; every run is saved, and the same command goes on", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    if not finished:
        raise typer.Exit(1)


@app.command()
def sanity(
    recipe: Annotated[Path, typer.Argument(help="a recipe, or the folder of a run to judge")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as precision=bf16")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the run folder; else runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint of the run folder")] = False,
) -> None:
    """The paper's sanity test: train on a perfectible set; passed if training accuracy converges above 95%."""
    from tenbit.loop import Interrupted
    from tenbit.studies.sanity import sanity_command

    try:
        outcome = sanity_command(recipe, overrides or [], out, resume)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"tenbit: {stop or 'stopped'}; the same command with --resume goes on", file=sys.stderr)
        raise typer.Exit(STOPPED) from None
    if outcome.kind != "passed":
        raise typer.Exit(1)


def main() -> None:
    """Entry point: user errors become one message and exit status 2. Of several ranks, the first to fail speaks."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # where DeepSpeed is installed, other libraries import it, and it announces on what
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator" not in record.getMessage())
    from tenbit import vigil, world
    from tenbit.blame import NOT_OURS, was_raised_by_tenbit
    from tenbit.types import EngineFailed, Overflow

    try:
        if world.launched() and int(os.environ["WORLD_SIZE"]) > 1 and not _training():
            raise ValueError("only `tenbit train` runs in several processes. Start this command without torchrun")
        app()
    except ValueError as error:
        if os.environ.get("TENBIT_TRACEBACK"):
            raise
        _say(error, "" if was_raised_by_tenbit(error) else NOT_OURS)
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
