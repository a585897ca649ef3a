"""Everything that is derived from primitives: type promotion, broadcasting, and PyTorch's functions on top of them.

Plain functions over Tensors, over values of a graph that is being built, and over numbers; they reach values only
through primitives. `__all__` are the names that stand in ``jitgrad`` itself, `nn` holds those of
``jitgrad.nn.functional``; what is used only as a method is in the modules.
"""

# ruff: noqa: F403

from jitgrad.functional import (
    arithmetic,
    arrangement,
    complex_numbers,
    elementwise,
    index,
    linalg,
    logic,
    nn,
    queries,
    random,
    reduce,
    scattering,
    shape,
    sorting,
    statistics,
)
from jitgrad.functional.arithmetic import *
from jitgrad.functional.arrangement import *
from jitgrad.functional.autocast import clear_autocast_cache
from jitgrad.functional.complex_numbers import *
from jitgrad.functional.core import result_type
from jitgrad.functional.elementwise import *
from jitgrad.functional.foreach import foreach
from jitgrad.functional.index import *
from jitgrad.functional.linalg import *
from jitgrad.functional.logic import *
from jitgrad.functional.nn import *
from jitgrad.functional.queries import *
from jitgrad.functional.random import *
from jitgrad.functional.reduce import *
from jitgrad.functional.scattering import *
from jitgrad.functional.shape import *
from jitgrad.functional.sorting import *
from jitgrad.functional.statistics import *
from jitgrad.precision import get_float32_matmul_precision, set_float32_matmul_precision

_FAMILIES = (arithmetic, arrangement, complex_numbers, elementwise, logic, reduce, shape, linalg, index, scattering, sorting,
             statistics, random, queries)

__all__ = [*(name for family in _FAMILIES for name in family.__all__), *nn.TOP_LEVEL, "clear_autocast_cache", "foreach",
           "get_float32_matmul_precision", "result_type", "set_float32_matmul_precision"]
