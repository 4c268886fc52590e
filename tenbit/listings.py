"""The commands that list what there is: `tenbit recipes`, `algorithms`, `precisions`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def recipes(folder: Annotated[Path, typer.Argument(help="where to look")] = Path("recipes")) -> None:
    """List the recipes in a folder and the folders in it."""
    from tenbit.recipe import Recipe

    files = sorted(folder.rglob("*.toml"), key=lambda file: (len(file.parts), file))
    if not files:
        raise ValueError(f"{folder}: no recipes (*.toml) here. Name the folder that holds them: tenbit recipes FOLDER")
    rows = []
    for file in files:
        first = next((line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")), "#")
        recipe = Recipe.load(file)
        rows.append((str(file), recipe.precision.name, recipe.algorithm.name, first.lstrip("# ")))
    _print_table(("recipe", "precision", "algorithm", "what it does"), rows)


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


def precisions() -> None:
    """List the number formats and the presets, and the plan that each preset stands for."""
    from tenbit.precision import UNUSUAL, Format, Precision
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
    console.print(
        "\nA preset is a format, or training/rollout: fp16, bf16, fp32, bf16/fp32, ...; fp16/fp8 and fp16/fp16~4 round "
        "the weights that are rolled out. The default, fp16:\n"
    )
    console.print(plan_table(Precision.parse("fp16"), {}))
    console.print("\nKeys that are rarely set:\n")
    _print_table(("key", "what it is"), [(k, Precision.model_fields[k].description or "") for k in UNUSUAL])


def _print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for i, head in enumerate(heads):
        last = i == len(heads) - 1
        table.add_column(head, style="bold" if i == 0 else "", overflow="fold", no_wrap=not last)
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False, width=max(100, Console().width)).print(table)
