"""Eager, compiled and float64 agree on random programs; `--programs N` says on how many.

Every compiled run carries out its kernels as plain Python with checked pointers. Some programs run natively as well: those
of which all kernels are known already, or all but one as long as the budget lasts (compiling is what takes the time), and
now and then one whatever it costs.
"""

import pytest
from drawing import FAMILIES, programs
from hypothesis import HealthCheck, given, settings
from programs import check

from jitgrad import config, pipeline
from jitgrad.runtime.build import find_kernel

NATIVE_AT_LEAST = 300
BUDGET = 150
EVERY = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of kernels for all programs of the run; at the end: were enough of them run natively?"""
    folder = tmp_path_factory.mktemp("programs")
    folder.chmod(0o700)
    with config.scope(cache=folder):
        yield Count()


class Count:
    """How many programs there were, and how many of them ran natively."""

    def __init__(self):
        self.programs = self.native = self.compiled = 0

    def chooses(self, graphs):
        """Whether this one runs natively."""
        self.programs += 1
        missing = {key for graph in graphs for key, name in pipeline.build(graph).spec.kernels.items()
                   if find_kernel(key, name) is None}
        affordable = len(missing) <= 1 and self.compiled + len(missing) <= BUDGET
        chosen = affordable or self.programs % EVERY == 0
        self.compiled += len(missing) if affordable else 0
        self.native += chosen
        return chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_compiled_and_float64_agree(family, cache, request):
    count = request.config.getoption("--programs") // len(FAMILIES)

    @settings(max_examples=count, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(programs(family))
    def run(program):
        check(program, cache.chooses)

    run()


def test_enough_of_them_ran_natively(cache, request):
    wanted = min(NATIVE_AT_LEAST, cache.programs // 10)
    assert cache.native >= wanted, f"{cache.native} of {cache.programs}"
