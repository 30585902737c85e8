"""The feature cache: equal to what was put in, shared, and never wrong after a kill."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny
from chiasm.data import feature_cache
from chiasm.data.feature_cache import FeatureCache, encoder_identity, prune

IDENTITY = {"weights": "w", "dtype": "float32"}
SHAPE = (3, 5)


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def rows(*numbers: int) -> torch.Tensor:
    return torch.stack([torch.full(SHAPE, float(number)) for number in numbers])


def fill(cache: FeatureCache, *numbers: int) -> None:
    cache.add([key(number) for number in numbers], rows(*numbers))


def number_in(cache: FeatureCache, number: int) -> float:
    row = cache.row(key(number))
    assert row is not None
    values = cache.read([row]).unique().tolist()
    assert len(values) == 1
    return values[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_goes_in_comes_out_in_any_order(tmp_path: Path, dtype: str) -> None:
    cache = FeatureCache({**IDENTITY, "dtype": dtype}, SHAPE, tmp_path)
    features = torch.randn(4, *SHAPE)
    cache.add([key(n) for n in range(4)], features)
    assert cache.row(key(9)) is None and len(cache) == 4
    wanted = [cache.row(key(n)) for n in (2, 0, 2)]
    assert torch.equal(cache.read([row for row in wanted if row is not None]), features[[2, 0, 2]].to(cache.dtype))
    again = FeatureCache({**IDENTITY, "dtype": dtype}, SHAPE, tmp_path)
    assert torch.equal(again.read([3]), features[3:].to(cache.dtype))


def test_a_picture_is_kept_once(tmp_path: Path) -> None:
    cache = FeatureCache(IDENTITY, SHAPE, tmp_path)
    fill(cache, 1, 2)
    fill(cache, 2, 3, 3)
    assert len(cache) == 3 and [number_in(cache, n) for n in (1, 2, 3)] == [1, 2, 3]


def test_two_open_caches_see_each_others_rows(tmp_path: Path) -> None:
    one, other = FeatureCache(IDENTITY, SHAPE, tmp_path), FeatureCache(IDENTITY, SHAPE, tmp_path)
    fill(one, 1)
    fill(other, 2)
    fill(one, 3)
    fill(other, 4)
    for cache in (FeatureCache(IDENTITY, SHAPE, tmp_path), other):
        assert [number_in(cache, n) for n in (1, 2, 3, 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("torn", ["features", "keys", "both"])
def test_a_torn_tail_is_ignored_and_written_over(tmp_path: Path, torn: str) -> None:
    cache = FeatureCache(IDENTITY, SHAPE, tmp_path)
    fill(cache, 1, 2)
    if torn in ("features", "both"):
        with (cache.folder / "features.bin").open("ab") as file:
            file.write(b"x" * (cache.row_bytes + 7))
    if torn in ("keys", "both"):
        with (cache.folder / "keys.bin").open("ab") as file:
            file.write(b"k" * 11)
    again = FeatureCache(IDENTITY, SHAPE, tmp_path)
    assert len(again) == 2
    fill(again, 3, 4)
    for number in (1, 2, 3, 4):
        assert number_in(again, number) == number_in(FeatureCache(IDENTITY, SHAPE, tmp_path), number) == number
    assert (cache.folder / "features.bin").stat().st_size == 4 * cache.row_bytes


def test_keys_without_features_are_not_believed(tmp_path: Path) -> None:
    cache = FeatureCache(IDENTITY, SHAPE, tmp_path)
    fill(cache, 1, 2, 3)
    os.truncate(cache.folder / "features.bin", 2 * cache.row_bytes + 4)
    again = FeatureCache(IDENTITY, SHAPE, tmp_path)
    assert again.row(key(3)) is None and number_in(again, 2) == 2
    fill(again, 4, 3)
    assert [number_in(again, n) for n in (1, 2, 3, 4)] == [1, 2, 3, 4]


WRITER = """
import sys
import test_feature_cache as t
cache = t.FeatureCache(t.IDENTITY, t.SHAPE, t.Path(sys.argv[1]))
for number in range(100_000):
    t.fill(cache, *range(number * 3, number * 3 + 3))
"""


@pytest.mark.slow
def test_writers_that_are_killed_leave_only_truth(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
    }
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environment) for _ in range(2)]
    folder = FeatureCache(IDENTITY, SHAPE, tmp_path).folder
    deadline = time.monotonic() + 300
    while (folder / "keys.bin").stat().st_size < 32 * 50 and time.monotonic() < deadline:
        time.sleep(0.02)
    for writer in writers:
        writer.kill()
        writer.wait()
    cache = FeatureCache(IDENTITY, SHAPE, tmp_path)
    assert len(cache) >= 50
    known = [number for number in range(3 * len(cache)) if cache.row(key(number)) is not None]
    assert len(known) == len(cache)
    assert all(number_in(cache, number) == number for number in known)


def test_the_folder_follows_from_weights_features_preprocessing_and_dtype(tmp_path: Path) -> None:
    encoder = tiny.vision()
    base = encoder_identity(encoder, {"layers": [-2]}, {"size": 30}, "float32")
    others = [
        encoder_identity(encoder, {"layers": [-1]}, {"size": 30}, "float32"),
        encoder_identity(encoder, {"layers": [-2]}, {"size": 31}, "float32"),
        encoder_identity(encoder, {"layers": [-2]}, {"size": 30}, "bfloat16"),
    ]
    next(encoder.parameters()).data.view(-1)[0] += 1e-3
    others.append(encoder_identity(encoder, {"layers": [-2]}, {"size": 30}, "float32"))
    folders = {FeatureCache(identity, SHAPE, tmp_path).folder for identity in [base, *others]}
    assert len(folders) == 5
    assert json.loads((FeatureCache(base, SHAPE, tmp_path).folder / "identity.json").read_text())["shape"] == [3, 5]


def test_the_least_recently_used_caches_go_when_space_is_short(tmp_path: Path) -> None:
    caches = [FeatureCache({**IDENTITY, "weights": name}, SHAPE, tmp_path) for name in "abcd"]
    for age, cache in enumerate(caches):
        cache.add([key(0)], torch.zeros(1, *SHAPE))
        used = time.time() - feature_cache.PROTECTED_SECONDS * (2 - age if age < 3 else 0.5) - 10
        os.utime(cache.folder / "identity.json", (used, used))
    assert prune(tmp_path, 1.0, caches[0].folder) == []
    removed = prune(tmp_path, 0.0, keep=caches[0].folder)
    assert removed == [caches[1].folder]
    assert not caches[1].folder.exists() and caches[2].folder.exists() and caches[3].folder.exists()


def test_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features are \(1, 2, 5\), expected \(1, 3, 5\)"):
        FeatureCache(IDENTITY, SHAPE, tmp_path).add([key(1)], torch.zeros(1, 2, 5))


def test_a_full_disk_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = FeatureCache(IDENTITY, SHAPE, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"features.bin is not written: the disk is full"):
        fill(cache, 1)


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_no_number_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIASM_FEATURE_CACHE_GB", text)
    with pytest.raises(ValueError, match=rf"CHIASM_FEATURE_CACHE_GB is '{text}', expected a number of gigabytes"):
        FeatureCache(IDENTITY, SHAPE, tmp_path)
