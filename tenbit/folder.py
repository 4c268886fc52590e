"""Run folders: which one a run gets, whether it may have it, and the lock that keeps a second process out.

A folder is never taken from an earlier run: it is new, or `--resume` goes on with the same recipe in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tenbit.recipe import Recipe

# on --resume, without making it another run: what trains and how many sample decide where, not what
MAY_CHANGE = (
    "name", "steps", "log_samples", "checkpoint", "watch", "backend", "rollout.ray.engines", "rollout.ray.restarts",
)  # fmt: skip


def choose_folder(recipe: Recipe, out: Path | None, resume: bool) -> Path:
    """`out`, or runs/NAME (runs/NAME-2, ...): a new folder, or the one to go on with. Nothing is made yet."""
    if out is None:
        first = Path("runs", recipe.name)
        others = (Path("runs", f"{recipe.name}-{n}") for n in itertools.count(2))
        taken = list(itertools.takewhile(Path.exists, itertools.chain([first], others)))
        free = Path("runs", f"{recipe.name}-{len(taken) + 1}") if taken else first
        out = taken[-1] if resume and taken else free
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: this is a file. Name a folder")
    if not holds_something(out):
        return out
    if not resume:
        raise ValueError(
            f"--out {out}: the folder is not empty. Add --resume to go on with its run, or name another one"
        )
    if not (out / "recipe.toml").is_file():
        raise ValueError(f"--out {out}: holds no run to resume (recipe.toml is missing). Name the run's folder")
    return out


def holds_something(folder: Path) -> bool:
    """Whether there is more than the lock of a start that came no further."""
    return folder.is_dir() and any(not p.name.startswith((".lock", "recipe.toml.tmp")) for p in folder.iterdir())


def check_same(recipe: Recipe, folder: Path) -> None:
    """A resumed run must be the same run. Raises ValueError naming the keys that differ."""
    if not (folder / "recipe.toml").is_file():
        return
    old, new = (flat(r.tree()) for r in (Recipe.load(folder / "recipe.toml"), recipe))
    free = MAY_CHANGE if recipe.optim.schedule == "constant" else tuple(k for k in MAY_CHANGE if k != "steps")
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    differing = [k for k in changed if not any(k == f or k.startswith(f"{f}.") for f in free)]
    if differing:
        what = "; ".join(f"{k}: was {old.get(k)}, is {new.get(k)}" for k in differing)
        raise ValueError(
            f"{folder}: --resume goes on with the same recipe, but {what}. Start a new run with another --out"
        )


def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}}`` -> ``{"optim.lr": 1}``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return out


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written ({error.strerror}). Name another folder") from None


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Holds the folder against a second process, or what `name` stands for in it. Raises ValueError if one has it."""
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is running here. Wait for it, or name another --out") from None
        yield
