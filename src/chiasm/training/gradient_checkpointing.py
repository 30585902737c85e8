"""Gradient checkpointing (arXiv 1604.06174): layers are computed again in the backward instead of being kept."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def checkpointed_layers(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """While it lasts, layers in training mode keep their inputs only: less memory, about a third more time."""
    if not wanted:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
