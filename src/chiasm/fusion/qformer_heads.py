"""A Q-Former with its text branch and what only BLIP-2's first stage needs (arXiv 2301.12597): projections into a space
that pictures and texts share, a matching head, a language-modelling head, and a temperature."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chiasm.connectors.base import Grid
from chiasm.connectors.qformer import QFormer

TEMPERATURE = 0.07


class RetrievalQFormer(QFormer):
    """A Q-Former whose output is compared with text instead of read by a language model."""

    def __init__(self, vision_width: int, space: int, grid: Grid, *, generation: bool = True, **options: Any) -> None:
        """
        Args:
            space: width of the shared space.
            generation: whether the text branch has a language-modelling head and a [DEC] token.
            options: those of `QFormer`; a vocabulary is a must.
        """
        super().__init__(vision_width, space, grid, **options)
        if self.words is None:
            raise ValueError("a retrieval Q-Former needs a text branch; pass vocabulary=<tokens>")
        vocabulary, width = self.words.weight.shape
        del self.proj
        self.image_projection, self.text_projection = nn.Linear(width, space), nn.Linear(width, space)
        self.matching_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        self.language_head = LanguageHead(width, vocabulary) if generation else None
        if generation:
            self.words = WordsAndDecoder(vocabulary, width)
        for module in (self.words, self.image_projection, self.text_projection, self.matching_head, self.language_head):
            if module is not None:
                module.apply(_initialise)

    @property
    def output(self) -> nn.Linear:
        return self.image_projection

    @property
    def decoder_token_id(self) -> int:
        """The [DEC] token: one beyond the vocabulary."""
        if self.words is None or self.language_head is None:
            raise ValueError("this Q-Former has no language-modelling head; build it with generation=True")
        return self.words.num_embeddings

    def flops(self) -> int:
        """Of a picture without a text."""
        projection = 2 * self.num_tokens * self.image_projection.weight.numel()
        return projection + sum(block.flops(self.num_tokens, self.num_features) for block in self.blocks)

    def forward(
        self,
        features: Float[Tensor, "B N D_v"],
        instruction_ids: Int[Tensor, "B L"] | None = None,
        instruction_mask: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B K P"]:
        """A vector of length 1 for every query."""
        mask = self.look_at_all(instruction_ids, instruction_mask)
        states, _ = self.encode(self.query_tokens(features), instruction_ids, mask, features)
        return F.normalize(self.image_projection(states), dim=-1)


class WordsAndDecoder(nn.Embedding):
    """A table of words that knows one token more, [DEC], which is nobody's word."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width)
        self.decoder = nn.Parameter(torch.empty(width))

    def forward(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        is_decoder = ids == self.num_embeddings
        words = super().forward(ids.masked_fill(is_decoder, 0))
        return torch.where(is_decoder[..., None], self.decoder.to(words.dtype), words)


class LanguageHead(nn.Module):
    """BERT's head (arXiv 1810.04805): a layer, then the words' own table."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Float[Tensor, "K W"], words: Float[Tensor, "V W"]) -> Float[Tensor, "K V"]:
        return F.linear(self.norm(F.gelu(self.dense(states))), words, self.bias)

    def resize(self, vocabulary: int) -> None:
        """Gives the head so many words."""
        bias, kept = self.bias.new_zeros(vocabulary), min(vocabulary, len(self.bias))
        bias[:kept] = self.bias.detach()[:kept]
        self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)


def _initialise(module: nn.Module) -> None:
    """BERT's start: normal weights of deviation 0.02 and no biases."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 2 or isinstance(module, nn.Embedding):
            nn.init.normal_(parameter, std=0.02)
        elif name == "bias":
            nn.init.zeros_(parameter)
