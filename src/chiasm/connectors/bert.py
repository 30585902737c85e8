"""A Q-Former starts from a BERT-shaped encoder, as in BLIP-2 (arXiv 2301.12597): queries get a copy of the feed-forward
layers, cross-attention is new."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from chiasm.connectors.qformer import QFormer
from chiasm.connectors.qformer_block import Attention, FeedForward

FIRST_POSITION = {"bert": 0, "camembert": 2, "roberta": 2, "xlm-roberta": 2}
"""Model types of BERT's shape → the row of the position table that a text's first token has."""


def load_bert(source: str) -> PreTrainedModel:
    """A BERT-shaped encoder of a folder or hub id.

    Raises:
        ValueError: it has another shape.
    """
    bert = AutoModel.from_pretrained(source, dtype=torch.float32)
    if bert.config.model_type not in FIRST_POSITION:
        raise ValueError(
            f"init_from: {source} is a {bert.config.model_type!r} model; a Q-Former starts from one of "
            f"{', '.join(FIRST_POSITION)}"
        )
    return bert


def qformer_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """Options of a Q-Former that a BERT-shaped encoder fits into."""
    return {
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "feed_forward": config.intermediate_size,
        "max_positions": config.max_position_embeddings - FIRST_POSITION[config.model_type],
        "eps": config.layer_norm_eps,
    }


@torch.no_grad()
def initialise_from_bert(qformer: QFormer, bert: PreTrainedModel) -> None:
    """Copies everything that both have. Words and positions are copied as far as the smaller table goes.

    Raises:
        ValueError: the sizes differ.
    """
    layers: Any = bert.encoder.layer
    ours = {
        "width": qformer.queries.shape[-1],
        "heads": qformer.blocks[0].self_attention.heads,
        "feed_forward": qformer.blocks[0].query_feed_forward.up.out_features,
    }
    theirs = qformer_sizes(bert.config)
    for name, size in ours.items():
        if size != theirs[name]:
            raise ValueError(f"init_from: the encoder has {name}={theirs[name]}, the Q-Former {size}; leave {name} out")
    if len(qformer.blocks) > len(layers):
        raise ValueError(f"init_from: the encoder has {len(layers)} layers, the Q-Former depth={len(qformer.blocks)}")
    qformer.norm.load_state_dict(bert.embeddings.LayerNorm.state_dict())
    for block, layer in zip(qformer.blocks, layers, strict=False):
        _copy_attention(block.self_attention, layer.attention)
        for feed_forward in (block.query_feed_forward, block.text_feed_forward):
            if feed_forward is not None:
                _copy_feed_forward(feed_forward, layer)
    if qformer.words is not None and qformer.positions is not None:
        start = FIRST_POSITION[bert.config.model_type]
        positions = bert.embeddings.position_embeddings.weight[start:] + bert.embeddings.token_type_embeddings.weight[0]
        _copy_rows(qformer.words, bert.embeddings.word_embeddings.weight)
        _copy_rows(qformer.positions, positions)


def _copy_attention(ours: Attention, theirs: Any) -> None:
    for name in ("query", "key", "value"):
        getattr(ours, name).load_state_dict(getattr(theirs.self, name).state_dict())
    ours.output.load_state_dict(theirs.output.dense.state_dict())
    ours.norm.load_state_dict(theirs.output.LayerNorm.state_dict())


def _copy_feed_forward(ours: FeedForward, theirs: Any) -> None:
    ours.up.load_state_dict(theirs.intermediate.dense.state_dict())
    ours.down.load_state_dict(theirs.output.dense.state_dict())
    ours.norm.load_state_dict(theirs.output.LayerNorm.state_dict())


def _copy_rows(table: nn.Embedding, rows: torch.Tensor) -> None:
    count = min(len(table.weight), len(rows))
    table.weight[:count] = rows[:count]
