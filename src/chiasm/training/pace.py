"""How fast a stage goes on this machine, timed before it begins: what a budget in minutes buys."""

import copy
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from chiasm.data.collation import Item, collate, encode_sample, load_pixels
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import Sample
from chiasm.training.attention import fast_attention
from chiasm.training.optimizer import StageOptimizer
from chiasm.training.precision import autocast, choose_dtype, stage_precision
from chiasm.training.schema import Stage
from chiasm.training.stages import enter


def seconds_per_sample(
    model: PreTrainedModel, processor: ChiasmProcessor, stage: Stage, samples: Sequence[Sample]
) -> float:
    """Seconds that one sample takes: drawn or read, encoded once, and taken through one step. The model stays as it is.

    Args:
        samples: a few batches of what the stage will meet; the first batch is not counted.
    """
    model, size = copy.deepcopy(model), stage.batch_size
    dtype = choose_dtype(stage.dtype, model.device)
    plan = enter(model, stage)
    encode = model.vision.fast_encoder(dtype=model.vision.model.dtype)
    times = []
    with stage_precision(model, dtype), fast_attention(model.language, dtype):
        optimizer = StageOptimizer(model, plan, stage, num_steps=len(samples))
        for step, first in enumerate(range(0, len(samples) - size + 1, size)):
            started = time.monotonic()
            items = [_item(sample, processor, encode) for sample in samples[first : first + size]]
            batch = collate(items, processor)
            inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
            with autocast(model.device, dtype):
                loss = model(**inputs, num_items_in_batch=batch.supervised).loss
            loss.backward()
            loss.item()
            optimizer.step(step)
            optimizer.zero_grad()
            times.append((time.monotonic() - started) / size)
    return statistics.median(times[1:])


def _item(sample: Sample, processor: ChiasmProcessor, encode: object) -> Item:
    pixels = load_pixels(sample, processor)
    features = None if pixels is None else torch.as_tensor(encode(pixels))  # type: ignore[operator]
    return Item(sample.id, encode_sample(sample, processor), features, encoded=features is not None)
