"""A connector that names things before it is trained: ridge regression from patch features to word embeddings.

Which of a caption's words a patch shows is found as words of two languages are aligned (IBM model 1, Brown 1993):
at first every patch takes all of them, the rare ones most; then, round by round, those that the regression of the round
before expects of it. The solution is rescaled to the language model's embedding scale, because regression shrinks. A
caption cannot tell where a patch stands, but its coordinates can: they are mapped to the words for places. Connectors
`linear` and `mlp` become the solution as far as their width allows, all others are fitted to it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from chiasm.connectors.base import AffineConnector, Connector
from chiasm.connectors.fitting import Features, fit

PLACE_SHARE = 0.5
"""Loudness of where a patch stands beside what it shows."""
SHARPNESS = 2.0
"""Power of a word's expected share when patches choose among the words of their caption."""


class NothingToLearn(ValueError):
    """The data holds nothing to start from: no pictures with captions that differ."""


class Ridge:
    """Running second moments of features and of the shares that words have in them; memory does not grow with data."""

    def __init__(self, width: int, num_words: int) -> None:
        self.count = 0
        self.feature_sum = torch.zeros(width, dtype=torch.float64)
        self.feature_square = torch.zeros(width, width, dtype=torch.float64)
        self.weight: Tensor | None = None
        self._forget_words(num_words)

    def _forget_words(self, num_words: int) -> None:
        self.word_sum = torch.zeros(num_words, dtype=torch.float64)
        self.cross = torch.zeros(self.feature_sum.numel(), num_words, dtype=torch.float64)

    def add(self, features: Float[Tensor, "N D_v"], words: list[int], rarity: Float[Tensor, " K"]) -> None:
        """One picture: its patches, and the K words of its caption by number and by how much they tell."""
        features = features.float().cpu()
        if self.weight is None:
            self.count += features.shape[0]
            self.feature_sum += features.sum(dim=0)
            self.feature_square += features.T @ features
            shares = (rarity / rarity.sum()).expand(features.shape[0], -1)
        else:
            expected = (features.double() - self.mean) @ self.weight[:, words] + self.expected[words]
            shares = expected.clamp(min=1e-4) ** SHARPNESS
            shares = (shares / shares.sum(dim=1, keepdim=True)).float()
        self.word_sum[words] += shares.sum(dim=0)
        self.cross[:, words] += (features.T @ shares).double()

    def align(self) -> None:
        """Ends a round: in the next pass over the same pictures, patches take the words that are expected of them."""
        self.weight, self.expected = self.solve(), self.word_sum / self.count
        self._forget_words(self.word_sum.numel())

    @property
    def mean(self) -> Float[Tensor, " D_v"]:
        return self.feature_sum / self.count

    @property
    def covariance(self) -> Float[Tensor, "D_v D_v"]:
        return self.feature_square / self.count - torch.outer(self.mean, self.mean)

    def solve(self, penalty: float = 0.1) -> Float[Tensor, "D_v words"]:
        """Weight of the centred regression from features to words.

        Args:
            penalty: ridge strength as a share of the features' mean variance.
        """
        covariance = self.covariance
        cross = self.cross / self.count - torch.outer(self.mean, self.word_sum / self.count)
        ridge = penalty * covariance.diagonal().mean() * torch.eye(self.mean.numel(), dtype=torch.float64)
        return torch.linalg.solve(covariance + ridge, cross)

    def loudness(self, weight: Float[Tensor, "D_l D_v"]) -> float:
        """Root mean square of what a map makes of the centred features."""
        return ((weight @ self.covariance) * weight).sum(dim=1).mean().clamp(min=0).sqrt().item()

    def spread(self) -> float:
        """Root mean square of the centred features."""
        return self.covariance.diagonal().mean().clamp(min=0).sqrt().item()


class Map(NamedTuple):
    """`features @ weight.T + bias`; `spread` is the root mean square of the centred features."""

    weight: Float[Tensor, "D_l D_v"]
    bias: Float[Tensor, " D_l"]
    spread: float


def solve(
    ridge: Ridge,
    embeddings: Float[Tensor, "words D_l"],
    embedding_mean: Float[Tensor, " D_l"],
    scale: float,
    coordinates: Float[Tensor, "N C"] | None = None,
    places: Float[Tensor, "N D_l"] | None = None,
) -> Map:
    """The regression as a map of patches, centred on the mean embedding and as loud as the words are.

    Args:
        ridge: moments of at least two pictures whose captions differ.
        embeddings: of the words.
        embedding_mean: mean token embedding, where a patch that predicts nothing lands.
        scale: root mean square of the token embeddings.
        coordinates: the last C channels of the features, which are the same for every picture, where there are any.
        places: what the words for a patch's place embed to.

    Raises:
        NothingToLearn: the captions do not differ.
    """
    weight = (ridge.solve() @ embeddings.double()).T
    loudness = ridge.loudness(weight)
    if not loudness > 1e-8 * scale:
        raise NothingToLearn(
            "init: closed_form found nothing to learn: every caption has the same words; use init: keep"
        )
    weight *= scale / loudness
    if coordinates is not None and places is not None:
        marks = (places - places.mean(dim=0)).double().cpu()
        marks *= PLACE_SHARE * scale / marks.square().mean().sqrt()
        centred = (coordinates - coordinates.mean(dim=0)).double().cpu()
        weight[:, -coordinates.shape[1] :] = torch.linalg.lstsq(centred, marks, driver="gelsd").solution.T
    return Map(weight, embedding_mean.double().cpu() - weight @ ridge.mean, ridge.spread())


def is_exact(connector: Connector) -> bool:
    """Whether the connector can be the map itself, as far as its width allows."""
    return isinstance(connector, AffineConnector) and connector.can_be_affine


def start(
    connector: Connector, solution: Map, features: Features | None, with_positions: Callable[[Features], Features]
) -> float:
    """Makes the connector the map where it can be one, else as near to it as a short training comes.

    Args:
        features: of some pictures, for connectors that are fitted; `with_positions` appends their coordinates.

    Returns:
        The share of the map's variance that the connector misses.
    """
    if features is not None:
        return fit(connector, features, with_positions, solution.weight, solution.bias)
    like = next(connector.parameters(), solution.weight)
    weight, bias = (tensor.to(like.device, like.dtype) for tensor in (solution.weight, solution.bias))
    connector.set_affine(weight, bias, solution.spread)  # type: ignore[operator]
    return 0.0
