"""Checkpoints: sharded, written in the background, and whole or not at all: a killed run finds only complete ones.

    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    checkpoints.save(backend, progress)         copies this rank's share, and returns; the disk is written meanwhile
    checkpoints.wait()                          until it is

A checkpoint is a folder ``step-000010``: ``trainer/`` holds masters and moments in the format of
torch.distributed.checkpoint, each rank having written its shards; ``state.json`` says how far the run is, with the loss
scale and the counts. The format is the same for every backend and knows no number of ranks, so a run may go on with
another of either. It is written beside its final place, synced to disk, and renamed; a rename is atomic.

Problems, responses and evaluations draw from seeds made of the recipe's seed, the step and the place, so no random
state decides a run. Those of the libraries are kept all the same, for code of the user's own.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import async_save

from tenbit import world
from tenbit.backends import Backend
from tenbit.runlog import write_atomic

# one process writes its checkpoint by itself, and that is meant
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
TRAINER, HELD, BASE = "trainer", "held.pt", "base"
KEPT = "kept.json"  # in a checkpoint's folder: why it stays
MOST_KEPT = 3  # of those, the first and the newest stay
COUNTS = ("updates", "skips_in_a_row", "loss_scale", "clean_steps")


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` steps are done, `position` problems taken."""

    step: int = 0
    position: int = 0


@dataclass(frozen=True)
class Kept:
    """A checkpoint that stays, and those that stayed until now."""

    path: Path
    given_up: tuple[Path, ...] = ()


class Checkpoints:
    """Writes a run's checkpoints, one at a time. Every method is called on all ranks.

    `base` is the digest of frozen weights, which a checkpoint does not hold; rank 0's counts.
    """

    def __init__(self, folder: Path, keep: int, newest: int | None = None, base: str | None = None) -> None:
        self._folder, self._keep, self._base = folder, keep, base
        self._writing: Future[Any] | None = None
        self.newest = newest  # the step of the last one that was begun

    def save(self, backend: Backend, progress: Progress, held: Any = None, healthy: int | None = None) -> None:
        """Begins ``step-N``; the training state is copied before this returns, so training may go on.

        `held` is what rank 0 keeps besides, in plain values and tensors. The newest checkpoint up to step `healthy`
        stays, however many come after it. Raises what went wrong with the one before.
        """
        self.wait()
        self.newest = progress.step
        final = self._folder / f"step-{progress.step:06d}"
        draft = self._folder / f".{final.name}.tmp"
        world.first(lambda: _begin(draft))
        state = backend.state()

        def describe() -> None:
            torch.save(random_state(), draft / f"random-{world.rank()}.pt")
            if world.is_first():
                torch.save(held, draft / HELD)
                about = {**asdict(progress), "ranks": world.size(), "trainer": state.counts}
                about |= {} if self._base is None else {BASE: self._base}
                (draft / "state.json").write_text(json.dumps(about, indent=1))

        world.together(describe)
        writing: Any = async_save(
            state.tensors,
            checkpoint_id=draft / TRAINER,
            process_group=world.writers(),
            no_dist=world.size() == 1,
        )
        self._writing = _then(writing, lambda: self._commit(draft, final, healthy)) if world.is_first() else writing

    def _commit(self, draft: Path, final: Path, healthy: int | None) -> None:
        replace_folder(draft, final)
        self._tidy(None if healthy is None else latest(self._folder, healthy))

    def _tidy(self, spared: Path | None) -> None:
        for old in complete(self._folder)[: -self._keep]:
            if old != spared and not (old / KEPT).exists():
                shutil.rmtree(old.rename(self._folder / f".{old.name}.tmp"))

    def keep(self, step: int, why: str) -> Kept | None:
        """The newest checkpoint up to `step` stays from now on; None if there is none. On all ranks.

        Of more than `MOST_KEPT` only the first, from before the first trouble, and the newest stay.
        """
        self.wait()

        def mark() -> Kept | None:
            found = latest(self._folder, step)
            if found is None:
                return None
            if not (found / KEPT).exists():
                why_kept = json.dumps({"step": step_of(found), "reason": why}, indent=1) + "\n"
                write_atomic(found / KEPT, why_kept.encode())
            kept = [p for p in complete(self._folder) if (p / KEPT).exists()]
            surplus = tuple(kept[1 : 1 - MOST_KEPT]) if len(kept) > MOST_KEPT else ()
            for old in surplus:
                (old / KEPT).unlink()
            self._tidy(found)
            return Kept(found, surplus)

        return world.first(mark)

    def wait(self) -> None:
        """Until the last checkpoint is on disk, on all ranks; raises OSError if it could not be written."""

        def finish() -> None:
            writing, self._writing = self._writing, None
            if writing is not None:
                try:
                    writing.result()
                except CheckpointException as error:
                    number, (cause, _) = next(iter(error.failures.items()))
                    where = f" by rank {number}" if world.size() > 1 else ""
                    raise OSError(f"{self._folder}: a checkpoint could not be written{where}: {cause}") from error

        world.together(finish)


