"""What the stand-ins for libraries of NVIDIA's have in common, for tests: functions in C that methods carry out."""

import itertools
from ctypes import CFUNCTYPE, c_int


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
