"""Whole runs on a tiny model: who changes, who does not, what is written, and what stops a run."""

import errno
import json
import math
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import helpers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import chiasm
import contracts
from chiasm.data.containers import TarRows
from chiasm.data.feature_cache import FeatureCache
from chiasm.data.readers import read
from chiasm.data.schema import ImageRef, Sample
from chiasm.training import features
from chiasm.training.checkpoint import TrainingError
from chiasm.training.closed_form import Started
from chiasm.training.log import read_log
from chiasm.training.preview import preview
from chiasm.training.recipe import load_recipe
from chiasm.training.reporter import Reporter
from chiasm.training.validation import Validator

FULL = {**helpers.FROZEN, "connector": {"tune": "full", "lr": 1e-2}}


def events(result: helpers.TrainResult, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_log(result.log) if event["event"] == kind]


def losses(result: helpers.TrainResult) -> list[tuple[str, int, float]]:
    return [(event["stage"], event["step"], event["loss"]) for event in events(result, "step")]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fusion", "part"),
    [(fusion, part) for fusion in helpers.FUSIONS for part in ("connector", "language", "vision")]
    + [("intermediate", "cross_attention")],
)
def test_one_step_changes_exactly_the_parts_that_are_tuned(tmp_path: Path, fusion: str, part: str, dtype: str) -> None:
    model = helpers.vlm(fusion=fusion)
    before = helpers.weights(model)
    parts = {**helpers.FROZEN, part: {"tune": "full", "lr": 1e-2}}
    result = helpers.run(tmp_path / "run", {"stages": [helpers.stage(steps=1, parts=parts, dtype=dtype)]}, model)
    unused = {f"vision.{name}" for name in model.model.vision.unused_parameters()}
    expected = {name for name, _ in model.model.named_parameters() if name.startswith(f"{part}.")} - unused
    assert changed(before, helpers.weights(model)) == expected
    warned = [event["text"] for event in events(result, "warning")]
    assert len(warned) == (1 if part == "vision" else 0) and all("got no gradient" in text for text in warned)


def test_a_run_that_keeps_no_models_can_go_on(tmp_path: Path) -> None:
    recipe = {"stages": [helpers.stage(), helpers.stage("more")]}
    first, second = helpers.vlm(), helpers.vlm()
    result = helpers.run(tmp_path / "run", recipe, first, keep_models=False)
    assert sorted(path.name for path in result.output.iterdir() if path.is_dir()) == ["checkpoints"]
    assert helpers.run(tmp_path / "run", recipe, second, keep_models=False).model.exists() is False
    assert not changed(helpers.weights(first), helpers.weights(second))
    helpers.run(tmp_path / "run", recipe, helpers.vlm())
    assert not changed(helpers.weights(first), helpers.weights(chiasm.load(result.model)))


