"""Every way a rank can be lost: the others end soon, and one of them says what happened first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tenbit import vigil, world

SCRIPT = Path(__file__).parent / "ranks_of_vigil.py"


def start(hosts: list[str], what: list[str]) -> list[subprocess.Popen[str]]:
    """One process a rank, as launchers on several machines would start them; no launcher watches them here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(hosts)),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), host, act],
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (host, act) in enumerate(zip(hosts, what, strict=True))
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return started


def ended(processes: list[subprocess.Popen[str]], within: float) -> str:
    """All of them have ended by then, none with success; what they said."""
    said, until = "", time.monotonic() + within
    try:
        for process in processes:
            said += process.communicate(timeout=max(0.1, until - time.monotonic()))[1]
            assert process.returncode != 0
    finally:
        for process in processes:
            process.kill()
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hosts", "victim", "cause"),
    [
        (["a", "a", "a"], 1, "is gone: it was killed, or it crashed"),
        (["a", "b", "c"], 2, "gives no sign of life"),
        (["a", "b"], 0, "gives no sign of life|store is gone"),
    ],
    ids=["one machine", "other machines", "the machine of rank 0"],
)
def test_pitfall_28_a_killed_rank_ends_the_others_within_a_minute_and_is_named(hosts, victim, cause):
    processes = start(hosts, ["work"] * len(hosts))
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    said = ended([p for i, p in enumerate(processes) if i != victim], within=60)
    assert time.monotonic() - killed < 60
    lines = [line for line in said.splitlines() if line.startswith("tenbit: ")]
    assert any(word in lines[0] for word in cause.split("|")), said
    assert len(lines) == 1 or victim == 0, said
    if "store" not in lines[0]:
        assert f"rank {victim} (process {processes[victim].pid} on {hosts[victim]})" in lines[0]
    assert "Traceback" not in said, "the consequence on another rank was shown beside the cause"


@pytest.mark.slow
def test_the_first_failure_is_the_one_that_is_shown():
    said = ended(start(["a", "b", "c"], ["work", "raise", "work"]), within=60)
    assert said.count("Traceback") == 1
    assert "MemoryError: no room for the activations" in said


@pytest.mark.slow
def test_a_rank_that_is_done_is_not_missed():
    processes = start(["a", "b"], ["leave", "leave"])
    assert [p.wait(timeout=30) for p in processes] == [0, 0]
    assert all(p.stderr.read() == "" for p in processes)


def test_alone_nobody_watches(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not world.launched()
    with vigil.kept(), world.joined():
        assert vigil.alone()
        assert vigil.failed_first("whatever")
        assert (world.rank(), world.size()) == (0, 1)
        assert world.gather(3) == [3]
