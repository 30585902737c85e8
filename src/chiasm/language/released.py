"""A model that has given up its full weights: what is left of it answers, but cannot be trained, saved or converted."""

from typing import NoReturn

from torch import nn


class Released(nn.Module):
    """A layer of which only packed weights of a `kind` are left."""

    kind: str

    def train(self, mode: bool = True) -> "Released":
        if mode:
            self.refuse("the model cannot be trained")
        super().train(mode)
        return self

    def refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{what}: an engine with release=True has left only {self.kind} of its matrices; load the model again"
        )


def require_trainable(model: nn.Module) -> None:
    """Refuses to train a model of which a layer is `Released`, before anything of it is changed."""
    for module in model.modules():
        if isinstance(module, Released):
            module.train()
