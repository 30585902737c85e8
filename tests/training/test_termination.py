"""SIGTERM: a run saves what it has and ends, and the same command leads to the weights of a run that never did."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import helpers
import pytest
import torch

import chiasm
from chiasm.training.log import read_log
from chiasm.training.optimization import Optimization
from chiasm.training.termination import EXIT_CODE, Terminated, hears_sigterm

RECIPE = {"stages": [helpers.stage(checkpoint_every=100), helpers.stage("more", steps=2, parts=helpers.LORA)]}
LONG = {"stages": [helpers.stage(steps=60, checkpoint_every=1000)], "forgetting": helpers.FORGETTING_OFF}


def signalled(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """SIGTERM comes within these optimizer steps, counted over all stages and runs."""
    optimize, taken = Optimization.take, count(1)

    def signalling(self: Any, *arguments: Any) -> Any:
        if next(taken) in steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimize(self, *arguments)

    monkeypatch.setattr(Optimization, "take", signalling)


@pytest.mark.parametrize(("step", "stage"), [(2, "align"), (4, "align"), (5, "more")])
def test_a_step_is_taken_to_its_end_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int, stage: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    helpers.run(tmp_path / "whole", RECIPE)
    with monkeypatch.context() as patch, pytest.raises(Terminated) as ended:
        signalled(patch, {step})
        helpers.run(tmp_path / "run", RECIPE)
    done = step if stage == "align" else step - 4
    line = f"stopped by SIGTERM after a checkpoint at step {done} of stage {stage}: the same command goes on\n"
    assert ended.value.code == 143 and capsys.readouterr().err == line
    assert signal.getsignal(signal.SIGTERM) is before
    log = helpers.run(tmp_path / "run", RECIPE).log
    assert [(event["stage"], event["step"]) for event in read_log(log) if event["event"] == "resume"] == [(stage, done)]
    ours, theirs = (helpers.weights(chiasm.load(tmp_path / name / "model")) for name in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_is_told_to_end_in_its_last_step_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, {6})
    assert helpers.run(tmp_path / "run", RECIPE).model.is_dir()


def test_other_threads_train_and_leave_signals_alone(tmp_path: Path) -> None:
    thread = Thread(target=helpers.run, args=(tmp_path / "run", {"stages": [helpers.stage()]}))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "model").is_dir()


def test_what_was_there_before_comes_back() -> None:
    def own(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with hears_sigterm() as told:
            assert not told()
            os.kill(os.getpid(), signal.SIGTERM)
            assert told()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def started(folder: Path, run: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "chiasm", "train", "recipe.json", "--model", "vlm", "--data", "data.jsonl"]
    environment = {**os.environ, "CHIASM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "-o", run], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def test_sigterm_on_the_command_line(tmp_path: Path) -> None:
    helpers.vlm().save_pretrained(tmp_path / "vlm")
    (tmp_path / "recipe.json").write_text(json.dumps(LONG))
    rows = []
    for index in range(8):
        helpers.sample(index).images[0].load().save(tmp_path / f"{index}.png")
        rows.append({"question": "colour?", "answer": "red" if index % 2 else "blue", "image": f"{index}.png"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log, process = tmp_path / "run" / "log.jsonl", started(tmp_path, "run")
    while process.poll() is None and not (log.exists() and b'"event": "step"' in log.read_bytes()):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == EXIT_CODE, said
    told = re.search(
        r"^stopped by SIGTERM after a checkpoint at step (\d+) of stage align: the same", said, re.MULTILINE
    )
    assert told is not None and "Traceback" not in said, said
    for run in ("run", "whole"):
        process = started(tmp_path, run)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
    assert [event["step"] for event in read_log(log) if event["event"] == "resume"] == [int(told[1])]
    ours, theirs = (helpers.weights(chiasm.load(tmp_path / run / "model")) for run in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
