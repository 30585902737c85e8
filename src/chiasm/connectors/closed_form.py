"""A connector that names things before it is trained: ridge regression from patch features to word embeddings.

Each patch of a picture is regressed on the mean embedding of the words in the picture's caption. What a patch shares with
other pictures whose captions share a word survives the averaging, so the map sends it near that word. The solution is
rescaled to the language model's embedding scale, because regression shrinks.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.connectors.base import AffineConnector


class Ridge:
    """Running second moments of features and targets; memory does not grow with the data."""

    def __init__(self, width: int, target_width: int) -> None:
        self.count = 0
        self.feature_sum = torch.zeros(width, dtype=torch.float64)
        self.target_sum = torch.zeros(target_width, dtype=torch.float64)
        self.feature_square = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, target_width, dtype=torch.float64)

    def add(self, features: Float[Tensor, "N D_v"], target: Float[Tensor, " D_l"]) -> None:
        """One picture: its patches and the embedding that its words have in the mean."""
        features, target = features.double().cpu(), target.double().cpu()
        self.count += features.shape[0]
        total = features.sum(dim=0)
        self.feature_sum += total
        self.target_sum += features.shape[0] * target
        self.feature_square += (features.float().T @ features.float()).double()
        self.cross += torch.outer(total, target)

    def solve(self, penalty: float = 0.01) -> tuple[Float[Tensor, "D_l D_v"], Float[Tensor, " D_v"]]:
        """Weight of the centred regression, and the features' mean.

        Args:
            penalty: ridge strength as a share of the features' mean variance.
        """
        mean = self.feature_sum / self.count
        covariance = self.feature_square / self.count - torch.outer(mean, mean)
        cross = self.cross / self.count - torch.outer(mean, self.target_sum / self.count)
        ridge = penalty * covariance.diagonal().mean() * torch.eye(mean.numel(), dtype=torch.float64)
        return torch.linalg.solve(covariance + ridge, cross).T, mean

    def spread(self) -> float:
        """Root mean square of the centred features."""
        mean = self.feature_sum / self.count
        return (self.feature_square.diagonal() / self.count - mean.square()).mean().sqrt().item()

    def explained(self, weight: Float[Tensor, "D_l D_v"]) -> float:
        """Root mean square of the centred predictions."""
        mean = self.feature_sum / self.count
        covariance = self.feature_square / self.count - torch.outer(mean, mean)
        return ((weight @ covariance) * weight).sum(dim=1).mean().clamp(min=0).sqrt().item()


def initialise(connector: AffineConnector, ridge: Ridge, embedding_mean: Float[Tensor, " D_l"], scale: float) -> None:
    """Sets the connector to the regression, centred on the mean word and as loud as the words are.

    Args:
        ridge: moments of at least two pictures whose captions differ.
        embedding_mean: mean token embedding, where a patch that predicts nothing lands.
        scale: root mean square of the token embeddings.

    Raises:
        ValueError: the connector cannot start as an affine map, or the captions do not differ.
    """
    if not isinstance(connector, AffineConnector):
        raise ValueError(f"init: closed_form is for connectors linear and mlp, got {type(connector).__name__}; use init: keep")
    weight, mean = ridge.solve()
    loudness = ridge.explained(weight)
    if not loudness > 1e-8 * scale:
        raise ValueError("init: closed_form found nothing to learn: every caption has the same words; use init: keep")
    weight = weight * (scale / loudness)
    bias = embedding_mean.double().cpu() - weight @ mean
    dtype, device = connector.output.weight.dtype, connector.output.weight.device
    connector.set_affine(weight.to(device, dtype), bias.to(device, dtype), ridge.spread())
