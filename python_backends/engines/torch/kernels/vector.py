"""Sixteen floats at once, for kernels: a numba type with the few operations they need.

LLVM turns one `Float32x16` into the registers that the machine has: one of AVX-512, two of AVX2, four of NEON. Addresses
are integers (bytes), loads and stores need no alignment.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from python_backends.engines.torch.kernels.compiler import has_wide_registers, kernel

LANES = 16
LANE_BYTES = 4 * LANES

FLOAT = ir.FloatType()
INT32 = ir.IntType(32)
INT64 = ir.IntType(64)
POINTER = ir.PointerType()
VECTOR = ir.VectorType(FLOAT, LANES)
_INTS = ir.VectorType(INT32, LANES)


class _Float32x16(types.Type):
    def __init__(self) -> None:
        super().__init__("Float32x16")


Float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager: Any, of: Any) -> None:
        super().__init__(manager, of, VECTOR)


# --- what kernels and the emitters of tile.py share ---


def call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """Call an LLVM intrinsic or C function by name."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", VECTOR, [a, b, c])


def emit_broadcast(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def constant(value: float) -> Any:
    return ir.Constant(VECTOR, [float(np.float32(value))] * LANES)


# --- operations ---


@intrinsic
def load(_context: Any, _address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], POINTER), typ=VECTOR, align=4)

    return Float32x16(types.intp), codegen


@intrinsic
def store(_context: Any, _address: Any, _vector: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], POINTER), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, Float32x16), codegen


@intrinsic
def load_scalar(_context: Any, _address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], POINTER), typ=FLOAT, align=4)

    return types.float32(types.intp), codegen


@intrinsic
def store_scalar(_context: Any, _address: Any, _value: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], POINTER), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


@intrinsic
def broadcast(_context: Any, _scalar: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit_broadcast(builder, args[0])

    return Float32x16(types.float32), codegen


@intrinsic
def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """a * b + c, rounded once."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit_fma(builder, *args)

    return Float32x16(Float32x16, Float32x16, Float32x16), codegen


def _binary(name: str) -> Any:
    @intrinsic
    def operation(_context: Any, _a: Any, _b: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args)

        return Float32x16(Float32x16, Float32x16), codegen

    return operation


_add, _sub, _mul, _div = _binary("fadd"), _binary("fsub"), _binary("fmul"), _binary("fdiv")


def _overload_operator(function: Any, operation: Any) -> None:
    @overload(function, inline="always")
    def _overloaded(a: Any, b: Any) -> Any:
        def apply(a: Any, b: Any) -> Any:
            return operation(a, b)

        return apply if a is Float32x16 and b is Float32x16 else None


for _function, _operation in ((operator.add, _add), (operator.sub, _sub), (operator.mul, _mul), (operator.truediv, _div)):
    _overload_operator(_function, _operation)


@intrinsic
def add_in_order(_context: Any, _a: Any, _b: Any) -> Any:
    """a + b that compilers put in no other order: `+` in a loop may be summed differently in each place it becomes part of."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fadd(*args, flags=("contract",))

    return Float32x16(Float32x16, Float32x16), codegen


@intrinsic
def maximum(_context: Any, _a: Any, _b: Any) -> Any:
    """b where a is not greater: a NaN in b stays."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return Float32x16(Float32x16, Float32x16), codegen


@intrinsic
def keep_lanes(_context: Any, _vector: Any, _first: Any, _end: Any) -> Any:
    """-inf in the lanes outside first .. end - 1."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        vector, first, end = args
        lanes = ir.Constant(_INTS, list(range(LANES)))
        first, end = (emit_broadcast(builder, builder.trunc(bound, INT32)) for bound in (first, end))
        inside = builder.and_(builder.icmp_signed(">=", lanes, first), builder.icmp_signed("<", lanes, end))
        return builder.select(inside, vector, constant(-np.inf))

    return Float32x16(Float32x16, types.intp, types.intp), codegen


def _reduction(name: str, *initial: float) -> Any:
    @intrinsic
    def reduce(_context: Any, _vector: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            start = [ir.Constant(FLOAT, value) for value in initial]
            result = call(builder, f"llvm.vector.reduce.{name}.v16f32", FLOAT, [*start, args[0]])
            result.fastmath.add("reassoc")  # in halves; without it, one lane after the other
            return result

        return types.float32(Float32x16), codegen

    return reduce


lane_sum = _reduction("fadd", 0.0)
lane_max = _reduction("fmax")


@intrinsic
def _round(_context: Any, _vector: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return call(builder, "llvm.rint.v16f32", VECTOR, list(args))

    return Float32x16(Float32x16), codegen


def _emit_scale(builder: Any, vector: Any, exponent: Any) -> Any:
    """AVX-512 has it as an instruction."""
    mask, current_rounding = ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(INT32, 4)
    args = [vector, exponent, constant(0.0), mask, current_rounding]
    return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", VECTOR, args)


@intrinsic
def _times_power_of_two(_context: Any, _vector: Any, _exponent: Any) -> Any:
    """vector * 2 ** exponent, for whole exponents and normal vectors and results."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if has_wide_registers():
            return _emit_scale(builder, *args)
        shift = ir.Constant(_INTS, [23] * LANES)
        exponent = builder.shl(builder.fptosi(args[1], _INTS), shift)
        return builder.bitcast(builder.add(builder.bitcast(args[0], _INTS), exponent), VECTOR)

    return Float32x16(Float32x16, Float32x16), codegen


@intrinsic
def _zero_below(_context: Any, _vector: Any, _x: Any, _limit: Any) -> Any:
    """0 in the lanes where x < limit."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        vector, x, limit = args
        return builder.select(builder.fcmp_ordered("<", x, limit), constant(0.0), vector)

    return Float32x16(Float32x16, Float32x16, Float32x16), codegen


def _power_of_two_polynomial() -> tuple[np.float32, ...]:
    """2 ** f for f in [-1/2, 1/2], highest power first: Chebyshev interpolation, relative error below 2e-8."""
    fit = np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])  # type: ignore[no-untyped-call]
    coefficients = fit.convert(kind=np.polynomial.Polynomial).coef
    return tuple(np.float32(c) for c in coefficients[::-1])


_C6, _C5, _C4, _C3, _C2, _C1, _C0 = _power_of_two_polynomial()
_SMALLEST = np.float32(-126.0)
_LARGEST = np.float32(127.0)
_LOG2E = np.float32(np.log2(np.e))


@kernel
def exp2(x: Any) -> Any:
    """2 ** x per lane, for x <= 127; 0 where x < -126, NaN where x is. Relative error below 3e-7."""
    whole = _round(x)
    fraction = x - whole
    result = fma(broadcast(_C6), fraction, broadcast(_C5))
    result = fma(result, fraction, broadcast(_C4))
    result = fma(result, fraction, broadcast(_C3))
    result = fma(result, fraction, broadcast(_C2))
    result = fma(result, fraction, broadcast(_C1))
    result = fma(result, fraction, broadcast(_C0))
    return _zero_below(_times_power_of_two(result, whole), x, broadcast(_SMALLEST))


@kernel
def silu(x: Any) -> Any:
    """x / (1 + e ** -x) per lane."""
    power = exp2(_minimum_largest(x * broadcast(-_LOG2E)))
    return x / (broadcast(np.float32(1.0)) + power)


@kernel
def _minimum_largest(x: Any) -> Any:
    zero = broadcast(np.float32(0.0))
    return zero - maximum(broadcast(-_LARGEST), zero - x)
