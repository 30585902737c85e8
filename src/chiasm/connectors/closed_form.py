"""A connector that names things before it is trained: ridge regression from patch features to word embeddings.

Each patch of a picture is regressed on the mean embedding of the words in the picture's caption. What a patch shares
with other pictures whose captions share a word survives the averaging, so the map sends it near that word. Where a patch
stands is known without any caption, and is regressed in the same way on the words for places. Solutions are rescaled to
the language model's embedding scale, because regression shrinks.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.connectors.base import AffineConnector


class Ridge:
    """Running second moments of features and of one or more kinds of targets; memory does not grow with the data."""

    def __init__(self, width: int, target_width: int, kinds: int = 1) -> None:
        self.count = 0
        self.feature_sum = torch.zeros(width, dtype=torch.float64)
        self.feature_square = torch.zeros(width, width, dtype=torch.float64)
        self.target_sum = torch.zeros(kinds, target_width, dtype=torch.float64)
        self.cross = torch.zeros(kinds, width, target_width, dtype=torch.float64)

    def add(self, features: Float[Tensor, "N D_v"], *targets: Float[Tensor, "N_or_one D_l"]) -> None:
        """One picture: its patches, and what each should become, one tensor for each kind of target."""
        features = features.float().cpu()
        self.count += features.shape[0]
        self.feature_sum += features.sum(dim=0)
        self.feature_square += features.T @ features
        for kind, target in enumerate(targets):
            target = target.float().cpu().expand(features.shape[0], -1)
            self.target_sum[kind] += target.sum(dim=0)
            self.cross[kind] += features.T @ target

    @property
    def mean(self) -> Float[Tensor, " D_v"]:
        return self.feature_sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "D_v D_v"]:
        return self.feature_square / self.count - torch.outer(self.mean, self.mean)

    def solve(self, kind: int = 0, penalty: float = 0.01) -> tuple[Float[Tensor, "D_l D_v"], float]:
        """Weight of the centred regression, and the root mean square of what it predicts.

        Args:
            penalty: ridge strength as a share of the features' mean variance.
        """
        covariance = self.covariance
        cross = self.cross[kind] / self.count - torch.outer(self.mean, self.target_sum[kind] / self.count)
        ridge = penalty * covariance.diagonal().mean() * torch.eye(self.mean.numel(), dtype=torch.float64)
        weight = torch.linalg.solve(covariance + ridge, cross).T
        return weight, ((weight @ covariance) * weight).sum(dim=1).mean().clamp(min=0).sqrt().item()

    def spread(self) -> float:
        """Root mean square of the centred features."""
        return self.covariance.diagonal().mean().clamp(min=0).sqrt().item()


def initialise(
    connector: AffineConnector,
    ridge: Ridge,
    shares: tuple[float, ...],
    embedding_mean: Float[Tensor, " D_l"],
    scale: float,
) -> None:
    """Sets the connector to the regressions' sum, centred on the mean embedding and as loud as the words are.

    Args:
        ridge: moments of at least two pictures whose captions differ.
        shares: loudness of each kind of target; their squares add up to 1.
        embedding_mean: mean token embedding, where a patch that predicts nothing lands.
        scale: root mean square of the token embeddings.

    Raises:
        ValueError: the captions do not differ.
    """
    weight = torch.zeros(embedding_mean.numel(), ridge.mean.numel(), dtype=torch.float64)
    for kind, share in enumerate(shares):
        part, loudness = ridge.solve(kind)
        if not loudness > 1e-8 * scale:
            raise ValueError(
                "init: closed_form found nothing to learn: every caption has the same words; use init: keep"
            )
        weight += part * (share * scale / loudness)
    bias = embedding_mean.double().cpu() - weight @ ridge.mean
    like = connector.output.weight
    connector.set_affine(weight.to(like.device, like.dtype), bias.to(like.device, like.dtype), ridge.spread())
