"""Vectors of 16 float32 numbers for functions that numba compiles: what LLVM has for them, under names.

A loop over numbers is turned into vectors by a compiler when it can prove that what is written is not what is read, which it
rarely can between addresses. Here they are written down as vectors, and LLVM makes of them what the processor has. Addresses
are whole numbers, as `torch.Tensor.data_ptr` gives them; nothing is checked.

Numbers in memory are of one of two kinds, told by a number of its type: `np.float32(0)` for float32, `np.uint16(0)` for
bfloat16, the upper half of a float32. Reference of what is called: https://llvm.org/docs/LangRef.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from zfabric.backends.hf_transformers.cpu_kernels.available import LANES
from zfabric.backends.hf_transformers.cpu_kernels.compiling import inlined

_FLOAT, _WHOLE, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(16)
_FLOATS, _WHOLES, _HALVES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _WHOLE, _HALF))


class Vector(types.Type):
    """16 numbers of float32."""

    def __init__(self) -> None:
        super().__init__(name="Float32x16")


vector: Final = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@intrinsic
def bytes_of(context: Any, kind: Any) -> Any:
    """Of a number of this kind, in memory."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return ir.Constant(ir.IntType(64), kind.bitwidth // 8)

    return types.int64(kind), generate


@intrinsic
def load(context: Any, address: Any, kind: Any) -> Any:
    """The 16 numbers at an address."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _load(builder, given[0], signature.args[1])

    return vector(types.int64, kind), generate


@intrinsic
def store(context: Any, address: Any, numbers: Any, kind: Any) -> Any:
    """Write 16 numbers, each rounded to the nearest of its kind, to even ones between two."""

    def generate(its: Any, builder: Any, signature: Any, given: Any) -> Any:
        _store(builder, given[0], given[1], signature.args[2])
        return its.get_dummy_value()

    return types.void(types.int64, vector, kind), generate


@intrinsic
def rounded(context: Any, numbers: Any, kind: Any) -> Any:
    """What would be read if they were written."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        if signature.args[1] == types.float32:
            return given[0]
        return _widened(builder, _halves(builder, given[0]))

    return vector(vector, kind), generate


@intrinsic
def splat(context: Any, number: Any) -> Any:
    """A vector of one number."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _splat(builder, given[0])

    return vector(types.float32), generate


@intrinsic
def read(context: Any, address: Any) -> Any:
    """The float32 number at an address."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load(builder.inttoptr(given[0], _FLOAT.as_pointer()))

    return types.float32(types.int64), generate


