"""What `transformers.generate` must know about pictures: how beams repeat them, and that a placeholder is no word."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

PICTURE_INPUTS = (
    "pixel_values",
    "pixel_attention_mask",
    "image_sizes",
    "image_features",
    "instruction_ids",
    "instruction_mask",
    "qformer_input_ids",
    "qformer_attention_mask",
)
"""Inputs with one row for each picture, which beams repeat by the pictures of a conversation."""

READ_ONCE = (*PICTURE_INPUTS, "pixel_values_videos")
"""Inputs that a cache makes needless."""


def begun(cache: Cache | None) -> bool:
    """Whether a cache holds tokens already."""
    return cache is not None and cache.get_seq_length() > 0


def expand_images(images: Tensor, counts: list[int], times: int) -> Tensor:
    """Pictures of each row, `counts` of them, repeated `times` as a group: rows [A B] [C] twice → A B A B C C."""
    groups = torch.split(images, counts)
    return torch.cat([group for group in groups for _ in range(times)])


def pictures_of_rows(places: list[int], lengths: Sequence[int]) -> list[int]:
    """How many pictures each row has, by its placeholders and those of each picture.

    Raises:
        ValueError: they are not as many.
    """
    borders, ends = (list(accumulate(counts, initial=0)) for counts in (places, lengths))
    if borders[-1] != ends[-1] or not set(borders) <= set(ends):
        raise ValueError(
            f"the rows hold {', '.join(map(str, places))} image placeholders but {len(lengths)} image(s) give "
            f"{', '.join(map(str, lengths))} visual tokens; build the inputs with the model's processor"
        )
    return [ends.index(stop) - ends.index(start) for start, stop in pairwise(borders)]


class _TextOnly(LogitsProcessorList):
    """Applies a list of processors to the text alone."""

    def __init__(self, processors: LogitsProcessorList, image_token_id: int) -> None:
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(self, input_ids: Int[Tensor, "B S"], scores: Tensor, **kwargs: Any) -> Tensor:
        """A placeholder counts as the row's last text token, which is in the row anyway."""
        return super().__call__(
            torch.where(input_ids == self.image_token_id, input_ids[:, -1:], input_ids), scores, **kwargs
        )


def without_placeholders(processors: LogitsProcessorList, image_token_id: int) -> LogitsProcessorList:
    """The same processors, which then see no placeholder."""
    return _TextOnly(processors, image_token_id) if processors else processors


class PictureGenerationMixin(GenerationMixin):
    """`generate` of a model that finds its `placeholders` in a text, `num_image_tokens` for every picture.

    Classes that can be built name `GenerationMixin` as a base too: transformers' own checks look for it there.
    """

    @property
    def num_image_tokens(self) -> int:
        """Placeholders that one picture takes in the sequence."""
        raise NotImplementedError

    def picture_lengths(self, inputs: Mapping[str, Any], pictures: int) -> list[int]:
        """Placeholders of each of so many pictures.

        Args:
            inputs: what is known of the pictures, by the names of the forward's arguments.
        """
        return [self.num_image_tokens] * pictures

    def placeholders(
        self, input_ids: Int[Tensor, "B S"] | None, inputs_embeds: Float[Tensor, "B S D_l"] | None
    ) -> Bool[Tensor, "B S"]:
        raise NotImplementedError

    @property
    def picture_marks(self) -> list[int]:
        """Tokens that tell where pictures stand."""
        return [self.config.image_token_id]

    @staticmethod
    def prompt(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What tells where pictures stand: a prompt's tokens, also those beside embeddings, or embeddings alone."""
        told = inputs_embeds is None or (input_ids is not None and input_ids.shape[1] == inputs_embeds.shape[1])
        return (input_ids, None) if told else (None, inputs_embeds)

    def _marked(self, input_ids: Int[Tensor, "B S"], inputs_embeds: Float[Tensor, "B S D_l"]) -> Tensor:
        """Embeddings whose pictures stand where the tokens beside them say so."""
        if input_ids.shape[1] != inputs_embeds.shape[1]:
            return inputs_embeds
        table: Any = self.get_input_embeddings()
        marks = [mark for mark in self.picture_marks if mark < table.weight.shape[0]]
        places = torch.isin(input_ids, input_ids.new_tensor(marks))
        return torch.where(places[..., None], table(input_ids.masked_fill(~places, 0)), inputs_embeds)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Pictures are read once: afterwards the cache holds them, also where a prompt goes on from one that holds them
        all. An assistant is not told of its first step."""
        cache = kwargs.get("cache")
        started = begun(cache)
        if inputs_embeds is not None and is_first_iteration:
            inputs_embeds = self._marked(input_ids, inputs_embeds)
        if use_cache and started:
            new = -(kwargs.get("next_sequence_length") or 0)
            if not is_first_iteration or not self.placeholders(*self.prompt(input_ids, inputs_embeds))[:, new:].any():
                kwargs = {name: value for name, value in kwargs.items() if name not in READ_ONCE}
        is_first_iteration = is_first_iteration or not started
        return super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )

    def picture_prompts(self, count: int) -> Int[Tensor, "B S"]:
        """The shortest prompt of a picture, `count` times: its placeholders and the beginning of text."""
        begin = self.config.text_config.bos_token_id
        prompt = [self.config.image_token_id] * self.num_image_tokens + ([] if begin is None else [begin])
        return torch.tensor([prompt] * count, device=self.device)

    def _maybe_initialize_input_ids_for_generation(
        self, inputs: Tensor | None, bos_token_id: Tensor | int | None, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Pictures without text are prompts of their own; rows of embeddings are counted, and not their pictures."""
        pictures = next((model_kwargs[name] for name in PICTURE_INPUTS[:2] if name in model_kwargs), None)
        if "inputs_embeds" in model_kwargs:
            model_kwargs = {"inputs_embeds": model_kwargs["inputs_embeds"]} | model_kwargs
        elif inputs is None and pictures is not None:
            return self.picture_prompts(len(pictures))
        return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams and several answers repeat a row's pictures together, in the row's own order."""
        pixels = kwargs.get("pixel_values")
        in_rows = pixels is not None and pixels.ndim == 5 and kwargs.get("image_sizes") is None
        by_row = ("pixel_values", "pixel_attention_mask") if in_rows else ()
        names = [name for name in PICTURE_INPUTS if name not in by_row and kwargs.get(name) is not None]
        pictures = {name: kwargs.pop(name) for name in names}
        expanded = {}
        if pictures:
            placeholders = self.placeholders(*self.prompt(input_ids, kwargs.get("inputs_embeds")))
            lengths = self.picture_lengths(pictures, len(next(iter(pictures.values()))))
            counts = pictures_of_rows(placeholders.sum(dim=1).tolist(), lengths)
            expanded = {name: expand_images(tensor, counts, expand_size) for name, tensor in pictures.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | expanded

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """The placeholder is never chosen, and processors that look tokens up in the scores never meet its id."""
        processors = super()._get_logits_processor(*args, **kwargs)
        token = self.config.image_token_id
        if token < self.config.get_text_config().vocab_size:
            processors.append(SuppressTokensLogitsProcessor([token], device=self.device))
        return without_placeholders(processors, token)
