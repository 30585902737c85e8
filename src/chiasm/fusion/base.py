"""What generative fusions share: the parts, the way from pictures to visual tokens, and the loss.

The language model itself is untouched: its embeddings, layers and head are the ones that were loaded, and on text alone
it computes exactly what it computed before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from chiasm.connectors import Connector, build_connector
from chiasm.fusion.config import ChiasmConfig
from chiasm.fusion.generation_inputs import PictureGenerationMixin, begun
from chiasm.fusion.part_dtypes import PartDtypes, set_config_dtypes
from chiasm.language.adapter import accepts, build_language, embedding_width, logits_at, vocabulary
from chiasm.language.next_token import next_token_loss, supervised_positions
from chiasm.language.released import require_trainable
from chiasm.positions import grid as grid_positions
from chiasm.positions.regions import region_order
from chiasm.vision.encoder import VisionEncoder, VisionFeatures


@dataclass
class FusionOutput(CausalLMOutputWithPast):
    """A causal language model's output, with the visual tokens `(images, T, D_l)` that it has seen; those of each
    picture where pictures have their own T."""

    hidden_states: tuple[Tensor | None, ...] | None = None  # None where only some layers' are asked for
    visual_tokens: Tensor | tuple[Tensor, ...] | None = None

    @property
    def image_outputs(self) -> BaseModelOutputWithPooling:
        """The same under the name that transformers' image-text models have for it."""
        return BaseModelOutputWithPooling(pooler_output=self.visual_tokens)

    @property
    def image_hidden_states(self) -> Tensor | tuple[Tensor, ...] | None:
        """The name that transformers' models have for the visual tokens."""
        return self.visual_tokens


