"""`resolve` tells aliases, folders and hub ids apart, and helps with what is none of them."""

from pathlib import Path

import pytest

from chiasm.sources import SourceError, resolve


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == resolve(tmp_path) == str(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == "owner/name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == str(tmp_path / "owner")


@pytest.mark.parametrize("hub_id", ["google/siglip2-base-patch16-224", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_hub_id_is_unchanged(hub_id: str) -> None:
    assert resolve(hub_id) == hub_id


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("smolm2-135m-instruct", "did you mean smollm2-135m-instruct?"),
        ("SmolLM2-135M-Instruct", "did you mean smollm2-135m-instruct?"),
        ("efficientnet-lite", "did you mean efficientnet-lite"),
        ("gpt2", "owner/name"),
        ("", "owner/name"),
        ("~no-such-user/x", "folder '~no-such-user/x' does not exist"),
        ("./missing", "folder './missing' does not exist"),
        ("/missing/folder", "folder '/missing/folder' does not exist"),
        ("a/b/c", "folder 'a/b/c' does not exist"),
        (Path("minilm-l6"), "folder 'minilm-l6' does not exist"),
    ],
)
def test_anything_else_is_an_error_with_a_hint(source: str | Path, hint: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(source)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with pytest.raises(SourceError, match="is a file"):
        resolve(file)
