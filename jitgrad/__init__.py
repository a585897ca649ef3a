"""jitgrad: a JIT-compiling deep-learning array framework in Python.

    import jitgrad as jg

    @jg.compile
    def step(x, y):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

Names and meaning are PyTorch's. A traced function becomes one graph, the graph a few kernels, a step one native call.
"""

from math import e, inf, nan, pi

from jitgrad import amp, autograd, backends, config, cuda, data, dtypes, errors, func, nn, optim, utils
from jitgrad.amp import (
    autocast,
    get_autocast_dtype,
    is_autocast_cache_enabled,
    is_autocast_enabled,
    set_autocast_cache_enabled,
    set_autocast_dtype,
    set_autocast_enabled,
)
from jitgrad.autograd import (
    enable_grad,
    inference_mode,
    is_grad_enabled,
    is_inference_mode_enabled,
    no_grad,
    set_grad_enabled,
)
from jitgrad.compile import compare, compile, verify
from jitgrad.creation import *
from jitgrad.devices import device, get_default_device, set_default_device
from jitgrad.dtypes import (
    DType as dtype,
    bfloat16,
    bool_ as bool,
    can_cast,
    complex64,
    complex64 as cfloat,
    complex128,
    complex128 as cdouble,
    finfo,
    float16,
    float16 as half,
    float32,
    float32 as float,
    float64,
    float64 as double,
    get_default_dtype,
    iinfo,
    int8,
    int16,
    int16 as short,
    int32,
    int32 as int,
    int64,
    int64 as long,
    promote as promote_types,
    set_default_dtype,
    uint8,
    uint32,
)
from jitgrad.functional import *
from jitgrad.functional.assigning import *
from jitgrad.making import *
from jitgrad.process import *
from jitgrad.serialization import load, save
from jitgrad.shapes import Size
from jitgrad.tensor import Tensor, is_tensor

newaxis = None
__version__ = "0.1.0"
