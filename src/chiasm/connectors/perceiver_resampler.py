"""Perceiver resampler: learned latents read the patches, layer by layer (Flamingo, arXiv 2204.14198)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from chiasm.connectors.attention import attend, split_heads
from chiasm.connectors.base import Connector, Grid

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared_relu": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "gelu": F.gelu,
}


class PerceiverResampler(Connector):
    """Any number of patches becomes `num_latents` visual tokens.

    Args:
        num_latents: T.
        depth: layers, each attention and a feed-forward block.
        heads: attention heads.
        head_dim: channels of one head.
        feed_forward: inner width of the feed-forward block, as a multiple of D_v.
        activation: `squared_relu` (Flamingo), `relu` (Idefics) or `gelu` (OpenFlamingo).
        qk_norm: whether queries and keys have a layer norm, head by head (Idefics).
        num_frames: the most frames of a clip; their features come one frame after the other, and each frame has a
            learned time embedding. None for still pictures.
        project: whether a linear layer brings the tokens to D_l. Without it they keep the vision width, which only
            cross-attention reads.
    """

    takes_prefix = True

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        grid: Grid,
        *,
        num_latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        feed_forward: int = 4,
        activation: str = "squared_relu",
        qk_norm: bool = False,
        num_frames: int | None = None,
        project: bool = True,
    ) -> None:
        super().__init__(vision_width, language_width, grid)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        self.latents = nn.Parameter(torch.randn(num_latents, vision_width))
        self.frames = nn.Parameter(torch.randn(num_frames, vision_width)) if num_frames else None
        self.layers: Any = nn.ModuleList(
            PerceiverLayer(vision_width, heads, head_dim, feed_forward * vision_width, activation, qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(vision_width)
        self.proj = nn.Linear(vision_width, language_width) if project else None

    @classmethod
    def options_for(cls, tokens: int, grid: Grid) -> dict[str, Any]:
        return {"num_latents": tokens}

    @property
    def num_tokens(self) -> int:
        return self.latents.shape[0]

    @property
    def width(self) -> int:
        return self.vision_width if self.proj is None else self.language_width

    @property
    def output(self) -> nn.Linear | None:
        return self.proj

    def flops(self) -> int:
        layers = sum(layer.flops(self.num_features, self.num_tokens) for layer in self.layers)
        return layers + (0 if self.proj is None else 2 * self.num_tokens * self.proj.weight.numel())

    def forward(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T D"]:
        tokens = self.norm(self._resample(features)[0])
        return tokens if self.proj is None else self.proj(tokens)

    def attention(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B T N"]:
        shares = torch.stack(self._resample(features)[1]).mean(dim=(0, 2))[..., : features.shape[1]]
        return shares / shares.sum(dim=2, keepdim=True)

    def _resample(self, features: Tensor) -> tuple[Float[Tensor, "B T D_v"], list[Float[Tensor, "B H T keys"]]]:
        if self.frames is not None:
            features = features + self._times(features.shape[1], self.frames)
        latents = self.latents.repeat(features.shape[0], 1, 1)
        weights = []
        for layer in self.layers:
            latents, read = layer(latents, features)
            weights.append(read)
        return latents, weights

    def _times(self, patches: int, frames: Float[Tensor, "frames D_v"]) -> Float[Tensor, "N D_v"]:
        per_frame = self.num_features
        count, rest = divmod(patches, per_frame)
        if rest or not 1 <= count <= len(frames):
            raise ValueError(
                f"connector perceiver_resampler got {patches} patches, which are no whole number of frames of "
                f"{per_frame} between 1 and num_frames={len(frames)}; give whole frames, or raise num_frames"
            )
        return frames[:count].repeat_interleave(per_frame, dim=0)


class PerceiverLayer(nn.Module):
    """Latents attend to patches and to each other, then each goes through a feed-forward block; both are residual."""

    def __init__(self, width: int, heads: int, head_dim: int, inner: int, activation: str, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.latent_norm, self.patch_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.query_norm: nn.Module = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.key_norm: nn.Module = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.activation = ACTIVATIONS[activation]

    def flops(self, patches: int, latents: int) -> int:
        keys = patches + latents
        matrices = (self.query, self.out, self.up, self.down)
        per_latent = sum(layer.weight.numel() for layer in matrices) + 2 * keys * self.query.out_features
        return 2 * (latents * per_latent + keys * (self.key.weight.numel() + self.value.weight.numel()))

    def forward(
        self, latents: Float[Tensor, "B T D_v"], patches: Float[Tensor, "B N D_v"]
    ) -> tuple[Float[Tensor, "B T D_v"], Float[Tensor, "B H T keys"]]:
        asking = self.latent_norm(latents)
        answering = torch.cat([self.patch_norm(patches), asking], dim=1)
        query, key = (split_heads(x, self.heads) for x in (self.query(asking), self.key(answering)))
        value = split_heads(self.value(answering), self.heads)
        read, weights = attend(self.query_norm(query), self.key_norm(key), value)
        latents = latents + self.out(read.transpose(1, 2).flatten(2))
        return latents + self.down(self.activation(self.up(self.feed_forward_norm(latents)))), weights
