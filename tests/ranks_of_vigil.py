"""Run as one of several processes: joins the others and waits for them, until something happens.

ranks_of_vigil.py HOST WHAT         WHAT: work for ever | raise after a second | leave
"""

from __future__ import annotations

import socket
import sys
import time

host, what = sys.argv[1:]
socket.gethostname = lambda: host  # as if on another machine, where only signs of life can be seen

from tenbit import vigil, world  # noqa: E402

sys.argv = ["tenbit", "train"]


def act() -> None:
    with world.joined(), vigil.kept():
        world.gather("here")
        print("ready", flush=True)
        time.sleep(2)
        if what == "raise":
            raise MemoryError("no room for the activations")
        if what != "leave":
            while True:
                world.gather("still here")
                time.sleep(0.05)


def main() -> None:
    """As tenbit.cli.main does."""
    try:
        act()
    except Exception as error:
        vigil.wait_for_cause(error)
        if vigil.failed_first(f"{type(error).__name__}: {error}"):
            raise
        sys.exit(1)


main()