class FusionModel(PartDtypes, PictureGenerationMixin):
    """A vision encoder, a connector and a language model; parameters are named after the parts."""

    vision: Any
    """What turns pictures into features; unified fusion has an image input of its own instead."""
    config_class = ChiasmConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("cache",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ChiasmConfig, vision: Any = None, language: PreTrainedModel | None = None) -> None:
        """Parts that are not given are built from the configuration with fresh weights."""
        super().__init__(config)
        set_config_dtypes(config)
        self.build_parts(config, vision, language)

    def build_parts(self, config: ChiasmConfig, vision: Any, language: PreTrainedModel | None) -> None:
        """Takes the given parts and makes the others."""
        features = VisionFeatures.from_dict(config.features)
        self.vision = vision or VisionEncoder.from_config(config.vision_config, features)
        self.language = language or build_language(config.text_config)
        config.vision_config, config.text_config = self.vision.model.config, self.language.config
        self.connector = self.new_connector()
        self.token_order = self._token_order()
        masked = self.connector.takes_mask and config.patch_positions == "none"
        if features.resolution == "native" and not masked:
            raise ValueError(
                "features with resolution 'native' need a connector that takes a mask, such as idefics2_resampler, "
                f"and patch_positions 'none', got {config.connector['name']!r} and {config.patch_positions!r}"
            )

    def train(self, mode: bool = True) -> "FusionModel":
        """Training mode, for a model that can be trained; of another one nothing changes."""
        if mode:
            require_trainable(self)
        super().train(mode)
        return self

    def new_connector(self) -> Connector:
        """A connector between the two parts, with fresh weights."""
        width = self.vision.width + (grid_positions.WIDTH if self.config.patch_positions == "grid" else 0)
        language_width, seen = embedding_width(self.language), (self.vision.grid, self.vision.num_prefix)
        return build_connector(self.config.connector, width, language_width, *seen)

    def new_parts(self) -> dict[str, Callable[[], nn.Module]]:
        return {"connector": self.new_connector}

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language.set_output_embeddings(value)

    @property
    def reads_instruction(self) -> bool:
        """Whether the connector takes each picture's instruction."""
        return self.connector.reads_instruction

    def word_embeddings(
        self,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
        placeholders: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "B S D_l"]:
        """Embeddings of the text; a placeholder's id may lie beyond the table, so that it reads as the first word."""
        if inputs_embeds is not None:
            return inputs_embeds
        return self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))  # type: ignore[union-attr]

    def placeholders(
        self, input_ids: Int[Tensor, "B S"] | None, inputs_embeds: Float[Tensor, "B S D_l"] | None
    ) -> Bool[Tensor, "B S"]:
        """Where pictures stand in the text.

        Raises:
            ValueError: not exactly one of the two is given.
        """
        return self.places(self.config.image_token_id, input_ids, inputs_embeds)

    def places(
        self,
        token: int | None,
        input_ids: Int[Tensor, "B S"] | None,
        inputs_embeds: Float[Tensor, "B S D_l"] | None,
    ) -> Bool[Tensor, "B S"]:
        """Where a token stands in the text; in embeddings, where its own stands.

        Raises:
            ValueError: not exactly one of the two is given.
        """
        if input_ids is not None and inputs_embeds is None:
            return torch.zeros_like(input_ids, dtype=torch.bool) if token is None else input_ids == token
        if input_ids is not None or inputs_embeds is None:
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if token is None or token >= vocabulary(self.language):
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        own = self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == own).all(dim=-1)

    def encode_images(
        self, pixel_values: Float[Tensor, "images 3 height width"], pixel_attention_mask: Tensor | None = None
    ) -> Float[Tensor, "images N D_v"]:
        """Patch features of pictures: what a feature cache keeps."""
        return self.vision(pixel_values, pixel_attention_mask)

    def connect_features(
        self, features: Float[Tensor, "images N D_v"], **more: Tensor | None
    ) -> Float[Tensor, "images T D_l"]:
        """Visual tokens of patch features; some connectors also take each picture's instruction or patch mask."""
        tokens = self.connector(self.with_positions(features.to(self.connector.dtype or features.dtype)), **more)
        return tokens if self.token_order is None else tokens[:, self.token_order]

    def _token_order(self) -> list[int] | None:
        """Where the connector's tokens stand in the sequence; None leaves them as they come."""
        if self.config.regions is None:
            return None
        if (grid := self.connector.token_grid) is None:
            raise ValueError(
                f"regions need a connector whose visual tokens form a grid, got {self.config.connector['name']!r}; "
                "remove regions, or take mlp, linear or a pooling connector"
            )
        return region_order(grid, tuple(self.config.regions))

    def with_positions(self, features: Float[Tensor, "images N D_v"]) -> Float[Tensor, "images N D_p"]:
        """Patch features as the connector receives them: with coordinates where the configuration asks for them."""
        if self.config.patch_positions == "none":
            return features
        return grid_positions.append_grid_positions(features, self.vision.grid, self.config.feature_scale)

    def visual_tokens(
        self,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images N D_v"] | None = None,
        instruction_ids: Int[Tensor, "images L"] | None = None,
        instruction_mask: Int[Tensor, "images L"] | None = None,
        qformer_input_ids: Int[Tensor, "images L"] | None = None,
        qformer_attention_mask: Int[Tensor, "images L"] | None = None,
        pixel_attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "images T D_l"] | None:
        """Visual tokens of pictures or of their encoded features; None without either.

        Args:
            qformer_input_ids, qformer_attention_mask: InstructBLIP's names of the instruction and its mask.
        """
        more: dict[str, Tensor | None] = {}
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values, pixel_attention_mask)
        if image_features is None:
            return None
        if self.connector.takes_mask and (patches := self.vision.patch_mask(pixel_attention_mask)) is not None:
            more["patch_mask"] = patches.flatten(1)
        if self.connector.reads_instruction:
            more["instruction_ids"] = qformer_input_ids if instruction_ids is None else instruction_ids
            more["instruction_mask"] = qformer_attention_mask if instruction_mask is None else instruction_mask
        return self.connect_features(image_features, **more)

    def blank_picture(self, like: Tensor) -> Float[Tensor, "1 T D_l"]:
        """Visual tokens of a blank picture: what a training batch without pictures sends through the connector with
        weight zero, so that every process of a distributed run has a gradient for the same parameters."""
        if self.training and any(parameter.requires_grad for parameter in self.vision.parameters()):
            height, width = self.vision.image_size
            features = self.encode_images(torch.zeros(1, 3, height, width, device=like.device, dtype=self.dtype))
        else:
            features = torch.zeros(1, self.vision.num_patches, self.vision.width, device=like.device, dtype=like.dtype)
        hidden = torch.zeros(1, 1, dtype=torch.long, device=like.device)
        instruction = {"instruction_ids": hidden, "instruction_mask": hidden}
        return self.connect_features(features, **instruction if self.connector.reads_instruction else {})

    def predict(
        self,
        inputs_embeds: Float[Tensor, "B S D_l"],
        attention_mask: Tensor | dict | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        labels: Int[Tensor, "B S"] | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
        return_logits: bool | None,
        *,
        shift_labels: Int[Tensor, "B S"] | None = None,
        whole_vocabulary: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        """The language model's logits, and the loss where labels are given: fields of a `FusionOutput`.

        With labels, logits of the whole sequence are made in evaluation mode and not in training mode, where only
        supervised positions meet the head; `return_logits` asks for one or the other.

        Args:
            shift_labels: in place of the labels, moved to the left by one already.
            whole_vocabulary: whether logits are shown that are hidden from text.
            more: inputs of the language model.
        """
        supervised = None if labels is None else supervised_positions(labels, shift_labels)
        told = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs = self.language_inputs(more | told, cache)
        if supervised is not None and not (return_logits if return_logits is not None else not self.training):
            inputs.pop("use_cache", None)
            rows, columns, targets = supervised
            logits = self.shown(logits_at(self.language, inputs, rows, columns, self.config.direct_head), True)
            return {"loss": next_token_loss(logits, targets, num_items_in_batch, self.z_loss)}
        if accepts(self.language, "logits_to_keep"):
            inputs["logits_to_keep"] = logits_to_keep
        output = self.language(**inputs, cache=cache, return_dict=True)
        logits = self.shown(output.logits, whole_vocabulary or supervised is not None)
        loss = None
        if supervised is not None:
            rows, columns, targets = supervised
            loss = next_token_loss(logits[rows, columns], targets, num_items_in_batch, self.z_loss)
        fields = ("cache", "hidden_states", "attentions")
        return {"loss": loss, "logits": logits} | {name: getattr(output, name) for name in fields}

    def language_inputs(self, inputs: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
        """What the language model is told; positions count real tokens only, so that left padding changes nothing."""
        positions, mask = inputs["position_ids"], inputs["attention_mask"]
        if positions is None and isinstance(mask, Tensor) and mask.ndim == 2 and not begun(cache):
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return inputs | {"position_ids": positions}

    def shown(self, logits: Float[Tensor, "... V"], learns: bool) -> Float[Tensor, "... V"]:
        """Logits as the caller gets them; `learns` where the loss, or drawing, reads them."""
        return logits

    @property
    def z_loss(self) -> float:
        """Weight of the penalty on large logits."""
        return 0.0
