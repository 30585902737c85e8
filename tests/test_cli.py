"""The verbs, end to end on tiny models: what they print, and how they fail."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from safetensors import SafetensorError

import chiasm
import chiasm.vlm
import tiny
from chiasm.cli import app
from chiasm.cli.app import ORDER
from chiasm.connectors import PACKAGED
from chiasm.generation.engine import Engine, Piece
from chiasm.training.reporter import Reporter, Task, progress_bar

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of a tiny connected model."""
    folder = tmp_path / "model"
    chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """LLaVA JSON with 24 pictures of one colour each."""
    rows = []
    for number in range(24):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (40 + number, 40), COLOURS[name]).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": name}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_train_eval_chat(run: Any, model: Path, data: Path, tmp_path: Path) -> None:
    options = ["--set", "batch_size=4", "--set", "validation.answers=1"]
    code, out, err = run("train", "llava", "--model", model, "--data", data, "-o", tmp_path / "run", *options, "--json")
    assert code == 0, err
    trained = Path(json.loads(out)["model"])
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"plan", "step", "validation", "stage_end"} <= {event["event"] for event in events}
    code, out, err = run("eval", trained, "--data", data, "--limit", 6, "--max-new-tokens", 4, "--json")
    assert code == 0, err
    assert json.loads(out)["summary"][-1]["n"] == 6
    code, out, err = run("chat", trained, data.parent / "1.png", "-p", "Colour?", "--max-new-tokens", 4)
    assert code == 0, err
    assert out.endswith("\n")
    code, out, err = run("inspect", trained, "--json")
    assert json.loads(out)["tokens_per_image"] == 9


