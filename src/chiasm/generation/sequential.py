"""One answer at a time on the model as it is: a cache for each request, for any fusion and language model."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from chiasm.fusion.base import PICTURE_INPUTS, FusionModel


@dataclass
class Sequence:
    """What decoding one request has to keep.

    Args:
        inputs: what every forward gets beside its token.
        length: tokens so far, where they count in the attention mask.
    """

    inputs: dict[str, Any]
    length: int


class SequentialDecoder:
    """Prefill and steps of single requests through `model.forward`."""

    def __init__(self, model: FusionModel) -> None:
        self.model = model
        self.seq2seq = bool(model.config.is_encoder_decoder)

    def start(self, inputs: dict[str, Any]) -> tuple[Sequence, Float[Tensor, " V"]]:
        """Reads a prompt; also the logits of the first token of its answer."""
        if self.seq2seq:
            return self._start_seq2seq(inputs)
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        kept = {"cache": output.cache}
        if getattr(output, "image_cache", None) is not None:
            kept["image_cache"] = output.image_cache
        return Sequence(kept, inputs["input_ids"].shape[1]), output.logits[0, -1]

    def _start_seq2seq(self, inputs: dict[str, Any]) -> tuple[Sequence, Float[Tensor, " V"]]:
        pictures = {name: inputs[name] for name in PICTURE_INPUTS if name in inputs}
        embeddings = self.model.embed(inputs["input_ids"], None, self.model.visual_tokens(**pictures))
        language, mask = self.model.language, inputs["attention_mask"]
        encoded = language.get_encoder()(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        state = Sequence({"encoder_outputs": BaseModelOutput(encoded), "attention_mask": mask}, 0)
        return state, self.step(state, language.generation_config.decoder_start_token_id)

    def step(self, sequence: Sequence, token: int) -> Float[Tensor, " V"]:
        """Logits of the token behind this one."""
        ids = torch.tensor([[token]], device=self.model.device)
        sequence.length += 1
        if self.seq2seq:
            output = self.model.language(decoder_input_ids=ids, use_cache=True, **sequence.inputs)
            sequence.inputs["past_key_values"] = output.past_key_values
            return output.logits[0, -1]
        mask = torch.ones(1, sequence.length, dtype=torch.long, device=ids.device)
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=True, **sequence.inputs)
        if "image_cache" in sequence.inputs:
            sequence.inputs["image_cache"] = output.image_cache
        return output.logits[0, -1]
