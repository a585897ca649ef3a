"""The benchmarks of a GPU, in tiny sizes on the stand-in, with PyTorch on the CPU where it is installed: that every case
runs, that results agree, and that a case that fails or ends its process stops no other."""

import json
import sys
import time

import pytest

from benchmarks import gpu
from benchmarks.gpu import child, jobs as listed
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.jobs import FAMILIES, Job, jobs, tables

pytestmark = pytest.mark.usefixtures("kernels_of_module")
SMALL = {job.key: job for job in jobs(small=True)}


@pytest.fixture
def bench(executing):
    return Bench(torch_device="cpu", seconds=0.0, repeats=1, small=True, cache=1 << 10)


@pytest.mark.parametrize("key", SMALL)
def test_everything_runs(key, bench):
    job = SMALL[key]
    t=time.time()
    result = job.case.run(bench)
    print(key, time.time()-t)
    assert result["failed"] == {} and "jitgrad" in result["seconds"]
    print(*tables({job.family: {job.case.name: result}}))
