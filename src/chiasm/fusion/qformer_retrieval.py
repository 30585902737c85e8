"""A Q-Former with its text branch as an image-text retrieval model: stage 1 of BLIP-2 (arXiv 2301.12597).

A picture is scored against a text in two ways: by the cosine of its nearest query (contrastive: one vector for each
text, so whole collections can be compared), and by a head that reads both together (matching: slower, more exact).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from chiasm.connectors.qformer import QFormer
from chiasm.fusion.adapters import inject_adapters
from chiasm.fusion.base import FusionModel
from chiasm.fusion.part_dtypes import PartDtypes, cast_parts, set_config_dtypes
from chiasm.fusion.qformer_heads import RetrievalQFormer
from chiasm.fusion.retrieval_config import QFormerRetrievalConfig
from chiasm.positions import grid as grid_positions
from chiasm.vision.encoder import VisionEncoder, VisionFeatures


@dataclass
class RetrievalOutput(ModelOutput):
    """Scores of pictures and texts: cosines `(images, texts)`, or the logits of "no match, match" `(pairs, 2)`."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class QFormerRetrieval(PartDtypes):
    """A vision encoder and a Q-Former that scores pictures and texts; parameters are named after the two parts."""

    config_class = QFormerRetrievalConfig
    config: QFormerRetrievalConfig
    main_input_name = "input_ids"
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: QFormerRetrievalConfig, vision: VisionEncoder | None = None) -> None:
        """An encoder that is not given is built from the configuration with fresh weights."""
        super().__init__(config)
        set_config_dtypes(config)
        self.vision = vision or VisionEncoder.from_config(
            config.vision_config, VisionFeatures.from_dict(config.features)
        )
        self.connector = self.new_connector()
        self.connector.num_prefix = self.vision.num_prefix
        inject_adapters(self)
        cast_parts(self)
        self.post_init()

    def new_connector(self) -> RetrievalQFormer:
        """A Q-Former for the encoder, with fresh weights."""
        config = self.config
        width = self.vision.width + (grid_positions.WIDTH if config.patch_positions == "grid" else 0)
        options = {name: value for name, value in config.connector.items() if name != "name"}
        return RetrievalQFormer(width, config.space, self.vision.grid, generation=config.generation, **options)

    def new_parts(self) -> dict[str, Any]:
        return {"connector": self.new_connector}

    def get_input_embeddings(self) -> nn.Module | None:
        return self.connector.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another table of as many words, whose [DEC] token stays where the table has none.

        Raises:
            ValueError: it has another size, which the language-modelling head and the configuration would not have.
        """
        words: Any = self.connector.words
        if not isinstance(value, nn.Embedding) or value.weight.shape != words.weight.shape:
            found = tuple(value.weight.shape) if isinstance(value, nn.Embedding) else type(value).__name__
            raise ValueError(
                f"the text branch reads a table of words of {tuple(words.weight.shape)}, got {found}; "
                "another vocabulary is chosen when the model is built"
            )
        if hasattr(words, "decoder") and not hasattr(value, "decoder"):
            words.weight = value.weight
        else:
            self.connector.words = value

    def get_output_embeddings(self) -> None:
        return None

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """More words or fewer, and as many biases of the language-modelling head; those of new words are 0."""
        words = super().resize_token_embeddings(*args, **kwargs)
        if self.connector.language_head is not None:
            self.connector.language_head.resize(words.num_embeddings)
        return words

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """What similarities are divided by, kept from zero."""
        return self.connector.temperature.clamp(1e-3, 0.5)

    def encode_images(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images N D_v"]:
        """Patch features of pictures: what a feature cache keeps."""
        return self.vision(pixel_values)

    def patches(
        self,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images N D_v"] | None = None,
    ) -> Float[Tensor, "images N D_p"]:
        """Pictures, or their encoded features, as the Q-Former reads them."""
        if (pixel_values is None) == (image_features is None):
            raise ValueError("pass exactly one of pixel_values and image_features")
        features: Any = image_features if pixel_values is None else self.encode_images(pixel_values)
        features = features.to(self.connector.dtype)
        if self.config.patch_positions == "none":
            return features
        return grid_positions.append_grid_positions(features, self.vision.grid, self.config.feature_scale)

    def embed_images(self, patches: Float[Tensor, "images N D_p"]) -> Float[Tensor, "images K P"]:
        """A vector of length 1 for every query of every picture."""
        return self.connector(patches)

    def embed_texts(
        self, input_ids: Int[Tensor, "texts L"], attention_mask: Int[Tensor, "texts L"] | None = None
    ) -> Float[Tensor, "texts P"]:
        """A vector of length 1 for every text: that of its first token."""
        mask = None if attention_mask is None else attention_mask.bool()[:, None]
        _, states = self.connector.encode(text_ids=input_ids, mask=mask)
        return F.normalize(self.connector.text_projection(states[:, 0]), dim=-1)

    @staticmethod
    def similarity(
        images: Float[Tensor, "images K P"], texts: Float[Tensor, "texts P"]
    ) -> Float[Tensor, "images texts"]:
        """The cosine of every picture's nearest query and every text."""
        return query_similarity(images, texts)

    def match(
        self,
        patches: Float[Tensor, "pairs N D_p"],
        input_ids: Int[Tensor, "pairs L"],
        attention_mask: Int[Tensor, "pairs L"] | None = None,
    ) -> Float[Tensor, "pairs 2"]:
        """Logits of "no match, match" for pairs of a picture and a text, averaged over the queries."""
        connector = self.connector
        mask = connector.look_at_all(input_ids, attention_mask)
        states, _ = connector.encode(connector.query_tokens(patches), input_ids, mask, patches)
        return connector.matching_head(states).mean(dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "texts L"],
        attention_mask: Int[Tensor, "texts L"] | None = None,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images N D_v"] | None = None,
        use_image_text_matching_head: bool = False,
        **_: Any,
    ) -> RetrievalOutput:
        """Scores of all pictures against all texts, or of pairs.

        Args:
            input_ids: texts in the text branch's own tokens.
            image_features: encoded pictures instead of pixels, as `encode_images` returns them.
            use_image_text_matching_head: read each picture together with the text of the same row.
        """
        patches = self.patches(pixel_values, image_features)
        if use_image_text_matching_head:
            logits = self.match(patches, input_ids, attention_mask)
            return RetrievalOutput(logits_per_image=logits, logits_per_text=logits.T)
        images, texts = self.embed_images(patches), self.embed_texts(input_ids, attention_mask)
        scores = query_similarity(images, texts)
        return RetrievalOutput(scores, scores.T, images, texts)


