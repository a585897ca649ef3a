"""Kernel text natively and as plain Python: loops, conditions, types of variables, division; and what is no kernel text."""

import numpy as np
import pytest

from jitgrad.codegen.native import compile_source
from jitgrad.codegen.plain import run_plain
from jitgrad.errors import CompileError
from jitgrad.runtime import native

X = np.array([-(2 ** 63), 2 ** 63 - 1, *range(-20, 20)], np.int64)
HEAD = """def text(args, begin, end, thread):
    x, o = pointer(args, 1, i64), pointer(args, 2, i64)
    for i in range(begin, end):
"""


def text_of(body):
    """A kernel that runs `body` for every element v of X and stores its r."""
    return HEAD + "".join(f"        {line}\n" for line in ("v = load(x, i, 0, 2)", *body, "store(o, i, r, 1, 2)"))


def natively(body, *numbers):
    """What `body` makes of X; `numbers` are ``args[3]`` and what follows."""
    made = np.zeros_like(X)
    args = np.array([0, X.ctypes.data, made.ctypes.data, *numbers], np.int64)
    native.function(native.load(compile_source(text_of(body), "text"), "text"))(args.ctypes.data, 0, len(X), 0)
    return made


def assert_same(body, *numbers):
    """Natively and as plain Python."""
    plain = np.zeros_like(X)
    with np.errstate(all="ignore"):
        run_plain(text_of(body), "text", [X, plain, *numbers], 0, len(X))
    np.testing.assert_array_equal(natively(body, *numbers), plain)


@pytest.mark.parametrize("bounds", [
    (0, 10, 3), (10, 0, -3), (0, 10, -1), (10, 0, 1), (5, 5, 1), (3, 4, 9), (-4, 9, 4), (9, -4, -2)])
def test_loops_by_a_step(bounds):
    start, stop, step = bounds
    assert_same(["r = v // 4", "for s in range(args[3], args[4], args[5]):", "    r = r * 3 + s"], *bounds)
    assert_same(["r = v // 4", f"for s in range({start}, {stop}, {step}):", "    r = r * 3 + s"])
    assert_same(["r = v // 4", f"for s in range(args[3], args[4], {step}):", "    r = r * 3 + s"], *bounds)
    assert_same(["r = v // 4", "for s in range(args[3], args[4]):", "    r = r * 3 + s"], *bounds)


def test_a_loop_by_zero_has_no_rounds():
    assert (natively(["r = 7", "for s in range(0, 9, args[3]):", "    r = s"], 0) == 7).all()


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 8, 64])
def test_quotients_and_rests_of_constants_round_down(divisor):
    assert_same([f"r = v // {divisor}"])
    assert_same([f"r = v % {divisor}"])
    assert_same(["r = (v // 2 // args[3]) * 100 + v // 2 % args[3]"], divisor)


def test_break_continue_and_conditions():
    assert_same(["r = 0", "for s in range(10, -7, -3):", "    r += s", "    if s == v:", "        break",
                 "    if r > 20 and v > 3 or not r != 3:", "        continue", "    r = r + 1"])
    assert_same(["r, k = 0, v % 16", "while k > 0 and r < 40:", "    k -= 1", "    r = r + k if k % 2 == 0 else r - 1"])
    assert_same(["inside = 0 <= v < 5", "r = 1 if inside or v == -3 else 2"])



def test_parts_of_a_tuple_by_a_number():
    assert_same(["parts = (v // 2, v % 3, 7)", "r = 0", "for k in range(3):", "    r = r * 2 % 1000 + parts[k] % 9"])
    assert_same(["parts = (v // 2, v % 3, 7)", "r = parts[v % 3] - parts[1]"])

def test_variables_that_are_given_in_several_places():
    assert_same(["r = 1", "if v > 0:", "    r = v // 2", "else:", "    last = v % 5", "    r = last + 1"])
    assert_same(["r, q = v % 9, v % 7", "for k in range(3):", "    r, q = q, r + k"])
    assert_same(["t = 0", "for k in range(4):", "    t = t + 0.5 * k", "r = i64(t) + v // 2"])          # float64 throughout


@pytest.mark.parametrize(("line", "problem"), [
    ("r = nobody(v)", "'nobody' is not defined"), ("r = later + v", "."), ("for k in v:\n            r = 1", "over a range"),
    ("r = abs.real", "."), ("r = load(v, 0, 0, 2)", ".")])
def test_what_cannot_be_compiled_is_an_error(line, problem):
    with pytest.raises(CompileError, match=problem):
        compile_source(f"{HEAD}        v = load(x, i, 0, 2)\n        {line}\n", "text")
