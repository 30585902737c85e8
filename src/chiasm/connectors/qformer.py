"""Q-Former: learned queries that talk to each other and to the picture (BLIP-2, arXiv 2301.12597), and to the
instruction if they are asked to (InstructBLIP, arXiv 2305.06500)."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chiasm.connectors.base import Connector, Grid
from chiasm.connectors.qformer_block import Block, Weights


class QFormer(Connector):
    """K queries, whatever the number of patches: self-attention in every layer, cross-attention in every second one.

    With a vocabulary there is a text branch: text shares the self-attention with the queries and has a feed-forward of
    its own. Stage 1 of BLIP-2 trains both through `encode`; `forward` needs text only as an instruction.

    Args:
        num_queries: K, the visual tokens of a picture.
        width: channels of the queries.
        depth: number of layers.
        heads: attention heads.
        cross_attention_every: layers from one cross-attention to the next, the first layer having one.
        feed_forward: inner width of the feed-forward layers, 4 × width where it is None.
        vocabulary: tokens of the text branch, None without one.
        max_positions: the longest text.
        instruction: whether the queries read the instruction; asks for a vocabulary.
        norm_features: whether patch features are normalised first, as BLIP-2 does with those of a bare encoder.
        eps: of every layer norm.
        dropout: of hidden states, 0.1 in BLIP-2.
    """

    takes_prefix = True

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        grid: Grid,
        *,
        num_queries: int = 32,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        cross_attention_every: int = 2,
        feed_forward: int | None = None,
        vocabulary: int | None = None,
        max_positions: int = 512,
        instruction: bool = False,
        norm_features: bool = True,
        eps: float = 1e-12,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vision_width, language_width, grid)
        if width % heads:
            raise ValueError(f"connector qformer has width={width}, which does not divide into heads={heads}")
        if instruction and vocabulary is None:
            raise ValueError("connector qformer has instruction=True but no vocabulary; pass vocabulary=<tokens>")
        self.instruction = instruction
        self.queries = nn.Parameter(torch.empty(1, num_queries, width))
        self.norm_features = nn.LayerNorm(vision_width) if norm_features else None
        self.words, self.positions = None, None
        if vocabulary is not None:
            self.words = nn.Embedding(vocabulary, width)
            self.positions = nn.Embedding(max_positions, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks: Any = nn.ModuleList(
            Block(
                width,
                heads,
                feed_forward or 4 * width,
                vision_width if index % cross_attention_every == 0 else None,
                has_text=vocabulary is not None and not (instruction and index == depth - 1),
                eps=eps,
                dropout=dropout,
            )
            for index in range(depth)
        )
        self.proj = nn.Linear(width, language_width)
        self.apply(_initialise)
        nn.init.normal_(self.queries, std=0.02)

    @classmethod
    def options_for(cls, tokens: int, grid: Grid) -> dict[str, Any]:
        return {"num_queries": tokens}

    @property
    def num_tokens(self) -> int:
        return self.queries.shape[1]

    @property
    def reads_instruction(self) -> bool:
        return self.instruction

    @property
    def output(self) -> nn.Linear:
        return self.proj

    def flops(self) -> int:
        """Of a picture without an instruction."""
        projection = 2 * self.num_tokens * self.proj.weight.numel()
        return projection + sum(block.flops(self.num_tokens, self.num_features) for block in self.blocks)

    def forward(
        self,
        features: Float[Tensor, "B N D_v"],
        instruction_ids: Int[Tensor, "B L"] | None = None,
        instruction_mask: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B K D_l"]:
        mask = self.look_at_all(instruction_ids, instruction_mask)
        states, _ = self.encode(self.query_tokens(features), instruction_ids, mask, features)
        return self.proj(states)

    def attention(
        self,
        features: Float[Tensor, "B N D_v"],
        instruction_ids: Int[Tensor, "B L"] | None = None,
        instruction_mask: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B K N"]:
        """Cross-attention of every query, averaged over layers and heads."""
        seen: list[Weights] = []
        mask = self.look_at_all(instruction_ids, instruction_mask)
        self.encode(self.query_tokens(features), instruction_ids, mask, features, seen)
        return torch.stack(seen).mean(dim=(0, 2))

    def query_tokens(self, features: Float[Tensor, "B N D_v"]) -> Float[Tensor, "B K W"]:
        """The learned queries, once for each picture."""
        return self.queries.expand(features.shape[0], -1, -1)

    def look_at_all(self, ids: Int[Tensor, "B L"] | None, mask: Int[Tensor, "B L"] | None) -> Tensor | None:
        """Queries and real text tokens all see each other: a mask for `encode`."""
        if ids is None or mask is None:
            return None
        return nn.functional.pad(mask.bool(), (self.num_tokens, 0), value=True)[:, None]

    def encode(
        self,
        queries: Float[Tensor, "B K W"] | None = None,
        text_ids: Int[Tensor, "B L"] | None = None,
        mask: Bool[Tensor, "#B #S S"] | None = None,
        features: Float[Tensor, "B N D_v"] | None = None,
        seen: list[Weights] | None = None,
    ) -> tuple[Float[Tensor, "B K W"], Float[Tensor, "B L W"]]:
        """Hidden states of queries and text; either may be left out, and its states are then empty.

        Args:
            queries: usually `query_tokens`.
            text_ids: tokens of the text branch.
            mask: over the sequence S of queries, then text: row i may look at column j where it is true.
            features: patch features, which the queries read.
            seen: a list that receives the weights of every cross-attention.
        """
        if queries is not None and features is None:
            raise ValueError("the queries have no picture to read; pass features")
        parts = [queries] if queries is not None else []
        if text_ids is not None:
            parts.append(self._embed(text_ids))
        count = 0 if queries is None else queries.shape[1]
        hidden = self.dropout(self.norm(torch.cat(parts, dim=1)))
        if features is not None and self.norm_features is not None:
            features = self.norm_features(features)
        for block in self.blocks:
            hidden, weights = block(hidden, count, mask, features)
            if seen is not None and weights is not None:
                seen.append(weights)
        return hidden[:, :count], hidden[:, count:]

    def _embed(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        if self.words is None or self.positions is None:
            raise ValueError("this Q-Former has no text branch; build it with vocabulary=<tokens>")
        if ids.shape[1] > self.positions.num_embeddings:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens, the Q-Former takes {self.positions.num_embeddings}; cut it"
            )
        return self.words(ids) + self.positions.weight[: ids.shape[1]]


def _initialise(module: nn.Module) -> None:
    """BERT's start: normal weights of deviation 0.02 and no biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
