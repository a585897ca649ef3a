"""Every primitive: what it means, as one record each (`jitgrad.ir.Op`), one file per family.

``ops.NAME(*operands, **attributes)`` carries one out by the current interpreter. Primitives are strict: they never
broadcast, never promote and have no defaults; axes count from the front.
"""

# ruff: noqa: F401
from jitgrad.ops.builders import (
                                  as_type_of,
                                  broadcast,
                                  conjugate,
                                  expand_dims,
                                  full,
                                  full_like,
                                  ones_like,
                                  sum_to,
                                  times,
                                  zero_of,
                                  zeros_like,
)
from jitgrad.ops.contraction import (
                                  convolution,
                                  convolution_input_grad,
                                  convolution_output_shape,
                                  convolution_weight_grad,
                                  matmul,
                                  transposed,
)
from jitgrad.ops.elementwise import (
                                  abs,
                                  acos,
                                  acosh,
                                  add,
                                  asin,
                                  asinh,
                                  atan,
                                  atan2,
                                  atanh,
                                  bitwise_and,
                                  bitwise_not,
                                  bitwise_or,
                                  bitwise_xor,
                                  cast,
                                  ceil,
                                  complex,
                                  conj,
                                  copysign,
                                  cos,
                                  cosh,
                                  digamma,
                                  div,
                                  eq,
                                  erf,
                                  erfc,
                                  erfinv,
                                  exp,
                                  exp2,
                                  expm1,
                                  floor,
                                  floor_divide,
                                  fmod,
                                  ge,
                                  gt,
                                  imag,
                                  isfinite,
                                  isinf,
                                  isnan,
                                  le,
                                  lgamma,
                                  log,
                                  log1p,
                                  log2,
                                  log10,
                                  logical_not,
                                  lt,
                                  maximum,
                                  minimum,
                                  mul,
                                  ne,
                                  neg,
                                  polygamma,
                                  pow,
                                  real,
                                  reciprocal,
                                  relu,
                                  remainder,
                                  round,
                                  rsqrt,
                                  shift_left,
                                  shift_right,
                                  sigmoid,
                                  sign,
                                  sin,
                                  sinh,
                                  sqrt,
                                  sub,
                                  tan,
                                  tanh,
                                  trunc,
                                  where,
)
from jitgrad.ops.foreach import foreach
from jitgrad.ops.gradient import apply_rule, operand_gradients, reads, reverse
from jitgrad.ops.index import gather, index_add, index_update, scatter, scatter_add, take
from jitgrad.ops.movement import (
                                  broadcast_to,
                                  concat,
                                  flip,
                                  inverse_permutation,
                                  pad,
                                  permute,
                                  reshape,
                                  slice,
                                  slice_update,
)
from jitgrad.ops.record import silence_numpy, type_of
from jitgrad.ops.reduction import argmax, argmin, max, min, prod, repeat_back, sum
from jitgrad.ops.scan import cumprod, cumsum
from jitgrad.ops.sort import sort
from jitgrad.ops.source import constant, iota, random_bits
from jitgrad.ops.window import avg_pool2d, avg_pool2d_grad, max_pool2d, max_pool2d_gather, max_pool2d_grad
