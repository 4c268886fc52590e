"""C++ kernels: compiled with g++ on first use, kept in the user's cache directory, called by ctypes.

    lib = load_library("fused", [here / "fused.cpp"], FLAGS)

The file's name carries a hash of sources, headers, flags and CPU, and it appears under that name only when complete,
so processes may race. Sources may include `simd.h`, which lies next to this module.
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
AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "f16c", "fma"})
AMX = frozenset({"amx_tile", "amx_bf16", "avx512_bf16"})
_HERE = Path(__file__).parent


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, by the kernel's names; empty where that is not known."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return frozenset(found[1].split()) if found else frozenset()


@functools.cache
def may_use_tiles() -> bool:
    """Whether there are AMX tiles and this process may use them. Linux gives the permission to who asks for it."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return cpu_flags() >= AMX and ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def load_library(name: str, sources: Sequence[Path], flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """Compiles `sources` if that has not been done, and loads them. Raises OSError with the reason if it cannot be.

    Reasons: TENBIT_NATIVE=0 in the environment, a CPU without AVX-512, no g++, or the compiler's own words.
    """
    if os.environ.get("TENBIT_NATIVE", "1") == "0":
        raise OSError("TENBIT_NATIVE=0")
    if platform.machine() != "x86_64" or not cpu_flags() >= AVX512:
        raise OSError("the CPU has no AVX-512")
    openmp = _openmp()
    parts = [path.read_bytes() for path in (*sorted(_HERE.glob("*.h")), *sources)]
    parts += [" ".join([*flags, *openmp, *sorted(cpu_flags())]).encode()]
    target = _cache() / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"
    if not target.exists():
        if shutil.which("g++") is None:
            raise OSError("there is no g++ to compile the kernels with")
        log.info("compiling the %s kernels into %s, once", name, target.parent)
        _compile(sources, flags, openmp, target)
    return ctypes.CDLL(str(target))


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


def _compile(sources: Sequence[Path], flags: Sequence[str], openmp: Sequence[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        jobs = [
            subprocess.Popen(
                ["g++", *flags, f"-I{_HERE}", "-c", str(source), "-o", out], stderr=subprocess.PIPE, text=True
            )
            for source, out in zip(sources, objects, strict=True)
        ]
        errors = [job.communicate()[1] for job in jobs]
        if any(job.returncode for job in jobs):
            raise OSError("\n".join(errors)[:2000])
        made = Path(folder) / target.name
        link = subprocess.run(
            ["g++", "-shared", *objects, *openmp, "-o", str(made)], check=False, capture_output=True, text=True
        )
        if link.returncode:
            raise OSError(link.stderr[:2000])
        made.replace(target)
