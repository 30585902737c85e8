"""Two processes take the steps that one would take, whatever the stage trains, with whole copies or with shards."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import helpers
import pytest
import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp

import chiasm
import tiny
from chiasm.data.schema import ImageRef, Sample
from chiasm.training import stage_run
from chiasm.training.batches import Order
from chiasm.training.errors import TrainingError
from chiasm.training.late_stage import PairModel
from chiasm.training.log import read_log
from chiasm.training.optimization import Optimization
from chiasm.training.parallel import Sharded
from chiasm.training.recipe import load_recipe
from chiasm.training.schema import Stage
from chiasm.training.stage_model import AnswerModel
from chiasm.training.team import Team
from chiasm.training.termination import Terminated

FULL = {"tune": "full", "lr": 1e-2}
FULL_CONNECTOR = {"connector": FULL}
NORMS, LATER = {**FULL, "only": "norms"}, {**FULL, "from_layer": 1}
DORA, RSLORA = ({"tune": method, "lr": 1e-2, "rank": 3} for method in ("dora", "rslora"))
PAIRS, BLIP2 = {"objectives": ["contrastive"]}, {"objectives": ["contrastive", "grounded_generation"]}
ANSWERS, CODES = {"objectives": ["answers"]}, {"objectives": ["reconstruction"]}
SIGMOID = {"objectives": ["sigmoid"]}
UNCACHED = {"cache_features": False}
PATTERNS = {
    "patterns": {
        "vision.*.layers.1.*": FULL,
        "language.*.self_attn.*": DORA,
        "language.model.embed_tokens": {**FULL, "lr": 2e-2},
    }
}
STRATEGIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "connector": ("early", FULL_CONNECTOR, {}),
    "uncached": ("early", FULL_CONNECTOR, UNCACHED),
    "encoder": ("early", {"connector": FULL, "vision": FULL}, {}),
    "lora": ("early", helpers.LORA, {}),
    "lora-encoder": ("early", {**helpers.LORA, "vision": FULL}, {}),
    "dora": ("early", {"connector": FULL, "vision": DORA, "language": DORA}, {}),
    "rslora": ("early", {"connector": FULL, "vision": RSLORA, "language": RSLORA}, {}),
    "norms": ("early", {"connector": FULL, "vision": NORMS, "language": NORMS}, {}),
    "from_layer": ("early", {"connector": FULL, "vision": LATER, "language": LATER}, {}),
    "patterns": ("early", FULL_CONNECTOR, PATTERNS),
    "everything": ("early", {"connector": FULL, "vision": FULL, "language": FULL}, {}),
    "intermediate": ("intermediate", {"connector": FULL, "vision": NORMS}, {}),
    "late": ("late", {"connector": FULL, "vision": FULL, "language": RSLORA}, PAIRS),
    "late-connector": ("late", FULL_CONNECTOR, PAIRS),
    "late-chunks": (
        "late",
        {"connector": FULL, "vision": FULL, "language": FULL},
        PAIRS | {"batch_size": 3, "chunk": 1},
    ),
    "late-sigmoid": ("late-biased", FULL_CONNECTOR, SIGMOID),
    "late-answers": ("late", {"answer_head": FULL, "vision": NORMS}, ANSWERS),
    "blip-2": ("q-former", {"connector": FULL, "vision": NORMS}, BLIP2),
    "blip-2-uncached": ("q-former", FULL_CONNECTOR, BLIP2 | UNCACHED),
    "unified-language": ("unified", {"language": FULL}, {}),
    "unified": ("unified", {"vision": FULL, "language": FULL}, {}),
    "image-tokenizer": ("image-tokenizer", {"vision": FULL}, CODES),
}
"""Model, parts and settings of every run that is compared; parts that are not named are frozen."""
MODELS: dict[str, Callable[[], chiasm.VLM | chiasm.DualEncoder]] = {
    "early": helpers.vlm,
    "intermediate": partial(helpers.vlm, fusion="intermediate"),
    "q-former": partial(helpers.vlm, connector=tiny.connector("qformer")),
    "late": helpers.dual_encoder,
    "late-biased": partial(helpers.dual_encoder, logit_bias=-5.0),
    "unified": partial(helpers.unified, {"name": "patches", "patch_size": 10}),
    "image-tokenizer": partial(helpers.unified, helpers.VQ),
}
PARALLEL = ("ddp", "fsdp")


def recipe(parts: dict[str, Any], fusion: str = "early", **settings: Any) -> dict[str, Any]:
    """Plain gradient descent on batches of 4, of which an epoch's last has one sample for two processes."""
    parts = {**helpers.FROZEN, **parts}
    settings = {"steps": 4, "accumulate": 2, "validation": {"samples": 4}, "optimizer": "sgd"} | settings
    stages = [helpers.stage(parts=parts, **settings)]
    return helpers.with_blocks({"stages": stages}, fusion)


