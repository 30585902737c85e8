"""`chiasm index` and `chiasm search`, end to end on a tiny retrieval model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import chiasm
import tiny
from chiasm.data.captions import CaptionProcessor
from chiasm.fusion.qformer_retrieval import build_retrieval
from chiasm.retrieval import Index
from chiasm.retrieval.preparation import difference
from chiasm.vision.image_processor import ChiasmImageProcessor
from retrieval.pretend import paint
from training import helpers


def save_late(folder: Path) -> Path:
    pictures = ChiasmImageProcessor(30, [0.5] * 3, [0.5] * 3)
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "image_processor": pictures}
    chiasm.connect(tiny.vision(), tiny.bert(), fusion="late", **options).save_pretrained(folder)
    return folder


def save_blip2(folder: Path, seed: int = 0) -> Path:
    source = helpers.vlm(connector=tiny.connector("qformer"))
    torch.manual_seed(seed)
    model = build_retrieval(source.model, 261, space=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    processor = CaptionProcessor(source.processor.image_processor, tiny.tokenizer())
    chiasm.DualEncoder(model, processor).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save", [save_late, save_blip2])
def test_index_and_search(save: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, photos, index = save(tmp_path / "model"), tmp_path / "photos", tmp_path / "index"
    files = paint(photos, 9)
    (photos / "phone.HEIC").touch()
    code, out, err = run("index", model, photos, "-o", index)
    assert code == 0 and "left out: 1 .heic, which Pillow does not read" in err
    assert "9 added; search it: chiasm search" in out
    code, out, err = run(
        "search", index, "a red car", "-k", 3, "--where", "number<5", "--json", "--sheet", tmp_path / "s.png"
    )
    assert code == 0, err
    assert len(json.loads(out)) == 3 and Image.open(tmp_path / "s.png").width > 600
    code, out, err = run("search", index, "--image", files[4], "-k", 1)
    assert code == 0 and out.strip().endswith("004.png") and out.split()[0] == "1.000"
    code, out, err = run("search", index, "--image", files[4], "-k", 9, "--exclude-self", "--json")
    assert len(json.loads(out)) == 8
    code, out, err = run("search", index, files[4], "-k", 1)
    assert code == 2 and "is a file, not a text" in err
    monkeypatch.chdir(tmp_path)
    Path("LICENSE").touch()
    for text in ("LICENSE", "\ube68" * 86):
        assert run("search", index, text, "-k", 1)[0] == 0
    shown = chiasm.load(model)
    scores = shown.score(files, "a red car")[:, 0]
    code, out, err = run("search", index, "a red car", "-k", 9, "--json")
    found = {hit["id"]: hit["score"] for hit in json.loads(out)}
    assert found == pytest.approx({file.name: scores[place].item() for place, file in enumerate(files)}, abs=1e-5)
    paint(photos, 2, start=9)
    (photos / "broken.png").write_bytes(b"no picture")
    code, out, err = run("index", "--add", photos, "-o", index)
    assert code == 2 and "broken.png" in err and "Traceback" not in err
    code, out, err = run("index", "--add", photos, "-o", index, "--skip-bad")
    assert code == 0 and "already there, 1 skipped" in out and "skipped: picture" in err
    limited = ("index", "--add", photos, "-o", index, "--skip-bad", "--max-pixels")
    Image.new("RGB", (80, 60)).save(photos / "wide.png")
    code, out, err = run(*limited, 4799)
    assert code == 0 and "wide.png: has 80x60 pixels, the limit is 4,799" in err and "2 skipped" in out
    assert "1 added" in run(*limited, 4800)[1] and run("index", "-o", index, "--delete", "wide.png")[0] == 0
    code, out, err = run("index", "-o", index, "--list", "--where", "colour=blue", "--json")
    assert [row["id"] for row in json.loads(out)["pictures"]] == ["002.png", "006.png", "010.png"]
    code, out, err = run("index", "-o", index, "--delete", "000.png", "--delete", "001.png")
    assert code == 0 and "deleted 2; 9 pictures are left" in out
    code, out, err = run("index", "-o", index, "--delete-where", "colour=blue", "--json")
    assert json.loads(out)["pictures"] == 6
    assert run("index", "-o", index, "--compact")[1].strip() == "6 pictures"


def test_a_name_that_is_no_text_is_printed(run: Any, tmp_path: Path) -> None:
    model, photos, index = save_late(tmp_path / "model"), tmp_path / "photos", tmp_path / "index"
    strange = os.fsdecode(b"\xb0\xed.png")
    for file, name in zip(paint(photos, 2), (strange, "two\nlines.png"), strict=True):
        file.rename(photos / name)
    (photos / "metadata.jsonl").unlink()
    assert run("index", model, photos, "-o", index)[0] == 0
    code, out, err = run("search", index, "a red car", "--sheet", tmp_path / "s.png")
    assert code == 0 and "\\udcb0\\udced.png" in out and Image.open(tmp_path / "s.png"), err
    code, out, err = run("search", index, "a red car", "--json")
    assert {hit["id"] for hit in json.loads(out)} == {strange, "two\nlines.png"}
    assert run("index", "-o", index, "--list")[0] == 0
    assert run("index", "-o", index, "--delete", strange)[0] == 0


def test_a_qformer_that_finds_is_inspected(run: Any, tmp_path: Path) -> None:
    folder = save_blip2(tmp_path / "model")
    code, out, err = run("inspect", folder, "--json")
    assert code == 0, err
    told, model = json.loads(out), chiasm.load(folder).model
    counted = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vision", "connector")}
    assert {part: facts["parameters"] for part, facts in told["parts"].items()} == counted
    assert told["space"] == 16 and told["queries"] == model.connector.num_tokens
    code, out, err = run("inspect", folder)
    assert code == 0 and f"→ {told['queries']} vectors, and a text → one, of 16 dimensions" in " ".join(out.split()), (
        err
    )


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"size": {"height": 36, "width": 36}}, r"makes pictures of shape \[3, 36, 36\], not \[3, 30, 30\]"),
    ({"resample": int(Image.Resampling.BILINEAR)}, "resizes, crops or normalises"),
    ({"resize_mode": "squash"}, "resizes, crops or normalises"),
    ({"crop_fraction": 0.9}, "resizes, crops or normalises"),
    ({"image_mean": [0.45] * 3}, "resizes, crops or normalises"),
    ({"image_std": [0.45] * 3}, "resizes, crops or normalises"),
    ({"text_length": 9}, "makes other tokens of texts"),
    ({"lowercase": True}, "makes other tokens of texts"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_another_processor_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    encoder = chiasm.load(save_late(tmp_path / "model"))
    index = Index.create(tmp_path / "index", encoder)
    assert index.attach(chiasm.load(tmp_path / "model")).note is None
    processor = encoder.processor
    for name, value in change.items():
        target = processor if hasattr(processor, name) else processor.image_processor
        assert hasattr(target, name) and getattr(target, name) != value
        setattr(target, name, value)
    with pytest.raises(ValueError, match=f"was made with another processor: this one {told}.*or index again"):
        index.attach(encoder)


def test_the_shape_that_differs_is_told() -> None:
    before = {"shapes": [[3, 30, 30], [3, 30, 30]], "values": [], "texts": ""}
    assert difference(before, before) is None
    now = before | {"shapes": [[3, 30, 30], [3, 60, 30]]}
    assert difference(before, now) == "makes pictures of shape [3, 60, 30], not [3, 30, 30]"


def test_an_older_index_is_read_with_a_line_that_says_so(run: Any, tmp_path: Path) -> None:
    model, photos, index = save_late(tmp_path / "model"), tmp_path / "photos", tmp_path / "index"
    paint(photos, 2)
    assert run("index", model, photos, "-o", index)[0] == 0
    assert "is older" not in run("search", index, "a")[2]
    manifest = json.loads((index / "manifest.json").read_text())
    del manifest["model"]["preparation"]
    (index / "manifest.json").write_text(json.dumps(manifest))
    code, out, err = run("search", index, "a", "--json")
    assert code == 0 and len(json.loads(out)) == 2
    assert [line for line in err.splitlines() if line.startswith(f"index {index} is older than this check")], err


def test_options_that_a_retrieval_model_does_not_read_are_refused(run: Any, tmp_path: Path) -> None:
    model, photos, index = save_blip2(tmp_path / "model"), tmp_path / "photos", tmp_path / "index"
    paint(photos, 2)
    assert run("index", model, photos, "-o", index, "--batch-size", 1)[0] == 0
    refused = {
        ("eval", model, "--data", photos, "--max-new-tokens", 5): "--max-new-tokens 5 is for models that write answers",
        ("eval", model, "--data", photos, "--shots", 2): "--shots 2 is for models that read examples",
        ("inspect", model, "--text-tokens", 9): "--text-tokens is of a prompt's cost",
        ("serve", model, "--weights", "int8"): "--weights int8 is for models that answer",
        ("index", "-o", index, "--list", "--batch-size", 2): "--batch-size is not for --list",
        ("index", "-o", index, "--delete", "000.png", "--skip-bad"): "--skip-bad is not for --delete",
        ("index", "-o", index, "--compact", "--metadata", photos / "metadata.jsonl"): "--metadata is not for --compact",
        ("index", model, photos, "-o", index, "--model", model): "--model is not for MODEL IMAGES",
    }
    for arguments, reason in refused.items():
        code, _, err = run(*arguments)
        assert code == 2 and reason in " ".join(err.split()), (arguments, err)
    assert run("index", "--add", photos, "-o", index, "--model", model, "--skip-bad", "--batch-size", 1)[0] == 0


def test_a_text_without_words_is_one_line(run: Any, tmp_path: Path) -> None:
    model, photos, index = save_late(tmp_path / "model"), tmp_path / "photos", tmp_path / "index"
    paint(photos, 2)
    assert run("index", model, photos, "-o", index)[0] == 0
    code, _, err = run("search", index, "")
    assert code == 2 and "the text is '', expected words" in err
    code, _, err = run("search", index, os.fsdecode(b"\xb0\xed\xbe\xe7"))
    assert code == 2 and "is no text: it holds half a character" in err and "in a terminal of UTF-8" in err
    with pytest.raises(ValueError, match="text '' has no tokens"):
        chiasm.load(model).processor.encode("")


def test_mistakes_are_one_line(run: Any, tmp_path: Path) -> None:
    model, photos, index = save_blip2(tmp_path / "model"), tmp_path / "photos", tmp_path / "index"
    paint(photos, 2)
    assert run("index", model, photos, "-o", index)[0] == 0
    other = save_blip2(tmp_path / "other", seed=1)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes((photos / "000.png").read_bytes()[:60])
    mistakes = {
        ("index", other, photos, "-o", index): "was made by model",
        ("index", "-o", index): "got nothing to do, expected one of MODEL IMAGES, --add",
        ("index", model, "-o", index): "got MODEL alone",
        ("index", "-o", index, "--list", "--compact"): "got --list and --compact",
        ("search", tmp_path / "nowhere", "a"): "holds no index",
        ("search", index, photos / "000.png"): "is a file, not a text; search by the picture with --image",
        ("index", model, broken, "-o", tmp_path / "partial"): "--skip-bad leaves such pictures out",
        ("search", index): "give a text or --image",
        ("search", index, "a", "--exclude-self"): "--exclude-self goes with --image",
        ("search", index, "a", "--where", "red"): "condition 'red' is not understood",
        ("search", index, "a", "--where", "color=red"): "no picture has the metadata 'color'",
        ("search", index, "a", "--model", other): "was made by model",
        ("index", "--add", tmp_path / "none", "-o", index): "no such file or folder",
        ("index", model, tmp_path / "none", "-o", tmp_path / "new"): "no such file or folder",
        ("index", model, photos, "-o", tmp_path / "new", "--batch-size", 0): "--batch-size is 0",
        ("index", model, photos, "-o", photos): "is not empty",
        ("search", "http://127.0.0.1:9/photos", "a"): "no Qdrant server answers for http://127.0.0.1:9/photos",
    }
    for arguments, reason in mistakes.items():
        code, _, err = run(*arguments)
        assert code == 2 and reason in " ".join(err.split()) and "Traceback" not in err, (arguments, err)
    assert not (tmp_path / "new").exists()
    model.rename(tmp_path / "moved")
    code, _, err = run("search", index, "a")
    assert code == 2 and "model, which is not there; pass --model FOLDER" in " ".join(err.split())
    assert run("search", index, "a", "--model", tmp_path / "moved")[0] == 0
