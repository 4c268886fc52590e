"""Whether an error is one of tenbit's own messages, which name the key and the remedy, or came out of a library."""

from __future__ import annotations

import opcode
from pathlib import Path
from types import TracebackType

OWN = Path(__file__).parent
NOT_OURS = "this is not a message of tenbit's own; TENBIT_TRACEBACK=1 shows where it comes from"
_RAISES = {opcode.opmap[name] for name in ("RAISE_VARARGS", "RERAISE") if name in opcode.opmap}


def was_raised_by_tenbit(error: BaseException) -> bool:
    """Whether a `raise` in tenbit's own code began it: not a library's, nor a built-in function called in the wrong way
    (`zip(strict=True)`, `int("a")`), which would be a bug of tenbit's.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is None or (_is_own(last) and last.tb_frame.f_code.co_code[last.tb_lasti] in _RAISES)


def _is_own(place: TracebackType) -> bool:
    return OWN in Path(place.tb_frame.f_code.co_filename).parents
