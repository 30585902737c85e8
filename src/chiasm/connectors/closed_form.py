"""A connector that names things before it is trained: ridge regression from patch features to word embeddings.

Each patch of a picture is regressed on the mean embedding of the words in the picture's caption. What a patch shares
with other pictures whose captions share a word survives the averaging, so the map sends it near that word. The solution
is rescaled to the language model's embedding scale, because regression shrinks. A caption cannot tell where a patch
stands, but its coordinates can: they are mapped to the words for places.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.connectors.base import AffineConnector

PLACE_SHARE = 0.5
"""Loudness of where a patch stands beside what it shows."""


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
    coordinates: Float[Tensor, "N C"] | None = None,
    places: Float[Tensor, "N D_l"] | None = None,
) -> None:
    """Sets the connector to the regression, centred on the mean embedding and as loud as the words are.

    Args:
        ridge: moments of at least two pictures whose captions differ.
        embedding_mean: mean token embedding, where a patch that predicts nothing lands.
        scale: root mean square of the token embeddings.
        coordinates: the last C channels of the features, which are the same for every picture, where there are any.
        places: what the words for a patch's place embed to.

    Raises:
        ValueError: the captions do not differ.
    """
    weight, loudness = ridge.solve()
    if not loudness > 1e-8 * scale:
        raise ValueError("init: closed_form found nothing to learn: every caption has the same words; use init: keep")
    weight *= scale / loudness
    if coordinates is not None and places is not None:
        marks = (places - places.mean(dim=0)).double().cpu()
        marks *= PLACE_SHARE * scale / marks.square().mean().sqrt()
        centred = (coordinates - coordinates.mean(dim=0)).double().cpu()
        weight[:, -coordinates.shape[1] :] = torch.linalg.lstsq(centred, marks, driver="gelsd").solution.T
    bias = embedding_mean.double().cpu() - weight @ ridge.mean
    like = next(connector.parameters(), weight)
    connector.set_affine(weight.to(like.device, like.dtype), bias.to(like.device, like.dtype), ridge.spread())
