"""Everything that is derived from primitives: type promotion, broadcasting, and PyTorch's functions on top of them.

Plain functions over Tensors, over values of a graph that is being built, and over numbers; they reach values only
through primitives. `__all__` are the names that stand in ``jitgrad`` itself, `nn` holds those of
``jitgrad.nn.functional``; what is used only as a method is in the modules.
"""

# ruff: noqa: F403

from jitgrad.functional import elementwise, index, linalg, logic, nn, random, reduce, shape, sorting
from jitgrad.functional.autocast import clear_autocast_cache
from jitgrad.functional.core import result_type
from jitgrad.functional.elementwise import *
from jitgrad.functional.foreach import foreach
from jitgrad.functional.index import *
from jitgrad.functional.linalg import *
from jitgrad.functional.logic import *
from jitgrad.functional.nn import *
from jitgrad.functional.random import *
from jitgrad.functional.reduce import *
from jitgrad.functional.shape import *
from jitgrad.functional.sorting import *
from jitgrad.precision import get_float32_matmul_precision, set_float32_matmul_precision

__all__ = [*elementwise.__all__, *logic.__all__, *reduce.__all__, *shape.__all__, *linalg.__all__, *index.__all__,
           *sorting.__all__, *random.__all__, *nn.TOP_LEVEL, "clear_autocast_cache", "foreach",
           "get_float32_matmul_precision", "result_type", "set_float32_matmul_precision"]
