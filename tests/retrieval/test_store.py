"""The folder of an index holds the old state or the new one, notices damage, and has one writer."""

import json
from pathlib import Path

import numpy as np
import pytest

from chiasm.retrieval.store import Store
from retrieval import killing


def filled(folder: Path, segments: int = 2) -> Store:
    store = Store.create(folder / "index", {"source": "a", "fingerprint": "b"})
    for number in range(segments):
        names = [str(3 * number + place) for place in range(3)]
        store.append([{"id": name} for name in names], np.stack(list(map(killing.vector, names))))
    return store


def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    killing.kill_often(tmp_path, rounds=12)


def test_a_reader_keeps_its_state_through_delete_and_compaction(tmp_path: Path) -> None:
    store = filled(tmp_path)
    before = store.snapshot()
    store.delete([1, 4])
    deleted = store.snapshot()
    with store.writing():
        store.compact()
    assert killing.live(before) == set("012345")
    assert killing.live(deleted) == killing.live(store.snapshot()) == set("0235")
    assert len(store.snapshot()) == 4 and len(store.manifest()["segments"]) == 1
    assert len(list((tmp_path / "index" / "segments").iterdir())) == 2


def test_deleting_everything_leaves_an_empty_index(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.delete(range(6))
    store.compact()
    assert len(store.snapshot()) == 0
    store.append([{"id": "9"}], killing.vector("9")[None])
    assert killing.live(store.snapshot()) == {"9"}


@pytest.mark.parametrize("kind", ["f32", "jsonl"])
def test_damage_is_noticed(tmp_path: Path, kind: str) -> None:
    store = filled(tmp_path)
    file = next((tmp_path / "index" / "segments").glob(f"*.{kind}"))
    whole = file.read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match="is damaged"):
        store.snapshot()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"has {len(whole) - 1} bytes, expected {len(whole)}"):
        store.snapshot(verify=False)
    file.unlink()
    with pytest.raises(ValueError, match=r"lost the file .*index the pictures again"):
        store.snapshot()


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no index"):
        Store(tmp_path).snapshot()
    (tmp_path / "note").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        Store.create(tmp_path, {})
    store = filled(tmp_path)
    manifest = tmp_path / "index" / "manifest.json"
    manifest.write_text(json.dumps(store.manifest() | {"format": 99}))
    with pytest.raises(ValueError, match="format 99, expected 1"):
        store.snapshot()
    manifest.write_text("[]")
    with pytest.raises(ValueError, match="format None, expected 1"):
        store.snapshot()


def test_an_index_whose_making_was_stopped_is_made(tmp_path: Path) -> None:
    segments = tmp_path / "index" / "segments"
    segments.mkdir(parents=True)
    for name in ("lock", "manifest.json.new"):
        (tmp_path / "index" / name).touch()
    filled(tmp_path)
    (tmp_path / "index" / "manifest.json").unlink()
    with pytest.raises(FileExistsError, match="is not empty"):
        Store.create(tmp_path / "index", {})
    assert len(list(segments.iterdir())) == 4


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store.writing(), pytest.raises(BlockingIOError, match="another process is writing"), store.writing():
        pass


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vectors are \[3, 8\] a picture, the index holds \[2, 8\]"):
        filled(tmp_path).append([{"id": "1"}], np.zeros((1, 3, 8), "f4"))
