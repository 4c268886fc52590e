"""Compiles the kernels of `kernels.cpp`, `amx.cpp` and `step.cpp` with g++ on first use, and loads them.

The result goes into the user's cache directory under a name that is a hash of sources, flags and CPU, and appears
there only when complete, so processes may race for it. Without g++ or AVX-512, or with TENBIT_NATIVE=0 in the
environment, `library()` is None and `why_not()` says why; the engine then runs in plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-w")
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "f16c", "fma"}
AMX = {"amx_tile", "amx_bf16"}


def _cpu_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return frozenset(found[1].split()) if found else frozenset()


def _openmp() -> list[str]:
    """What to link for OpenMP: the very library that torch has loaded, so that there is one pool of threads."""
    loaded = re.findall(r"\S*/lib(?:gomp|iomp5|omp)[-.]\S*so\S*", Path("/proc/self/maps").read_text())
    return loaded[:1] or ["-fopenmp"]


def _cache() -> Path:
    """A folder of the user's for compiled kernels, or one for this process alone if there is none to write to."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        (root / "tenbit").mkdir(parents=True, exist_ok=True)
        if os.access(root / "tenbit", os.W_OK):
            return root / "tenbit"
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tenbit-"))


def _compile(sources: Sequence[Path], openmp: Sequence[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        jobs = [
            subprocess.Popen(["g++", *FLAGS, "-c", str(source), "-o", out], stderr=subprocess.PIPE, text=True)
            for source, out in zip(sources, objects, strict=True)
        ]
        errors = [job.communicate()[1] for job in jobs]
        if any(job.returncode for job in jobs):
            raise OSError("\n".join(errors)[:2000])
        made = Path(folder) / target.name
        subprocess.run(
            ["g++", "-shared", *objects, *openmp, "-o", str(made)], check=True, capture_output=True, text=True
        )
        made.replace(target)


def _load() -> ctypes.CDLL:
    """Compiles if needed, and loads. OSError with the reason where it cannot be."""
    if os.environ.get("TENBIT_NATIVE", "1") == "0":
        raise OSError("TENBIT_NATIVE=0")
    flags = _cpu_flags()
    if platform.machine() != "x86_64" or not flags >= NEEDED:
        raise OSError("the CPU has no AVX-512")
    here = Path(__file__).parent
    sources = [here / name for name in ("kernels.cpp", *(("amx.cpp", "step.cpp") if flags >= AMX else ()))]
    openmp = _openmp()
    parts = [source.read_bytes() for source in [here / "simd.h", *sources]]
    parts += [" ".join([*FLAGS, *openmp, *sorted(flags)]).encode()]
    target = _cache() / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"
    if not target.exists():
        if shutil.which("g++") is None:
            raise OSError("there is no g++ to compile the kernels with")
        log.info("compiling the sampling kernels into %s, once", target.parent)
        _compile(sources, openmp, target)
    return ctypes.CDLL(str(target))


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    try:
        lib = _load()
    except (OSError, subprocess.CalledProcessError) as error:
        return None, str(getattr(error, "stderr", None) or error)
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
    return lib is not None and hasattr(lib, "tb_amx") and bool(lib.tb_amx())
