"""What the stand-in for cuDNN knows of graphs of operations, for tests: `SETTABLE`, `check` and `evaluate`.

The operations are those that attention is made of: elementwise ones, products, reductions and transposes of tensors of four
dimensions. `check` has the rules of the header, cudnn_graph.h, about their sizes and types; `evaluate` carries them out with
NumPy in float64, and rounds every tensor to its type."""

import itertools
import math

import ml_dtypes
import numpy as np

BAD_PARAM, SHAPES_DIFFER = 2000, 2008

# CUDNN_TYPE_…, CUDNN_DATA_…
DATA_TYPE, INT64, POINTWISE_MODE, DESCRIPTOR, REDUCTION = 1, 3, 14, 15, 18
F32, F16, I32, BF16, BOOL = 0, 2, 4, 9, 11
TYPES = {F32: np.dtype(np.float32), F16: np.dtype(np.float16), I32: np.dtype(np.int32), BF16: np.dtype(ml_dtypes.bfloat16),
         BOOL: np.dtype(bool)}

ONE_PART = (DESCRIPTOR, 1)
SETTABLE = {
    0: {0: (POINTWISE_MODE, 1), 1: (DATA_TYPE, 1), 9: (INT64, 1)},                                   # POINTWISE
    13: dict.fromkeys((750, 751, 752, 753, 758), ONE_PART),                                          # OPERATION_POINTWISE
    18: {1500: (DATA_TYPE, 1)},                                                                      # MATMUL
    19: dict.fromkeys((1520, 1521, 1522, 1523), ONE_PART),                                           # OPERATION_MATMUL
    21: {1600: (REDUCTION, 1), 1601: (DATA_TYPE, 1)},                                                # REDUCTION
    22: dict.fromkeys((1610, 1611, 1612), ONE_PART),                                                 # OPERATION_REDUCTION
    31: dict.fromkeys((2200, 2201), ONE_PART),                                                       # OPERATION_RESHAPE
}
OPTIONAL = {0: {9}, 13: {752, 758}}
WHAT = {13: (750, 0), 19: (1523, 18), 22: (1612, 21)}
"""Where an operation has what it does, and the kind of that descriptor."""
READ = {13: (751, 752, 758), 19: (1520, 1521), 22: (1610,), 31: (2200,)}
WRITTEN = {13: 753, 19: 1522, 22: 1611, 31: 2201}

GEN_INDEX, BINARY_SELECT, CMP_GE = 501, 601, 303
ELEMENTWISE = {0: np.add, 1: np.multiply, 6: np.divide, 9: np.subtract, 13: np.exp, 15: np.log, CMP_GE: np.greater_equal}
REDUCTIONS = {0: np.add, 3: np.maximum}


def operands(operation):
    """The tensors that it reads, and the one that it makes."""
    return [operation.attributes.get(k) for k in READ[operation.kind]], operation[WRITTEN[operation.kind]]


def check(operation, require):
    """That its parts are what they have to be."""
    read, made = operands(operation)
    require(all(t.kind == 17 and len(t[902]) == 4 for t in (*read, made) if t is not None))
    if operation.kind in WHAT:
        place, kind = WHAT[operation.kind]
        require(operation[place].kind == kind)
    {13: _check_elementwise, 19: _check_product, 22: _check_reduction, 31: _check_reshape}[operation.kind](
        operation, *read, made, require)


def _check_elementwise(operation, x, b, t, made, require):
    what = operation[750]
    mode = what[0]
    require(mode in (*ELEMENTWISE, GEN_INDEX, BINARY_SELECT))
    require((t is not None) == (mode == BINARY_SELECT) and (9 in what.attributes) == (mode == GEN_INDEX))
    require((b is None) == (mode in (13, 15, GEN_INDEX)))
    require((what[1] == BOOL) == (mode == CMP_GE) == (made[901] == BOOL) and (made[901] == I32) == (mode == GEN_INDEX))
    require(t is None or t[901] == BOOL)
    fits = [all(m in (1, n) for m, n in zip(other[902], made[902], strict=True)) for other in (x, b, t) if other is not None]
    require(all(fits) and made[902] == x[902], SHAPES_DIFFER)