def compare(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    """Losses and counts of the steps that `one` logged, and the weights at the end."""
    logs = [
        {(e["event"], e["step"]): e for e in read_log(run / "log.jsonl") if e["event"] in ("step", "validation")}
        for run in (one, other)
    ]
    assert max(logs[0]) == max(logs[1])
    for place, ours in logs[0].items():
        theirs = logs[1][place]
        assert (ours["samples"], ours.get("supervised_tokens")) == (theirs["samples"], theirs.get("supervised_tokens"))
        assert abs(ours["loss"] - theirs["loss"]) < 10 * tolerance
    weights, expected = (helpers.weights(chiasm.load(run / "model")) for run in (one, other))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=tolerance), name


def train(folder: Path, strategy: str, data: list[Sample] | None = None, **settings: Any) -> None:
    """The run of a strategy, by as many processes as there are."""
    model, parts, more = STRATEGIES[strategy]
    asked = recipe(parts, model, **settings, **more)
    helpers.run(folder, asked, MODELS[model](), data, cache_root=folder.parent / "features")


ADAMW = {"optimizer": "adamw", "accumulate": 1, "checkpoint_every": 2}
UNEVEN = ("lora-encoder", "late-connector")
"""Strategies with tensors that two processes share unevenly, or cannot share: a temperature is one number."""


ONE_SIDED = ("connector", "uncached", "everything", "intermediate", "unified", "unified-language")
"""Strategies that are tried with pictures in one process only."""
ONE_EPOCH = {"steps": 2, "group_by_length": False, "validation": {"samples": 0}}


def one_sided() -> list[Sample]:
    """Two steps of which the first of two processes reads text alone, and the other one pictures alone."""
    order = Order(range(16), None, load_recipe(recipe(FULL_CONNECTOR, **ONE_EPOCH)).stages[0], 0)
    batches = [batch for step in range(2) for batch in order.step(step)]
    blind = {index for batch in batches for index in Team(0, 2).share(batch)}
    return [helpers.sample(index, images=int(index not in blind)) for index in range(16)]


def looked(folder: Path, strategy: str, **settings: Any) -> None:
    """A run on such data; whether this process was shown pictures is written down."""
    shown, losses = list[bool](), AnswerModel.losses

    def noting(self: AnswerModel, inputs: dict[str, torch.Tensor], *rest: Any) -> dict[str, torch.Tensor]:
        shown.append("pixel_values" in inputs or "image_features" in inputs)
        return losses(self, inputs, *rest)

    with patch.object(AnswerModel, "losses", noting):
        train(folder, strategy, one_sided(), **ONE_EPOCH, **settings)
    (folder / f"shown-{dist.get_rank()}.json").write_text(json.dumps(shown))


def stop(folder: Path, strategy: str, **settings: Any) -> None:
    """A run that ends without a word in its third step."""
    with helpers.killed_at(3):
        train(folder, strategy, **settings)


def told_to_end(folder: Path, step: int, **settings: Any) -> None:
    """A run whose second process alone gets SIGTERM in a step; both end, and only the first one says why."""
    optimize, steps = Optimization.take, count(1)

    def terminating(self: Any, *arguments: Any) -> Any:
        if next(steps) == step and self.team.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimize(self, *arguments)

    with patch.object(Optimization, "take", terminating), pytest.raises(Terminated) as ended:
        train(folder, "uncached", **settings)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def caught(folder: Path, name: str, settings: dict[str, Any], **options: Any) -> None:
    """A run that fails; what this process has to say is written down."""
    try:
        helpers.run(folder / name, settings, cache_root=folder / "features", **options)
    except BaseException as error:
        said = [type(error).__name__, str(error)]
        (folder / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(said))


