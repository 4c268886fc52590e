"""Training on N ranks from a test: a script is run by torchrun, and what it found comes back in a file.

results = on_ranks(2, "tests/ranks_of_fsdp.py", "fp16", folder)         one result per rank
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def launch(size: int, *args: object, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node size ARGS``, on one thread a rank, with its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), **environment}
    return subprocess.run(
        [*command, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def on_ranks(size: int, script: str, *args: object, folder: Path, timeout: float = 240) -> list[dict]:
    """Runs ``script ARGS`` on `size` ranks; what each gave to `report`."""
    folder.mkdir(parents=True, exist_ok=True)
    done = launch(size, ROOT / "tests" / script, *args, timeout=timeout, TENBIT_TEST_OUT=str(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(folder / f"rank{i}.pt", weights_only=False) for i in range(size)]


def report(result: dict) -> None:
    """From within a rank: what the test is to see."""
    from tenbit import world

    torch.save(result, Path(os.environ["TENBIT_TEST_OUT"]) / f"rank{world.rank()}.pt")
