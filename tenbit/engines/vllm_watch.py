"""Notices that vLLM's own process has ended, and wakes whoever waits for it.

vLLM's synchronous client waits on a queue that a killed process (SIGKILL, out of memory) will never fill, so a run
would hang. A thread waits for the process, and then puts an error into everything the client may be waiting for.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import signal
import threading
from typing import Any


class Watch:
    """Watches the processes of a vLLM client. `cause` says how the first of them ended, None while all live."""

    def __init__(self, client: Any) -> None:
        self.cause: str | None = None
        self._client = client
        self._processes = list(client.resources.engine_manager.processes)
        self._closing = threading.Event()
        threading.Thread(target=self._wait, name="tenbit-vllm-watch", daemon=True).start()

    def _wait(self) -> None:
        ended = multiprocessing.connection.wait([p.sentinel for p in self._processes])
        if self._closing.is_set():
            return
        process = next(p for p in self._processes if p.sentinel in ended)
        process.join()
        self.cause = f"its process {process.pid} {said(process.exitcode)}"
        error = RuntimeError(self.cause)
        self._client.outputs_queue.put_nowait(error)
        for future in list(self._client.utility_results.values()):
            with contextlib.suppress(Exception):  # it may have been answered in this very moment
                future.set_exception(error)

    def close(self) -> None:
        """The end that comes now is wanted."""
        self._closing.set()


def said(exit_code: int | None) -> str:
    """An exit code in words: -9 -> "was killed by SIGKILL"."""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = ", most likely for want of memory" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended with exit status {exit_code}"