def untouched(folder: Path) -> None:
    """A step of two towers that no loss reached: which of the sharded model's single numbers have no gradient."""
    towers = helpers.dual_encoder()
    stage = load_recipe(recipe({"connector": FULL}, "late", **PAIRS)).stages[0]
    engine = Sharded(PairModel(towers.model, towers.processor, stage), torch.device("cpu"))
    with engine.accumulate(last=True):
        pass
    without = [number.grad is None for number in engine.numbers]
    (folder / f"untouched-{dist.get_rank()}.json").write_text(json.dumps(without))


def work(folder: Path) -> None:
    """All runs, in one of two processes."""
    dist.init_process_group("gloo")
    for parallel, strategy in product(PARALLEL, STRATEGIES):
        train(folder / f"{parallel}-{strategy}", strategy, parallel=parallel)
    for parallel, strategy in product(PARALLEL, ONE_SIDED):
        looked(folder / f"one-sided-{parallel}-{strategy}", strategy, parallel=parallel)
    for strategy in UNEVEN:
        stop(folder / f"to-one-{strategy}", strategy, parallel="fsdp", **ADAMW)
        train(folder / f"from-one-{strategy}", strategy, parallel="fsdp", **ADAMW)
    losses = AnswerModel.losses

    def infinite(self: AnswerModel, *arguments: Any) -> dict[str, torch.Tensor]:
        return {name: loss / (1 - dist.get_rank()) for name, loss in losses(self, *arguments).items()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(AnswerModel, "losses", infinite):
        caught(folder, "infinite", recipe(FULL_CONNECTOR, validation={"samples": 0}))
    with patch.object(dcp.HuggingFaceStorageWriter, "write_data", full) if dist.get_rank() else nullcontext():
        caught(folder, "full", recipe(FULL_CONNECTOR, parallel="fsdp", checkpoint_every=1))
    broken = helpers.samples(8)
    broken[6] = replace(broken[6], images=[ImageRef.of(b"no picture", "rotten.png")])
    caught(folder, "broken", recipe(FULL_CONNECTOR, cache_features=False, validation={"samples": 0}), data=broken)
    untouched(folder)
    with patch.object(Stage, "checkpoint_due", lambda self, step, seconds: step == 2 + dist.get_rank()):
        helpers.run(folder / "clocks", recipe(FULL_CONNECTOR, parallel="fsdp"), cache_root=folder / "features")
    told_to_end(folder / "told", 2, **{**ADAMW, "parallel": "fsdp", "checkpoint_every": 100})
    dist.destroy_process_group()


END = {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}
PARALLEL_OF = {"dies": "ddp", "hangs": "fsdp"}


def lost(how: str) -> dict[str, Any]:
    return recipe(FULL_CONNECTOR, checkpoint_every=1, parallel=PARALLEL_OF[how])


def end(folder: Path, how: str) -> None:
    """A run of which the second process dies or hangs."""
    log_step = stage_run.StageRun._log_step

    def ending(self: Any, step: int, *rest: Any) -> None:
        if step == 2 and self.team.rank == 1:
            (folder.parent / "moment").write_text(str(time.time()))
            os.kill(os.getpid(), END[how])
        log_step(self, step, *rest)

    stage_run.StageRun._log_step = ending  # type: ignore[method-assign]
    try:
        helpers.run(folder, lost(how))
    except TrainingError as error:
        sys.exit(f"told: {error}")


def spawn(call: str, *arguments: Any, patience: int = 60) -> list[subprocess.Popen]:
    """A function of this file in two processes that know of each other, and wait so many seconds for each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "CHIASM_PROCESS_TIMEOUT": str(patience),
    }
    code = f"import sys, pathlib, test_parallel; test_parallel.{call}(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit codes and what was said."""
    said = [process.communicate(timeout=600)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs by two processes."""
    folder = tmp_path_factory.mktemp("two")
    for strategy in UNEVEN:
        stop(folder / f"from-one-{strategy}", strategy, **ADAMW)
    for code, said in finish(spawn("work", folder)):
        assert code == 0, said
    return folder


def test_the_first_process_decides_when_a_checkpoint_is_due(together: Path) -> None:
    saved = [event["step"] for event in read_log(together / "clocks" / "log.jsonl") if event["event"] == "checkpoint"]
    assert saved == [2, 4]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_equal_one(tmp_path: Path, together: Path, strategy: str) -> None:
    train(tmp_path / "one", strategy)
    for parallel in PARALLEL:
        compare(together / f"{parallel}-{strategy}", tmp_path / "one")


@pytest.mark.parametrize("strategy", ONE_SIDED)
def test_pictures_in_one_process_and_text_in_the_other(tmp_path: Path, together: Path, strategy: str) -> None:
    train(tmp_path / "one", strategy, one_sided(), **ONE_EPOCH)
    for parallel in PARALLEL:
        run = together / f"one-sided-{parallel}-{strategy}"
        assert [json.loads((run / f"shown-{rank}.json").read_text()) for rank in (0, 1)] == [[False] * 4, [True] * 4]
        compare(run, tmp_path / "one")


def test_a_process_that_is_told_to_end_ends_all_of_them(tmp_path: Path, together: Path) -> None:
    run = together / "told"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["align-2"]
    for folder in (run, tmp_path / "one"):
        train(folder, "uncached", **ADAMW)
    compare(run, tmp_path / "one", tolerance=2e-5)


def test_a_number_that_no_process_reached_stays_without_a_gradient(together: Path) -> None:
    """As under DDP: a gradient of zero would move it by what earlier steps have left in the moments."""
    assert [json.loads((together / f"untouched-{rank}.json").read_text()) for rank in (0, 1)] == [[True], [True]]


@pytest.mark.parametrize("strategy", UNEVEN)
def test_shards_go_on_in_another_number_of_processes(tmp_path: Path, together: Path, strategy: str) -> None:
    shards = together / f"to-one-{strategy}" / "checkpoints" / "align-2" / "weights"
    assert len(list(shards.glob("*.safetensors"))) == 2
    train(together / f"to-one-{strategy}", strategy, **ADAMW)
    train(tmp_path / "one", strategy, **ADAMW)
    for run in (together / f"{name}-{strategy}" for name in ("to-one", "from-one")):
        compare(run, tmp_path / "one", tolerance=2e-5)
        assert [e["step"] for e in read_log(run / "log.jsonl") if e["event"] == "resume"] == [2]


def test_a_fault_of_one_process_is_told_once(together: Path) -> None:
    expected = {
        "infinite": ("TrainingError", r"stage 'align', step 1: the loss is inf on the samples s\d+"),
        "full": (
            "TrainingError",
            r"align-1 is not written: the disk is full \(.*\); make room .* checkpoints are intact",
        ),
        "broken": ("ValueError", r"sample 's6': picture rotten.png: is not a picture"),
    }
    for name, (kind, words) in expected.items():
        first, second = (json.loads((together / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert first[0] == kind and re.search(words, first[1]) and "\n" not in first[1], first
        assert second == ["Stopped", "1" if kind == "TrainingError" else "2"]


@pytest.mark.parametrize("how", END)
def test_a_process_that_is_lost_stops_the_others_in_time(tmp_path: Path, how: str) -> None:
    patience = 20
    first, second = spawn("end", tmp_path / "run", how, patience=patience)
    said = first.communicate(timeout=600)[1]
    waited = time.time() - float((tmp_path / "moment").read_text())
    second.kill()
    second.communicate()
    assert first.returncode == 1 and waited < patience + 30, said
    line = r"told: process 0 of 2 lost another one, which died or hung \(.+\); .*run the same command again: it goes on"
    assert len(re.findall(line, said)) == 1, said
    helpers.run(tmp_path / "run", lost(how))
    helpers.run(tmp_path / "one", lost(how))
    compare(tmp_path / "run", tmp_path / "one")


@pytest.mark.slow
def test_torchrun_on_the_command_line(tmp_path: Path) -> None:
    helpers.vlm().save_pretrained(tmp_path / "vlm")
    lines = []
    for index in range(8):
        helpers.sample(index).images[0].load().save(tmp_path / f"{index}.png")
        said = [
            {"from": "human", "value": "<image>\ncolour?"},
            {"from": "gpt", "value": "red" if index % 2 else "blue"},
        ]
        lines.append(json.dumps({"id": str(index), "image": f"{index}.png", "conversations": said}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(FULL_CONNECTOR, parallel="fsdp")))
    chiasm_train = ["-m", "chiasm", "train", "recipe.yaml", "--model", "vlm", "--data", "data.jsonl", "-o", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *chiasm_train]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("model:") == 1 and (tmp_path / "run" / "model" / "config.json").is_file()
