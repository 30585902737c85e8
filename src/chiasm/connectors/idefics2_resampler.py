"""Idefics2's resampler: a gated MLP to the language model's width, then latents that read it (arXiv 2405.02246).

It differs from Flamingo's resampler in where it works: at the language model's width, with the language model's own
kinds of layers (RMSNorm, grouped queries, SwiGLU).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chiasm.connectors.attention import attend, split_heads
from chiasm.connectors.base import Connector, Grid


class Idefics2Resampler(Connector):
    """Any number of patches becomes `num_latents` visual tokens.

    Args:
        num_latents: T.
        depth: layers, each attention and a gated MLP.
        heads: attention heads.
        key_value_heads: heads of keys and values, which divides `heads`.
        head_dim: channels of one head.
        projection_width: inner width of the MLP before the latents, 4 D_l when it is None; in Idefics2 that of the
            language model's own MLP.
        eps: of the norms.
    """

    takes_prefix = True
    takes_mask = True

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        grid: Grid,
        *,
        num_latents: int = 64,
        depth: int = 3,
        heads: int = 16,
        key_value_heads: int = 4,
        head_dim: int = 96,
        projection_width: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(vision_width, language_width, grid)
        if heads % key_value_heads:
            raise ValueError(
                f"connector idefics2_resampler has heads={heads}, key_value_heads={key_value_heads}; expected the "
                "second to divide the first"
            )
        inner = projection_width or 4 * language_width
        self.modality_projection = GatedMLP(vision_width, inner, language_width)
        self.latents = nn.Parameter(torch.randn(num_latents, language_width))
        self.layers: Any = nn.ModuleList(
            ResamplerLayer(language_width, heads, key_value_heads, head_dim, eps) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(language_width, eps=eps)

    @classmethod
    def options_for(cls, tokens: int, grid: Grid) -> dict[str, Any]:
        return {"num_latents": tokens}

    @property
    def num_tokens(self) -> int:
        return self.latents.shape[0]

    @property
    def output(self) -> None:
        return None

    def flops(self) -> int:
        layers = sum(layer.flops(self.num_features, self.num_tokens) for layer in self.layers)
        return layers + 2 * self.num_features * self.modality_projection.elements()

    def forward(
        self, features: Float[Tensor, "B N D_v"], patch_mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B T D_l"]:
        return self.norm(self._resample(features, patch_mask)[0])

    def attention(
        self, features: Float[Tensor, "B N D_v"], patch_mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B T N"]:
        shares = torch.stack(self._resample(features, patch_mask)[1]).mean(dim=(0, 2))[..., : features.shape[1]]
        return shares / shares.sum(dim=2, keepdim=True)

    def _resample(
        self, features: Tensor, patch_mask: Tensor | None
    ) -> tuple[Float[Tensor, "B T D_l"], list[Float[Tensor, "B H T keys"]]]:
        patches = self.modality_projection(features)
        latents = self.latents.repeat(features.shape[0], 1, 1)
        mask = None if patch_mask is None else F.pad(patch_mask, (0, self.num_tokens), value=True)[:, None, None]
        weights = []
        for layer in self.layers:
            latents, read = layer(latents, patches, mask)
            weights.append(read)
        return latents, weights


class ResamplerLayer(nn.Module):
    """Latents attend to patches and to each other, with grouped queries (arXiv 2305.13245), then a gated MLP."""

    def __init__(self, width: int, heads: int, key_value_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.heads, self.key_value_heads = heads, key_value_heads
        self.latent_norm, self.patch_norm = nn.RMSNorm(width, eps=eps), nn.RMSNorm(width, eps=eps)
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(width, key_value_heads * head_dim, bias=False)
        self.value = nn.Linear(width, key_value_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.mlp = GatedMLP(width, 4 * width, width)

    def flops(self, patches: int, latents: int) -> int:
        keys = patches + latents
        per_latent = self.query.weight.numel() + self.out.weight.numel() + self.mlp.elements()
        per_key = self.key.weight.numel() + self.value.weight.numel()
        return 2 * (latents * (per_latent + 2 * keys * self.query.out_features) + keys * per_key)

    def forward(
        self,
        latents: Float[Tensor, "B T D_l"],
        patches: Float[Tensor, "B N D_l"],
        mask: Bool[Tensor, "B 1 1 keys"] | None = None,
    ) -> tuple[Float[Tensor, "B T D_l"], Float[Tensor, "B H T keys"]]:
        asking = self.latent_norm(latents)
        answering = torch.cat([self.patch_norm(patches), asking], dim=1)
        repeat = self.heads // self.key_value_heads
        key, value = (
            split_heads(x, self.key_value_heads).repeat_interleave(repeat, dim=1)
            for x in (self.key(answering), self.value(answering))
        )
        read, weights = attend(split_heads(self.query(asking), self.heads), key, value, mask)
        latents = latents + self.out(read.transpose(1, 2).flatten(2))
        return latents + self.mlp(self.mlp_norm(latents)), weights


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(inputs, inner, bias=False), nn.Linear(inputs, inner, bias=False)
        self.down = nn.Linear(inner, outputs, bias=False)

    def elements(self) -> int:
        return self.gate.weight.numel() + self.up.weight.numel() + self.down.weight.numel()

    def forward(self, tokens: Float[Tensor, "B S C"]) -> Float[Tensor, "B S D"]:
        return self.down(F.silu(self.gate(tokens)) * self.up(tokens))
