"""A run that was killed, at any moment and any number of times, ends with the bits of the run that never was."""

import json
import os
import random
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from filelock import FileLock
from PIL import Image

import chiasm
from chiasm.data.readers import read
from chiasm.data.schema import ImageRef, Samples
from chiasm.training import stage_run, tensor_files
from chiasm.training.checkpoint import TrainingError
from chiasm.training.log import read_log

DROPOUT = {**helpers.LORA, "language": {**helpers.LORA["language"], "dropout": 0.2}}
RECIPE = {
    "checkpoint_every": 1,
    "validation": {"samples": 4, "every": 4},
    "stages": [
        helpers.stage("align", steps=6, accumulate=2, checkpoint_every=1, validation={"samples": 4}),
        helpers.stage("lora", steps=8, accumulate=2, parts=DROPOUT, checkpoint_every=3, dtype="bfloat16"),
        helpers.stage("again", steps=4, parts=DROPOUT, checkpoint_every=1),
    ],
}


def outcome(folder: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    log = [event for event in read_log(folder / "log.jsonl") if event["event"] in ("step", "validation", "stage_end")]
    told = [
        [event["event"], event["stage"], event["step"], event.get("loss"), event.get("shuffled_loss")] for event in log
    ]
    return told, helpers.weights(chiasm.load(folder / "model"))


def assert_same(folder: Path, reference: Path) -> None:
    (told, ours), (expected, theirs) = outcome(folder), outcome(reference)
    assert told == expected
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For every fusion a run that never stopped."""
    folders = {fusion: tmp_path_factory.mktemp(fusion) / "run" for fusion in helpers.FUSIONS}
    for fusion, folder in folders.items():
        helpers.run(folder, helpers.with_blocks(RECIPE, fusion), helpers.vlm(fusion=fusion))
    return folders


@pytest.fixture
def reference(references: dict[str, Path]) -> Path:
    return references["early"]


KILLS = [("early", step) for step in (1, 5, 6, 7, 9, 10, 14, 16, 18)] + [("intermediate", step) for step in (3, 9, 16)]


@pytest.mark.parametrize(("fusion", "dies_at"), KILLS)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, references: dict[str, Path], fusion: str, dies_at: int) -> None:
    recipe = helpers.with_blocks(RECIPE, fusion)
    with helpers.killed_at(dies_at):
        helpers.run(tmp_path / "run", recipe, helpers.vlm(fusion=fusion))
    helpers.run(tmp_path / "run", recipe, helpers.vlm(fusion=fusion))
    assert_same(tmp_path / "run", references[fusion])


KILLABLE = "import sys, pathlib, helpers, test_resume; helpers.run(pathlib.Path(sys.argv[1]), test_resume.RECIPE)"


KILLS = int(os.environ.get("CHIASM_KILLS", "3"))
"""How often the test below kills a run; 50 by hand."""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path, reference: Path) -> None:
    dice = random.Random(time.time_ns())
    kills = number = 0
    while kills < KILLS:
        folder, number = tmp_path / f"run-{number}", number + 1
        kills += killed_and_resumed(folder, dice, KILLS - kills)
        assert_same(folder, reference)


def killed_and_resumed(folder: Path, dice: random.Random, at_most: int) -> int:
    """Starts a run again and again, kills it at any moment, and lets it end in peace after `at_most` kills.

    Returns:
        How often it was killed.
    """
    log, kills = folder / "log.jsonl", 0
    while True:
        started = log.stat().st_size if log.exists() else 0
        process = helpers.started(KILLABLE, folder)
        while kills < at_most and process.poll() is None:
            if log.exists() and log.stat().st_size != started:
                time.sleep(dice.uniform(0, 0.6))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        _, error = process.communicate(timeout=120)
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, error.decode()
        kills += 1


def test_the_newest_checkpoint_may_be_torn(tmp_path: Path, reference: Path) -> None:
    with helpers.killed_at(5):
        helpers.run(tmp_path / "run", RECIPE)
    torn = tmp_path / "run" / "checkpoints" / "align-4" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    result = helpers.run(tmp_path / "run", RECIPE)
    assert_same(tmp_path / "run", reference)
    notes = [event["text"] for event in read_log(result.log) if event["event"] == "note"]
    assert notes == ["checkpoint align-4 is ignored: optimizer.safetensors is not what was written"]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    recipe = {"stages": [helpers.stage(), helpers.stage("more", parts=helpers.LORA)]}
    helpers.run(tmp_path / "run", recipe)
    before = outcome(tmp_path / "run")
    model = helpers.vlm()
    helpers.run(tmp_path / "run", recipe, model)
    after = outcome(tmp_path / "run")
    assert before[0] == after[0]
    final = helpers.weights(model)
    assert all(torch.equal(final[name], tensor) for name, tensor in before[1].items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("recipe", r"stages\.align\.batch_size was 4, is 2"),
        ("data", "the data is not the same"),
        ("model", "the model is not the same"),
    ],
)
def test_another_recipe_data_or_model_is_refused(tmp_path: Path, change: str, told: str) -> None:
    recipe = {"stages": [helpers.stage()]}
    helpers.run(tmp_path / "run", recipe)
    other: dict[str, Any] = {}
    if change == "recipe":
        other["overrides"] = ["batch_size=2"]
    if change == "data":
        other["data"] = [*helpers.samples(), helpers.sample(33)]
    if change == "model":
        other["model"] = helpers.vlm()
        other["model"].model.connector.output.bias.data.add_(1)
    with pytest.raises(ValueError, match=rf"holds another run: {told}\. Restore that .* --no-resume"):
        helpers.run(tmp_path / "run", recipe, **other)
    helpers.run(tmp_path / "run", recipe, resume=False, **other)


def colours(folder: Path, shard: bool) -> Samples:
    """Twelve questions about pictures on disk, as files or in a shard, all of the same size in bytes."""
    folder.mkdir(parents=True)
    for index in range(12):
        Image.new("RGB", (150, 150), (index, 0, 0)).save(folder / f"{index}.bmp")
    rows = [{"question": "colour", "answer": "red", "image": f"{index}.bmp"} for index in range(12)]
    if shard:
        with tarfile.open(folder / "shard.tar", "w") as tar:
            for index, row in enumerate(rows):
                (folder / f"{index}.json").write_text(json.dumps(row))
                tar.add(folder / f"{index}.json", f"{index}.json")
                tar.add(folder / f"{index}.bmp", f"{index}.bmp")
    else:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(folder / ("shard.tar" if shard else "rows.jsonl"))


@pytest.mark.parametrize("shard", [False, True])
def test_pictures_may_move_but_not_change(tmp_path: Path, shard: bool) -> None:
    recipe = {"stages": [helpers.stage(checkpoint_every=1)]}
    with helpers.killed_at(2):
        helpers.run(tmp_path / "run", recipe, data=colours(tmp_path / "here", shard))
    there = tmp_path / "there" / "copy"
    moved = colours(there, shard)
    changed = there / ("shard.tar" if shard else "7.bmp")
    content, times = changed.read_bytes(), changed.stat()
    place = content.rindex(bytes([0, 0, 7]) * 9)
    changed.write_bytes(content[:place] + bytes([0, 0, 8]) * 9 + content[place + 27 :])
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match=r"holds another run: the pictures are not the same\. Restore that"):
        helpers.run(tmp_path / "run", recipe, data=moved)
    changed.write_bytes(content)
    resumed = helpers.run(tmp_path / "run", recipe, data=moved)
    assert [event["step"] for event in read_log(resumed.log) if event["event"] == "resume"] == [1]


def test_settings_without_effect_on_weights_may_change(tmp_path: Path) -> None:
    recipe = {"stages": [helpers.stage()]}
    first = helpers.run(tmp_path / "run", recipe)
    steps = [event for event in read_log(first.log) if event["event"] == "step"]
    overrides = ["checkpoint_every=1h", "keep_checkpoints=5", "skip_bad=true"]
    again = helpers.run(tmp_path / "run", recipe, overrides=overrides)
    assert [event for event in read_log(again.log) if event["event"] == "step"] == steps, "it was trained again"


def test_what_a_fault_recommends_is_taken_by_the_same_run(tmp_path: Path) -> None:
    """A picture that cannot be read is left out with `skip_bad`: the run is the one that had said so from the start."""
    data = [helpers.sample(index) for index in range(16)]
    data[5] = replace(data[5], images=[ImageRef.of(b"no picture", "rotten.png")])
    recipe = {"stages": [helpers.stage(checkpoint_every=1, cache_features=False, group_by_length=False, seed=2)]}
    with pytest.raises(ValueError, match=r"rotten\.png.*--skip-bad .* leaves them out"):
        helpers.run(tmp_path / "run", recipe, data=data)
    assert list((tmp_path / "run" / "checkpoints").iterdir()), "the fault comes too early to tell"
    resumed, whole = helpers.vlm(), helpers.vlm()
    result = helpers.run(tmp_path / "run", recipe, resumed, data, overrides=["skip_bad=true"])
    assert [event["stage"] for event in read_log(result.log) if event["event"] == "resume"] == ["align"]
    helpers.run(tmp_path / "whole", recipe, whole, data, overrides=["skip_bad=true"])
    ours, theirs = helpers.weights(resumed), helpers.weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_stage_that_has_not_begun_may_change(tmp_path: Path) -> None:
    with helpers.killed_at(2):
        helpers.run(tmp_path / "run", helpers.TWO_STAGES)
    changed = {"stages": [helpers.stage(), helpers.stage("other", steps=2), helpers.stage("more", steps=1)]}
    helpers.run(tmp_path / "run", changed)
    helpers.run(tmp_path / "whole", changed)
    assert_same(tmp_path / "run", tmp_path / "whole")
    longer = {"stages": [*changed["stages"], helpers.stage("last", steps=2)]}
    (tmp_path / "run/checkpoints/.DS_Store").touch()  # no checkpoint of a stage that is gone
    helpers.run(tmp_path / "run", longer)
    helpers.run(tmp_path / "longer", longer)
    assert_same(tmp_path / "run", tmp_path / "longer")
    with pytest.raises(ValueError, match="it has reached the stage 'last', which the recipe does not have"):
        helpers.run(tmp_path / "run", changed)
    with pytest.raises(ValueError, match=r"stages\.other\.steps was 2, is 3"):
        helpers.run(tmp_path / "run", longer, overrides=["stages.other.steps=3"])


def test_the_rate_of_the_stage_in_which_a_run_stands_may_change_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {"stages": [helpers.stage(checkpoint_every=1), helpers.stage("more", steps=1)]}
    with helpers.killed_at(2):
        helpers.run(tmp_path / "run", recipe)
    overrides = ["stages.align.lr=1e-3", "stages.align.clip=0.5", "stages.align.schedule=constant"]
    for other in ("stages.align.weight_decay=0.1", "stages.align.parts.language=full"):
        with pytest.raises(ValueError, match=r"holds another run: stages\.align\."):
            helpers.run(tmp_path / "run", recipe, overrides=[*overrides, other])
    result = helpers.run(tmp_path / "run", recipe, overrides=overrides, quiet=False)
    told = "goes on with another lr and clip and schedule: not the run that it would have been"
    assert [event["text"] for event in read_log(result.log) if event["event"] == "warning"] == [told]
    assert capsys.readouterr().err.count(f"warning: stage align: {told}") == 1
    rates = [event["lr"]["connector"] for event in read_log(result.log) if event["event"] == "step"]
    assert rates[1:4] == [1e-3] * 3 and rates[0] > 5e-3
    with pytest.raises(ValueError, match=r"stages\.align\.lr was 0\.001, is null"):
        helpers.run(tmp_path / "run", recipe)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"is not empty and holds no run \(found thesis\.tex\)"):
        helpers.run(tmp_path / "run", {"stages": [helpers.stage()]})


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="another process is training in"):
        helpers.run(tmp_path / "run", {"stages": [helpers.stage()]})


def test_a_full_disk_leaves_a_run_that_goes_on(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    save_file, written = tensor_files.save_file, 0

    def full(tensors: dict, path: Path) -> None:
        nonlocal written
        written += 1
        if written == 9:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", full)
        with pytest.raises(TrainingError, match="the disk is full"):
            helpers.run(tmp_path / "run", RECIPE)
    helpers.run(tmp_path / "run", RECIPE)
    assert_same(tmp_path / "run", reference)


def test_a_gradient_that_is_not_finite_costs_no_step(tmp_path: Path) -> None:
    recipe = {"stages": [helpers.stage(checkpoint_every=1)]}
    whole, broken, again = (helpers.vlm() for _ in range(3))
    helpers.run(tmp_path / "whole", recipe, whole)
    seen = list[torch.Tensor]()

    def third_is_infinite(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(gradient)
        return gradient if len(seen) < 3 else gradient / 0

    broken.model.connector.output.weight.register_hook(third_is_infinite)
    with pytest.raises(
        TrainingError, match=r"step 3: the gradient is (inf|nan) on the samples s\d+, .* is intact"
    ) as told:
        helpers.run(tmp_path / "run", recipe, broken)
    assert "\n" not in str(told.value)
    resumed = helpers.run(tmp_path / "run", recipe, again)
    assert [event["step"] for event in read_log(resumed.log) if event["event"] == "resume"] == [2]
    ours, theirs = helpers.weights(again), helpers.weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_command_passes_over_finished_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    start = stage_run.StageRun.run

    def noted(self: Any) -> None:
        ran.append(self.stage.name)
        if self.stage.name == "instruct" and ran.count("instruct") == 1:
            raise helpers.Killed
        start(self)

    recipe = {**helpers.TWO_STAGES, "forgetting": {}}
    monkeypatch.setattr(stage_run.StageRun, "run", noted)
    with pytest.raises(helpers.Killed):
        helpers.run(tmp_path / "run", recipe)
    for _ in range(2):
        result = helpers.run(tmp_path / "run", recipe)
    assert ran == ["align", "instruct", "instruct"]
    forgetting = [event.get("stage") for event in read_log(result.log) if event["event"] == "forgetting"]
    assert forgetting == [None, "align", "instruct"]
