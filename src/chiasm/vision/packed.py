"""A tower that reads pictures and videos of any size as one packed row of patches (Qwen2-VL, arXiv 2409.12191)."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

PACKED_TOWERS: dict[str, Any] = {"qwen2_vl_vision": Qwen2VisionTransformerPretrainedModel}
"""Model type → class of transformers; its merger is the connector and is not built."""


class PackedTower(nn.Module):
    """Patches of all pictures → their features; a picture's patches stand block by block, as the merger takes them."""

    kind = "packed"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.model = PACKED_TOWERS[config.model_type](config)
        self.model.merger = nn.Identity()

    @property
    def width(self) -> int:
        return self.config.embed_dim

    @property
    def merge(self) -> int:
        """Patches of a block's side."""
        return self.config.spatial_merge_size

    @property
    def image_size(self) -> tuple[int, int]:
        """A picture that costs are told for: 16 × 16 visual tokens."""
        side = 16 * self.merge * self.config.patch_size
        return side, side

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens of that picture."""
        return 16, 16

    def flops(self) -> int:
        """Of that picture: every matrix on every patch, and attention among all of them."""
        patches = self.grid[0] * self.grid[1] * self.merge**2
        embedding = self.model.patch_embed.proj.weight.numel()
        matrices = sum(p.numel() for p in self.model.blocks.parameters() if p.ndim == 2)
        attention = 2 * patches * self.width * len(self.model.blocks)
        return 2 * patches * (embedding + matrices + attention)

    def forward(
        self, pixel_values: Float[Tensor, "P pixels"], grid_thw: Int[Tensor, "pictures 3"]
    ) -> Float[Tensor, "P D_v"]:
        return self.model(pixel_values.to(self.model.dtype), grid_thw=grid_thw).last_hidden_state
