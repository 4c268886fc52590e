"""`tenbit plan` on the screen: the verdict, what every way of training and sampling needs, and the command to run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenbit.studies import plan_memory as memory
from tenbit.studies.plan import FEW, HEADROOM, Outcome, Plan
from tenbit.studies.plan_memory import GIB, Part

STATE = ("FP32 masters", "AdamW's moments", "16-bit copy", "frozen weights", "weights to compute with")


def show(plan: Plan, console: Console, overrides: list[str] | None = None) -> None:
    """Prints the plan. `overrides` are those that the recipe was read with; they become part of the command."""
    for line in _about(plan):
        console.print(line, soft_wrap=False)
    console.print()
    best = plan.chosen
    console.print(_verdict("As the recipe says", plan.asked))
    if best is None:
        console.print(Text("Nothing fits. ", style="bold red").append(_closest(plan)))
    elif best is not plan.asked:
        console.print(_verdict("Recommended", best))
    shown = best or plan.asked
    again = ", gradient checkpointing" if shown.trainer.checkpointing else ""
    tables = {
        "Training: GB on each GPU, at the largest moment": _training(plan, shown),
        f"Sampling beside {shown.trainer.label}: GB on each GPU; sequences of {plan.longest:,} tokens in an engine": (
            _sampling(plan, shown)
        ),
        f"In full, {shown.trainer.label}{again}; {shown.sampler.label}: GB on each GPU (~: estimate)": (
            _in_full(shown)
        ),
    }
    for title, table in tables.items():
        console.print(Text(f"\n{title}\n", style="bold"))
        console.print(table)
    console.print()
    for line in _rest(plan, shown):
        console.print(line)
    if best is not None:
        console.print()
        console.print("To run it" + (", on the first node, inside a Slurm job:" if plan.machine.nodes > 1 else ":"))
        for line in command(plan, best, overrides or []):
            console.print(Text("  " + line, style="bold"), soft_wrap=True)


def changes(plan: Plan, outcome: Outcome) -> list[str]:
    """KEY=VALUE for what the recipe does not already say."""
    said = _flat(plan.recipe.tree())
    auto = plan.recipe.backend.name == "auto" and outcome.trainer.backend == plan.asked.trainer.backend
    defaults = {"rollout.vllm.options.tensor_parallel_size": "1"}
    return [
        f"{key}={value}"
        for key, value in outcome.keys.items()
        if said.get(key, defaults.get(key)) != value and not (key == "backend.name" and auto)
    ]


def command(plan: Plan, outcome: Outcome, overrides: list[str]) -> list[str]:
    """What to type, a line each."""
    machine, sampler = plan.machine, outcome.sampler
    new = changes(plan, outcome)
    replaced = {item.partition("=")[0] for item in new}
    keys = [*(item for item in overrides if item.partition("=")[0] not in replaced), *new]
    run = shlex.join(["-m", "tenbit", "train", plan.source, *keys])
    if outcome.trainer.backend == "single":
        return [shlex.join(["tenbit", "train", plan.source, *keys])]
    nodes, ranks = machine.nodes, min(outcome.ranks, machine.per_node)
    if nodes == 1:  # a pool starts its local cluster on the GPUs that no rank trains on
        return [f"torchrun --nproc-per-node {ranks} {run}"]
    training = outcome.ranks // machine.per_node
    hosts = "mapfile -t HOSTS < <(scontrol show hostnames $SLURM_JOB_NODELIST)"
    step = f"srun --nodes {training} --ntasks-per-node 1 --gpus-per-node {machine.per_node}"
    where = f' --nodelist $(IFS=,; echo "${{HOSTS[*]:0:{training}}}")' if sampler.pool else ""
    torchrun = (
        f"torchrun --nnodes {training} --nproc-per-node {machine.per_node} --rdzv-id $SLURM_JOB_ID "
        "--rdzv-backend c10d --rdzv-endpoint ${HOSTS[0]}:29500"
    )
    lines = [hosts]
    if sampler.pool:
        away = f'$(IFS=,; echo "${{HOSTS[*]:{training}}}")'
        lines += [
            "ray start --head --num-gpus 0 --port 6379",
            f"srun --nodes {nodes - training} --ntasks-per-node 1 --nodelist {away} "
            "ray start --address ${HOSTS[0]}:6379 --block &",
            "export RAY_ADDRESS=${HOSTS[0]}:6379",
        ]
    return [*lines, f"{step}{where} {torchrun} {run}"]


def _about(plan: Plan) -> Iterable[Text]:
    shape, machine = plan.shape, plan.machine
    each = f"{machine.nodes} nodes of {machine.per_node}" if machine.nodes > 1 else "one node"
    yield Text(f"{plan.source} on {machine.gpus} GPU{_s(machine.gpus)} of {machine.memory:g} GB ({each})", style="bold")
    active = f" ({_many(shape.active)} at work on a token)" if shape.active < shape.parameters else ""
    yield Text(f"Model: {plan.model}")
    yield Text(
        f"  {_many(shape.parameters)} parameters{active}; {shape.layers} layers of {_many(shape.layer)}, the rest "
        f"{_many(shape.outside)}"
    )
    if shape.adapter:
        yield Text(f"  an adapter of {_many(shape.adapter)} parameters is trained; the others are frozen")
    yield Text(f"  largest tensor {_many(shape.largest)}, {shape.largest_name}")
    rollout, optim = plan.recipe.rollout, plan.recipe.optim
    yield Text(
        f"Precision {plan.recipe.precision.name}. Sequences of at most {plan.longest:,} tokens "
        f"({plan.longest - rollout.max_tokens:,} of prompt); micro-batches of {plan.uses[True].tokens:,}"
    )
    full, half = plan.micro_batches(plan.longest), plan.micro_batches(plan.longest // 2)
    responses = rollout.prompts * rollout.samples
    yield Text(
        f"A step: {responses:,} responses, {optim.updates} gradient step{_s(optim.updates)}; in "
        f"each at most {full} micro-batch{'es' * (full > 1)} on a rank, {half} if responses are half as long"
    )


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _verdict(what: str, outcome: Outcome) -> Text:
    style = "green" if outcome.comfortable else "yellow" if outcome.fits else "red"
    again = ", gradient checkpointing" if outcome.trainer.checkpointing else ""
    text = Text(f"{what}: ", style="bold").append(f"{outcome.trainer.label}{again}; {outcome.sampler.label}: ")
    return text.append(outcome.verdict, style=f"bold {style}")


def _closest(plan: Plan) -> str:
    near = max(plan.outcomes, key=lambda o: o.spare if o.sequences else min(o.spare, 0))
    again = ", gradient checkpointing" if near.trainer.checkpointing else ""
    return (
        f"Closest: {near.trainer.label}{again}; {near.sampler.label}: {near.verdict}. More --gpus or --memory, a "
        "smaller optim.token_budget, or a smaller rollout.max_tokens would help."
    )


def _table(*heads: str, words: tuple[int, ...] = (0,)) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i in words else "right", no_wrap=True, vertical="bottom")
    return table


def _training(plan: Plan, shown: Outcome) -> Table:
    again = "with gradient\ncheckpointing"
    heads = ("", "state", "gathered", "activations", "peak", again, "peak", "host memory\nof a node")
    table = _table(*heads)
    rows: dict[str, dict[bool, Outcome]] = {}
    for outcome in plan.outcomes:
        if outcome.sampler == shown.sampler:
            rows.setdefault(outcome.trainer.label, {})[outcome.trainer.checkpointing] = outcome
    for label, pair in rows.items():
        plain, again = pair[False], pair[True]
        mark = "bold" if label == shown.trainer.label else ""
        table.add_row(
            Text(label.removeprefix("deepspeed "), style=mark),
            _gb(_sum(again.train, *STATE, "gradient sums", "reduction bucket")),
            _gb(_sum(again.train, "gathered", "gradients before", "gradients that")),
            _gb(_sum(plain.train, "activations", "working memory")),
            _peak(plain, plan),
            _gb(_sum(again.train, "activations", "working memory")),
            _peak(again, plan),
            _gb(memory.total(again.host)),
        )
    return table


def _peak(outcome: Outcome, plan: Plan) -> Text:
    size = memory.total(outcome.train)
    limit = plan.machine.bytes
    style = "green" if size <= (1 - HEADROOM) * limit else "yellow" if size <= limit else "red"
    return Text(_gb(size) + (" ✓" if size <= limit else " ✗"), style=style)


def _sampling(plan: Plan, shown: Outcome) -> Table:
    heads = (
        "",
        "engines",
        "training\nholds",
        "engine's\nweights",
        "cache",
        "sequences\nat a time",
        "memory\nshare",
        "",
    )
    table = _table(*heads, words=(0, 7))
    best = _best_pools(plan, shown)
    for outcome in plan.outcomes:
        if outcome.trainer == shown.trainer and (not outcome.sampler.pool or outcome in best):
            few = outcome.sequences < FEW
            table.add_row(
                Text(outcome.sampler.label, style="bold" if outcome.sampler == shown.sampler else ""),
                str(outcome.engines),
                _gb(_sum(outcome.sample, *STATE, "gradient sums", "reduction bucket")),
                _gb(_sum(outcome.sample, "engine's weights")),
                _gb(_sum(outcome.sample, "cache")),
                Text(f"{outcome.sequences:,}", style="red" if not outcome.sequences else "yellow" if few else ""),
                "" if outcome.share is None else f"{outcome.share:g}",
                _short(outcome),
            )
    return table


def _best_pools(plan: Plan, shown: Outcome) -> list[Outcome]:
    """For each size of a pool the least tensor parallelism with room for a few sequences, and what is shown in full."""
    best: dict[int, Outcome] = {}
    for outcome in plan.outcomes:
        if outcome.trainer == shown.trainer and outcome.sampler.pool and outcome.fits:
            old = best.get(outcome.sampler.pool)
            if old is None or old.sequences < FEW:
                best[outcome.sampler.pool] = outcome
    return [*best.values(), shown]


def _short(outcome: Outcome) -> Text:
    style = "green" if outcome.comfortable else "yellow" if outcome.fits else "red"
    if outcome.spare < 0:
        return Text(f"{-outcome.spare / GIB:.1f} GB too much", style=style)
    if not outcome.sequences:
        return Text("no room for one", style=style)
    return Text("fits" if outcome.comfortable else "tight", style=style)


def _in_full(outcome: Outcome) -> Table:
    moments = {"training": outcome.train, "weight update": outcome.update, "sampling": outcome.sample}
    table = _table("", *moments)
    names = dict.fromkeys(part.name for parts in moments.values() for part in parts)
    exact = {part.name: part.exact for parts in moments.values() for part in parts}
    for name in names:
        cells = [next((p for p in parts if p.name == name), None) for parts in moments.values()]
        table.add_row(Text(f"{'' if exact[name] else '~ '}{name}"), *("" if c is None else _gb(c.bytes) for c in cells))
    table.add_section()
    table.add_row("together", *(_gb(memory.total(parts)) for parts in moments.values()), style="bold")
    return table


def _rest(plan: Plan, shown: Outcome) -> Iterable[Text]:
    items = "; ".join(f"{part.name} {_gb(part.bytes)}" for part in shown.host)
    yield Text(f"First node's memory: {_gb(memory.total(shown.host))} GB at most ({items})")
    size, keep = memory.checkpoint_bytes(plan.shape), plan.recipe.checkpoint.keep
    export = plan.recipe.precision.export.bytes * plan.shape.parameters
    yield Text(
        f"Disk: {_gb(size)} GB a checkpoint, {_gb((keep + 1) * size)} GB for checkpoint.keep = {keep} and the one "
        f"being written; the exported model {_gb(export)} GB"
    )


def _sum(parts: list[Part], *names: str) -> int:
    return sum(part.bytes for part in parts if part.name.startswith(names))


def _gb(size: int) -> str:
    value = size / GIB
    return "–" if not size else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 0.1 else f"{value:.3f}"


def _many(count: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if unit < 1e9 else f"{count / unit:.2f} {name}"
    return str(count)


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{key}.")
        else:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            flat[before + key] = f"{value:g}" if isinstance(value, float) else text
    return flat
