"""A connector that names things before it is trained: ridge regression from patch features to word embeddings.

Each patch of a picture is regressed on the mean embedding of the words in the picture's caption. What a patch shares
with other pictures whose captions share a word survives the averaging, so the map sends it near that word. The solution
is rescaled to the language model's embedding scale, because regression shrinks. A caption cannot tell where a patch
stands: coordinate channels get directions at random, so that every place has a mark of its own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.connectors.base import AffineConnector

COORDINATE_SHARE = 0.4
"""Loudness of a patch's place beside what it shows."""


class Ridge:
    """Running second moments of features and targets; memory does not grow with the data."""

    def __init__(self, width: int, target_width: int) -> None:
        self.count = 0
        self.feature_sum = torch.zeros(width, dtype=torch.float64)
        self.feature_square = torch.zeros(width, width, dtype=torch.float64)
        self.target_sum = torch.zeros(target_width, dtype=torch.float64)
        self.cross = torch.zeros(width, target_width, dtype=torch.float64)

    def add(self, features: Float[Tensor, "N D_v"], target: Float[Tensor, " D_l"]) -> None:
        """One picture: its patches, and the embedding that its words have in the mean."""
        features, target = features.float().cpu(), target.float().cpu()
        total = features.sum(dim=0)
        self.count += features.shape[0]
        self.feature_sum += total
        self.feature_square += features.T @ features
        self.target_sum += features.shape[0] * target
        self.cross += torch.outer(total, target)

    @property
    def mean(self) -> Float[Tensor, " D_v"]:
        return self.feature_sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "D_v D_v"]:
        return self.feature_square / self.count - torch.outer(self.mean, self.mean)

    def solve(self, penalty: float = 0.1) -> tuple[Float[Tensor, "D_l D_v"], float]:
        """Weight of the centred regression, and the root mean square of what it predicts.

        Args:
            penalty: ridge strength as a share of the features' mean variance.
        """
        covariance = self.covariance
        cross = self.cross / self.count - torch.outer(self.mean, self.target_sum / self.count)
        ridge = penalty * covariance.diagonal().mean() * torch.eye(self.mean.numel(), dtype=torch.float64)
        weight = torch.linalg.solve(covariance + ridge, cross).T
        return weight, ((weight @ covariance) * weight).sum(dim=1).mean().clamp(min=0).sqrt().item()

    def spread(self) -> float:
        """Root mean square of the centred features."""
        return self.covariance.diagonal().mean().clamp(min=0).sqrt().item()


def initialise(
    connector: AffineConnector,
    ridge: Ridge,
    embedding_mean: Float[Tensor, " D_l"],
    scale: float,
    coordinates: int = 0,
) -> None:
    """Sets the connector to the regression, centred on the mean embedding and as loud as the words are.

    Args:
        ridge: moments of at least two pictures whose captions differ.
        embedding_mean: mean token embedding, where a patch that predicts nothing lands.
        scale: root mean square of the token embeddings.
        coordinates: how many of the last feature channels tell a place.

    Raises:
        ValueError: the captions do not differ.
    """
    weight, loudness = ridge.solve()
    if not loudness > 1e-8 * scale:
        raise ValueError("init: closed_form found nothing to learn: every caption has the same words; use init: keep")
    weight *= scale / loudness
    if coordinates:
        power = ridge.covariance.diagonal()[-coordinates:].sum().sqrt()
        weight[:, -coordinates:] = torch.randn(weight.shape[0], coordinates) * (COORDINATE_SHARE * scale / power)
    bias = embedding_mean.double().cpu() - weight @ ridge.mean
    like = connector.output.weight
    connector.set_affine(weight.to(like.device, like.dtype), bias.to(like.device, like.dtype), ridge.spread())
