"""Entries that come back whole or not at all."""

from __future__ import annotations

import hashlib
import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from relrep_onnx.cache import Cache
from relrep_onnx.types import Array, ConfigError

ENTRY: dict[str, Array] = {
    "numbers": np.array([3, 2**40]),
    "mean": np.linspace(0, 1, 12).reshape(3, 4),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(True),
}


def assert_same(given: dict[str, Array] | None, expected: dict[str, Array]) -> None:
    assert given is not None
    assert given.keys() == expected.keys()
    for name, array in expected.items():
        assert given[name].dtype == array.dtype
        np.testing.assert_array_equal(given[name], array, strict=True)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    Cache(folder).put("key", ENTRY)
    assert_same(Cache(folder).get("key"), ENTRY)
    assert len(files(folder)) == 1


def test_an_unknown_key(tmp_path: Path) -> None:
    assert Cache(tmp_path).get("key") is None


def test_a_later_entry_replaces_the_former(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("key", ENTRY)
    cache.put("key", {"mean": np.ones(2)})
    assert_same(cache.get("key"), {"mean": np.ones(2)})
    assert len(files(tmp_path)) == 1


def test_different_keys_never_meet(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keys = ["", "a", "A", "a ", "a/b", "a\\b", "../a", "a\0", "ä", "a" * 5000, "(1, 23)", "(12, 3)"]
    for number, key in enumerate(keys):
        cache.put(key, {"number": np.array(number)})
    for number, key in enumerate(keys):
        assert_same(cache.get(key), {"number": np.array(number)})
    assert len(files(tmp_path)) == len(keys)
    assert all(file.parent == tmp_path for file in files(tmp_path))


def test_damaged_entries_are_not_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("key", ENTRY)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        assert cache.get("key") is None, position
    for length in (0, 1, 31, 32, 33, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert cache.get("key") is None, length
    path.write_bytes(whole + b"\0")
    assert cache.get("key") is None
    path.write_bytes(whole)
    assert_same(cache.get("key"), ENTRY)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, mean=np.array([{"a": 1}], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize("payload", [b"", b"hello", b"PK\x03\x04", pickled()])
def test_what_is_no_archive_of_numbers_is_not_there(tmp_path: Path, payload: bytes) -> None:
    cache = Cache(tmp_path)
    cache.put("key", ENTRY)
    (path,) = files(tmp_path)
    path.write_bytes(hashlib.sha256(payload).digest() + payload)
    assert cache.get("key") is None


def test_a_damaged_entry_can_be_written_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("key", ENTRY)
    files(tmp_path)[0].write_bytes(b"")
    cache.put("key", ENTRY)
    assert_same(cache.get("key"), ENTRY)


def test_many_writers_of_one_key(tmp_path: Path) -> None:
    def write(number: int) -> dict[str, Array] | None:
        cache = Cache(tmp_path)
        cache.put("key", {"number": np.full(2000, number)})
        return cache.get("key")

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(write, range(64)))
    for entry in seen:
        assert entry is not None
        assert_same(entry, {"number": np.full(2000, entry["number"][0])})
    assert len(files(tmp_path)) == 1


def test_a_folder_that_went_away(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = Cache(folder)
    shutil.rmtree(folder)
    cache.put("key", ENTRY)
    assert cache.get("key") is None
    folder.write_text("a file now")
    cache.put("key", ENTRY)
    assert cache.get("key") is None
    assert folder.read_text() == "a file now"


def test_a_failed_write_leaves_the_cache_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    cache.put("key", ENTRY)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache.put("key", {"mean": np.ones(2)})
    assert_same(cache.get("key"), ENTRY)
    assert len(files(tmp_path)) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use the cache folder"):
        Cache(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot use the cache folder"):
        Cache(tmp_path / "file" / "below")
