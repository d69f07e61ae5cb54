"""The threads of one worker inside compiled code: who takes which piece of work, and how they wait for each other.

All threads run the same kernel. A phase is cut into units; each thread claims the next one by an atomic counter until
none is left, then waits until all units are done. It waits for work, not for threads: one whose core is busy with
something else takes fewer units, or none, and holds up nobody unless it is in the middle of one. A waiting thread spins
for some microseconds, which is what ends of phases usually differ by, and then sleeps in the kernel (futex(2)): it takes
no core from another worker.

    control memory: per phase 64 bytes: units claimed, units done, sleeping threads, cycle counter when all were done, and
                    in that of the first phase whether the run is over

Each run has control memory of its own, so a thread that is late by a whole run finds nothing left to claim in it.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from python_backends.engines.torch.kernels.compiler import kernel
from python_backends.engines.torch.kernels.vector import INT32, INT64, POINTER

_MACHINE = platform.machine()
_SYS_FUTEX = 202 if _MACHINE == "x86_64" else 98
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129
_SPINS = 1500  # about 20 us

_NAP_US = 2000  # of a thread that waits for a core: waking up more often costs more than it wins

_CLAIMED, _DONE, _SLEEPERS, _ENDED, _OVER, _PHASE_BYTES = 0, 8, 16, 24, 32, 64


def control_memory(phases: int) -> npt.NDArray[np.int64]:
    return np.zeros(phases * _PHASE_BYTES // 8, np.int64)


def phase_ends(control: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """After a run, [phases]: `cycles()` when each ended, 0 for those without units."""
    return control.reshape(-1, _PHASE_BYTES // 8)[:, _ENDED // 8]


@intrinsic
def _add_at(_context: Any, _address: Any, _value: Any) -> Any:
    """Atomically add; what was there before."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], POINTER), args[1], "seq_cst")

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def _pause(_context: Any) -> Any:
    """Tell the processor that this is a spin loop."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        if _MACHINE == "x86_64":
            name, hints = "llvm.x86.sse2.pause", []
        else:
            name, hints = "llvm.aarch64.hint", [ir.Constant(INT32, 1)]
        kind = ir.FunctionType(ir.VoidType(), [hint.type for hint in hints])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), hints)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _read_cycles(_context: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        if _MACHINE != "x86_64":  # others let no program read theirs
            return ir.Constant(INT64, 0)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(INT64, []), "llvm.readcyclecounter")
        return builder.call(function, [])

    return types.intp(), codegen


@intrinsic
def _futex(_context: Any, _address: Any, _operation: Any, _value: Any) -> Any:
    """The system call, on the 32 bits at the address, without a time limit."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(INT64, [INT64], var_arg=True)
        function = cgutils.get_or_insert_function(builder.module, kind, "syscall")
        builder.call(function, [ir.Constant(INT64, _SYS_FUTEX), *args, ir.Constant(INT64, 0)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def _sleep_us(_context: Any, _microseconds: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(INT32, [INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "usleep")
        builder.call(function, [builder.trunc(args[0], INT32)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@kernel
def cycles() -> int:
    """The processor's cycle counter, of constant rate; 0 where programs can't read it."""
    return _read_cycles()


@kernel
def look(address: int) -> int:
    """The int64 at the address, which another thread or process may be changing."""
    return _add_at(address, 0)


@kernel
def claim(control: int, phase: int) -> int:
    """The next unit of the phase; at or beyond its number of units when none is left."""
    return _add_at(control + phase * _PHASE_BYTES + _CLAIMED, 1)


@kernel
def finish(control: int, phase: int, units: int, mine: int) -> None:
    """Say that so many units were done here, and wait for the others. What their threads wrote is seen afterwards."""
    done = control + phase * _PHASE_BYTES + _DONE
    sleepers = control + phase * _PHASE_BYTES + _SLEEPERS
    now = _add_at(done, mine) + mine
    if now == units:
        if mine > 0:
            _add_at(control + phase * _PHASE_BYTES + _ENDED, _read_cycles())
            if _add_at(sleepers, 0) > 0:
                _futex(done, _FUTEX_WAKE_PRIVATE, 1 << 30)
        return
    spins = 0
    while now != units:
        spins += 1
        if spins < _SPINS:
            _pause()
        else:
            _add_at(sleepers, 1)
            _futex(done, _FUTEX_WAIT_PRIVATE, now)
            _add_at(sleepers, -1)
        now = _add_at(done, 0)


@kernel
def end_run(control: int) -> None:
    """Nobody needs to wait for a core any more."""
    _add_at(control + _OVER, 1)


@kernel
def nap(control: int) -> bool:
    """Sleep for a moment, unless the run is over. Returns whether it is not."""
    if look(control + _OVER):
        return False
    _sleep_us(_NAP_US)
    return True
