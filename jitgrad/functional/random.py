"""Random tensors: counter-based (Philox4x32-10), so that equal seeds give equal values everywhere.

A draw is named by a key (the seed) and an offset (how many draws came before, in program order); element i of it
depends on these and on i alone: not on threads, on fusion, on eager or compiled. Uniform bits are equal everywhere;
normal values go through log and cos and are equal up to rounding. `device`: where they are made, if that is said. """

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.devices import placed
from jitgrad.dtypes import DType
from jitgrad.errors import ShapeError, complain
from jitgrad.functional.core import Operand, Tensor, as_operand, cast, constant, describe, made_on, require_shape
from jitgrad.functional.elementwise import add, div, mul
from jitgrad.functional.logic import lt
from jitgrad.functional.reduce import cumsum
from jitgrad.functional.shape import section
from jitgrad.functional.sorting import searchsorted, topk
from jitgrad.ir import interpreter
from jitgrad.ops.builders import broadcast, full

__all__ = [
    "Generator", "bernoulli", "default_generator", "get_rng_state", "initial_seed", "manual_seed",
    "multinomial", "normal", "seed", "set_rng_state",
]

_SEED_MASK = (1 << 63) - 1


class Generator:
    """A stream of random draws: its seed, and how many draws it has given (`offset`)."""

    def __init__(self, device: Any = "cpu"):
        self.device = placed(device)
        self.seed_value = 0
        self.offset = 0

    def manual_seed(self, seed: int) -> Generator:
        """Begin again with that seed."""
        self.seed_value, self.offset = int(seed) & _SEED_MASK, 0
        return self

    def seed(self) -> int:
        """Begin again with a seed from the system, which is returned."""
        self.manual_seed(secrets.randbits(63))
        return self.seed_value

    def initial_seed(self) -> int:
        """The seed that the stream began with."""
        return self.seed_value

    def get_state(self) -> tuple[int, int]:
        """Seed and offset."""
        return self.seed_value, self.offset

    def set_state(self, state: Sequence[int]) -> Generator:
        """Go on from what `get_state` gave."""
        self.seed_value, self.offset = int(state[0]), int(state[1])
        return self

    def advance(self, count: int) -> tuple[int, int]:
        """Take the next `count` offsets: (seed, the first of them)."""
        first = self.offset
        self.offset = first + count
        return self.seed_value, first


default_generator = Generator().manual_seed(secrets.randbits(63))


def manual_seed(seed: int) -> Generator:
    """Seed the stream that all functions use which are given no other."""
    return default_generator.manual_seed(seed)


def seed() -> int:
    """Seed that stream from the system."""
    return default_generator.seed()


def initial_seed() -> int:
    """The seed of that stream."""
    return default_generator.initial_seed()


def get_rng_state() -> tuple[int, int]:
    """Where that stream stands."""
    return default_generator.get_state()


def set_rng_state(state: Sequence[int]) -> None:
    """Let that stream go on from there."""
    default_generator.set_state(state)