def test_lora_changes_its_targets_and_leaves_no_trace_of_itself(tmp_path: Path) -> None:
    model = helpers.vlm()
    before = helpers.weights(model)
    plan = {"tune": "lora", "lr": 1e-2, "rank": 2, "targets": ["q_proj", "down_proj"]}
    recipe = {"stages": [helpers.stage(steps=2, parts={**helpers.FROZEN, "language": plan}, dtype="bfloat16")]}
    helpers.run(tmp_path / "run", recipe, model)
    names = changed(before, helpers.weights(model))
    assert len(names) == 2 * 3 and all(".q_proj." in name or ".down_proj." in name for name in names)
    assert model.model.config.adapters is None and all(p.requires_grad for p in model.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_is_a_model_folder_and_the_last_is_the_result(tmp_path: Path, dtype: str) -> None:
    model = helpers.vlm()
    result = helpers.run(tmp_path / "run", helpers.TWO_STAGES, model, overrides=[f"dtype={dtype}"])
    final = helpers.weights(model)
    for folder in (result.model, result.stages["instruct"]):
        assert changed(final, helpers.weights(chiasm.load(folder))) == set()
    align = helpers.weights(chiasm.load(result.stages["align"]))
    assert all(name.startswith("connector.") for name in changed(helpers.weights(helpers.vlm()), align))
    picture = helpers.sample(0).images[0].load()
    assert chiasm.load(result.model).chat(picture, "colour", max_new_tokens=4) == model.chat(
        picture, "colour", max_new_tokens=4
    )


def test_the_result_takes_the_space_of_one_model_and_is_not_the_stage(tmp_path: Path) -> None:
    result = helpers.run(tmp_path / "run", {"stages": [helpers.stage(steps=1)]})
    folders = result.model, result.stages["align"]
    result_weights, stage_weights = (folder / "model.safetensors" for folder in folders)
    if os.name != "nt":
        assert result_weights.samefile(stage_weights)
    assert not any((result.model / name).samefile(folders[1] / name) for name in ("config.json", "README.md"))
    assert len({frozenset(path.name for path in folder.iterdir()) for folder in folders}) == 1
    before, other = stage_weights.read_bytes(), chiasm.load(result.model)
    next(other.model.parameters()).data.add_(1)
    other.save_pretrained(result.model)
    assert result_weights.read_bytes() != before == stage_weights.read_bytes()


def test_a_disk_without_links_holds_the_result_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    result = helpers.run(tmp_path / "run", {"stages": [helpers.stage(steps=1)]})
    one, other = (helpers.weights(chiasm.load(folder)) for folder in (result.model, result.stages["align"]))
    assert changed(one, other) == set() and one.keys() == other.keys()


def test_the_log_says_what_happened(tmp_path: Path) -> None:
    recipe = {"stages": [helpers.stage(validation={"samples": 4, "every": 3, "answers": 2})]}
    model = helpers.vlm()

    def generate(messages: list, images: list) -> list[str]:
        return model.generate(messages, images, max_new_tokens=2)

    result = helpers.run(tmp_path / "run", recipe, model, data=helpers.samples(60), generate=generate)
    plan = events(result, "plan")[0]
    assert plan["parts"] == {"vision": "frozen", "connector": "full, lr 0.01", "language": "frozen"}
    assert plan["trainable"] == sum(p.numel() for p in model.model.connector.parameters()) and plan["steps"] == 4
    steps = events(result, "step")
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    assert {"loss", "lr", "grad_norm", "samples_per_second", "tokens_per_second", "supervised_tokens"} <= set(steps[0])
    assert steps[0]["peak_memory_bytes"] > 1e6 and steps[0]["lr"] == {"connector": 0.01}
    validations = events(result, "validation")
    assert [event["step"] for event in validations] == [0, 3, 4]
    assert validations[0]["loss"] != validations[0]["shuffled_loss"]
    answer = validations[-1]["answers"][0]
    assert set(answer) == {"id", "question", "answer", "expected", "correct"} and answer["expected"] in helpers.COLOURS
    assert events(result, "stage_end")[0]["seconds"] > 0
    assert load_recipe(tmp_path / "run" / "recipe.yaml").stages == load_recipe(recipe).stages


@pytest.mark.parametrize("fusion", helpers.FUSIONS)
def test_learning_beats_the_shuffled_control(tmp_path: Path, fusion: str) -> None:
    parts = {**FULL, "language": {"tune": "full", "lr": 1e-2}}
    recipe = {"stages": [helpers.stage(steps=60, parts=parts, batch_size=8, validation={"samples": 8})]}
    data = [helpers.sample(index) for index in range(48)]
    model = helpers.vlm(fusion=fusion)
    recipe = helpers.with_blocks(recipe, fusion)
    result = helpers.run(tmp_path / "run", recipe, model, data=data[8:], validation_samples=data[:8])
    last = events(result, "validation")[-1]
    assert last["loss"] < 0.5 < last["shuffled_loss"] and not events(result, "warning")


@pytest.mark.parametrize("start", ["keep", "open"])
def test_gates_are_logged_from_their_start(tmp_path: Path, start: str) -> None:
    model = helpers.vlm(fusion="intermediate")
    contracts.open_gates(model.model, 0.0)
    data = [helpers.sample(index) for index in range(24)]
    recipe = helpers.with_blocks({"stages": [helpers.stage(steps=3, warmup=0, schedule="constant")]}, "intermediate")
    recipe["stages"][0] |= {"validation": {"samples": 4, "every": 1}, "gates": start}
    result = helpers.run(tmp_path / "run", recipe, model, data=data)
    told = [event["gates"] for kind in ("validation", "stage_end") for event in events(result, kind)]
    assert len(told) == 5 and all(moment["layers"] == [1] for moment in told)
    first = math.tanh(1.0) if start == "open" else 0.0
    assert told[0]["attention_gate"] == told[0]["feed_forward_gate"] == [pytest.approx(first)]
    assert told[-1]["attention_gate"] != told[0]["attention_gate"]
    assert told[-1] == told[-2] == {"layers": [1], **chiasm.load(result.model).model.cross_attention.gates()}
    assert "gates" not in events(helpers.run(tmp_path / "early", helpers.TWO_STAGES), "stage_end")[0]


def test_gates_that_are_not_there_or_not_tuned_cannot_be_opened(tmp_path: Path) -> None:
    recipe = {"stages": [helpers.stage(gates="open")]}
    with pytest.raises(ValueError, match="'align': gates: open is for models with the part cross_attention"):
        helpers.run(tmp_path / "early", recipe)
    with pytest.raises(
        ValueError, match="'align': gates: open changes the part cross_attention, which is frozen; tune"
    ):
        helpers.run(tmp_path / "frozen", recipe, helpers.vlm(fusion="intermediate"))


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    data = [
        helpers.sample(index, images=index % 3) for index in range(7)
    ]  # a last batch that is smaller, and different numbers of supervised tokens
    outcome = []
    for size, accumulate in [(7, 1), (2, 4)]:
        model = helpers.vlm()
        recipe = {"stages": [helpers.stage(steps=2, parts=FULL, batch_size=size, accumulate=accumulate, warmup=0)]}
        result = helpers.run(tmp_path / str(size), recipe, model, data=data)
        outcome.append(
            (losses(result), [event["grad_norm"] for event in events(result, "step")], model.model.connector)
        )
    (large, norms, one), (small, other_norms, other) = outcome
    assert large[0][2] == pytest.approx(small[0][2], rel=1e-6) and norms == pytest.approx(other_norms, rel=1e-4)
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fusion", helpers.FUSIONS)
def test_cached_features_give_the_losses_of_pixels(tmp_path: Path, fusion: str) -> None:
    recipe = helpers.with_blocks(helpers.TWO_STAGES, fusion)
    runs = [
        helpers.run(
            tmp_path / str(cached),
            recipe,
            helpers.vlm(fusion=fusion),
            overrides=[f"cache_features={str(cached).lower()}"],
        )
        for cached in (True, False)
    ]
    cached, pixels = ([loss for *_, loss in losses(run)] for run in runs)
    assert cached == pytest.approx(pixels, rel=1e-4)
    keys = list((tmp_path / "features").glob("*/keys.bin"))
    assert len(keys) == 1 and keys[0].stat().st_size > 0


def test_a_run_is_a_function_of_its_seed(tmp_path: Path) -> None:
    first, again, other = (
        losses(helpers.run(tmp_path / name, helpers.TWO_STAGES, overrides=[f"seed={seed}"]))
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert first == again != other


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    model = helpers.vlm()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    helpers.run(tmp_path / "run", {"stages": [helpers.stage(steps=1)]}, model)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_bfloat16_copies_never_reach_the_disk(tmp_path: Path) -> None:
    recipe = {"stages": [helpers.stage(dtype="bfloat16"), helpers.stage("again", parts=helpers.LORA, dtype="bfloat16")]}
    helpers.run(tmp_path / "run", recipe, overrides=["checkpoint_every=1", "keep_checkpoints=50"])
    for file in (tmp_path / "run" / "checkpoints").glob("*/weights.safetensors"):
        assert all(tensor.dtype == torch.float32 for tensor in load_file(file).values())


def test_a_half_precision_checkpoint_stays_one(tmp_path: Path) -> None:
    model = helpers.vlm()
    model.model.to(torch.bfloat16)
    before = helpers.weights(model)
    result = helpers.run(tmp_path / "run", {"stages": [helpers.stage(steps=2, dtype="bfloat16")]}, model)
    after = helpers.weights(model)
    assert {tensor.dtype for name, tensor in after.items() if tensor.is_floating_point()} == {torch.bfloat16}
    assert {name.split(".")[0] for name in changed(before, after)} == {"connector"}
    assert changed(after, helpers.weights(chiasm.load(result.model))) == set()


def test_text_alone_trains(tmp_path: Path) -> None:
    parts = {**FULL, "language": {"tune": "full", "lr": 1e-2}}
    data = [helpers.sample(index, images=0) for index in range(8)]
    result = helpers.run(tmp_path / "run", {"stages": [helpers.stage(parts=parts)]}, data=data)
    assert losses(result)[-1][2] < losses(result)[0][2]


def test_a_loss_that_depends_on_nothing_that_is_trained_is_refused(tmp_path: Path) -> None:
    """As where a picture becomes codes, through which no gradient comes back."""
    model = helpers.unified(helpers.VQ)
    recipe = {"stages": [helpers.stage(parts={**helpers.FROZEN, "vision": {"tune": "full", "lr": 1e-3}})]}
    told = r"'align': the loss depends on none of the weights that the plan trains \(vision\."
    with pytest.raises(ValueError, match=told) as error:
        helpers.run(tmp_path / "run", recipe, model)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=told):
        preview(load_recipe(recipe), model.model, model.processor, helpers.samples())


def test_a_pooling_that_reads_more_than_the_features_can_be_trained_alone(tmp_path: Path) -> None:
    patterns = {"vision.model.post_layernorm": {"tune": "full", "lr": 1e-2}}
    settings = {"objectives": ["contrastive"], "parts": helpers.FROZEN, "patterns": patterns}
    model = helpers.dual_encoder()
    before = helpers.weights(model)
    data = [helpers.sample(index) for index in range(8)]
    helpers.run(tmp_path / "run", {"stages": [helpers.stage(**settings)]}, model, data)
    moved = {name for name, tensor in helpers.weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"vision.model.post_layernorm.weight", "vision.model.post_layernorm.bias"}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tmp_path: Path) -> None:
    model = helpers.vlm()
    model.model.connector.output.weight.data.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan on the samples s\d+, s\d+") as error:
        helpers.run(tmp_path / "run", {"stages": [helpers.stage()]}, model, data=helpers.samples(4))
    assert "\n" not in str(error.value)