def test_intermediate_fusion_from_end_to_end(run: Any, model: Path, data: Path, tmp_path: Path) -> None:
    parts = tmp_path / "vision", tmp_path / "language"
    tiny.vision().save_pretrained(parts[0])
    tiny.language().save_pretrained(parts[1])
    tiny.tokenizer().save_pretrained(parts[1])
    (parts[0] / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    options = ["--fusion", "intermediate", "--cross-attention", '{"every": 2, "heads": 2}']
    folder = tmp_path / "flamingo"
    code, out, err = run("connect", "--vision", parts[0], "--language", parts[1], *options, "-o", folder)
    assert code == 0, err
    assert "intermediate fusion" in out and "cross_attention" in out and "train flamingo" in out
    steps = ["--set", "stages.align.steps=2", "--set", "batch_size=4", "--set", "validation.answers=1"]
    code, out, err = run(
        "train", "flamingo", "--model", folder, "--data", data, "-o", tmp_path / "run", *steps, "--json"
    )
    assert code == 0, err
    trained = json.loads(out)["model"]
    code, out, err = run("eval", trained, "--data", data, "--limit", 4, "--shots", 2, "--max-new-tokens", 3, "--json")
    assert code == 0, err
    asked = [trained, data.parent / "1.png", "-p", "Colour?", "--max-new-tokens", 3]
    shot = ["--example", f"{data.parent / '0.png'}|Colour?|red"]
    code, out, err = run("chat", *asked, *shot, "--show-attention", tmp_path / "seen.png", "--json")
    assert code == 0, err
    assert Image.open(tmp_path / "seen.png").width > 224
    answer = json.loads(out)["answer"]
    assert run("chat", *asked, *shot)[1].strip() == answer


def test_late_fusion_from_end_to_end(run: Any, data: Path, tmp_path: Path) -> None:
    parts = tmp_path / "vision", tmp_path / "language"
    tiny.vision().save_pretrained(parts[0])
    tiny.language().save_pretrained(parts[1])
    tiny.tokenizer().save_pretrained(parts[1])
    (parts[0] / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    folder = tmp_path / "two_towers"
    towers = ["--vision", parts[0], "--language", parts[1]]
    code, out, err = run("connect", *towers, "--fusion", "late", "--pooling", '{"text": "mean"}', "-o", folder)
    assert code == 0, err
    assert "late fusion" in out and "pooled by mean" in out and "train clip" in out
    short = ["--set", "steps=2", "--set", "batch_size=4"]
    code, out, err = run("train", "clip", "--model", folder, "--data", data, "-o", tmp_path / "run", *short, "--json")
    assert code == 0, err
    trained = json.loads(out)["model"]
    for task, rows in (("retrieval", 6), ("zero-shot", 2)):
        code, out, err = run("eval", trained, "--data", data, "--task", task, "--json")
        assert code == 0, err
        summary = json.loads(out)["summary"]
        assert len(summary) == rows and summary[0]["n"] == summary[0]["control_n"] == 24
        (tmp_path / "7.png").rename(tmp_path / "gone.png")
        code, out, err = run("eval", trained, "--data", data, "--task", task, "--skip-bad", "--json")
        assert code == 0 and json.loads(out)["summary"][0]["n"] == 23, err
        (tmp_path / "gone.png").rename(tmp_path / "7.png")
    code, out, err = run(
        "train", "late_vqa", "--model", trained, "--data", data, "-o", tmp_path / "vqa", *short, "--json"
    )
    assert code == 0, err
    code, out, err = run("eval", json.loads(out)["model"], "--data", data, "--json")
    assert code == 0 and json.loads(out)["summary"][-1]["metric"] == "exact_match", err
    code, out, err = run("inspect", tmp_path / "vqa" / "model")
    assert code == 0 and "3 answers" in out, err


def test_a_full_disk_is_one_line_and_leaves_nothing(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Path, **_: Any) -> None:
        Path(folder, "config.json").write_text("{}")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    loaded = chiasm.load(model)
    parts = tmp_path / "vision", tmp_path / "language"
    loaded.model.vision.model.save_pretrained(parts[0])
    loaded.model.language.save_pretrained(parts[1])
    tiny.tokenizer().save_pretrained(parts[1])
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    for verb in (
        ("connect", "--vision", parts[0], "--language", parts[1]),
        ("convert", model, "--to", "transformers", "--no-check"),
    ):
        code, _, err = run(*verb, "-o", tmp_path / "new" / "one")
        assert code == 2
        assert "new/one is not written: the disk is full" in err and "Traceback" not in err
        assert list((tmp_path / "new").iterdir()) == []


def test_broken_samples_are_left_out_of_an_evaluation_on_demand(run: Any, model: Path, data: Path) -> None:
    rows = json.loads(data.read_text())
    rows[3] |= {"conversations": rows[3]["conversations"][:1]}
    data.write_text(json.dumps(rows))
    (data.parent / "5.png").write_bytes((data.parent / "5.png").read_bytes()[:60])
    asked = ["eval", model, "--data", data, "--max-new-tokens", 2, "--json"]
    code, _, err = run(*asked)
    assert code == 2
    assert "sample '3'" in err and "--skip-bad" in err and "Traceback" not in err
    code, out, err = run(*asked, "--skip-bad")
    assert code == 0, err
    told = json.loads(out)
    assert told["summary"][-1]["n"] == 22
    assert run(*asked, "--limit", 8, "--skip-bad")[0] == 0
    assert told["notes"][0].startswith("2 of 24 samples cannot be used and were skipped ('3': ")
    data.write_text(json.dumps([rows[5]] * 2))
    code, _, err = run(*asked, "--skip-bad")
    assert code == 2
    assert "none of the 2 samples can be used, the first being" in " ".join(err.split())


def test_an_evaluation_that_was_stopped_goes_on(
    run: Any, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped with the second model: the first one's answers, and the other's so far, are not asked for again."""
    folder, generate, batches = tmp_path / "result", chiasm.VLM.generate, []
    asked = ["eval", model, "--data", data, "--max-new-tokens", 2, "--batch-size", 8, "--against", tmp_path / "other"]
    chiasm.connect(tiny.vision(seed=7), tiny.language(), tokenizer=tiny.tokenizer()).save_pretrained(tmp_path / "other")

    def dying(self: chiasm.VLM, *given: Any, **options: Any) -> list[str]:
        if len(batches) == 7:
            raise KeyboardInterrupt
        batches.append(given)
        return generate(self, *given, **options)

    monkeypatch.setattr(chiasm.VLM, "generate", dying)
    code, _, err = run(*asked, "-o", folder)
    assert code == 130 and "stopped; the same command goes on from the answers in" in err
    assert len((folder / ".answers.jsonl").read_text().splitlines()) == 7
    batches.clear()
    assert run(*asked, "-o", folder)[0] == 0 and len(batches) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["results.jsonl", "summary.json"]
    monkeypatch.setattr(chiasm.VLM, "generate", generate)
    assert run(*asked, "-o", tmp_path / "whole")[0] == 0
    for name in ("results.jsonl", "summary.json"):
        assert (folder / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_check_finds_what_is_broken(run: Any, data: Path, model: Path) -> None:
    assert run("data", "check", data)[0] == 0
    assert run("data", "check", data, "--model", model)[0] == 0
    code, out, _ = run("data", "check", data, "--model", model, "--max-length", 12, "--json")
    assert code == 2 and json.loads(out)["counts"] == {"too long": 24}
    code, out, _ = run("data", "check", data, "--model", model, "--max-length", 38, "--json")
    assert code == 0 and set(json.loads(out)["counts"]) == {"cut answer"}, "a warning"
    code, _, err = run("data", "check", data, "--max-length", 12)
    assert code == 2 and "--max-length 12 is in a model's tokens; pass --model too" in err
    for split in ("train", "test"):
        shutil.copytree(data.parent, data.parent / "splits" / split, ignore=shutil.ignore_patterns("splits"))
    (data.parent / "splits" / "test" / "3.png").unlink()
    assert run("data", "check", data.parent / "splits")[0] == 0, "training reads the train split"
    assert run("data", "check", data.parent / "splits", "--split", "test")[0] == 2
    (data.parent / "3.png").write_bytes((data.parent / "3.png").read_bytes()[:60])
    code, out, _ = run("data", "check", data, "--json")
    assert code == 2
    assert [finding["id"] for finding in json.loads(out)["findings"]] == ["3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["connect", "--vision", "efficientnet-lite", "-o", "OUT"], "did you mean efficientnet-lite"),
        (["connect", "--connector", "mlpp", "-o", "OUT"], "connector 'mlpp' is unknown"),
        (["connect", "--connector", "{bad", "-o", "OUT"], "is not JSON"),
        (["connect", "--preset", "lava", "-o", "OUT"], "preset 'lava' is unknown; choose one of llava, "),
        (["chat", "no-such-folder/at-all/", "-p", "Hi"], "does not exist"),
        (["train", "llavaa", "--model", "MODEL", "--data", "DATA", "-o", "OUT"], "llavaa"),
        (["train", "llava", "--model", "MODEL", "--data", "no.json", "-o", "OUT"], "no.json"),
        (["train", "llava", "--model", "MODEL", "--data", "DATA", "-o", "OUT", "--set", "batchsize=3"], "batchsize"),
        (["chat", "MODEL", "nowhere.png", "-p", "Hi"], "no such picture: nowhere.png"),
        (["chat", "MODEL", "-p", "Hi", "--example", "a.png|what"], "has 2 part(s), expected picture|question|answer"),
        (["chat", "MODEL", "-p", "Hi", "--example", "no.png|what|this"], "no such picture: no.png"),
        (["chat", "MODEL", "-p", "Hi", "--show-attention", "a.png"], "give a picture and -p"),
        (["chat", "NOWHERE", "PICTURE", "-p", "Hi", "--show-attention", "a.foo"], "'a.foo' is no picture's name"),
        (
            ["draw", "NOWHERE", "an apple", "-o", "a"],
            "-o 'a' is no picture's name; it ends in .jpg, .jpeg, .jfif, .png",
        ),
        (
            ["search", "NOWHERE", "an apple", "--sheet", "x.foo"],
            "--sheet 'x.foo' is no picture's name; it ends in .jpg",
        ),
        (["eval", "MODEL", "--data", "DATA", "--shots", "40"], "to take 40 examples from"),
        (["chat", "MODEL", "--json"], "--json is for one answer; give -p"),
        (["compare", "compare", "-o", "OUT", "--here", "--jobs", "2"], "--jobs 2 is not for --here"),
        (["compare", "compare", "-o", "OUT", "--list", "--jobs", "2"], "--jobs 2 is not for --list"),
        (["compare", "compare", "-o", "OUT", "--list", "--here"], "--list runs no cell, so --here is not for it"),
        (["convert", "MODEL", "--to", "gguf", "-o", "OUT", "--no-check"], "--no-check is not for --to gguf"),
        (
            ["train", "llava", "--model", "MODEL", "--plan-only", "--validation-data", "DATA"],
            "goes with --data; without",
        ),
        (["chat", "NOWHERE", "PICTURE", "-p", ""], "-p is '', expected words; write a question, or leave -p out"),
        (["search", "NOWHERE", " "], "the text is ' ', expected words; say what to look for"),
        (["draw", "NOWHERE", "", "-o", "a.png"], "the prompt is '', expected words; say what to draw"),
        (["frobnicate"], "No such command 'frobnicate' (see chiasm --help)"),
        (["train"], "Missing argument 'recipe' (see chiasm train --help)"),
        (["train", "llavaa", "--model", "MODEL", "--data", "DATA", "-o", "OUT"], "did you mean llava?"),
        (["train", "compare", "--model", "MODEL", "--data", "DATA", "-o", "OUT"], "compare.yaml"),
        (["train", "llava", "--model", "MODEL", "--data", "DATA", "-o", "DATA"], "is a file; name a folder"),
        (["demo", "-o", "DATA"], "is a file; name a folder"),
        (["eval", "MODEL", "--data", "DATA", "--against", "nowhere"], "source 'nowhere' is no alias"),
        (["serve", "MODEL", "--port", "99999"], "Invalid value for '--port'"),
        (["serve", "MODEL", "--api-key-file", "no.txt"], "error: no.txt: No such file"),
        (["pull", "smollm"], "did you mean smollm2-135m-instruct?"),
        (["connect", "--conector", "mlp", "-o", "OUT"], "No such option: --conector"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    run: Any, model: Path, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"OUT": tmp_path / "out", "MODEL": model, "DATA": data}
    code, _, err = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in err and err[err.index("error:") :].count("\n") == 1
    assert "Traceback" not in err


PARTS = ["connect", "--vision", "VISION", "--language", "LANGUAGE", "-o", "OUT"]
RECIPE = ["train", "RECIPE", "--model", "MODEL", "--data", "DATA", "-o", "OUT"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PARTS, "--connector", '{"name": ["mlp"]}'], "connector ['mlp'] is unknown"),
        ([*PARTS, "--connector", '{"name": "mlp", "depth": "x"}'], "depth='x', expected int"),
        ([*PARTS, "--connector", '{"name": "mlp", "bias": "no"}'], "bias='no', expected bool"),
        ([*PARTS, "--connector", '{"name": "mlp", "width": -2}'], "width=-2, expected at least 1"),
        ([*PARTS, "--features", "5"], "--features '5' is not a JSON object"),
        ([*PARTS, "--features", '{"layers": 3}'], "layers is 3, expected a list"),
        ([*PARTS, "--features", '{"layers": [null]}'], "layers is [None], expected a list"),
        ([*PARTS, "--features", '{"reduce": 5}'], "reduce is 5, expected a word"),
        ([*PARTS, "--features", '{"grid": [0, 0]}'], "grid is [0, 0], expected a whole number above 0"),
        ([*PARTS, "--features", '{"grid": "x"}'], "grid is 'x', expected a whole number above 0"),
        ([*PARTS, "--image-size", "-3"], "image_size is -3, expected a whole number above 0"),
        ([*PARTS, "--image-size", "100000"], "image_size is 100000, expected at most 4096 pixels a side"),
        ([*PARTS, "--language", "VISION"], "'clip_vision_model', which is no language model that answers"),
        ([*PARTS, "--language", "BROKEN"], "damaged or cut off"),
        ([*PARTS, "--vision", "BROKEN"], "damaged or cut off"),
        (["inspect", "BROKEN"], "damaged or cut off"),
        (["inspect", "EMPTY"], "holds no config.json"),
        (["inspect", "ADAPTER"], "holds PEFT adapters without their model"),
        (["inspect", "TYPELESS"], "is no JSON object with model_type"),
        ([*PARTS[:-1], "MODEL"], "exists and is not empty"),
        ([*RECIPE[:-1], "MODEL"], "is not empty and holds no run"),
        (["chat", "MODEL", "RECIPE", "-p", "Hi"], "cannot be read as a picture"),
        (["chat", "MODEL", "-p", "Hi" * 800], "context is 1024; shorten"),
        (["chat", "MODEL", "-p", "Hi", "--temperature", "nan"], "temperature=nan, expected 0 (greedy) or a finite"),
        (["chat", "MODEL", "-p", "Hi", "--temperature", "inf", "--json"], "temperature=inf, expected 0 (greedy)"),
        (["eval", "MODEL", "--data", "EMPTY"], "holds no data file"),
        (["eval", "MODEL", "--data", "EMPTY", "-o", "RECIPE"], "recipe' is a file; name a folder"),
        (["data", "check", "DATA", "--max-pixels", "-1"], "max_pixels is -1, expected a whole number above 0"),
        (["data", "check", "DATA", "--max-bytes", "0"], "max_bytes is 0, expected a whole number above 0"),
        (["inspect", "DAMAGED"], "processor_config.json is damaged, it is not JSON"),
    ],
)
def test_strange_values_are_one_line_and_exit_2(
    run: Any, model: Path, data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    names = (
        "OUT",
        "MODEL",
        "VISION",
        "LANGUAGE",
        "BROKEN",
        "DAMAGED",
        "EMPTY",
        "ADAPTER",
        "TYPELESS",
        "RECIPE",
        "DATA",
    )
    places: dict[str, Path] = {name: tmp_path / name.lower() for name in names} | {"DATA": data}
    tiny.vision().save_pretrained(places["VISION"])
    tiny.language().save_pretrained(places["LANGUAGE"])
    whole = {"inspect": model, "--vision": places["VISION"]}
    before = arguments[arguments.index("BROKEN") - 1] if "BROKEN" in arguments else ""
    shutil.copytree(whole.get(before, places["LANGUAGE"]), places["BROKEN"])
    (places["BROKEN"] / "model.safetensors").write_bytes(b"cut off")
    shutil.copytree(model, places["DAMAGED"])
    (places["DAMAGED"] / "processor_config.json").write_text("{cut off")
    places["EMPTY"].mkdir()
    places["ADAPTER"].mkdir()
    (places["ADAPTER"] / "adapter_config.json").write_text("{}")
    places["TYPELESS"].mkdir()
    (places["TYPELESS"] / "config.json").write_text("[]")
    places["RECIPE"].write_text("stages: [{name: a, steps: 1, lr: 1.0e-3, parts: {connector: full, '*': frozen}}]")
    code, _, err = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["pull", "connect", "inspect", "chat", "train", "eval", "demo", "serve"])
def test_every_verb_has_an_example(run: Any, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert f"chiasm {verb}" in out


def test_the_version_is_told(run: Any) -> None:
    assert run("--version") == (0, f"{chiasm.__version__}\n", "")


def test_verbs_are_listed_as_a_model_comes_about(run: Any) -> None:
    listed = re.findall(r"^│ (\w+) ", run("--help")[1], re.MULTILINE)
    assert listed == list(ORDER)


def test_help_names_what_there_is_to_choose(run: Any) -> None:
    recipes = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")} - {"compare", "demo"}
    for verb, names in (("connect", PACKAGED), ("train", recipes)):
        words = set(re.findall(r"\w+", run(verb, "--help")[1]))
        assert names <= words, names - words


def test_a_conversation_remembers(run: Any, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Colour?", "/image nowhere.png", "And now?", "/new", "Hello", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(lines))
    code, out, err = run("chat", model, data.parent / "0.png", "--max-new-tokens", 3)
    assert code == 0, err
    assert "no such picture" in out


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_in_a_chat(
    run: Any, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    packed = chiasm.load(model)
    Engine(packed.model, packed.processor, weights=weights, release=True).close()
    picture, few = data.parent / "0.png", {"max_new_tokens": 5}
    expected = packed.chat(picture, "Colour?", **few)
    asked = ["chat", model, picture, "--max-new-tokens", 5, "--weights", weights]
    code, out, err = run(*asked, "-p", "Colour?")
    assert code == 0 and out.strip() == expected, err
    code, out, err = run(*asked, "-p", "Colour?", "--show-attention", data.parent / "seen.png", "--json")
    assert code == 0 and json.loads(out)["answer"] == expected, err
    shot = packed.chat(picture, "Colour?", examples=[(picture, "Colour?", "red")], **few)
    code, out, err = run(*asked, "-p", "Colour?", "--example", f"{picture}|Colour?|red")
    assert code == 0 and out.strip() == shot, err
    lines = iter(["Colour?", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(lines))
    code, out, err = run(*asked)
    assert code == 0 and expected in out, err


def test_weights_are_one_option_of_chat_and_serve(run: Any, model: Path) -> None:
    told = [
        next(p.help for p in typer.main.get_command(app).commands[verb].params if p.name == "weights")  # type: ignore[attr-defined]
        for verb in ("chat", "serve")
    ]
    assert told[0] == told[1]
    code, _, err = run("chat", model, "-p", "Hi", "--weights", "int3")
    assert code == 2 and "weights='int3', expected one of float32, int8, int4" in err


def test_brackets_are_printed_as_they_are(run: Any, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data.parent / "[bold]my models"
    code, out, err = run("connect", "--vision", data.parent / "v", "--language", data.parent / "l", "-o", folder)
    assert code == 2 and "/v' does not exist" in err
    model.rename(folder)
    options = ["--set", "steps=1", "--set", "batch_size=2", "--set", "validation.samples=0"]
    result = data.parent / "[red]run"
    code, out, err = run("train", "llava", "--model", folder, "--data", data, "-o", result, *options)
    assert code == 0, err
    assert f"model: {result}/model; talk to it: chiasm chat '{result}/model' PICTURE" in out
    lines = iter(["/image [x].jpg", "[bold]What[/bold]?", "And [/red] now?", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_: next(lines))

    def submit(self: Engine, messages: Any, *_: Any) -> Any:
        prompt = messages[-1]["content"][-1]["text"]
        if "[/red]" in prompt:
            raise ValueError(f"a mistake in {prompt}")
        return [Piece(text, 0) for text in ("[bold]", "[/red] ", prompt)]

    monkeypatch.setattr(Engine, "submit", submit)
    code, out, err = run("chat", folder)
    assert code == 0, err
    for line in ("no such picture: [x].jpg", "[bold][/red] [bold]What[/bold]?", "a mistake in And [/red] now?"):
        assert line in out


def test_bfloat16_in_software_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chiasm.vlm, "best_device", lambda: torch.device("cpu"))
    for hardware, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        monkeypatch.setattr(chiasm.vlm, "choose_dtype", lambda wanted, device, found=hardware: found)
        model = chiasm.connect(tiny.vision(), tiny.language().bfloat16(), tokenizer=tiny.tokenizer())
        ready = chiasm.vlm.ready_to_answer(model)
        assert ready.model.language.dtype == expected
        assert isinstance(ready.chat(tiny.picture(), "What?", max_new_tokens=2), str)


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [
        ("serve", "--max-batch", 0),
        ("serve", "--max-waiting", -1),
        ("serve", "--max-tokens", 0),
        ("serve", "--max-images", -1),
        ("serve", "--max-pixels", 0),
        ("serve", "--max-body", 0),
        ("serve", "--request-seconds", 0),
        ("serve", "--port", 70_000),
        ("serve", "--temperature", "nan"),
        ("serve", "--temperature", -1),
        ("chat", "--max-new-tokens", 0),
        ("chat", "--temperature", "inf"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    run: Any, model: Path, monkeypatch: pytest.MonkeyPatch, verb: str, option: str, value: Any
) -> None:
    """Before a model is loaded, and not by every answer."""
    monkeypatch.setattr("chiasm.vlm.load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("chiasm.load", lambda *_: pytest.fail("loaded"))
    code, _, err = run(verb, model, option, value)
    assert code == 2 and option.removeprefix("--") in err, err


def test_one_answer_on_a_cpu_is_in_float32_too(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chiasm.load(model).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    monkeypatch.setattr(chiasm.vlm, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(chiasm.vlm, "choose_dtype", lambda wanted, device: torch.bfloat16)
    seen: list[torch.dtype] = []
    monkeypatch.setattr(chiasm.VLM, "stream", lambda self, *_, **__: iter([str(seen.append(self.model.dtype))]))
    code, _, err = run("chat", tmp_path / "half", "-p", "Hi")
    assert code == 0 and seen == [torch.float32], err


def test_an_engine_on_a_cpu_steps_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision has no compiled step, whatever the processor multiplies; packed weights need no conversion."""
    monkeypatch.setattr(chiasm.vlm, "best_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(chiasm.vlm, "choose_dtype", lambda wanted, device: torch.bfloat16)
    for dtype, weights, expected in (
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, "float32", torch.float32),
        (torch.bfloat16, "int8", torch.bfloat16),
    ):
        model = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer()).to(dtype)
        assert chiasm.vlm.ready_to_step(model, weights).model.language.dtype == expected


def test_plan_only_trains_nothing_and_shows_the_table(run: Any, model: Path, data: Path, tmp_path: Path) -> None:
    options = ["--model", model, "--set", "batch_size=4", "--plan-only"]
    code, out, err = run("train", "connector", *options)
    assert code == 0, err
    assert "language" in out and "frozen" in out and "pass --data to have them measured" in " ".join(out.split())
    code, out, err = run("train", "lora", *options, "--data", data, "--json")
    assert code == 0, err
    align, lora = json.loads(out)["stages"]
    assert (align["stage"], lora["stage"]) == ("align", "lora") and lora["parts"]["vision"] == "lora, rank 8, lr 0.0001"
    assert lora["memory"]["activations"] > 0 and lora["seconds"] > 0 and lora["trainable"] > align["trainable"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["model"]
    code, _, err = run("train", "lora", *options, "--set", "stages.lora.parts.vision.targets=[qkv]")
    assert code == 2 and "'qkv' is no linear layer of part 'vision'" in " ".join(err.split())
    code, _, err = run("train", "connector", "--model", model)
    assert code == 2 and "--data is missing" in err


def test_a_run_is_reported_and_compared(run: Any, model: Path, data: Path, tmp_path: Path) -> None:
    made = tmp_path / "run"
    few = ["--set", "steps=2", "--set", "batch_size=4", "--set", "validation.answers=1"]
    assert run("train", "connector", "--model", model, "--data", data, "-o", made, *few)[0] == 0
    code, out, err = run("report", made, "--data", data, "--json")
    assert code == 0, err
    page = Path(json.loads(out)["report"]).read_text()
    assert "finished" in page and "What it cost what was there before" in page
    asked = ["--data", data, "--limit", 6, "--max-new-tokens", 2, "--no-control"]
    code, out, err = run("eval", made / "model", *asked, "--against", model, "-o", tmp_path / "scores", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["comparison"][-1]["n"] == 6 and result["verdict"].startswith("No evidence that")
    code, out, err = run("eval", model, *asked, "--against", tmp_path / "scores")
    assert code == 0 and "McNemar p = 1" in " ".join(out.split()), err


def test_an_evaluation_skips_what_is_broken(run: Any, model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:60])
    (tmp_path / "9.png").unlink()
    rows = json.loads(data.read_text())
    rows[13]["conversations"][0]["value"] = "<image> <image> Colour?"
    data.write_text(json.dumps(rows))
    asked = ["eval", model, "--data", data, "--max-new-tokens", 2]
    assert run(*asked)[0] == 2
    code, out, err = run(*asked, "--skip-bad", "--shots", 1, "-o", tmp_path / "scores", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["summary"][-1]["n"] == result["summary"][-1]["control_n"] == 21
    assert [row["id"] for row in result["skipped"]] == ["4", "9", "13"]
    assert result["skipped"] == json.loads((tmp_path / "scores" / "summary.json").read_text())["skipped"]
    assert result["notes"][0].startswith("3 of 24 samples cannot be used and were skipped ('4': ")
    code, out, err = run(*asked, "--skip-bad", "--limit", 6, "--against", tmp_path / "scores")
    assert code == 2 and "the same questions" in " ".join(err.split())
    code, out, err = run(*asked, "--skip-bad", "--limit", 6, "--against", model)
    assert code == 0 and "1 of 6 samples cannot be used and were skipped ('4': " in out, err
    data.write_text(json.dumps([rows[4], rows[9]]))
    code, _, err = run(*asked, "--skip-bad")
    assert code == 2 and "none of the 2 samples can be used, the first being '4'" in " ".join(err.split())


def test_the_recipe_schema_is_printed(run: Any) -> None:
    code, out, _ = run("recipe", "schema")
    assert code == 0 and "stages" in json.loads(out)["properties"]
    assert run("recipe", "docs")[1].startswith("# Every key of a recipe")


def test_unified_fusion_is_connected_inspected_and_draws(run: Any, tmp_path: Path, model: Path) -> None:
    folder, drawn = tmp_path / "one", tmp_path / "pictures" / "cat.png"
    sizes = '{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}'
    codes = '{"name": "vq", "image_size": 16, "levels": [4, 3], "width": 8, "depth": 1}'
    options = ("--positions", "mrope+modality", "--unified", '{"qk_norm": "rms"}')
    code, out, _ = run(
        "connect", "--fusion", "unified", "--language", sizes, "--image-input", codes, *options, "-o", folder
    )
    assert code == 0 and "chiasm train unified --model" in out
    code, out, _ = run("inspect", folder, "--json")
    told = json.loads(out)
    assert code == 0 and told["fusion"] == "unified" and told["tokens_per_image"] == 4
    assert set(told["parts"]) == {"vision", "language"}
    code, out, _ = run("draw", folder, "two red apples", "-o", drawn, "--json")
    assert code == 0 and json.loads(out)["size"] == [16, 16] == list(Image.open(drawn).size)
    code, _, err = run("draw", model, "two red apples", "-o", drawn)
    assert code == 2 and "cannot draw; connect with fusion='unified'" in " ".join(err.split())


def test_long_work_is_told_where_nobody_watches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("chiasm.training.reporter.PLAIN_SECONDS", -1.0)
    with progress_bar("answering", Console(stderr=True)) as update:
        for done, total in ((1, 2), (2, 2), (1, 4)):  # the pictures first, then the questions
            update(done, total)
    told = [line.split(",")[0].strip() for line in capsys.readouterr().err.splitlines()]
    assert told == ["answering 1/2", "answering 2/2", "answering 1/4"]


def test_the_time_left_goes_by_the_pace_since_the_first_units(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The first step of a run comes after its pictures are encoded."""
    now = [0.0]
    monkeypatch.setattr("chiasm.training.reporter.PLAIN_SECONDS", -1.0)
    monkeypatch.setattr("chiasm.training.reporter.time", SimpleNamespace(monotonic=lambda: now[0]))
    task = Task(Reporter("plain", Console(stderr=True)), "step", 10, 0)
    for now[0] in (100.0, 102.0):
        task.advance()
    assert capsys.readouterr().err.splitlines() == ["step 1/10 ", "step 2/10 , 0:16 left"]
