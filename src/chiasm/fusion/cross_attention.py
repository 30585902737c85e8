"""Gated cross-attention: tokens look at pictures in front of a language model's layers (Flamingo, arXiv 2204.14198).

Gates start at 0, where the model is the language model bit for bit. With RMS norms, SwiGLU, grouped heads and query-key
norms the same block is Idefics' or Llama 3.2 Vision's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from chiasm.fusion.cross_attention_settings import NORMS, CrossAttentionSettings

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Look:
    """What the tokens of one forward can look at.

    Args:
        keys_values: for every block, keys and values `(B, kv_heads, I·T, head_dim)`.
        mask: which visual tokens each token attends to.
        sees: whether it attends to any.
        blocks: the blocks that this look is for; those of another model around the same language model stay out.
        record: where blocks put their attention weights `(B, H, S, I·T)`, if anyone asks.
    """

    keys_values: list[KeysValues]
    mask: Bool[Tensor, "B 1 S K"]
    sees: Bool[Tensor, "B S 1"]
    blocks: nn.ModuleList | None = None
    record: list[Tensor] | None = None


LOOK: ContextVar[Look | None] = ContextVar("chiasm_look", default=None)
"""What this forward's tokens look at: a value of the call, so that no module keeps anything between calls."""


@contextmanager
def looking(look: Look | None) -> Iterator[None]:
    """While it lasts, the hooked layers of this thread's language model attend to `look`."""
    token = LOOK.set(look)
    try:
        yield
    finally:
        LOOK.reset(token)


