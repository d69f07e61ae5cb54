"""Where compiled kernels come from: numba translates them on the first start and keeps the machine code in the cache.

    <cache>/kernels/<digest of numba's version and of these sources>/

numba files an entry under the processor's name and features, so one cache serves different machines. `kernel` is what
every function in this folder is decorated with; importing this module decides the place, once per process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numba
from llvmlite import binding
from numba.core import config as numba_config

from python_backends.core.paths import cache_dir

_Function = TypeVar("_Function", bound=Callable[..., object])

# Sums may be reordered and products fused, once, at compile time. NaN and infinity keep their meaning.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
_NEEDED_FEATURES = {"x86_64": {"avx2", "fma", "f16c"}, "aarch64": {"neon"}}


def unsupported() -> str | None:
    """Why kernels can't run on this processor; None if they can."""
    machine = binding.get_process_triple().split("-")[0]
    if machine not in _NEEDED_FEATURES:
        return f"processors of kind {machine} are not supported"
    features = binding.get_host_cpu_features()
    missing = sorted(feature for feature in _NEEDED_FEATURES[machine] if not features.get(feature))
    return f"the processor lacks {', '.join(missing)}" if missing else None


def cache_place() -> Path:
    """The directory of this version's machine code."""
    digest = hashlib.blake2b(numba.__version__.encode(), digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return cache_dir() / "kernels" / digest.hexdigest()


def has_wide_registers() -> bool:
    """32 vector registers of 16 floats (AVX-512). Those that numba compiles for: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES can
    say less than the processor has."""
    if numba_config.CPU_FEATURES is not None:
        return "+avx512f" in numba_config.CPU_FEATURES
    return bool(binding.get_host_cpu_features().get("avx512f"))


def kernel(function: _Function) -> _Function:
    """Compile at the first call, without the GIL, into the cache."""
    return _compiled(function, "never")


def part(function: _Function) -> _Function:
    """Like kernel, for what only kernels call: it becomes part of each of them.

    A function called by a kernel is optimised once for itself and once more with every caller above it, so a chain of
    them, with the large tiles at its end, would take a minute.
    """
    return _compiled(function, "always")


def _compiled(function: _Function, inline: str) -> _Function:
    options = {"nogil": True, "cache": True, "fastmath": _FAST_MATH, "error_model": "numpy", "inline": inline}
    compiled: _Function = numba.njit(**options)(function)
    return compiled


numba_config.CACHE_DIR = str(cache_place())