def _check_product(operation, a, b, made, require):
    require(operation[1523][1500] == F32 and a[901] in (F16, BF16, F32))
    (*batch, m, k), (*shared, inner, n) = a[902], b[902]
    require(k == inner and made[902] == [*batch, m, n], SHAPES_DIFFER)
    require(all(some % one == 0 for some, one in zip(batch, shared, strict=True)), SHAPES_DIFFER)


def _check_reduction(operation, x, made, require):
    require(operation[1612][1601] == F32 and operation[1612][1600] in REDUCTIONS)
    fits = [m in (1, n) or (k == 1 and n % m == 0) for k, (m, n) in enumerate(zip(made[902], x[902], strict=True))]
    require(all(fits) and made[902] != x[902], SHAPES_DIFFER)


def _check_reshape(operation, x, made, require):
    require(math.prod(x[902]) == math.prod(made[902]), SHAPES_DIFFER)


def check_graph(operations, require):
    """What is virtual is made before it is read, once; results are in memory, and whatever is read is there."""
    known = set()
    for operation in operations:
        read, made = operands(operation)
        require(all(t[906] in known for t in read if t is not None and t.is_virtual))
        require(made[906] not in known and not made.is_value)
        known.add(made[906])
    wanted = {t[906] for operation in operations for t in operands(operation)[0] if t is not None}
    require(all(operands(o)[1][906] in wanted for o in operations if operands(o)[1].is_virtual))


def tensors(operations):
    """All that are in memory, by number, and whether they are made."""
    found = {}
    for operation in operations:
        read, made = operands(operation)
        for t in (*read, made):
            if t is not None and not t.is_virtual:
                found[t[906]] = t
    return found, {operands(operation)[1][906] for operation in operations}


def evaluate(operations, arrays):
    """Carry them out in order. `arrays`: those in memory by number, to which the results are added."""
    with np.errstate(all="ignore"):
        for operation in operations:
            read, made = operands(operation)
            given = [None if t is None else arrays[t[906]].astype(np.float64) if t[901] != BOOL else arrays[t[906]]
                     for t in read]
            computed = {13: _elementwise, 19: _product, 22: _reduction, 31: _reshape}[operation.kind](
                operation, given, read, made)
            arrays[made[906]] = np.broadcast_to(computed, made[902]).astype(TYPES[made[901]])


def _elementwise(operation, given, read, made):
    mode = operation[750][0]
    if mode == GEN_INDEX:
        return np.indices(made[902])[operation[750][9]]
    if mode == BINARY_SELECT:
        return np.where(given[2], given[0], given[1])
    return ELEMENTWISE[mode](*[x for x in given if x is not None])


def _product(operation, given, read, made):
    a, b = given
    return a @ np.repeat(b, a.shape[1] // b.shape[1], axis=1)


def _reduction(operation, given, read, made):
    """Over whole dimensions, and over runs of heads."""
    (x,), reduce = given, REDUCTIONS[operation[1612][1600]].reduce
    axes = tuple([k for k, n in enumerate(made[902]) if n == 1 != x.shape[k]])
    x = reduce(x, axis=axes, keepdims=True) if axes else x
    return reduce(x.reshape(x.shape[0], made[902][1], -1, *x.shape[2:]), axis=2)


def _reshape(operation, given, read, made):
    """The same memory, with the sizes and strides of what is made."""
    memory = np.empty(extent(read[0]))
    laid_out(memory, read[0])[...] = given[0]
    return laid_out(memory, made)


def pitches(sizes):
    """Of a dense array."""
    return [math.prod(sizes[k + 1:]) for k in range(len(sizes))]


def extent(tensor):
    """Elements of memory from the first one of a tensor to the last one."""
    return 1 + sum((n - 1) * pitch for n, pitch in zip(tensor[902], tensor[903], strict=True))


def laid_out(memory, tensor):
    """The array of a tensor whose elements lie in `memory`, perhaps with gaps; no two are in one place."""
    assert memory.size >= extent(tensor)
    axes = sorted([(pitch, n) for n, pitch in zip(tensor[902], tensor[903], strict=True) if n > 1])
    assert all(pitch * n <= more for (pitch, n), (more, _) in itertools.pairwise(axes))
    return np.lib.stride_tricks.as_strided(memory, tensor[902], [pitch * memory.itemsize for pitch in tensor[903]])
