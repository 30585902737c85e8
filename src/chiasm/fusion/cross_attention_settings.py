"""The choices of gated cross-attention: what makes the block Flamingo's, Idefics' or Llama 3.2 Vision's."""

from dataclasses import dataclass
from typing import Any

from torch import nn

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
GATES = ("scalar", "vector")


@dataclass(frozen=True)
class CrossAttentionSettings:
    """What `config.cross_attention` holds.

    Args:
        layers: indices of the language model's layers that have a block in front of them.
        heads: query heads.
        kv_heads: key-value heads that they share, all of their own by default.
        head_dim: width of a head.
        feed_forward: inner width of the feed-forward.
        gated_feed_forward: SwiGLU instead of GELU.
        norm: `layer` or `rms`.
        eps: of the norms.
        qk_norm: whether queries and keys are RMS-normalised.
        visual_norm: whether visual tokens are normalised before they become keys and values.
        gate: one `scalar` for a block, or a `vector` with one gate for each channel.
        mask_attention: whether tokens that see no picture get nothing; without it they attend to all pictures of their
            row (Llama 3.2 Vision).
        mask_feed_forward: whether the feed-forward, too, leaves tokens alone that see no picture (not so in Idefics).
        image_embedding: whether the placeholder reads as a vector of its own, or as its row of the embedding table.
        end_of_text: a token behind which nothing is seen until the next picture (Idefics).
    """

    layers: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    gated_feed_forward: bool = False
    norm: str = "layer"
    eps: float = 1e-5
    qk_norm: bool = False
    visual_norm: bool = True
    gate: str = "scalar"
    mask_attention: bool = True
    mask_feed_forward: bool = True
    image_embedding: bool = True
    end_of_text: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (("norm", self.norm, tuple(NORMS)), ("gate", self.gate, GATES)):
            if value not in choices:
                raise ValueError(f"cross_attention {name} {value!r} is unknown; choose one of {', '.join(choices)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"cross_attention has {self.heads} heads, which {self.kv_heads} kv_heads do not divide")


def cross_attention_settings(
    wanted: dict[str, Any] | None, num_layers: int, language_width: int
) -> CrossAttentionSettings:
    """Full settings from a user's: by default Flamingo's heads and feed-forward in front of every fourth layer.

    Args:
        wanted: fields of `CrossAttentionSettings`, or `every`: a block in front of layer i where i + 1 is a multiple.

    Raises:
        ValueError: an unknown key, or a layer that is not there.
    """
    given = dict(wanted or {})
    known = ("every", *CrossAttentionSettings.__dataclass_fields__)
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"cross_attention has no option {unknown[0]!r}; its options are: {', '.join(known)}")
    if "every" in given and "layers" in given:
        raise ValueError("cross_attention: every and layers contradict each other; give one of them")
    every = given.pop("every", min(4, num_layers))
    if not isinstance(every, int) or not 1 <= every <= num_layers:
        raise ValueError(f"cross_attention: every={every!r}, expected 1 to {num_layers}, the language model's layers")
    layers = [int(layer) for layer in given.pop("layers", range(every - 1, num_layers, every))]
    if not layers or sorted(set(layers) & set(range(num_layers))) != layers:
        raise ValueError(f"cross_attention: layers={layers}, expected ascending indices from 0 to {num_layers - 1}")
    heads = given.pop("heads", 8)
    defaults = {"kv_heads": heads, "head_dim": 64, "feed_forward": 4 * language_width}
    return CrossAttentionSettings(layers=layers, heads=heads, **(defaults | given))
