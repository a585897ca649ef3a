"""In-place forms as functions: ``exp_(x)`` is ``x.exp_()``, for those that PyTorch has at its top level or in
``nn.functional``."""

from __future__ import annotations

from jitgrad.functional import activation
from jitgrad.functional.in_place import reading
from jitgrad.functional.methods import TensorMethods as T

__all__ = [
    "abs_",
    "acos_",
    "acosh_",
    "addmv_",
    "arccos_",
    "arccosh_",
    "arcsin_",
    "arcsinh_",
    "arctan_",
    "arctanh_",
    "asin_",
    "asinh_",
    "atan_",
    "atanh_",
    "ceil_",
    "celu_",
    "clamp_",
    "clamp_max_",
    "clamp_min_",
    "clip_",
    "conj_physical_",
    "cos_",
    "cosh_",
    "deg2rad_",
    "elu_",
    "erf_",
    "erfc_",
    "exp2_",
    "exp_",
    "expm1_",
    "fill_",
    "fix_",
    "floor_",
    "frac_",
    "gcd_",
    "hardtanh_",
    "index_put_",
    "lcm_",
    "ldexp_",
    "leaky_relu_",
    "log1p_",
    "log2_",
    "log10_",
    "log_",
    "logit_",
    "nan_to_num_",
    "neg_",
    "negative_",
    "rad2deg_",
    "reciprocal_",
    "relu_",
    "round_",
    "rsqrt_",
    "selu_",
    "sigmoid_",
    "sin_",
    "sinc_",
    "sinh_",
    "sqrt_",
    "square_",
    "tan_",
    "tanh_",
    "threshold_",
    "trunc_",
    "xlogy_",
    "zero_",
]

abs_, acos_, acosh_, addmv_ = T.abs_, T.acos_, T.acosh_, T.addmv_
arccos_, arccosh_, arcsin_, arcsinh_ = T.arccos_, T.arccosh_, T.arcsin_, T.arcsinh_
arctan_, arctanh_, asin_, asinh_ = T.arctan_, T.arctanh_, T.asin_, T.asinh_
atan_, atanh_, ceil_, clamp_ = T.atan_, T.atanh_, T.ceil_, T.clamp_
clamp_max_, clamp_min_, clip_, conj_physical_ = T.clamp_max_, T.clamp_min_, T.clip_, T.conj_physical_
cos_, cosh_, deg2rad_, erf_ = T.cos_, T.cosh_, T.deg2rad_, T.erf_
erfc_, exp2_, exp_, expm1_ = T.erfc_, T.exp2_, T.exp_, T.expm1_
fill_, fix_, floor_, frac_ = T.fill_, T.fix_, T.floor_, T.frac_
gcd_, index_put_, lcm_, ldexp_ = T.gcd_, T.index_put_, T.lcm_, T.ldexp_
log10_, log1p_, log2_, log_ = T.log10_, T.log1p_, T.log2_, T.log_
logit_, nan_to_num_, neg_, negative_ = T.logit_, T.nan_to_num_, T.neg_, T.negative_
rad2deg_, reciprocal_, relu_, round_ = T.rad2deg_, T.reciprocal_, T.relu_, T.round_
rsqrt_, sigmoid_, sin_, sinc_ = T.rsqrt_, T.sigmoid_, T.sin_, T.sinc_
sinh_, sqrt_, square_, tan_ = T.sinh_, T.sqrt_, T.square_, T.tan_
tanh_, trunc_, xlogy_, zero_ = T.tanh_, T.trunc_, T.xlogy_, T.zero_

celu_, elu_, hardtanh_ = reading(activation.celu), reading(activation.elu), reading(activation.hardtanh)
leaky_relu_, selu_, threshold_ = (reading(activation.leaky_relu), reading(activation.selu),
                                  reading(activation.threshold))
