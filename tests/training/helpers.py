"""A tiny connected model, colour pictures with a question each, and recipes that take a second."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import chiasm
import contracts
import tiny
from chiasm.data.schema import ImageRef, Sample
from chiasm.training.log import read_log
from chiasm.training.optimization import Optimization
from chiasm.training.trainer import TrainResult, train
from chiasm.vision.image_processor import ChiasmImageProcessor

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}
SETTINGS = {"batch_size": 4, "dtype": "float32", "validation": {"samples": 0}, "checkpoint_every": 2}
FORGETTING_OFF = {"text": False, "pictures": 0}
FROZEN = {"*": "frozen"}
VQ = {"name": "vq", "image_size": [16, 16], "levels": [5, 5, 5], "width": 8, "depth": 1}
FUSIONS = ("early", "intermediate")


def vlm(language: str = "llama", vision: str = "clip", connector: Any = "mlp", fusion: str = "early") -> chiasm.VLM:
    """A tiny connected model, always with the same weights; gates are a little open."""
    pictures = ChiasmImageProcessor(30, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "image_processor": pictures}
    if fusion == "intermediate":
        options["cross_attention"] = {"every": 2, "heads": 3, "head_dim": 8}
    connected = chiasm.connect(tiny.vision(vision), tiny.language(language), connector, fusion, **options)
    contracts.open_gates(connected.model, 0.5)
    return connected


def dual_encoder(vision: str = "clip", language: str = "llama", **connector: Any) -> chiasm.DualEncoder:
    """A tiny dual encoder, always with the same weights."""
    pictures = ChiasmImageProcessor(30 if vision != "convnext" else 64, [0.5] * 3, [0.5] * 3)
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "image_processor": pictures, "fusion": "late"}
    return chiasm.connect(
        tiny.vision(vision), tiny.language(language), {"name": "linear", "space": 11, **connector}, **options
    )


def unified(image_input: Any) -> chiasm.VLM:
    """A tiny unified transformer, always with the same weights."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    torch.manual_seed(3)
    return chiasm.connect(
        language=sizes, fusion="unified", image_input=image_input, positions="mrope", unified={"qk_norm": "rms"}
    )


def sample(index: int, images: int = 1) -> Sample:
    """A question about `images` pictures of one colour."""
    name, colour = list(COLOURS.items())[index % len(COLOURS)]
    tint = tuple(min(255, channel + index) for channel in colour)
    pictures = [Image.new("RGB", (30 + index % 3, 30), tint) for _ in range(images)]
    parts = [{"type": "image"}] * images + [{"type": "text", "text": "colour" + "?" * (index % 5)}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": name}]
    return Sample(f"s{index}", messages, [ImageRef.of(picture, f"picture {index}") for picture in pictures])


def samples(count: int = 20) -> list[Sample]:
    """Samples with one picture, two, or none."""
    return [sample(index, images=2 if index % 7 == 3 else 0 if index % 7 == 5 else 1) for index in range(count)]


def stage(name: str = "align", **settings: Any) -> dict[str, Any]:
    """A stage that tunes the connector, for four steps."""
    parts = {"parts": {**FROZEN, "connector": {"tune": "full", "lr": 1e-2}}}
    return {"name": name, "steps": 4, **SETTINGS, **parts, **settings}


LORA = {**FROZEN, "connector": {"tune": "full", "lr": 1e-2}, "language": {"tune": "lora", "lr": 1e-2, "rank": 4}}
TWO_STAGES = {"stages": [stage(), stage("instruct", steps=5, accumulate=2, parts=LORA)]}
CROSS_ATTENTION = {"cross_attention": {"tune": "full", "lr": 1e-2}}


def with_blocks(recipe: dict[str, Any], fusion: str) -> dict[str, Any]:
    """The recipe, whose stages tune gated cross-attention too where the fusion has it."""
    if fusion != "intermediate":
        return recipe
    return {**recipe, "stages": [{**s, "parts": {**s["parts"], **CROSS_ATTENTION}} for s in recipe["stages"]]}


def run(
    folder: Path,
    recipe: Any,
    model: chiasm.VLM | chiasm.DualEncoder | None = None,
    data: Any = None,
    **options: Any,
) -> TrainResult:
    """`train` on the tiny model with a cache of its own, quietly; forgetting is measured where the recipe says so."""
    model = model or vlm()
    if isinstance(recipe, dict):
        recipe = {"forgetting": FORGETTING_OFF, **recipe}
    options = {"cache_root": folder.parent / "features", "quiet": True} | options
    data = samples() if data is None else data
    with _plain_kernels():
        return train(recipe, model.model, model.processor, data, folder, **options)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """oneDNN compiles a kernel for every new shape: for tiny layers ten times the work of the arithmetic."""
    was, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was


def weights(model: chiasm.VLM | chiasm.DualEncoder) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


class Killed(BaseException):
    """Stands for a kill within this process: nothing catches it."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Kills the run inside before its `step`-th optimizer step, counted over all stages."""
    optimize, steps = Optimization.take, count(1)

    def dying(self: Any, *arguments: Any) -> Any:
        if next(steps) == step:
            raise Killed
        return optimize(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Optimization, "take", dying)
        yield


def started(code: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that runs `code` with the tests' modules at hand and a folder as its argument."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment, stderr=subprocess.PIPE)


def whole_and_resumed(
    folder: Path, recipe: Any, model: Callable[[], Any], data: list[Sample], dies_at: int
) -> tuple[TrainResult, TrainResult]:
    """A run that never stopped, and one that was killed and went on to the same losses and weights, bit for bit."""
    finished, again = model(), model()
    whole = run(folder / "whole", recipe, finished, data)
    with killed_at(dies_at):
        run(folder / "run", recipe, model(), data)
    resumed = run(folder / "run", recipe, again, data)
    told, expected = ([e["loss"] for e in read_log(result.log) if e["event"] == "step"] for result in (resumed, whole))
    assert told == expected
    ours, theirs = weights(again), weights(finished)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return whole, resumed
