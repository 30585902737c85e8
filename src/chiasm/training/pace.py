"""How fast a stage goes on this machine and what it holds for the backward pass, measured before it begins."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.collation import Batch, Item, load_pixels
from chiasm.data.schema import Sample, SampleError, Samples
from chiasm.training.attention import fast_attention
from chiasm.training.features import with_hint
from chiasm.training.four_bit import four_bit_layers
from chiasm.training.gradient_checkpointing import checkpointed_layers
from chiasm.training.learner import learner_of
from chiasm.training.optimizer import StageOptimizer
from chiasm.training.precision import autocast, choose_dtype, stage_precision
from chiasm.training.reporter import Reporter
from chiasm.training.schema import Stage
from chiasm.training.stage_model import StageModel
from chiasm.training.stages import FreezePlan, enter, require_reached

BATCHES = 4
"""Batches that are enough to measure a stage; the first one is not timed."""


@dataclass(frozen=True)
class Pace:
    """Per sample: seconds of reading and, under a frozen encoder, encoding its pictures, and of its share of a step.
    `activations`: bytes that one batch keeps for its backward pass; `picture_bytes`: of one picture's features."""

    encode_seconds: float
    step_seconds: float
    activations: int
    picture_bytes: int = 0


def seconds_per_sample(model: PreTrainedModel, processor: ProcessorMixin, stage: Stage, samples: Samples) -> float:
    """Seconds that one sample takes: read, encoded once, and taken through one step. The model stays as it is."""
    pace = measure(model, processor, stage, samples)
    return pace.encode_seconds + pace.step_seconds


def measure(model: PreTrainedModel, processor: ProcessorMixin, stage: Stage, samples: Samples, number: int = 0) -> Pace:
    """Takes a copy of the model through a few steps of a stage.

    Args:
        samples: a few batches of what the stage will meet; the first batch is not timed if there are more.
        number: the stage's place in its recipe.
    """
    learner = learner_of(copy.deepcopy(model), processor, stage, number, samples)
    model, size = learner.model, min(stage.batch_size, len(samples))
    dtype = choose_dtype(stage.dtype, model.device)
    plan = enter(model, stage)
    learner.prepare(samples, range(len(samples)), Reporter("quiet"))
    encode = frozen_encoder(model, plan)
    encoding, stepping, kept = list[float](), list[float](), 0
    with ExitStack() as state:
        originals = state.enter_context(stage_precision(model, dtype))
        if "language" in plan.states:
            state.enter_context(fast_attention(model.language, dtype))
        state.enter_context(checkpointed_layers(model, stage.gradient_checkpointing))
        optimizer = StageOptimizer(model, plan, stage, num_steps=len(samples))
        state.enter_context(four_bit_layers(model, plan.four_bit, dtype, originals))
        for step, first in enumerate(range(0, len(samples) - size + 1, size)):
            started = time.monotonic()
            items = _items(samples[first : first + size], learner, encode, stage.skip_bad)
            if not items:
                continue
            encoded = time.monotonic()
            with nullcontext() if stepping else _counted(model) as counter:
                _step(learner, learner.collate(items), plan, optimizer, step, dtype)
            kept = counter.total if counter is not None else kept
            encoding.append((encoded - started) / len(items))
            stepping.append((time.monotonic() - encoded) / len(items))
    if not stepping:
        raise ValueError(
            f"stage {stage.name!r}: none of the {len(samples)} samples that were tried can be used; chiasm data check "
            "lists every such sample"
        )
    return Pace(_middle(encoding), _middle(stepping), kept, _picture_bytes(model, dtype))


def _picture_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Of one picture's features on disk, which are in bfloat16 where training is."""
    vision = model.vision
    if not hasattr(vision, "fast_encoder"):
        return 0
    kept = torch.bfloat16 if dtype == torch.bfloat16 else vision.model.dtype
    return vision.num_patches * vision.width * kept.itemsize


def _step(
    learner: StageModel, batch: Batch, plan: FreezePlan, optimizer: StageOptimizer, step: int, dtype: torch.dtype
) -> None:
    device = learner.model.device
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    with autocast(device, dtype):
        losses = learner.losses(inputs, len(batch.ids), batch.supervised)
    loss = torch.stack(list(losses.values())).sum()
    require_reached(loss, plan)
    loss.backward()
    loss.item()
    optimizer.step(step)
    optimizer.zero_grad()


class _Counter:
    """Bytes that are kept for the backward pass, each storage once and the model's own weights not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


@contextmanager
def _counted(model: nn.Module) -> Iterator[_Counter]:
    counter = _Counter(model)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        yield counter


def _middle(times: list[float]) -> float:
    return statistics.median(times[1:] or times)


def _items(samples: Samples, learner: StageModel, encode: Callable | None, skip_bad: bool) -> list[Item]:
    items = []
    for sample in samples:
        try:
            items.append(one_item(sample, learner, encode))
        except SampleError as error:
            if not skip_bad:
                raise with_hint(error) from error
    return items


def frozen_encoder(model: PreTrainedModel, plan: FreezePlan) -> Callable | None:
    """What encodes pictures before the first step; None where the encoder learns."""
    frozen = "vision" in plan.frozen_parts()
    encode: Callable | None = model.vision.fast_encoder(dtype=model.vision.model.dtype) if frozen else None
    return encode


def one_item(sample: Sample, learner: StageModel, encode: Callable | None) -> Item:
    """A sample as a batch takes it, its pictures encoded where `encode` does so."""
    pixels = load_pixels(sample, learner.processor)
    features = pixels if pixels is None or encode is None else torch.as_tensor(encode(pixels))
    return Item(sample.id, learner.encode(sample), features, encoded=encode is not None and pixels is not None)