@intrinsic
def write(context: Any, address: Any, number: Any) -> Any:
    """Write a float32 number."""

    def generate(its: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.store(given[1], builder.inttoptr(given[0], _FLOAT.as_pointer()))
        return its.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def read_whole(context: Any, address: Any) -> Any:
    """The int64 number at an address."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load(builder.inttoptr(given[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), generate


def _of_two(name: str) -> Any:
    @intrinsic
    def operation(context: Any, left: Any, right: Any) -> Any:
        def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
            return getattr(builder, name)(*given)

        return vector(vector, vector), generate

    return operation


add, subtract, multiply, divide = (_of_two(name) for name in ("fadd", "fsub", "fmul", "fdiv"))


def _chosen(sign: str) -> Any:
    @intrinsic
    def operation(context: Any, left: Any, right: Any) -> Any:
        def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.select(builder.fcmp_ordered(sign, *given), *given)

        return vector(vector, vector), generate

    return operation


#: The larger and the smaller of each two; the right one where either is no number.
larger, smaller = _chosen(">"), _chosen("<")


@intrinsic
def multiply_add(context: Any, left: Any, right: Any, added: Any) -> Any:
    """`left * right + added`, rounded once."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _multiply_add(builder, *given)

    return vector(vector, vector, vector), generate


@intrinsic
def total(context: Any, numbers: Any) -> Any:
    """The sum of the 16, in an order of the processor's."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _total(builder, given[0])

    return types.float32(vector), generate


@intrinsic
def largest(context: Any, numbers: Any) -> Any:
    """The largest of the 16."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        function = _function(builder, "llvm.vector.reduce.fmax.v16f32", _FLOAT, _FLOATS)
        return builder.call(function, given)

    return types.float32(vector), generate


@intrinsic
def nearest(context: Any, numbers: Any) -> Any:
    """The nearest whole numbers."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.call(_function(builder, "llvm.nearbyint.v16f32", _FLOATS, _FLOATS), given)

    return vector(vector), generate


@intrinsic
def two_to_the(context: Any, exponents: Any) -> Any:
    """Two to the power of whole numbers between -126 and 127."""

    def generate(_: Any, builder: Any, signature: Any, given: Any) -> Any:
        biased = builder.add(builder.fptosi(given[0], _WHOLES), _constant(127))
        return builder.bitcast(builder.shl(biased, _constant(23)), _FLOATS)

    return vector(vector), generate


@intrinsic
def zeros(context: Any, each: Any) -> Any:
    """A tuple of as many vectors of zeros as the tuple `each` has members."""

    def generate(its: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _tuple(its, builder, signature, [ir.Constant(_FLOATS, [0.0] * LANES)] * each.count)

    return types.UniTuple(vector, each.count)(each), generate


@intrinsic
def load_each(context: Any, each: Any, address: Any, stride: Any) -> Any:
    """A tuple of as many vectors as the tuple `each` has members, whose float32 numbers lie so many bytes apart."""

    def generate(its: Any, builder: Any, signature: Any, given: Any) -> Any:
        addresses = _addresses(builder, given[1:], each.count)
        return _tuple(its, builder, signature, [_load(builder, one, types.float32) for one in addresses])

    return types.UniTuple(vector, each.count)(each, types.int64, types.int64), generate


@intrinsic
def store_each(context: Any, vectors: Any, address: Any, stride: Any) -> Any:
    """Write each vector as float32, so many bytes apart."""

    def generate(its: Any, builder: Any, signature: Any, given: Any) -> Any:
        for index, one in enumerate(_addresses(builder, given[1:], vectors.count)):
            _store(builder, one, builder.extract_value(given[0], index), types.float32)
        return its.get_dummy_value()

    return types.void(vectors, types.int64, types.int64), generate


@intrinsic
def write_totals(context: Any, vectors: Any, address: Any, stride: Any) -> Any:
    """Write the sum of each vector as float32, so many bytes apart."""

    def generate(its: Any, builder: Any, signature: Any, given: Any) -> Any:
        for index, one in enumerate(_addresses(builder, given[1:], vectors.count)):
            found = _total(builder, builder.extract_value(given[0], index))
            builder.store(found, builder.inttoptr(one, _FLOAT.as_pointer()))
        return its.get_dummy_value()

    return types.void(vectors, types.int64, types.int64), generate


def _of_each(operand: Callable[[Any, Any], Any]) -> Any:
    """Each vector of a tuple, and to it added what `operand` makes of its address times one vector."""

    @intrinsic
    def operation(context: Any, sums: Any, numbers: Any, address: Any, stride: Any) -> Any:
        def generate(its: Any, builder: Any, signature: Any, given: Any) -> Any:
            before, factor = given[:2]
            made = []
            for index, one in enumerate(_addresses(builder, given[2:], sums.count)):
                made.append(_multiply_add(builder, factor, operand(builder, one), builder.extract_value(before, index)))
            return _tuple(its, builder, signature, made)

        return sums(sums, vector, types.int64, types.int64), generate

    return operation


#: `sums + numbers * loaded`, of float32 vectors that lie so many bytes apart.
add_products: Final = _of_each(lambda builder, address: _load(builder, address, types.float32))
#: `sums + numbers * read`, of float32 numbers that lie so many bytes apart.
add_multiples: Final = _of_each(
    lambda builder, address: _splat(builder, builder.load(builder.inttoptr(address, _FLOAT.as_pointer())))
)


_LOG2_E: Final = np.float32(1.4426950408889634)
#: The natural logarithm of two in two parts, of which products with small whole numbers are exact.
_LN2_HIGH: Final = np.float32(0.693145751953125)
_LN2_LOW: Final = np.float32(1.428606820309417e-06)
_LEAST: Final = np.float32(-87.0)
_MOST: Final = np.float32(88.0)
#: Of the polynomial that Cephes has for the exponential function of float32 numbers, highest power first.
_P0: Final = np.float32(1.9875691500e-4)
_P1: Final = np.float32(1.3981999507e-3)
_P2: Final = np.float32(8.3334519073e-3)
_P3: Final = np.float32(4.1665795894e-2)
_P4: Final = np.float32(1.6666665459e-1)
_P5: Final = np.float32(5.0000001201e-1)
_ONE: Final = np.float32(1.0)


@inlined
def exponential(numbers: Any) -> Any:
    """e to the power of each, to two units in the last place; of those beyond -87 and 88 what these give."""
    numbers = smaller(splat(_MOST), larger(splat(_LEAST), numbers))
    exponents = nearest(multiply(numbers, splat(_LOG2_E)))
    rest = multiply_add(exponents, splat(-_LN2_HIGH), numbers)
    rest = multiply_add(exponents, splat(-_LN2_LOW), rest)
    made = multiply_add(splat(_P0), rest, splat(_P1))
    made = multiply_add(made, rest, splat(_P2))
    made = multiply_add(made, rest, splat(_P3))
    made = multiply_add(made, rest, splat(_P4))
    made = multiply_add(made, rest, splat(_P5))
    made = add(multiply_add(made, multiply(rest, rest), rest), splat(_ONE))
    return multiply(made, two_to_the(exponents))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    if kind == types.float32:
        return builder.load(builder.inttoptr(address, _FLOATS.as_pointer()), align=4)
    return _widened(builder, builder.load(builder.inttoptr(address, _HALVES.as_pointer()), align=2))


def _store(builder: Any, address: Any, numbers: Any, kind: Any) -> None:
    if kind == types.float32:
        builder.store(numbers, builder.inttoptr(address, _FLOATS.as_pointer()), align=4)
    else:
        builder.store(_halves(builder, numbers), builder.inttoptr(address, _HALVES.as_pointer()), align=2)


def _widened(builder: Any, halves: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(halves, _WHOLES), _constant(16)), _FLOATS)


def _halves(builder: Any, numbers: Any) -> Any:
    """Upper halves of float32 numbers, rounded; one that is no number stays so."""
    bits = builder.bitcast(numbers, _WHOLES)
    odd = builder.and_(builder.lshr(bits, _constant(16)), _constant(1))
    up = builder.add(bits, builder.add(odd, _constant(0x7FFF)))
    missing = builder.fcmp_unordered("uno", numbers, numbers)
    bits = builder.select(missing, _constant(0x7FC00000), up)
    return builder.trunc(builder.lshr(bits, _constant(16)), _HALVES)


def _splat(builder: Any, number: Any) -> Any:
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(_WHOLE, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(_WHOLES, [0] * LANES))


def _multiply_add(builder: Any, left: Any, right: Any, added: Any) -> Any:
    function = _function(builder, "llvm.fma.v16f32", _FLOATS, _FLOATS, _FLOATS, _FLOATS)
    return builder.call(function, [left, right, added])


def _total(builder: Any, numbers: Any) -> Any:
    function = _function(builder, "llvm.vector.reduce.fadd.v16f32", _FLOAT, _FLOAT, _FLOATS)
    return builder.call(function, [ir.Constant(_FLOAT, -0.0), numbers], fastmath=("reassoc",))


def _constant(number: int) -> Any:
    return ir.Constant(_WHOLES, [number] * LANES)


def _function(builder: Any, name: str, result: Any, *given: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, given), name)


def _addresses(builder: Any, given: Any, count: int) -> list[Any]:
    first, stride = given
    found = [first]
    while len(found) < count:
        found.append(builder.add(found[-1], stride))
    return found


def _tuple(context: Any, builder: Any, signature: Any, members: list[Any]) -> Any:
    return context.make_tuple(builder, signature.return_type, members)
