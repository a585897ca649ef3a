"""Attention on a GPU: kernels for tensor cores and for CUDA cores on the PTX interpreter, against what NumPy gives, and their
machine code."""

import numpy as np
import pytest
from cuda_launching import run
from samples import random

from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.dtypes import bfloat16, float16, float32, float64
from jitgrad.ir.op import REGISTRY

UNIT = {"f64": 2e-14, "f32": 1e-6, "bf16": 2 ** -8, "f16": 2 ** -11}
"""What a result in a dtype may be off by, relative to the largest; scores are kept in it on their way through a product."""


def operands(sizes, dtype, mask=None, dropped=False):
    """(heads of q, L, heads of k, S, E, V); a mask of that shape hides a third of the scores, and one row altogether."""
    n, length, groups, source, width, values = sizes
    xs = [random(n, length, width, dtype=dtype, low=-0.6, high=0.6), random(groups, source, width, dtype=dtype, seed=1),
          random(groups, source, values, dtype=dtype, seed=2)]
    if mask is not None:
        added = random(*mask, dtype=dtype, seed=3)
        added[..., 1::3] = -np.inf
        added[..., 0, :] = -np.inf
        xs.append(added)
    if dropped:
        xs += [np.array(2**40 + 5), np.array(2**33 + 1), np.array(0.4, np.float32),
               np.array(1 / 0.6, np.float64 if dtype is float64 else np.float32)]
    return xs


def lowered(name, xs, attrs, aligned=True):
    types = tuple([from_array(x) for x in xs])
    op = REGISTRY[name]
    return lower_cuda(op, types, attrs, (), aligned), op.result_types(types, dict(attrs))


def from_array(x):
    from jitgrad.dtypes import from_numpy
    from jitgrad.ir.types import TensorType

    return TensorType(from_numpy(x.dtype), x.shape)


def check(sizes, dtype=bfloat16, mask=None, dropped=False, causal=False, zero=True, aligned=True, schedule="together"):
    """Both directions against NumPy, which computes in float32 or float64."""
    xs, attrs = operands(sizes, dtype, mask, dropped), {"causal": causal, "zero": zero}
    skew = 0 if aligned else 1
    made = REGISTRY["attention"].eager(*xs, **attrs)
    call, types = lowered("attention", xs, attrs, aligned)
    close(run(call, xs, types, schedule=schedule, skew=skew), made, dtype)
    gs = [random(*made[0].shape, dtype=dtype, seed=4), *xs, *made]
    with np.errstate(invalid="ignore"):
        wanted = REGISTRY["attention_grad"].eager(*gs, **attrs)
    call, types = lowered("attention_grad", gs, attrs, aligned)
    close(run(call, gs, types, schedule=schedule, skew=skew), wanted, dtype)


def close(found, wanted, dtype):
    for x, y in zip(found, wanted, strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64)
        assert x.shape == y.shape
        scale = np.abs(y[np.isfinite(y)]).max(initial=1)
        np.testing.assert_allclose(x, y, rtol=0, atol=3 * UNIT[dtype.short] * scale)