def next_offset(count: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Key and first offset of the next `count` draws, as 0-d int64 operands. The only place where a program
    takes random numbers from a stream."""
    generator = generator or default_generator
    draw = getattr(interpreter.state.current, "draw", None)
    if draw is not None:                    # while compiling: inputs of the plan
        return draw(generator, count)
    key, offset = generator.advance(count)
    return constant(key, dtypes.int64), constant(offset, dtypes.int64)


def bits(shape: tuple[int, ...], count: int = 1, generator: Generator | None = None) -> list[Tensor]:
    """`count` independent tensors of uniform 32-bit words."""
    key, offset = next_offset(count, generator)
    draws = [ops.random_bits(key, offset, shape=shape)]
    for k in range(1, count):
        draws.append(ops.random_bits(key, ops.add(offset, constant(k, dtypes.int64)), shape=shape))
    return draws


# distributions as functions of bits

_SIGNIFICANT_BITS = {"f16": 11, "bf16": 8, "f32": 24}


def _unit(words: Tensor, dtype: DType) -> Tensor:
    """Uniform words as floats in [0, 1), as fine as 32 bits and `dtype` allow; exact."""
    kept = _SIGNIFICANT_BITS.get(dtype.short, 32)
    if kept < 32:
        words = ops.shift_right(words, full(words.shape, 32 - kept, dtypes.uint32))
    return ops.mul(ops.cast(words, dtype=dtype), full(words.shape, 2.0 ** -kept, dtype))


def _uniform(shape: tuple[int, ...], dtype: DType, generator: Generator | None) -> Tensor:
    if dtype is not dtypes.float64:
        return _unit(bits(shape, 1, generator)[0], dtype)
    high, low = bits(shape, 2, generator)
    coarse = ops.cast(ops.shift_right(high, full(shape, 5, dtypes.uint32)), dtype=dtype)
    fine = ops.cast(ops.shift_right(low, full(shape, 6, dtypes.uint32)), dtype=dtype)
    joined = ops.add(ops.mul(coarse, full(shape, 2.0 ** 26, dtype)), fine)
    return ops.mul(joined, full(shape, 2.0 ** -53, dtype))


def _standard_normal(shape: tuple[int, ...], dtype: DType, generator: Generator | None) -> Tensor:
    """Box and Muller's transform (1958) of two uniform draws."""
    wide = dtype if dtype is dtypes.float64 else dtypes.float32
    first, second = bits(shape, 2, generator)
    scale, half = full(shape, 2.0 ** -32, wide), full(shape, 2.0 ** -33, wide)
    above_zero = ops.add(ops.mul(ops.cast(first, dtype=wide), scale), half)
    radius = ops.sqrt(ops.mul(full(shape, -2.0, wide), ops.log(above_zero)))
    angle = ops.mul(_unit(second, wide), full(shape, 2.0 * math.pi, wide))
    return cast(ops.mul(radius, ops.cos(angle)), dtype)


def _integers(low: int, high: int, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Uniform int64 in [low, high): a 32-bit word times the span, its upper half; 63 bits modulo wider spans."""
    span = high - low
    require_shape("randint", span > 0, f"the range [{low}, {high}) is empty")
    if span <= 1 << 31:
        words = ops.cast(bits(shape, 1, generator)[0], dtype=dtypes.int64)
        scaled = ops.mul(words, full(shape, span, dtypes.int64))
        drawn = ops.shift_right(scaled, full(shape, 32, dtypes.int64))
    else:
        drawn = ops.remainder(_words63(shape, generator), full(shape, span, dtypes.int64))
    return ops.add(drawn, full(shape, low, dtypes.int64)) if low else drawn


def _words63(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Uniform non-negative int64."""
    high, low = [ops.cast(w, dtype=dtypes.int64) for w in bits(shape, 2, generator)]
    shifted = ops.shift_left(ops.bitwise_and(high, full(shape, (1 << 31) - 1, dtypes.int64)),
                             full(shape, 32, dtypes.int64))
    return ops.bitwise_or(shifted, low)


# random tensors by shape

def uniform(shape: tuple[int, ...], low: Operand = 0.0, high: Operand = 1.0, dtype: DType | None = None,
            generator: Generator | None = None, device: Any = None) -> Tensor:
    """Uniform floats in [low, high)."""
    drawn = made_on(device, _uniform, tuple(shape), dtype or dtypes.get_default_dtype(), generator or default_generator)
    if type(low) is float and low == 0.0 and type(high) is float and high == 1.0:
        return drawn
    return add(mul(drawn, high - low), low)


def standard_normal(shape: tuple[int, ...], dtype: DType | None = None, generator: Generator | None = None,
                    device: Any = None) -> Tensor:
    """Normal floats of mean 0 and deviation 1."""
    return made_on(device, _standard_normal, tuple(shape), dtype or dtypes.get_default_dtype(),
                   generator or default_generator)


def normal(mean: Operand, std: Operand = 1.0, size: Sequence[int] | None = None, *, dtype: DType | None = None,
           generator: Generator | None = None, device: Any = None) -> Tensor:
    """Normal floats: of shape `size` with numbers `mean` and `std`, or one for each element of tensors."""
    given = [x for x in (mean, std) if hasattr(x, "shape")]
    if size is None:
        require_shape("normal", len(given) > 0, "give a size, or mean or std as a tensor")
        template = add(mean, std)
        shape, dtype, device = template.shape, dtype or template.dtype, template.device
    else:
        shape = tuple(size)
    return add(mul(standard_normal(shape, dtype, generator, device), std), mean)


def integers(low: int, high: int, shape: Sequence[int], dtype: DType = dtypes.int64,
             generator: Generator | None = None, device: Any = None) -> Tensor:
    """Uniform integers in [low, high)."""
    return made_on(device, _integers_as, int(low), int(high), tuple(shape), dtype, generator or default_generator)


def _integers_as(low: int, high: int, shape: tuple[int, ...], dtype: DType, generator: Generator) -> Tensor:
    return cast(_integers(low, high, shape, generator), dtype)


def permutation(n: int, dtype: DType = dtypes.int64, generator: Generator | None = None, device: Any = None) -> Tensor:
    """The numbers 0 … n - 1 in random order: that of as many random 63-bit words."""
    return made_on(device, _permutation, n, dtype, generator or default_generator)


def _permutation(n: int, dtype: DType, generator: Generator) -> Tensor:
    _, order = ops.sort(_words63((n,), generator), axis=0, descending=False, stable=True)
    return cast(order, dtype)


def exponential(shape: tuple[int, ...], rate: Operand = 1.0, dtype: DType | None = None,
                generator: Generator | None = None, device: Any = None) -> Tensor:
    """Exponentially distributed floats above 0."""
    dtype = dtype or dtypes.get_default_dtype()
    drawn = made_on(device, _exponential, tuple(shape), dtype if dtype is dtypes.float64 else dtypes.float32,
                    generator or default_generator)
    return cast(div(drawn, rate), dtype)


def _exponential(shape: tuple[int, ...], wide: DType, generator: Generator) -> Tensor:
    words = bits(shape, 1, generator)[0]
    upper = ops.cast(ops.shift_right(words, full(words.shape, 9, dtypes.uint32)), dtype=wide)
    between = ops.mul(ops.add(upper, full(words.shape, 0.5, wide)), full(words.shape, 2.0 ** -23, wide))
    return ops.neg(ops.log(between))


def keep_mask(shape: tuple[int, ...], p: Operand, generator: Generator | None = None, device: Any = None) -> Tensor:
    """True with probability ``1 - p``: what dropout keeps."""
    return made_on(device, _keep_mask, tuple(shape), p, generator or default_generator)


def _keep_mask(shape: tuple[int, ...], p: Operand, generator: Generator) -> Tensor:
    drawn = _uniform(shape, dtypes.float32, generator)
    return ops.ge(drawn, broadcast(as_operand(p, dtypes.float32), drawn.shape))


# random tensors like others

def bernoulli(input: Tensor, p: float | None = None, *, generator: Generator | None = None) -> Tensor:
    """1 with the probability that `input` gives for each element (or `p` for all), otherwise 0."""
    chance = input if p is None else as_operand(p, dtypes.get_default_dtype())
    wide = dtypes.float64 if chance.dtype is dtypes.float64 else dtypes.float32
    drawn = uniform(tuple(input.shape), dtype=wide, generator=generator, device=input.device)
    return cast(lt(drawn, cast(chance, wide)), input.dtype)


def multinomial(input: Tensor, num_samples: int, replacement: bool = False, *,
                generator: Generator | None = None) -> Tensor:
    """Indices (int64) drawn with the weights in the last dimension of `input`. Without replacement: the largest
    ratios of weights to exponential draws (Efraimidis and Spirakis 2006); with it: by the cumulative weights."""
    if len(input.shape) not in (1, 2) or input.dtype.category != "f":
        raise complain(ShapeError, "multinomial", f"expected weights in 1 or 2 dimensions, got {describe(input)}")
    n = input.shape[-1]
    wide = dtypes.float64 if input.dtype is dtypes.float64 else dtypes.float32
    weights = cast(input, wide)
    if not replacement:
        require_shape("multinomial", num_samples <= n, f"cannot draw {num_samples} of {n} without replacement")
        keys = ops.div(weights, exponential(tuple(weights.shape), 1.0, wide, generator, input.device))
        return topk(keys, num_samples).indices
    cumulative = cumsum(weights, -1)
    total = section(cumulative, len(input.shape) - 1, n - 1, n)
    drawn = uniform((*input.shape[:-1], num_samples), dtype=wide, generator=generator, device=input.device)
    places = mul(drawn, total)
    last = full(places.shape, n - 1, dtypes.int64)
    return ops.minimum(searchsorted(cumulative, places, right=True), last)