def query_similarity(
    images: Float[Tensor, "images K P"], texts: Float[Tensor, "texts P"]
) -> Float[Tensor, "images texts"]:
    """Of every picture and every text: the cosine of the picture's nearest query."""
    return torch.einsum("ikp,tp->itk", images, texts).amax(dim=-1)


def build_retrieval(
    model: FusionModel, vocabulary: int, space: int = 256, prepare: Callable[[QFormer], None] | None = None
) -> QFormerRetrieval:
    """A retrieval model that shares the encoder and every weight of its Q-Former with a generative model.

    The two have the same tensors under the same names: what one learns, the other knows. What the generative model
    lacks (heads, and the text branch if it reads no instruction) is new, and its text feed-forward layers start as the
    queries' own, as both started from BERT in the paper.

    Args:
        vocabulary: tokens of the text branch.
        prepare: gives the new connector its first weights, before the shared ones take their places.

    Raises:
        ValueError: the connector is no Q-Former, or its text branch has another vocabulary.
    """
    theirs = model.connector
    if not isinstance(theirs, QFormer):
        name = model.config.connector["name"]
        raise ValueError(
            f"captions are learned by two towers or by a Q-Former, this model has the connector {name!r}; connect one "
            "with fusion='late' or with connector='qformer'"
        )
    if theirs.words is not None and theirs.words.num_embeddings != vocabulary:
        raise ValueError(
            f"the Q-Former's text branch has {theirs.words.num_embeddings} tokens, the captions' tokenizer "
            f"{vocabulary}; they must be of one kind"
        )
    config = QFormerRetrievalConfig(
        vision_config=model.vision.model.config.to_dict(),
        features=model.vision.features.to_dict(),
        patch_positions=model.config.patch_positions,
        feature_scale=model.config.feature_scale,
        connector={**model.config.connector, "vocabulary": vocabulary, "instruction": False},
        space=space,
        dtype=theirs.dtype,
    )
    made = QFormerRetrieval(config, vision=model.vision)
    for block in made.connector.blocks:
        block.text_feed_forward.load_state_dict(block.query_feed_forward.state_dict())
    if prepare is not None:
        prepare(made.connector)
    made.connector.to(device=model.device, dtype=theirs.dtype)
    share_parameters(made.connector, theirs)
    return made.eval()


def share_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Every parameter that `theirs` has under a name of `ours` takes its place there.

    Raises:
        ValueError: a shape differs.
    """
    known = dict(theirs.named_parameters())
    for name, parameter in list(ours.named_parameters()):
        if name in known:
            if known[name].shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(known[name].shape)}, expected {tuple(parameter.shape)}")
            owner, _, leaf = name.rpartition(".")
            setattr(ours.get_submodule(owner), leaf, known[name])


@torch.no_grad()
def take_own_weights(ours: QFormerRetrieval, earlier: QFormerRetrieval, shared: nn.Module) -> None:
    """Copies the text branch and the heads of an earlier retrieval model: what `shared`, the generative model's
    connector, does not have."""
    names = {name for name, _ in shared.named_parameters()}
    for name, parameter in ours.connector.named_parameters():
        if name not in names:
            parameter.copy_(earlier.connector.get_parameter(name))
