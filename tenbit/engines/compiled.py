"""The sampling kernels of `kernels.cpp`, `amx.cpp` and `step.cpp`, compiled on first use by `tenbit.native`.

Without g++ or AVX-512, or with TENBIT_NATIVE=0 in the environment, `library()` is None and `why_not()` says why; the
engine then runs in plain torch.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from tenbit.native import AMX, cpu_flags, load_library, may_use_tiles

SOURCES = ("kernels.cpp",)
AMX_SOURCES = ("amx.cpp", "step.cpp")


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    names = SOURCES + (AMX_SOURCES if cpu_flags() >= AMX else ())
    try:
        lib = load_library("sampling", [Path(__file__).parent / name for name in names])
    except OSError as error:
        return None, str(error)
    p, n, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    signatures = {
        "tb_large_pages": [p, n],
        "tb_add_norm": [i, p, p, p, p, n, n, f],
        "tb_silu_mul": [i, p, p, n, n],
        "tb_rotate": [i, p, n, n, n, n, p, p, f, p, p, p],
        "tb_attend": [i, p, p, p, p, p, n, n, n, n, n],
        "tb_draw": [i, p, p, f, n, n, p, p],
        "tb_pack": [p, n, n, p],
        "tb_linear": [i, p, n, n, p, p, n, p],
        "tb_step": [p, p, p, n, p, p, p, p, n, n, p, p],
    }
    for name, arguments in signatures.items():
        if hasattr(lib, name):
            getattr(lib, name).argtypes = arguments
            getattr(lib, name).restype = ctypes.c_int if name == "tb_attend" else None
    return lib, ""


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return _library()[0]


def available() -> bool:
    return library() is not None


def why_not() -> str:
    """Why there are no kernels here; empty if there are."""
    return _library()[1]


@functools.cache
def has_amx() -> bool:
    lib = library()
    return lib is not None and hasattr(lib, "tb_linear") and may_use_tiles()
