"""The knobs: their values, where they come from, and what is refused."""

import threading
from pathlib import Path

import pytest

import jitgrad as jg
from jitgrad import config


def test_scope_holds_inside_only():
    outside = config.current()
    with config.scope(check=True, num_threads=3, debug="kernels, times") as settings:
        assert config.current() is settings
        assert settings.check and settings.num_threads == 3
        assert settings.debug == {"kernels", "times"}
        with config.scope(check=False):
            assert not config.current().check and config.current().num_threads == 3
        assert config.current() is settings
    assert config.current() is outside


def test_scope_ends_with_an_exception():
    outside = config.current()
    with pytest.raises(KeyError), config.scope(disable=True):
        raise KeyError
    assert config.current() is outside


def test_scope_is_of_one_thread():
    seen = []
    with config.scope(num_threads=7):
        thread = threading.Thread(target=lambda: seen.append(config.current().num_threads))
        thread.start()
        thread.join()
    assert seen == [config.current().num_threads]


def test_update_reaches_other_threads():
    before, seen = config.current(), []
    try:
        config.update(num_threads=5)
        thread = threading.Thread(target=lambda: seen.append(config.current().num_threads))
        thread.start()
        thread.join()
    finally:
        config.update(num_threads=before.num_threads)
    assert seen == [5] and config.current() == before


def test_threads_are_set_by_the_names_of_pytorch():
    before = config.current().num_threads
    try:
        jg.set_num_threads(1)
        assert jg.get_num_threads() == 1 == config.current().num_threads
        with pytest.raises(ValueError, match="from 1 up"):
            jg.set_num_threads(0)
        with pytest.raises(TypeError, match="expected an int, got str"):
            jg.set_num_threads("2")
        assert jg.get_num_threads() == 1
    finally:
        config.update(num_threads=before)


def test_unknown_knob_is_refused_with_the_list():
    legal = "The knobs are cache, num_threads, debug, check, disable, plain, cublas, cudnn"
    with pytest.raises(TypeError, match=f"no knob 'threads'. {legal}"), config.scope(threads=2):
        pass


@pytest.mark.parametrize(("name", "value", "legal"), [
    ("num_threads", 0, "from 1 up"), ("num_threads", True, "from 1 up"), ("num_threads", "two", "from 1 up"),
    ("num_threads", 1.5, "from 1 up"), ("debug", "kernel", "kernels, times, graphs, source"), ("debug", 1, "kernels"),
    ("check", "maybe", "True, False"), ("disable", 2, "True, False"), ("cache", "", "folder"), ("cache", 3, "folder"),
])
def test_wrong_values_are_refused_with_the_legal_ones(name, value, legal):
    with pytest.raises(ValueError, match=f"config: {name} cannot be .*{legal}"):
        config.update(**{name: value})


def test_environment():
    settings = config.from_environment({"JITGRAD_CACHE": "/tmp/kernels", "JITGRAD_NUM_THREADS": "2",
                                        "JITGRAD_DEBUG": "graphs", "JITGRAD_CHECK": "1", "JITGRAD_DISABLE": "off"})
    assert settings == config.Settings(Path("/tmp/kernels"), 2, frozenset({"graphs"}), True, False)


def test_environment_defaults():
    settings = config.from_environment({"XDG_CACHE_HOME": "/home/u/.cache", "JITGRAD_CHECK": ""})
    assert settings == config.Settings(Path("/home/u/.cache/jitgrad"))


def test_wrong_environment_names_the_variable():
    with pytest.raises(ValueError, match="JITGRAD_NUM_THREADS cannot be 'many'"):
        config.from_environment({"JITGRAD_NUM_THREADS": "many"})
