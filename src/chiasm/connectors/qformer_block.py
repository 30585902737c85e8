"""A layer of a Q-Former: BERT's (arXiv 1810.04805), with cross-attention and a feed-forward for the queries."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chiasm.connectors.attention import attend, split_heads

Weights = Float[Tensor, "B H K N"]


class Block(nn.Module):
    """One layer: everyone's self-attention, the queries' cross-attention, and a feed-forward for each kind."""

    def __init__(
        self, width: int, heads: int, inner: int, vision_width: int | None, has_text: bool, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, width, eps, dropout)
        self.cross_attention = Attention(width, heads, vision_width, eps, dropout) if vision_width else None
        self.query_feed_forward = FeedForward(width, inner, eps, dropout)
        self.text_feed_forward = FeedForward(width, inner, eps, dropout) if has_text else None

    def flops(self, queries: int, patches: int) -> int:
        attends = self.self_attention.flops(queries, queries)
        if self.cross_attention is not None:
            attends += self.cross_attention.flops(queries, patches)
        return attends + 4 * queries * self.query_feed_forward.up.weight.numel()

    def forward(
        self,
        hidden: Float[Tensor, "B S W"],
        num_queries: int,
        mask: Bool[Tensor, "#B #S S"] | None,
        features: Float[Tensor, "B N D_v"] | None,
    ) -> tuple[Float[Tensor, "B S W"], Weights | None]:
        hidden, _ = self.self_attention(hidden, hidden, mask)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        weights = None
        if num_queries:
            if self.cross_attention is not None:
                queries, weights = self.cross_attention(queries, features)
            queries = self.query_feed_forward(queries)
        if self.text_feed_forward is not None and text.shape[1]:
            text = self.text_feed_forward(text)
        return torch.cat([queries, text], dim=1), weights


class Attention(nn.Module):
    """Multi-head attention with its residual and the norm after it."""

    def __init__(self, width: int, heads: int, context_width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=eps)

    def flops(self, readers: int, context: int) -> int:
        """Four projections and two products of every pair."""
        width, context_width = self.query.in_features, self.key.in_features
        return 4 * width * (readers * width + context * context_width + readers * context)

    def forward(
        self,
        hidden: Float[Tensor, "B Q W"],
        context: Float[Tensor, "B C D"],
        mask: Bool[Tensor, "#B #Q C"] | None = None,
    ) -> tuple[Float[Tensor, "B Q W"], Float[Tensor, "B H Q C"]]:
        query = split_heads(self.query(hidden), self.heads)
        key, value = split_heads(self.key(context), self.heads), split_heads(self.value(context), self.heads)
        read, weights = attend(query, key, value, None if mask is None else mask[:, None])
        return self.norm(hidden + self.dropout(self.output(read.transpose(1, 2).flatten(2)))), weights


class FeedForward(nn.Module):
    """Linear – GELU – Linear with its residual and the norm after it."""

    def __init__(self, width: int, inner: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        inner = nn.functional.gelu(self.up(hidden))
        return self.norm(hidden + self.dropout(self.down(inner)))