def test_a_validation_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = Validator.run, []

    def infinite(*arguments: Any) -> dict[str, Any]:
        seen.append(run(*arguments))
        return seen[-1] | {"shuffled_loss": math.nan if len(seen) > 1 else 1.0}

    monkeypatch.setattr(Validator, "run", infinite)
    recipe = {"stages": [helpers.stage(validation={"samples": 4, "every": 2})]}
    with pytest.raises(TrainingError, match="step 2: the validation's shuffled_loss is nan; lower lr") as error:
        helpers.run(tmp_path / "run", recipe)
    assert "\n" not in str(error.value) and not list((tmp_path / "run" / "checkpoints").glob("*"))


def broken(kind: str, folder: Path) -> Sample:
    good = helpers.sample(3, images=1)
    if kind == "picture":
        (folder / "broken.jpg").write_bytes(b"not a picture")
        return Sample("bad", good.messages, [ImageRef.of(folder / "broken.jpg")])
    if kind == "missing":
        return Sample("bad", good.messages, [ImageRef.of(folder / "nowhere.jpg")])
    if kind == "count":
        return Sample("bad", good.messages, [])
    if kind == "answer":
        return Sample("bad", good.messages[:1], good.images)
    long = [{"role": "user", "content": "word " * 900}, good.messages[1]]
    return Sample("bad", long, [])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", ["picture", "missing", "count", "answer", "long"])
