"""Where a page may be written, for pages of one run and of several: checked before anything is read or made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

MARK = ("written_by", "tenbit report")  # in the JSON beside a page
EARLIER = {"verdict", "running_mean_steps", "cells"}  # what that JSON held before it had the mark


def refuse_no_page(out: Path) -> None:
    """Raises ValueError, with a name to use instead, for what is no HTML file."""
    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        better = out / "report.html" if out.is_dir() else out.with_name(f"{out.stem or 'report'}.html")
        what = "this is a folder" if out.is_dir() else "the page is an HTML file"
        raise ValueError(f"--out {out}: {what}. Name it, such as --out {better}")


def refuse_foreign(data: Path, out: Path) -> None:
    """Raises ValueError if the JSON that goes beside the page would replace another program's file."""
    if not data.exists():
        return
    try:
        tree = json.loads(data.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict) or not (tree.get(MARK[0]) == MARK[1] or tree.keys() >= EARLIER):
        better = out.with_name(f"{out.stem}-report{out.suffix}")
        raise ValueError(
            f"--out {out}: the tables go to {data}, which is there and not of a report. Name another page, such as "
            f"--out {better}"
        )


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes the page's folder, and says what goes wrong in terms of --out."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"--out {out}: cannot be written ({why}). Name another file") from None
