"""Settings of the process that PyTorch has at its top level, and what a plain script reads there."""

from __future__ import annotations

import pytest

import jitgrad as jg
from jitgrad import errors


def test_deterministic_algorithms_are_remembered():
    assert not jg.are_deterministic_algorithms_enabled()
    try:
        jg.use_deterministic_algorithms(True, warn_only=True)
        assert jg.are_deterministic_algorithms_enabled() and jg.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(errors.DTypeError):
            jg.use_deterministic_algorithms("yes")
    finally:
        jg.use_deterministic_algorithms(False)
    assert not jg.is_deterministic_algorithms_warn_only_enabled()


def test_print_options():
    x = jg.tensor([1 / 3, 100.0])
    usual = repr(x)
    try:
        jg.set_printoptions(precision=2, sci_mode=True)
        assert repr(x) == "tensor([3.33e-01, 1.00e+02])"
        jg.set_printoptions(threshold=5, edgeitems=1)
        assert repr(jg.arange(9)) == "tensor([0, ..., 8])"
        with pytest.raises(errors.DTypeError, match="default, short, full"):
            jg.set_printoptions(profile="long")
    finally:
        jg.set_printoptions(profile="default")
    assert repr(x) == usual


def test_sizes_count_and_stay_sizes():
    size = jg.zeros(2, 3, 4).size()
    assert size == (2, 3, 4) and size.numel() == 24 and size[1:].numel() == 12 and (size + size[:1]).numel() == 48
    assert repr(size) == "jitgrad.Size([2, 3, 4])" and isinstance(size, jg.Size) and {size: 1}[2, 3, 4] == 1


def test_limits_and_aliases():
    assert (jg.float, jg.double, jg.half, jg.long, jg.int, jg.short) == (jg.float32, jg.float64, jg.float16, jg.int64,
                                                                         jg.int32, jg.int16)
    assert jg.finfo(jg.float).eps == 2.0 ** -23 and jg.finfo().bits == 32 and jg.iinfo(jg.int8).min == -128
    assert 1 + jg.tensor(jg.finfo(jg.double).eps / 2, dtype=jg.double) == 1
    for wrong in (lambda: jg.finfo(jg.long), lambda: jg.iinfo(jg.float), lambda: jg.iinfo(7)):
        with pytest.raises(TypeError, match="Did you mean"):
            wrong()


def test_a_compiled_step_with_plain_names_is_sealed():
    @jg.compile
    def scaled(x):
        x = x.view(x.size()[0], x.size()[1:].numel()) * jg.finfo(x.dtype).eps + jg.numel(x)
        return x.to(jg.float) if jg.is_tensor(x) and jg.is_floating_point(x) else x

    for _ in range(4):
        result = scaled(jg.ones(2, 3, 4))
    assert result.shape == (2, 12) and str(scaled.explain()).startswith("scaled: sealed")
