"""Where a study writes, and how it says what it is doing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tenbit.folder import holds_something

Note = Callable[[str], None]


def free_folder(out: Path | None, name: str) -> Path:
    """`out`, or runs/NAME, runs/NAME-2, ...: a new or empty folder. Nothing is made yet."""
    if out is None:
        others = (Path("runs", f"{name}-{n}") for n in itertools.count(2))
        out = next(p for p in itertools.chain([Path("runs", name)], others) if not p.exists())
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file. Name a folder")
    if holds_something(out):
        raise ValueError(f"--out {out}: the folder is not empty. Name another one")
    return out


def noter(console: Console) -> Note:
    """Prints what is being done, with the seconds since now."""
    began = time.perf_counter()

    def note(text: str) -> None:
        console.print(Text.assemble((f"{time.perf_counter() - began:6.1f} s  ", "dim"), text), soft_wrap=True)

    return note
