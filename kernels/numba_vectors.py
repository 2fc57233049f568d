"""Vectors of float32 as values of numba, for kernels that are to keep their sums in registers.

Left to itself LLVM vectorises a loop over channels only with checks for overlap around every point, and keeps the sums
in memory. Beware while you change this file: numba renews its code on disk when the file of a kernel changes, not when
this one does.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, overload, register_model


class Vector(types.Type):
    """`width` float32 side by side."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Vector({width})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.FloatType(), kind.width))


def _pointer(context: Any, builder: Any, kind: Any, array: Any, offset: Any, to: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), to.as_pointer())


def _declared(builder: Any, name: str, kind: Any) -> Any:
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@intrinsic(prefer_literal=True)
def zeros(typing: Any, width: Any) -> Any:
    """zeros(width) -> Vector; `width` a constant."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return Vector(width.literal_value)(width), generate


@intrinsic
def load(typing: Any, array: Any, offset: Any, like: Any) -> Any:
    """load(array, offset, like) -> Vector from `offset` on, of the width of the vector `like`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        return builder.load(_pointer(context, builder, array, values[0], values[1], kind), align=4)

    return like(array, types.int64, like), generate


@intrinsic
def store(typing: Any, array: Any, offset: Any, vector: Any) -> Any:
    """store(array, offset, vector): array[offset : offset + width] = vector."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.store(values[2], _pointer(context, builder, array, values[0], values[1], values[2].type), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), generate


@intrinsic
def add_scaled(typing: Any, total: Any, scale: Any, vector: Any) -> Any:
    """add_scaled(total, scale, vector) -> total + scale * vector, rounded once where the processor can."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        base, factor, vector = values
        kind, nothing = vector.type, ir.Constant(vector.type, ir.Undefined)
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
        first = builder.insert_element(nothing, factor, ir.Constant(ir.IntType(32), 0))
        factors = builder.shuffle_vector(first, nothing, lanes)
        return builder.fadd(base, builder.fmul(factors, vector, flags=("contract",)), flags=("contract",))

    return total(total, types.float32, vector), generate


@intrinsic
def _sum(typing: Any, one: Any, other: Any) -> Any:
    return one(one, other), lambda context, builder, signature, values: builder.fadd(*values)


@intrinsic
def _difference(typing: Any, one: Any, other: Any) -> Any:
    return one(one, other), lambda context, builder, signature, values: builder.fsub(*values)


@intrinsic
def _product(typing: Any, one: Any, other: Any) -> Any:
    return one(one, other), lambda context, builder, signature, values: builder.fmul(*values)


def _both_vectors(one: Any, other: Any) -> bool:
    return isinstance(one, Vector) and isinstance(other, Vector)


@overload(operator.add)
def _add(one, other):
    return (lambda one, other: _sum(one, other)) if _both_vectors(one, other) else None


@overload(operator.sub)
def _subtract(one, other):
    return (lambda one, other: _difference(one, other)) if _both_vectors(one, other) else None


@overload(operator.mul)
def _multiply(one, other):
    return (lambda one, other: _product(one, other)) if _both_vectors(one, other) else None


@intrinsic
def below(typing: Any, one: Any, other: Any) -> Any:
    """below(one, other) -> 1 where one < other, 0 elsewhere and for NaN."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = values[0].type
        return builder.select(builder.fcmp_ordered("<", *values), ir.Constant(kind, [1.0] * kind.count), kind(None))

    return one(one, other), generate


@intrinsic
def keep(typing: Any, vector: Any, where: Any) -> Any:
    """keep(vector, where) -> vector where `where` is above 0, 0 elsewhere, be it NaN there."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        nothing = values[0].type(None)
        return builder.select(builder.fcmp_ordered(">", values[1], nothing), values[0], nothing)

    return vector(vector, where), generate


@intrinsic
def floor(typing: Any, vector: Any) -> Any:
    """floor(vector) -> the whole numbers below."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = values[0].type
        function = _declared(builder, f"llvm.floor.v{kind.count}f32", ir.FunctionType(kind, [kind]))
        return builder.call(function, values)

    return vector(vector), generate


@intrinsic
def ones(typing: Any, like: Any) -> Any:
    """ones(like) -> Vector of the width of the vector `like`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return ir.Constant(values[0].type, [1.0] * values[0].type.count)

    return like(like), generate


@intrinsic
def dot(typing: Any, one: Any, other: Any) -> Any:
    """dot(one, other) -> the sum of their products, in an order fixed by the width."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        products, real = builder.fmul(*values), ir.FloatType()
        kind = ir.FunctionType(real, [real, products.type])
        reduce = _declared(builder, f"llvm.vector.reduce.fadd.v{products.type.count}f32", kind)
        return builder.call(reduce, [ir.Constant(real, 0.0), products], fastmath=("reassoc",))

    return types.float32(one, other), generate


@intrinsic
def fetch(typing: Any, array: Any, offset: Any) -> Any:
    """fetch(array, offset): a hint that array[offset] is about to be read; harmless beyond its end."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, array, values[0], values[1], ir.IntType(8))
        whole = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, whole, whole, whole])
        hints = [ir.Constant(whole, number) for number in (0, 3, 1)]  # to read, to be kept, data
        builder.call(_declared(builder, "llvm.prefetch.p0", kind), [pointer, *hints])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate
