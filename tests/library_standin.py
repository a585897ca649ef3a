"""What the stand-ins for libraries of NVIDIA's have in common, for tests: functions in C that methods carry out, and how
results on a GPU are checked."""

import itertools
from ctypes import CFUNCTYPE, c_int

import numpy as np

import jitgrad as jg

RANDOM = np.random.default_rng(0)
TOLERANCE = {jg.float64: 1e-13, jg.float32: 1e-6, jg.bfloat16: 2 ** -8, jg.float16: 2 ** -11}


def random(*shape, dtype=jg.float32):
    return jg.tensor(RANDOM.uniform(-2, 2, shape)).to(dtype)


def check(function, *operands, tolerance=None):
    """The result on a GPU beside that in float64."""
    with jg.no_grad():
        found = function(*[x.cuda() for x in operands])
        wanted = getattr(function, "function", function)(*[x.double() for x in operands])
    assert found.dtype is operands[0].dtype and found.shape == wanted.shape
    limit = tolerance or TOLERANCE[found.dtype]
    np.testing.assert_allclose(found.double().cpu().numpy(), wanted.numpy(), rtol=0, atol=limit * wanted.abs().max().item())


class Refused(Exception):
    """What a function of a stand-in answers with: a status."""


class LibraryStandIn:
    """The functions that `prototypes` declares: `_name` of a subclass carries out `name`. One in `fail` gives the status
    that is there, once; where a method raises, the problem is kept in `problems` and the function gives `error`. `things`
    are what there are handles for."""

    def __init__(self, standin, prototypes, error, first_handle):
        self.standin, self.error = standin, error
        self.fail, self.asked, self.things, self.problems = {}, [], {}, []
        self._numbers = itertools.count(first_handle)
        for name, kinds in prototypes.items():
            setattr(self, name, CFUNCTYPE(c_int, *kinds)(self._guarded(name)))

    def _guarded(self, name):
        function = getattr(self, f"_{name}")

        def call(*arguments):
            try:
                code = self.fail.pop(name, 0)
                if not code:
                    function(*arguments)
                return code
            except Refused as refused:
                return refused.args[0]
            except BaseException as problem:                    # ctypes would print and forget it
                self.problems.append(problem)
                return self.error

        return call

    def _put(self, out, thing):
        out[0] = next(self._numbers)
        self.things[out[0]] = thing
