"""Compiled kernels on disk, as processes meet them."""

import hashlib
import os
import stat
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from moelora import _core

HEADER = 512


@pytest.fixture
def compiled(any_source):
    """What the compiler makes of the source, without a cache."""
    return _core.cuda_compile(*any_source)[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "above" / "cache"
    monkeypatch.setenv("MOELORA_CACHE", str(folder))
    return folder


def entry_of(folder):
    (entry,) = folder.iterdir()
    return entry


def test_a_kernel_is_kept_for_the_owner_alone(folder, any_source, compiled):
    assert _core.cuda_cubin(*any_source) == compiled
    entry = entry_of(folder)
    assert entry.read_bytes()[HEADER:] == compiled
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_what_is_kept_is_what_is_used(folder, any_source, compiled):
    _core.cuda_cubin(*any_source)
    before = entry_of(folder).stat()
    start = time.perf_counter()
    assert _core.cuda_cubin(*any_source) == compiled
    read = time.perf_counter() - start
    start = time.perf_counter()
    _core.cuda_compile(*any_source)
    assert read < (time.perf_counter() - start) / 3
    after = entry_of(folder).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_variant_and_another_architecture_are_other_files(folder, nvrtc):
    for options in ((0, 0), (0, 1), (1, 0)):
        for arch in ("sm_80", "sm_90"):
            assert _core.cuda_cubin("prepare.cu", options, arch) == _core.cuda_compile("prepare.cu", options, arch)[0]
    assert len(list(folder.iterdir())) == 6


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


SPOILED = {
    "empty": lambda data: b"",
    "header cut off": lambda data: data[:100],
    "header alone": lambda data: data[:HEADER],
    "cut off": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
    "other magic": lambda data: flipped(data, 0),
    "other length": lambda data: flipped(data, 8),
    "other checksum": lambda data: flipped(data, 16),
    "other key": lambda data: flipped(data, 30),
    "other padding": lambda data: flipped(data, HEADER - 1),
    "a bit of the kernel": lambda data: flipped(data, len(data) - 100),
    "foreign": lambda data: os.urandom(len(data)),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_file_is_replaced(folder, any_source, compiled, spoil):
    _core.cuda_cubin(*any_source)
    entry = entry_of(folder)
    whole = entry.read_bytes()
    entry.write_bytes(spoil(whole))
    assert _core.cuda_cubin(*any_source) == compiled
    assert entry_of(folder).read_bytes() == whole


def test_a_file_that_others_may_write_is_replaced(folder, any_source, compiled):
    _core.cuda_cubin(*any_source)
    entry = entry_of(folder)
    for mode in (0o620, 0o602):
        entry.chmod(mode)
        assert _core.cuda_cubin(*any_source) == compiled
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_replaced(folder, any_source, compiled):
    _core.cuda_cubin(*any_source)
    entry = entry_of(folder)
    os.chown(entry, 12345, -1)
    assert _core.cuda_cubin(*any_source) == compiled
    assert entry.stat().st_uid == 0


def test_links_and_pipes_are_not_followed(folder, any_source, compiled, tmp_path):
    _core.cuda_cubin(*any_source)
    entry = entry_of(folder)
    elsewhere = tmp_path / "elsewhere"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)
    assert _core.cuda_cubin(*any_source) == compiled
    assert not entry.is_symlink()
    entry.unlink()
    os.mkfifo(entry)
    assert _core.cuda_cubin(*any_source) == compiled
    assert entry.is_file()


def test_a_folder_in_the_place_of_the_file_is_no_error(folder, any_source, compiled):
    _core.cuda_cubin(*any_source)
    entry = entry_of(folder)
    entry.unlink()
    entry.mkdir()
    assert _core.cuda_cubin(*any_source) == compiled
    assert list(folder.iterdir()) == [entry]


PROGRAM = """
import hashlib, os, sys
from moelora import _core, runtime
runtime.open_nvrtc()
if os.environ.get("AS_NOBODY"):
    _core.cuda_compile({0!r}, {1!r}, {2!r})  # opens all files of NVRTC, which that user may not
    os.setuid(12345)
print(_core.cuda_cache())
print(hashlib.sha256(_core.cuda_cubin({0!r}, {1!r}, {2!r})).hexdigest())
"""


@pytest.fixture
def in_new_process(run_python, any_source, compiled):
    """``in_new_process(**env)``: the cache's folder there, after the right kernel came out."""

    def check(process):
        out, err = process.communicate(timeout=60)
        assert not err
        cache, digest = out.splitlines()
        assert digest == hashlib.sha256(compiled).hexdigest()
        return cache

    def in_new_process(**env):
        return check(in_new_process.start(**env))

    in_new_process.start = lambda **env: run_python.start(PROGRAM.format(*any_source), **env)
    in_new_process.check = check
    return in_new_process


def test_many_processes_at_once(folder, in_new_process):
    processes = [in_new_process.start() for _ in range(8)]
    assert {in_new_process.check(process) for process in processes} == {str(folder)}
    assert entry_of(folder).suffix == ".cubin"


def test_readers_never_see_a_part(folder, any_source, compiled):
    """While files are written over and over by some threads, others read whole ones or none."""

    def spoil_and_read(i):
        if i % 5 == 0:
            for entry in folder.glob("*.cubin"):
                entry.unlink(missing_ok=True)
        return _core.cuda_cubin(*any_source)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(spoil_and_read, range(20))) == {compiled}
    assert all(entry.suffix == ".cubin" for entry in folder.iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(in_new_process):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        assert in_new_process(MOELORA_CACHE=folder, AS_NOBODY="1" if os.geteuid() == 0 else "") == folder
        assert not os.listdir(folder)


@pytest.mark.parametrize("cache", ["/proc/moelora", "/dev/null/moelora", "/dev/null", "x" * 4090, "/" + "x/" * 2046])
def test_a_folder_that_cannot_be_made_is_no_error(in_new_process, cache):
    in_new_process(MOELORA_CACHE=cache)


def test_places_in_their_order(in_new_process, tmp_path):
    names = {"MOELORA_CACHE": str(tmp_path / "own"), "XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path)}
    assert in_new_process(**names) == str(tmp_path / "own")
    names["MOELORA_CACHE"] = ""
    assert in_new_process(**names) == str(tmp_path / "xdg" / "moelora")
    names["XDG_CACHE_HOME"] = "relative"
    assert in_new_process(**names) == str(tmp_path / ".cache" / "moelora")
    for path in ("own", "xdg/moelora", ".cache/moelora"):
        assert entry_of(tmp_path / path)


def test_without_a_home_there_is_no_cache(in_new_process):
    assert in_new_process(MOELORA_CACHE=None, XDG_CACHE_HOME=None, HOME=None) == "None"


def test_the_place_that_is_set_comes_first(folder, any_source, compiled, tmp_path):
    chosen = tmp_path / "chosen"
    _core.set_cuda_places(None, chosen)
    try:
        assert _core.cuda_cache() == str(chosen)
        _core.set_cuda_places(None, None)
        assert _core.cuda_cubin(*any_source) == compiled
        assert entry_of(chosen)
        assert not folder.exists()
    finally:
        _core.set_cuda_places(None, "")
    assert _core.cuda_cache() == str(folder)


@pytest.mark.parametrize("path, error", [("x" * 4096, ValueError), ("a\0b", ValueError), (3, TypeError)])
def test_places_are_paths(path, error):
    for places in ((path, None), (None, path)):
        with pytest.raises(error):
            _core.set_cuda_places(*places)