def test_a_bad_sample_stops_the_run_by_name_or_is_skipped_and_counted(
    tmp_path: Path, kind: str, cached: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [*helpers.samples(6), broken(kind, tmp_path)]
    recipe = {"stages": [helpers.stage(steps=None, epochs=1, cache_features=cached)]}
    check = "chiasm data check --model DIR" if kind == "long" else "chiasm data check"
    with pytest.raises(ValueError, match=rf"sample 'bad': .*; {check} lists every such sample") as error:
        helpers.run(tmp_path / "run", recipe, data=data)
    assert "\n" not in str(error.value)
    result = helpers.run(tmp_path / "run", recipe, data=data, overrides=["skip_bad=true"], quiet=False)
    assert "samples left out, since they cannot be used: 1; log.jsonl says why" in capsys.readouterr().err
    known = len(events(result, "start")[0]["bad"])
    skipped = [event["id"] for event in events(result, "skipped")]
    assert (known, skipped) in [(1, []), (0, ["bad"])]
    if kind == "picture":
        assert "broken.jpg: is not a picture" in events(result, "skipped")[0]["reason"]
    assert sum(event["samples"] for event in events(result, "step")) == 6


def test_answers_that_lose_their_end_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = helpers.samples(8)
    long = [data[3].messages[0], {"role": "assistant", "content": "red " * 40}]
    data[3] = replace(data[3], messages=long)
    recipe = {"stages": [helpers.stage(steps=None, epochs=2, max_length=120)]}
    result = helpers.run(tmp_path / "run", recipe, data=data, quiet=False)
    assert sum(event["cut"] for event in events(result, "step")) == 2
    (warning,) = events(result, "warning")
    assert re.search(r"longer than max_length .* such as 's3' with \d+ tokens lose the end", warning["text"])
    assert "stage align: answers cut at their end: 2 of 16" in capsys.readouterr().err


def test_pictures_that_wait_to_be_encoded_are_not_held(tmp_path: Path) -> None:
    """A data set with pictures in its rows may hold more of them than memory."""
    held = WeakValueDictionary[int, ImageRef]()

    class Rows(Sequence[Sample]):
        def __len__(self) -> int:
            return 600

        def __getitem__(self, index: Any) -> Any:
            picture = ImageRef.of(Image.new("RGB", (8, 8), (index % 256, index // 256, 9)))
            held[id(picture)] = picture
            return replace(helpers.sample(0), id=f"s{index}", images=[picture])

    model, most = helpers.vlm(), 0

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, len(held))
        return torch.zeros(len(pixels), 9, 24)

    cache = FeatureCache({"dtype": "float32"}, (9, 24), tmp_path)
    stage = load_recipe({"stages": [helpers.stage()]}).stages[0]
    made = features.Features(encode, None, cache, model.processor, Reporter("quiet"), stage)
    rows = made.fill(Rows(), range(600))
    assert rows is not None and len(cache) == 600 and most < 300


def test_the_encoder_is_chosen_by_the_samples_and_not_by_what_is_missing(tmp_path: Path) -> None:
    """Compiled features differ in their last bits: a run that was killed among them goes on to the same ones."""

    def plain(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 9, 24)

    cache = FeatureCache({"dtype": "float32"}, (9, 24), tmp_path)
    stage, model = load_recipe({"stages": [helpers.stage()]}).stages[0], helpers.vlm()
    made = features.Features(plain, lambda: lambda x: plain(x) + 1, cache, model.processor, Reporter("quiet"), stage)
    data = [replace(helpers.sample(index), id=f"s{index}") for index in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "WORTH_COMPILING", 4)
        assert made.fill(data[:2], range(2)) is not None
        assert made.fill(data, range(6)) is not None
        assert made.fill([helpers.sample(9)], range(1), together=8) is not None
    assert cache.read(range(7))[:, 0, 0].tolist() == [0.0] * 2 + [1.0] * 5


def test_a_damaged_shard_is_named_and_the_run_goes_on_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three shards of eight samples one is cut in the middle, and one has a member with a flipped bit."""
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for index in range(8):
                row = {"question": "colour", "answer": "red" if index % 2 else "blue"}
                picture = BytesIO()
                helpers.sample(index).images[0].load().save(picture, "PNG")
                for ending, content in (("json", json.dumps(row).encode()), ("png", picture.getvalue())):
                    member = tarfile.TarInfo(f"{number}{index}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    shard = tmp_path / "1.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])
    with tarfile.open(tmp_path / "2.tar") as tar:
        place = tar.getmember("23.png").offset_data + 50
    flipped = bytearray((tmp_path / "2.tar").read_bytes())
    flipped[place] ^= 8
    (tmp_path / "2.tar").write_bytes(flipped)
    data, recipe = read(tmp_path), {"stages": [helpers.stage(steps=None, epochs=1)]}
    with pytest.raises(ValueError, match=r"shard .*1\.tar is cut off or damaged at byte .*--skip-bad") as error:
        helpers.run(tmp_path / "run", recipe, data=data)
    assert "\n" not in str(error.value)
    result = helpers.run(tmp_path / "run", recipe, data=data, overrides=["skip_bad=true"], quiet=False)
    assert re.search(r"going on without what is lost: .*1\.tar is cut off", capsys.readouterr().err)
    (skipped,) = events(result, "skipped")
    assert re.search(r"2\.tar, member 23\.png: is truncated or damaged", skipped["reason"])
    before = len(TarRows([shard])) - 1
    assert 0 < before < 7 and sum(event["samples"] for event in events(result, "step")) == 8 + before + 7


def test_an_encoder_that_cannot_be_compiled_is_noted_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    recipe = {"stages": [helpers.stage(cache_features=True)]}
    expected = losses(helpers.run(tmp_path / "plain", recipe, cache_root=tmp_path / "a"))
    monkeypatch.setattr(features, "WORTH_COMPILING", 1)
    monkeypatch.setattr(features, "can_compile", lambda device: True)
    monkeypatch.setattr(torch, "compile", lambda function: fail)
    assert losses(helpers.run(tmp_path / "run", recipe, cache_root=tmp_path / "b", quiet=False)) == expected
    assert capsys.readouterr().err.count("not compiled: RuntimeError") == 1


def test_validation_says_that_a_question_leaves_no_room_for_an_answer(tmp_path: Path) -> None:
    model = helpers.vlm("gpt2")

    def generate(messages: list[Any], images: list[list[Any]]) -> list[str]:
        return model.generate(messages, images, max_new_tokens=1020)

    recipe = {"stages": [helpers.stage(validation={"samples": 4, "answers": 2})]}
    result = helpers.run(tmp_path / "run", recipe, model, generate=generate)
    assert all(event["answers"] == [] for event in events(result, "validation"))
    assert "max_new_tokens=1020" in events(result, "warning")[0]["text"]


def test_closed_form_is_asked_once_with_features(tmp_path: Path) -> None:
    asked = []

    def closed_form(model: Any, tokenizer: Any, samples: Any, features_of: Any) -> Started:
        asked.append([features_of(sample).shape for sample in samples if sample.images])
        model.connector.output.bias.data.fill_(3.0)
        return Started(len(asked[0]), 0.25)

    for cached in (True, False):
        recipe = {"stages": [helpers.stage(steps=1, lr=1e-6, init="closed_form", cache_features=cached)]}
        model = helpers.vlm()
        result = helpers.run(tmp_path / str(cached), recipe, model, data=helpers.samples(8), closed_form=closed_form)
        assert model.model.connector.output.bias.mean().item() == pytest.approx(3.0, abs=0.1)
        (event,) = events(result, "closed_form")
        assert (event["pictures"], event["missed"]) == (len(asked[0]), 0.25)
    assert len(asked) == 2 and asked[0] == asked[1] and set(asked[0]) == {(1, 9, 24), (2, 9, 24)}


@pytest.mark.parametrize(("project", "started"), [(True, 1), (False, 0)])
def test_a_connector_starts_in_closed_form_where_it_makes_words(tmp_path: Path, project: bool, started: int) -> None:
    """Tokens that keep the vision width are read by cross-attention alone."""
    recipe = {"stages": [helpers.stage(steps=1, init="auto", parts={"*": "frozen", "connector": "full"}, lr=1e-4)]}
    connector = {"name": "perceiver_resampler", "heads": 2, "depth": 1, "project": project}
    result = helpers.run(tmp_path / "run", recipe, helpers.vlm(connector=connector, fusion="intermediate"))
    assert len(events(result, "closed_form")) == started


@pytest.mark.parametrize("images", [0, 1])
def test_where_no_two_captions_differ_the_connector_starts_as_it_is(tmp_path: Path, images: int) -> None:
    parts = {**FULL, "language": {"tune": "full", "lr": 1e-2}}
    data = [helpers.sample(0, images=images)] * 4
    recipe = {"stages": [helpers.stage(steps=1, init="auto", parts=parts)]}
    result = helpers.run(tmp_path / "run", recipe, data=data, validation_samples=data)
    assert "no two captions differ, so the connector starts as it is" in events(result, "note")[0]["text"]
    warned = [event["text"] for event in events(result, "warning") if "the data has no pictures" in event["text"]]
    assert len(warned) == (images == 0)
    with pytest.raises(ValueError, match="init: closed_form needs pictures with captions that differ"):
        helpers.run(
            tmp_path / "other", recipe, data=data, validation_samples=data, overrides=["stages.align.init=closed_form"]
        )


def test_a_connector_that_has_learned_is_not_started_again(tmp_path: Path) -> None:
    model = helpers.vlm()
    recipe = {"stages": [helpers.stage(steps=1, init="auto")]}
    first = helpers.run(tmp_path / "first", recipe, model, data=helpers.samples(8))
    assert model.model.config.fresh_connector is False
    again = helpers.run(tmp_path / "again", recipe, chiasm.load(first.model), data=helpers.samples(8))
    assert [len(events(result, "closed_form")) for result in (first, again)] == [1, 0]
    frozen = {"stages": [helpers.stage(init="closed_form", parts=helpers.LORA | {"connector": "frozen"})]}
    with pytest.raises(ValueError, match="init: closed_form changes the part connector, which is frozen"):
        helpers.run(tmp_path / "frozen", frozen, helpers.vlm(), data=helpers.samples(8))


@pytest.mark.parametrize("cached", [True, False])
def test_closed_form_never_meets_a_bad_picture(tmp_path: Path, cached: bool) -> None:
    data = [*helpers.samples(6), broken("picture", tmp_path)]

    def closed_form(model: Any, tokenizer: Any, samples: Any, features_of: Any) -> Started:
        return Started(sum(len(features_of(sample)) for sample in samples if sample.images), 0.0)

    recipe = {"stages": [helpers.stage(init="closed_form", cache_features=cached, skip_bad=True)]}
    result = helpers.run(tmp_path / "run", recipe, data=data, closed_form=closed_form)
    assert events(result, "closed_form")[0]["pictures"] == sum(len(sample.images) for sample in data[:6])


def test_every_skipped_sample_names_its_own_file(tmp_path: Path) -> None:
    data = helpers.samples(6)
    for index in range(2):
        (tmp_path / f"{index}.jpg").write_bytes(b"")
        data.append(Sample(f"bad{index}", data[0].messages, [ImageRef.of(tmp_path / f"{index}.jpg")]))
    recipe = {"skip_bad": True, "stages": [helpers.stage(steps=None, epochs=1)]}
    skipped = {
        event["id"]: event["reason"] for event in events(helpers.run(tmp_path / "run", recipe, data=data), "skipped")
    }
    assert all(f"{index}.jpg: is empty" in skipped[f"bad{index}"] for index in range(2))


@pytest.mark.parametrize("settings", [{"cache_features": True}, {"cache_features": False}, {"init": "closed_form"}])
def test_a_run_that_skips_every_sample_stops(tmp_path: Path, settings: dict[str, Any]) -> None:
    data = [broken("missing", tmp_path) for _ in range(30)]
    data = [replace(sample, id=f"s{number}") for number, sample in enumerate(data)]
    recipe = {"stages": [helpers.stage(steps=20, skip_bad=True, validation={"samples": 4}, **settings)]}
    with pytest.raises(
        ValueError, match=r"all of the \d+ samples .* skipped \(missing picture: \d+\), .*'s\d+': "
    ) as error:
        helpers.run(tmp_path / "run", recipe, data=data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cached", [True, False])
def test_the_control_asks_the_same_questions_where_pictures_are_broken(tmp_path: Path, cached: bool) -> None:
    held_out = [helpers.sample(index) for index in range(6)]
    held_out[2] = broken("picture", tmp_path)
    settings = {"skip_bad": True, "cache_features": cached, "validation": {"samples": 6}}
    result = helpers.run(tmp_path / "run", {"stages": [helpers.stage(**settings)]}, validation_samples=held_out)
    assert [event["samples"] for event in events(result, "validation")] == [5, 5]
    assert all(event["shuffled_loss"] is not None for event in events(result, "validation"))


def test_a_run_without_one_usable_text_stops(tmp_path: Path) -> None:
    data = [broken("answer", tmp_path), broken("count", tmp_path)]
    recipe = {"stages": [helpers.stage(skip_bad=True)]}
    with pytest.raises(ValueError, match=r"all of the 2 samples so far were skipped \(no answer: 1, placeholders: 1\)"):
        helpers.run(tmp_path / "run", recipe, data=data)


def test_a_stage_that_tunes_the_encoder_has_no_cache(tmp_path: Path) -> None:
    parts = {**FULL, "vision": {"tune": "full", "lr": 1e-3}}
    recipe = {"stages": [helpers.stage(parts=parts, cache_features=True)]}
    with pytest.raises(ValueError, match="'align' tunes the vision part, so its features cannot be cached"):
        helpers.run(tmp_path / "run", recipe)
    helpers.run(tmp_path / "other", recipe, overrides=["cache_features=auto"])
    assert not (tmp_path / "features").exists()


def test_a_stage_reads_its_kind_of_samples(tmp_path: Path) -> None:
    """Captions in one stage, questions in the next; a kind that the data lacks is named."""
    questions = [helpers.sample(index) for index in range(10)]
    caption = {"role": "assistant", "content": "All of this picture has one colour."}
    captions = [replace(s, id=f"caption of {s.id}", messages=[s.messages[0], caption]) for s in questions[:6]]
    stages = [
        {"name": kind, "data": kind, "epochs": 1, **helpers.SETTINGS, "parts": FULL}
        for kind in ("captions", "questions")
    ]
    result = helpers.run(tmp_path / "run", {"stages": stages}, data=[*captions, *questions])
    seen = {s["name"]: sum(e["samples"] for e in events(result, "step") if e["stage"] == s["name"]) for s in stages}
    assert seen == {"captions": 6, "questions": 10}
    with pytest.raises(ValueError, match="stage 'captions' reads captions, and the data has no such sample"):
        helpers.run(tmp_path / "other", {"stages": stages}, data=questions)