def _begin(draft: Path) -> None:
    draft.parent.mkdir(exist_ok=True)
    for left in draft.parent.glob(".step-*.tmp"):  # by a run that was killed while it wrote or removed one
        shutil.rmtree(left)
    draft.mkdir()


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if (p / "state.json").is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def latest(folder: Path, up_to: int | None = None) -> Path | None:
    """The newest complete checkpoint, of a step not after `up_to`."""
    found = [p for p in complete(folder) if up_to is None or step_of(p) <= up_to]
    return found[-1] if found else None


def load_progress(checkpoint: Path) -> Progress:
    """How far the run was when the checkpoint was written."""
    about = _about(checkpoint)
    return Progress(about["step"], about["position"])


def _about(checkpoint: Path) -> dict[str, Any]:
    try:
        about = json.loads((checkpoint / "state.json").read_text())
        counts = [about[key] for key in ("step", "position", "ranks")]
        counts += [about["trainer"][key] for key in COUNTS] if "trainer" in about else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, f"state.json: {type(error).__name__}: {error}") from error
    if "trainer" not in about:
        raise ValueError(f"{checkpoint}: written by an earlier tenbit, whose checkpoints this one does not read")
    return about


def _damaged(checkpoint: Path, cause: str) -> ValueError:
    return ValueError(
        f"{checkpoint}: cannot be read: {cause}. It is damaged, or of another model than model.path. Without this "
        "folder --resume goes on from the checkpoint before it"
    )


def refuse_other_base(checkpoint: Path, base: str | None, path: str) -> None:
    """Raises ValueError if the frozen weights that were opened at `path` are others than those of the checkpoint's run.

    Those written before they held a digest are taken as they are.
    """
    written = _about(checkpoint).get(BASE)
    if written is not None and base is not None and written != base:
        raise ValueError(
            f"model.path = {path!r}: these weights are not those that the adapter in {checkpoint} was trained beside; "
            "they have changed since. Put the earlier ones back there, or begin another run: --out, without --resume"
        )


def load(checkpoint: Path, backend: Backend) -> None:
    """Puts a backend of any kind and number of ranks into the saved state. Raises ValueError if it does not fit.

    Called on all ranks, which agree on every part that is read: one of them may hold the damaged file.
    """
    about = world.together(lambda: _about(checkpoint))

    def read(tensors: dict[str, Tensor]) -> None:
        try:
            load_shards(dict(tensors), checkpoint_id=checkpoint / TRAINER, no_dist=True)
        except (CheckpointException, RuntimeError, ValueError, OSError, EOFError) as error:
            raise _damaged(checkpoint, str(error).strip().splitlines()[-1]) from error

    backend.restore(about["trainer"], lambda tensors: world.together(lambda: read(tensors)))
    own = checkpoint / f"random-{world.rank()}.pt"
    if about["ranks"] == world.size():
        world.together(lambda: _restore_random(checkpoint, own))


def _restore_random(checkpoint: Path, own: Path) -> None:
    try:
        set_random_state(torch.load(own, weights_only=True))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(checkpoint, f"{own.name}: {error}") from error


def load_held(checkpoint: Path) -> Any:
    """What rank 0 gave to `save` besides."""
    try:
        return torch.load(checkpoint / HELD, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(checkpoint, f"{HELD}: {error}") from error


def random_state() -> dict[str, Any]:
    """Of the libraries that a user's own code may draw from."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numpy = [str(name), torch.tensor(np.asarray(keys, dtype=np.int64)), *rest]
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def _then(writing: Future[Any], act: Any) -> Future[None]:
    """A future that is done when `act` has followed on `writing`."""
    followed: Future[None] = Future()

    def follow(done: Future[Any]) -> None:
        try:
            done.result()
            act()
            followed.set_result(None)
        except BaseException as error:
            followed.set_exception(error)

    writing.add_done_callback(follow)
    return followed


def replace_folder(draft: Path, final: Path) -> None:
    """Moves a complete draft to its place: contents on disk first, then the name."""
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
