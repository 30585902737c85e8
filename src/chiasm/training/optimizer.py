"""AdamW (arXiv 1711.05101), or plain SGD, over a freeze plan: a rate for each part, weight decay on matrices, warm-up,
cosine."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chiasm.training.schema import Settings
from chiasm.training.sharding import alike, is_sharded, whole
from chiasm.training.stages import FreezePlan

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class StageOptimizer:
    """The optimizer of one stage. The learning rate is a function of the step alone, so it needs no saving."""

    def __init__(self, model: nn.Module, plan: FreezePlan, settings: Settings, num_steps: int) -> None:
        self.settings = settings
        self.num_steps = num_steps
        self.parameters = {name: p for name, p in model.named_parameters() if plan.rates[name] is not None}
        groups: dict[tuple[str, float, float, bool], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            key = plan.labels[name], plan.rates[name] or 0.0, decay, is_sharded([parameter])
            groups.setdefault(key, []).append(parameter)
        fused = all(p.device.type in FUSED_DEVICES for p in self.parameters.values())
        members = [
            {"params": tensors, "lr": rate, "weight_decay": decay, "part": part, "peak": rate}
            for (part, rate, decay, _), tensors in groups.items()
        ]
        self.rule: torch.optim.Optimizer = (
            torch.optim.SGD(members)
            if settings.optimizer == "sgd"
            else torch.optim.AdamW(members, betas=settings.betas, fused=fused)
        )

    def factor(self, step: int) -> float:
        """The learning rate of a step as a share of the peak: linear warm-up, then the schedule."""
        warmup = math.ceil(self.settings.warmup * self.num_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.num_steps - warmup)))

    def step(self, step: int) -> float:
        """Clips the gradients that were accumulated and takes a step.

        Returns:
            The gradients' norm before clipping; without a step if it is not finite.
        """
        reached = alike(p for p in self.parameters.values() if p.grad is not None)
        norms = [whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in reached]
        norm = norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms)
        if not torch.isfinite(norm):
            return norm.item()
        if self.settings.clip is not None:
            for group in reached:
                nn.utils.clip_grads_with_norm_(group, self.settings.clip, norm)
        for members in self.rule.param_groups:
            members["lr"] = members["peak"] * self.factor(step)
        self.rule.step()
        return norm.item()

    def zero_grad(self) -> None:
        self.rule.zero_grad(set_to_none=True)

    def rates(self, step: int) -> dict[str, float]:
        """Learning rate of every trained part and pattern at a step."""
        return {group["part"]: group["peak"] * self.factor(step) for group in self.rule.param_groups}

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by parameter name: `exp_avg/connector.…`. Parameters that never had a gradient have none."""
        return {
            f"{moment}/{name}": self.rule.state[parameter][moment]
            for name, parameter in self.parameters.items()
            for moment in MOMENTS
            if parameter in self.rule.state and moment in self.rule.state[parameter]
        }

    def empty_state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Moments of these names, to be filled with saved ones.

        Raises:
            ValueError: one belongs to no parameter that is trained here.
        """
        parameters = {name: self._parameter_of(name) for name in names}
        return {
            name: torch.zeros(()) if name.startswith("step/") else torch.zeros_like(parameter.data)
            for name, parameter in parameters.items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Puts saved moments back.

        Raises:
            ValueError: a moment belongs to no trainable parameter, or its shape differs.
        """
        state: dict[Any, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            moment, name = key.split("/", 1)
            parameter = self._parameter_of(key)
            if moment != "step" and tensor.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(parameter.shape)} but its saved state is {tuple(tensor.shape)}")
            device = tensor.device if moment == "step" and parameter.device.type == "cpu" else parameter.device
            state.setdefault(parameter, {})[moment] = tensor.to(device, copy=True)
        self.rule.state.update(state)

    def _parameter_of(self, key: str) -> Tensor:
        moment, name = key.split("/", 1)
        if name not in self.parameters or moment not in MOMENTS:
            raise ValueError(f"the checkpoint has optimizer state for {name!r}, which this stage does not train")
        return self.parameters[name]
