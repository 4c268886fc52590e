"""The Ray cluster of a run: RAY_ADDRESS's, or one on this machine that ends with the run. `ray` is the library.

A local cluster keeps quiet, asks nothing of the network, and leaves no files (a killed run's go with the next one). It
gets those of the machine's GPUs that no rank trains on; all of them, if there are no others. Ray's processes do not
hear Ctrl-C, which only the trainer decides about, and they end when the trainer does, however it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tenbit import world

PREFIX = "tenbit-ray-"
PATIENCE = 10.0  # seconds for an address to answer
FREED = 10.0  # seconds until Ray knows that the place of a closed pool is free
_MOST_OF_MEMORY, _LEAST_STORE = 0.4, 100 << 20
_users = 0  # engines of this process in the cluster that this process joined or started for them
_folder: str | None = None  # the local cluster's
log = logging.getLogger(__name__)


def join(ray: Any, cpus: float, store: int) -> None:
    """Joins the cluster, or starts one with so many CPUs and room for `store` bytes of weights. Raises ValueError.

    A process is in one cluster: what it has joined already, by itself or for another engine, is used.
    """
    global _users
    if ray.is_initialized():
        _users += _users > 0
        return
    address = os.environ.get("RAY_ADDRESS", "").strip()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    told = {"include_dashboard": None, "log_to_driver": False, "configure_logging": False}
    with _own_signals():
        if address and address != "local":
            _reachable(address)
            what = f"RAY_ADDRESS = {address!r}: the cluster there could not be joined"
            _start(ray, what, told | {"address": address})
        else:
            _start_local(ray, told, cpus, store)
    # what the cluster has to say of a process that died arrives with the call that it was doing
    worker = getattr(getattr(ray, "_private", None), "worker", None)
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda data, *_, **__: log.debug("%s", data)  # type: ignore[union-attr]
    _users = 1


def take_token() -> None:
    """Before Ray is imported: a cluster whose machine has one of Ray's tokens asks for it, so we show ours.

    `ray start` goes by whether there is a token; a driver that joins goes by the variable alone.
    """
    joins = os.environ.get("RAY_ADDRESS", "").strip() not in ("", "local")
    if joins and "RAY_AUTH_MODE" not in os.environ and (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_MODE"] = "token"


def _start(ray: Any, what: str, told: Mapping[str, Any]) -> None:
    try:
        ray.init(**{k: v for k, v in told.items() if v is not None})
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        said = " ".join(str(error).split())
        raise ValueError(
            f"{what}: {said}. Correct or unset RAY_ADDRESS; the trainer must run on a machine of the cluster, with its "
            "versions of Python and Ray, and with its token (~/.ray/auth_token, RAY_AUTH_MODE) if it has one"
        ) from error


def _start_local(ray: Any, told: dict[str, Any], cpus: float, store: int) -> None:
    global _folder
    remove_left()
    _folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")  # short: names of sockets may have 107 characters
    spare = spare_gpus(os.environ, torch.cuda.device_count())
    told |= {
        "address": "local",
        "include_dashboard": False,
        "num_cpus": int(max(cpus, os.cpu_count() or 1)),
        "num_gpus": len(spare),
        "object_store_memory": int(max(_LEAST_STORE, min(store, _MOST_OF_MEMORY * _memory()))),
        "_temp_dir": _folder,
    }
    hidden = {key: None for key in world.launcher_variables(list(os.environ))} | {"RAY_ADDRESS": None}
    with _environment({**hidden, **({"CUDA_VISIBLE_DEVICES": ",".join(spare)} if spare else {})}):
        try:
            _start(ray, "rollout.engine = 'ray': no local cluster could be started", told)
        except BaseException:
            _remove_folder()
            raise


def leave(ray: Any) -> None:
    """Ends a cluster that was started here, and leaves one that was joined, when its last engine is closed."""
    global _users
    if _users == 0:
        return
    _users -= 1
    if _users == 0:
        with _own_signals():
            ray.shutdown()
        _remove_folder()


def remove_left() -> None:
    """Removes the folders of runs on this machine that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(left, ignore_errors=True)


def _remove_folder() -> None:
    global _folder
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
        _folder = None


def _reachable(address: str) -> None:
    """Ray would try for minutes."""
    if address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS = {address!r} is Ray's client, through which weights would be copied one by one. Run the "
            "trainer on a machine of the cluster, with RAY_ADDRESS = 'HOST:6379'"
        )
    host, colon, port = address.rpartition(":")
    if not colon:
        return  # "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({error}). Start one (ray start --head), correct "
            "the address, or unset it for a local cluster"
        ) from None


def spare_gpus(environment: Mapping[str, str], count: int) -> list[str]:
    """Of this process's GPUs, by the names that CUDA_VISIBLE_DEVICES has for them, those that no rank trains on."""
    listed = [g.strip() for g in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if g.strip()]
    visible = listed[:count] if listed else [str(i) for i in range(count)]
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    return visible[ranks:] if len(visible) > ranks else visible


def room(ray: Any, cpus: float, gpus: float) -> tuple[int, int]:
    """How many engines the cluster's machines hold, and how many of those are free now, as far as is known."""
    need = {key: n for key, n in (("CPU", cpus), ("GPU", gpus)) if n > 0}
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    whole = sum(min(int(has.get(key, 0) / n + 1e-9) for key, n in need.items()) for has in nodes)
    free = ray.available_resources()
    return whole, min(whole, *(int(free.get(key, 0) / n + 1e-9) for key, n in need.items()))


def refuse_second(ray: Any, cpus: float, gpus: float) -> None:
    """A pool of this process that fills the cluster will not make room for another one. Raises ValueError."""
    end = time.monotonic() + FREED
    while _users > 1 and (cpus or gpus) and room(ray, cpus, gpus)[1] == 0:
        if time.monotonic() > end:
            raise ValueError(
                "rollout.engine = 'ray': another pool of this run fills the cluster. Lower rollout.ray.engines so that "
                "both fit, or leave out what samples besides (compare.precisions = [])"
            )
        time.sleep(0.1)


def has_gpus(ray: Any) -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for key, value in values.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts its own handlers in place; what a signal means is for the run to say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
