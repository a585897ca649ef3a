"""The folder of kernels and plans: what is stored comes back whole or not at all, and only from a safe place."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from jitgrad import config
from jitgrad.errors import CacheWarning
from jitgrad.runtime import build
from jitgrad.runtime.cache import Cache, current

KEY = "0123456789abcdef" * 4
OTHER = "f" * 64
TEXT = """
def fill(args, begin, end, thread):
    o = pointer(args, 1, f32)
    for i in range(begin, end):
        store(o, i, f32(SEED), 0, 1)
"""


def compile_all(sources):
    from jitgrad.codegen.native import compile_sources
    return compile_sources(sources)


build.set_compiler(compile_all)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def stored_file(cache, key=KEY):
    return cache.folder / "kernels" / key[:2] / key[2:]


def test_what_is_stored_comes_back(cache):
    assert cache.get("kernels", KEY) is None
    cache.put("kernels", KEY, b"code")
    cache.put("plans", KEY, b"plan")
    assert cache.get("kernels", KEY) == b"code" and cache.get("plans", KEY) == b"plan"
    assert [(e.kind, e.key) for e in cache.entries()] == [("kernels", KEY), ("plans", KEY)]
    assert cache.size() == sum(e.size for e in cache.entries())
    cache.clear()
    assert cache.entries() == [] and cache.get("kernels", KEY) is None


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: b"", lambda data: data[:20], lambda data: data + b"x",
    lambda data: data[:45] + bytes([data[45] ^ 1]) + data[46:], lambda data: b"J" + data[1:]])
def test_a_damaged_entry_is_a_miss(cache, damage):
    cache.put("kernels", KEY, b"code" * 10)
    file = stored_file(cache)
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get("kernels", KEY) is None
    cache.put("kernels", KEY, b"again")
    assert cache.get("kernels", KEY) == b"again"


def test_an_entry_under_another_key_is_a_miss(cache):
    cache.put("kernels", KEY, b"code")
    cache.put("kernels", OTHER, b"other")
    stored_file(cache, OTHER).write_bytes(stored_file(cache).read_bytes())
    assert cache.get("kernels", OTHER) is None


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "ABC", "a" * 65])
def test_a_key_is_no_path(cache, key):
    with pytest.raises(ValueError):
        cache.get("kernels", key)


def test_a_folder_that_others_can_write_is_not_used(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.warns(CacheWarning, match="others can write"):
        cache = Cache(folder)
    assert cache.folder != folder and not cache.folder.stat().st_mode & 0o022
    cache.put("kernels", KEY, b"code")
    assert cache.get("kernels", KEY) == b"code" and not any(folder.iterdir())


def test_a_link_or_a_file_is_not_used(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.warns(CacheWarning):
            assert Cache(tmp_path / name).folder != tmp_path / name


def test_nothing_can_be_stored_is_said_once(cache, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(CacheWarning, match="No space left"):
        cache.put("kernels", KEY, b"code")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("kernels", OTHER, b"code")
    assert cache.get("kernels", KEY) is None
    assert not list(stored_file(cache).parent.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    cache = Cache(folder)
    with pytest.warns(CacheWarning):
        cache.put("kernels", KEY, b"code")
    assert cache.get("kernels", KEY) is None


def test_the_least_recently_used_go_first(tmp_path):
    cache = Cache(tmp_path / "cache", limit=5000)
    keys = [f"{k:064x}" for k in range(10)]
    for age, key in enumerate(keys):
        cache.put("kernels", key, b"x" * 900)
        os.utime(stored_file(cache, key), (1000 + age, 1000 + age))
    assert cache.get("kernels", keys[0]) is not None                    # used: now the youngest
    cache.trim()
    assert cache.size() <= 5000
    assert cache.get("kernels", keys[0]) is not None and cache.get("kernels", keys[1]) is None


def test_many_writers(cache):
    def work(number: int) -> bool:
        key = f"{number % 5:064x}"
        cache.put("kernels", key, key.encode() * 100)
        return cache.get("kernels", key) == key.encode() * 100

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


WRITER = """
import sys
from pathlib import Path
from jitgrad.runtime.cache import Cache
cache = Cache(Path(sys.argv[1]))
for k in range(300):
    key = f"{k % 7:064x}"
    cache.put("kernels", key, key.encode() * 500)
    assert cache.get("kernels", key) == key.encode() * 500
"""


def test_two_processes_at_once(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "cache")]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]


# Kernels by way of the cache

def test_a_kernel_is_compiled_once_and_then_loaded(tmp_path, monkeypatch):
    text = TEXT.replace("SEED", "17")
    with config.scope(cache=tmp_path / "cache"):
        before = build.compiled
        build.kernel(text, "fill")
        assert build.compiled == before + 1
        monkeypatch.setattr(build, "_addresses", {})
        build.kernel(text, "fill")
        assert build.compiled == before + 1


def test_a_damaged_kernel_is_compiled_again(tmp_path, monkeypatch):
    text = TEXT.replace("SEED", "18")
    with config.scope(cache=tmp_path / "cache"):
        build.kernel(text, "fill")
        key = build.kernel_key(text)
        current().put("kernels", key, b"\x7fELF and nothing more")      # checksum right, content wrong
        monkeypatch.setattr(build, "_addresses", {})
        before = build.compiled
        assert build.find_kernel(key, "fill") is None
        build.kernel(text, "fill")
        assert build.compiled == before + 1


def test_comments_and_names_are_no_part_of_the_key():
    text = TEXT.replace("SEED", "1")
    same = text.replace("fill", "other").replace("0, 1)", "0, 1)   # x.py:3")
    assert build.kernel_key(text) == build.kernel_key(same)
    assert build.kernel_key(text) != build.kernel_key(TEXT.replace("SEED", "2"))
