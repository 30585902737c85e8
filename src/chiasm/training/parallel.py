"""A stage's model over several processes: copies whose gradients are averaged, or one that is sharded over all of them.

`ddp` keeps a whole copy in every process (arXiv 2006.15704). `fsdp` shards master weights, gradients and moments over
the processes (FSDP2, arXiv 2304.11277): a twin of the model is trained, and the model itself waits in the CPU's memory
for what the twin has learned. Both compute what one process would.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from chiasm.language.adapter import layers
from chiasm.training.sharding import whole
from chiasm.training.stage_model import StageModel
from chiasm.training.team import Team


class Engine:
    """What computes a step's losses, here in one process. `model` has the parameters that learn."""

    def __init__(self, learner: StageModel) -> None:
        self.learner, self.model = learner, learner.model

    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        """Each objective's share of a step's loss, as `StageModel.losses`."""
        return self.learner.losses(inputs, num_samples, num_tokens)

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Around the forward and backward of a batch; after the `last` of its step all processes have one gradient."""
        return nullcontext()

    def reshard(self) -> None:
        """Gives back what is still whole, so that parameters are shards again, where there are any."""

    @property
    def asked(self) -> "Engine | StageModel":
        """Whose losses validation looks at; those of an engine need all processes at once."""
        return self.learner


class _Losses(nn.Module):
    """A learner as a module, whose forward is all that DDP and FSDP see."""

    def __init__(self, learner: StageModel) -> None:
        super().__init__()
        self.model, self.learner = learner.model, learner

    def forward(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        return self.learner.losses(inputs, num_samples, num_tokens)


class Replicated(Engine):
    """Every process has the whole model, and a part of every batch."""

    def __init__(self, learner: StageModel) -> None:
        super().__init__(learner)
        self.ddp = DistributedDataParallel(_Losses(learner), find_unused_parameters=True)

    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        return self.ddp(inputs, num_samples, num_tokens)

    def accumulate(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.ddp.no_sync()


class Sharded(Engine):
    """Every process has a shard of every parameter, and a part of every batch.

    A frozen encoder is whole in each of them: a process whose part of a batch has no picture does not run it, so nobody
    can wait there for its shards. Single numbers are whole too.
    """

    def __init__(self, learner: StageModel, device: torch.device) -> None:
        twin = copy.copy(learner)
        twin.model = copy.deepcopy(learner.model)
        super().__init__(twin)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # A list: processes must go through them in the same order, and a set's is that of memory.
        scalars = [parameter for parameter in twin.model.parameters() if parameter.ndim == 0]
        self.numbers = [parameter for parameter in scalars if parameter.requires_grad]
        kept = {*scalars, *_frozen_encoder(twin.model)}
        for parameter in kept:
            parameter.data = parameter.data.to(device)
        for block in _blocks(twin.model):
            if not kept.issuperset(block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=kept)
        self.root: Any = fully_shard(_Losses(twin), mesh=mesh, ignored_params=kept)

    def losses(self, inputs: dict[str, Tensor], num_samples: int, num_tokens: int) -> dict[str, Tensor]:
        return self.root(inputs, num_samples, num_tokens)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.root.set_requires_gradient_sync(last)
        yield
        if last:
            self._average_numbers()
            self.reshard()

    def _average_numbers(self) -> None:
        """A single number, such as a temperature, has no shards: its gradient is averaged as DDP does, and stays away
        where no process reached it."""
        for number in self.numbers:
            reached = number.new_tensor([number.grad is not None, 0 if number.grad is None else number.grad])
            dist.all_reduce(reached)
            number.grad = reached[1] / dist.get_world_size() if reached[0] else None

    def reshard(self) -> None:
        """FSDP keeps the root's parameters after a forward, and those that no gradient passed."""
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @property
    def asked(self) -> Engine:
        return self

    @torch.no_grad()
    def hand_over(self, model: PreTrainedModel) -> None:
        """Puts what the twin has learned into the model that it was made of."""
        self.reshard()
        for learned, own in zip(self.model.parameters(), model.parameters(), strict=True):
            if learned.requires_grad:
                own.data.copy_(whole(learned.data))


@contextmanager
def engine(learner: StageModel, team: Team, parallel: str, device: torch.device) -> Iterator[Engine]:
    """The engine of a stage. Afterwards the learner's own model has learned, whatever was trained in its stead."""
    if team.size == 1:
        yield Engine(learner)
        return
    for parameter in learner.model.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, 0)
    if parallel != "fsdp":
        yield Replicated(learner)
        return
    sharded = Sharded(learner, device)
    yield sharded
    sharded.hand_over(learner.model)


@contextmanager
def on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, a model leaves its device to others."""
    device = model.device
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)


def _frozen_encoder(model: PreTrainedModel) -> list[nn.Parameter]:
    """The vision part's parameters, if none of them learns."""
    parameters = list(model.vision.parameters())
    return [] if any(parameter.requires_grad for parameter in parameters) else parameters


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that are sharded by themselves, so that only one of them is whole at a time: layers of transformers."""
    parts = [getattr(model, "language", None), getattr(model.vision, "model", None)]
    found: list[nn.Module] = []
    for part in parts:
        if part is not None and hasattr(part.config.get_text_config(), "num_hidden_layers"):
            found += layers(part)
    return found
