"""Kernels that are compiled in several processes: all results, in order, whatever becomes of the processes."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from jitgrad.codegen.parallel import MOST_PROCESSES, compile_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled in one process elsewhere")

SOURCES = [(f"text {k}" + " " * (k % 7), f"kernel {k}") for k in range(40)]


def compiled_by(text: str, name: str) -> bytes:
    time.sleep(0.005)
    return f"{name}, {text}, {os.getpid()}".encode()


def names(results):
    return [data.decode().split(", ")[0] for data, _ in results]


@pytest.mark.parametrize("processes", [1, 2, 5, 100])
def test_results_come_in_order_from_several_processes(processes):
    here = os.getpid()

    def compile(text: str, name: str) -> bytes:
        if processes > 1 and os.getpid() == here:
            time.sleep(0.05)                        # so that a process that starts late finds something to do
        return compiled_by(text, name)

    results = compile_all(compile, SOURCES, processes)
    assert names(results) == [name for _, name in SOURCES]
    assert all(seconds >= 0.005 for _, seconds in results)
    took_part = {data.decode().split(", ")[2] for data, _ in results}
    assert len(took_part) <= min(processes, MOST_PROCESSES)
    if processes == 1:
        assert took_part == {str(os.getpid())}
    else:
        assert len(took_part) > 1


def test_few_kernels_start_no_process():
    results = compile_all(compiled_by, SOURCES[:3], 8)
    assert {data.decode().split(", ")[2] for data, _ in results} == {str(os.getpid())}


@pytest.mark.parametrize("end", ["killed", "failed", "silent"])
def test_what_a_process_does_not_deliver_is_compiled_here(end):
    here = os.getpid()

    def compile(text: str, name: str) -> bytes:
        if os.getpid() != here:
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "silent":
                os._exit(0)
            raise RuntimeError("out of memory, say")
        return compiled_by(text, name)

    results = compile_all(compile, SOURCES, 3)
    assert names(results) == [name for _, name in SOURCES]


def test_a_text_that_cannot_be_compiled_is_an_error():
    def compile(text: str, name: str) -> bytes:
        if name == "kernel 17":
            raise ValueError("kernel 17 is not a kernel")
        return compiled_by(text, name)

    with pytest.raises(ValueError, match="kernel 17"):
        compile_all(compile, SOURCES, 3)