class GatedCrossAttention(GradientCheckpointingLayer):
    """x + tanh(attention_gate) · attention(x, pictures), then x + tanh(feed_forward_gate) · feed_forward(x).

    Args:
        mark: of the model that the block is for, and of its copies.
    """

    def __init__(self, width: int, visual_width: int, settings: CrossAttentionSettings, mark: str = "") -> None:
        super().__init__()
        self.mark = mark
        norm, eps, size = NORMS[settings.norm], settings.eps, settings.head_dim
        inner, shared = settings.heads * size, settings.kv_heads * size
        self.settings = settings
        self.attention_norm = norm(width, eps=eps)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(visual_width, shared, bias=False)
        self.v_proj = nn.Linear(visual_width, shared, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.q_norm = nn.RMSNorm(size, eps=eps) if settings.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(size, eps=eps) if settings.qk_norm else nn.Identity()
        self.feed_forward_norm = norm(width, eps=eps)
        self.up_proj = nn.Linear(width, settings.feed_forward, bias=False)
        self.gate_proj = nn.Linear(width, settings.feed_forward, bias=False) if settings.gated_feed_forward else None
        self.down_proj = nn.Linear(settings.feed_forward, width, bias=False)
        gates = 1 if settings.gate == "scalar" else width
        self.attention_gate = nn.Parameter(torch.zeros(gates))
        self.feed_forward_gate = nn.Parameter(torch.zeros(gates))

    def keys_values(self, visual: Float[Tensor, "B K W"]) -> KeysValues:
        """Keys and values of the pictures, which stay the same while an answer is decoded."""
        split = (self.settings.kv_heads, self.settings.head_dim)
        keys, values = (proj(visual).unflatten(-1, split).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return self.k_norm(keys), values

    def forward(
        self,
        hidden: Float[Tensor, "B S D_l"],
        keys: Float[Tensor, "B G K head"],
        values: Float[Tensor, "B G K head"],
        look: Look,
    ) -> Float[Tensor, "B S D_l"]:
        attended = self._attend(_normed(self.attention_norm, hidden), (keys, values), look)
        if self.settings.mask_attention:
            attended = attended.masked_fill(~look.sees, 0.0)
        hidden = hidden + torch.tanh(self.attention_gate).to(hidden.dtype) * attended.to(hidden.dtype)
        fed = self._feed_forward(_normed(self.feed_forward_norm, hidden))
        if self.settings.mask_feed_forward:
            fed = fed.masked_fill(~look.sees, 0.0)
        return hidden + torch.tanh(self.feed_forward_gate).to(hidden.dtype) * fed.to(hidden.dtype)

    def _attend(self, hidden: Tensor, keys_values: KeysValues, look: Look) -> Float[Tensor, "B S D_l"]:
        queries = self.q_norm(self.q_proj(hidden).unflatten(-1, (self.settings.heads, -1)).transpose(1, 2))
        keys, values = (states.to(queries.dtype) for states in keys_values)
        mask = look.mask | ~look.sees[:, None]  # a row that sees nothing would be NaN: it attends to all, masked later
        if look.record is not None:
            shared = keys.repeat_interleave(self.settings.heads // self.settings.kv_heads, dim=1)
            scores = queries @ shared.transpose(-1, -2) * self.settings.head_dim**-0.5
            look.record.append(
                scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).masked_fill(~look.sees[:, None], 0)
            )
        attended = F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(F.gelu(self.up_proj(hidden)))
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def _normed(norm: Any, states: Tensor) -> Tensor:
    """The norm in the precision of its weights, which may differ from the other parts' while one of them is trained."""
    return norm(states.to(norm.weight.dtype))


class CrossAttention(nn.Module):
    """The part `cross_attention`: blocks, the norm in front of their keys and values, the placeholder's embedding.

    Args:
        width: of the states between the language model's layers.
        visual_width: of the pictures' tokens.
        word_width: of its embeddings.
    """

    def __init__(self, width: int, visual_width: int, word_width: int, settings: CrossAttentionSettings) -> None:
        super().__init__()
        self.settings = settings
        self.visual_norm = nn.LayerNorm(visual_width) if settings.visual_norm else nn.Identity()
        block = partial(GatedCrossAttention, width, visual_width, settings, uuid4().hex)
        self.blocks: Any = nn.ModuleList(block() for _ in settings.layers)
        self.image_embedding = nn.Parameter(torch.zeros(word_width)) if settings.image_embedding else None

    def attach(self, layers: nn.ModuleList) -> None:
        """Puts the blocks in front of their layers, by PyTorch's own hooks: no class and no weight name changes."""
        for index, layer in enumerate(self.settings.layers):
            hook = _InFront(self.blocks[index].mark, index)
            layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    def keys_values(self, visual: Float[Tensor, "B K W"]) -> list[KeysValues]:
        """Keys and values of every block."""
        visual = self.visual_norm(visual.to(self.blocks[0].k_proj.weight.dtype))
        return [block.keys_values(visual) for block in self.blocks]

    def flops(self, tokens: int, visual_tokens: int) -> int:
        """FLOPs of `tokens` new tokens through all blocks, with `visual_tokens` keys in view."""
        block, heads = self.blocks[0], self.settings.heads * self.settings.head_dim
        fresh = (block.q_proj, block.o_proj, block.up_proj, block.gate_proj, block.down_proj)
        matrices = sum(layer.weight.numel() for layer in fresh if layer is not None)
        return len(self.blocks) * 2 * tokens * (matrices + 2 * visual_tokens * heads)

    def keys_values_flops(self, visual_tokens: int) -> int:
        """FLOPs of the keys and values of `visual_tokens`, which are paid once for a picture."""
        weights = sum(layer.weight.numel() for layer in (self.blocks[0].k_proj, self.blocks[0].v_proj))
        return len(self.blocks) * 2 * visual_tokens * weights

    @torch.no_grad()
    def open_gates(self, gate: float = 1.0) -> bool:
        """Opens gates that are all closed, and makes the layers in front of them 0.

        The model stays the language model bit for bit, but everything learns from the first step. Where a gate is open
        already, nothing happens.

        Returns:
            Whether they were opened.
        """
        gates = [one for block in self.blocks for one in (block.attention_gate, block.feed_forward_gate)]
        if any(closed.any() for closed in gates):
            return False
        for closed in gates:
            closed.fill_(gate)
        for block in self.blocks:
            block.o_proj.weight.zero_()
            block.down_proj.weight.zero_()
        return True

    def gates(self) -> dict[str, list[float]]:
        """How far each block's gates are open, layer by layer: tanh of a scalar, the mean size of a vector."""
        return {
            name: [_openness(getattr(block, name)) for block in self.blocks]
            for name in ("attention_gate", "feed_forward_gate")
        }


def _openness(gate: Tensor) -> float:
    opened = torch.tanh(gate.detach().float())
    return opened.item() if opened.numel() == 1 else opened.abs().mean().item()


class _InFront:
    """A forward pre-hook that sends hidden states through a block first, of those that the model has now: PEFT trains
    copies of parts (`modules_to_save`). An object, so that models can be copied."""

    def __init__(self, mark: str, index: int) -> None:
        self.mark, self.index = mark, index

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        look = LOOK.get()
        if look is None or look.blocks is None or self.index >= len(look.blocks):
            return None
        block: Any = look.blocks[self.index]
        if block.mark != self.mark:
            return None
        hidden = block(args[0] if args else kwargs["hidden_states"], *look.keys_values[self.index], look)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
