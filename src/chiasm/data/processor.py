"""Conversations and pictures → model inputs: the chat template, the placeholders' expansion, and labels by spans."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import BatchFeature, ProcessorMixin

from chiasm.data.chat import IMAGE_TOKEN, NOTHING, Message, Told, apart, count_images, render
from chiasm.data.dealing import Dealt, check_count, deal_messages, deal_questions, deal_texts, in_groups
from chiasm.data.labels import IGNORE, last_answer, supervised
from chiasm.data.message_pictures import pictures_of
from chiasm.data.options import for_template, refuse_unknown
from chiasm.data.padding import filler, mask_rows, pad_rows
from chiasm.data.pixels import keeps_sizes, read_pixels
from chiasm.data.placeholders import (
    Placeholders,
    TiledPlaceholders,
    framed_placeholders,
    region_words,
    tiled_placeholders,
)
from chiasm.data.schema import ImageRef

OPTIONS: dict[str, Any] = {
    "add_special_tokens": False,
    "token_types": False,
    "text_is_message": False,
    "image_token": IMAGE_TOKEN,
    "image_boundary": None,
    "image_tag": None,
    "image_space": False,
    "image_tiles": 1,
    "regions": None,
    "encoder_decoder": False,
}
"""Options of a processor that are stored with it, and what they are where an older file does not name them."""


class ChiasmProcessor(ProcessorMixin):
    """Images + messages → inputs of a Chiasm model.

    Args:
        image_processor: pictures → `pixel_values`.
        tokenizer: the language model's own tokenizer; `<image>` is added to it where it is missing.
        num_image_tokens: T, placeholders per picture; the model's `num_image_tokens`.
        add_special_tokens: whether the tokenizer's own marks (a BOS) frame a conversation whose template writes none.
        token_types: whether inputs have `token_type_ids`, 0 up to the first answer and 1 from there on.
        text_is_message: whether `text` is a user's message, which the chat template completes, and which gets its
            picture's placeholder where it has none.
        image_token: the placeholder; `<image>` in messages and texts stands for a whole picture, whatever it is.
        image_boundary: a token before and after a picture's placeholders, pictures side by side sharing the one
            between; or two tokens, which open and close a picture.
        image_tag: what stands between `image_boundary`, one token, and the whole picture, where every tile has its row
            and column there (Idefics3).
        image_space: whether a space parts a picture from a word that touches it (Idefics2).
        image_tiles: pictures that the image processor makes of one, each with T placeholders; None where it cuts as
            many as suit a picture's shape (InternVL, Idefics3).
        regions: rows and columns of regions whose names ("top left") stand in front of their visual tokens.
        encoder_decoder: whether the last answer is the decoder's: labels are its tokens alone, and not the prompt's.
    """

    own_options: ClassVar[tuple[str, ...]] = ("num_image_tokens",)
    """Options that are stored beside `OPTIONS`."""

    draws = False
    """Whether pictures in answers are learned: their labels are their own placeholders."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        chat_template: str | dict[str, str] | None = None,
        add_special_tokens: bool = False,
        token_types: bool = False,
        text_is_message: bool = False,
        image_token: str = IMAGE_TOKEN,
        image_boundary: str | Sequence[str] | None = None,
        image_tag: str | None = None,
        image_space: bool = False,
        image_tiles: int | None = 1,
        regions: Sequence[int] | None = None,
        encoder_decoder: bool = False,
        **parts: Any,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {type(tokenizer).__name__} cannot tell which characters a token covers, which labels need; "
                "load the fast tokenizer of this model"
            )
        if regions is not None:
            region_words(*regions)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right" if encoder_decoder else "left"  # by which pipelines pad what is answered
        self.num_image_tokens = num_image_tokens
        self.add_special_tokens = add_special_tokens
        self.token_types = token_types
        self.text_is_message = text_is_message
        self.image_boundary = image_boundary
        self.image_tag = image_tag
        self.image_space = image_space
        self.image_tiles = image_tiles
        self.regions = None if regions is None else list(regions)
        self.encoder_decoder = encoder_decoder
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, **parts)

    @property
    def chat_template(self) -> Any:
        """The tokenizer's, which renders conversations."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        if template is not None:  # transformers begins every processor without one
            self.tokenizer.chat_template = template

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> "ChiasmProcessor":
        """A saved processor from its loaded parts and its own settings, or what is given in place of them."""
        told = processor_dict | kwargs
        parts = {name: kwargs.get(name, part) for name, part in zip(cls.get_attributes(), args, strict=True)}
        own = {name: told[name] for name in (*cls.own_options, "chat_template") if name in told}
        return cls(**parts, **own, **{name: told.get(name, default) for name, default in OPTIONS.items()})

    def to_dict(self) -> dict[str, Any]:
        """What is stored: all options, also those that a subclass only passes on."""
        return super().to_dict() | {name: getattr(self, name) for name in OPTIONS}

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        messages: Any = None,
        padding_side: str = "left",
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for a batch.

        Args:
            images: the batch's pictures in the order of their placeholders; flat, or one list for each conversation.
            text: rendered prompts with one `<image>` for each picture, or
            messages: one conversation, or a batch of them.
            padding_side: `left` to generate from the prompts, `right` to train on them.
        """
        refuse_unknown(kwargs)
        if (text is None) == (messages is None):
            raise ValueError("pass exactly one of text and messages")
        if text is None:
            dealt = deal_messages(images, messages)
        else:
            given = [text] if isinstance(text, str) else text
            texts = [one.replace(self.image_token, IMAGE_TOKEN) for one in given]
            dealt = deal_questions(images, texts) if self.text_is_message else deal_texts(images, texts)
        return self._inputs(dealt, padding_side, {"add_generation_prompt": add_generation_prompt})

    def _inputs(self, dealt: Dealt, padding_side: str, told: dict[str, Any]) -> BatchFeature:
        pixels = read_pixels(self.image_processor, dealt.pictures, dealt.counts, self.image_tiles)
        encoded = [
            self.encode_text(row, tiles) if isinstance(row, str) else self.encode(row, tiles=tiles, **told)
            for row, tiles in zip(dealt.rows, in_groups(pixels.tiles, dealt.counts), strict=True)
        ]
        inputs = self.pad(encoded, side=padding_side)
        inputs.pop("labels", None)
        return BatchFeature(inputs | pixels.inputs)

    def encode(
        self,
        messages: list[Message],
        num_images: int | None = None,
        supervise: bool = False,
        add_generation_prompt: bool = False,
        tiles: Sequence[Any] | None = None,
        told: Told = NOTHING,
    ) -> dict[str, list[int]]:
        """Token ids of one conversation, and labels on the assistant's words and their end-of-turn mark.

        Args:
            messages: the conversation; its last message is the answer when `supervise` is set.
            num_images: pictures that come with it; None skips the comparison with the placeholders.
            tiles: of each picture; by default `image_tiles`.
            told: another chat template, and what it is told beside the messages.

        Raises:
            ValueError: too many or too few pictures, nothing to supervise, or answers that the template rewrites where
                labels or token types need their places.
        """
        if num_images is not None:
            check_count(count_images(messages), num_images)
        if self.image_space:
            messages = [{**message, "content": apart(message["content"])} for message in messages]
        rendered = render(self.tokenizer, messages, add_generation_prompt, told, supervise or self.token_types)
        special = self.add_special_tokens and not self._has_bos(rendered.text)
        wanted, found = count_images(messages), rendered.text.count(IMAGE_TOKEN)
        if wanted != found:
            raise ValueError(f"the chat template turned {wanted} image placeholders into {found}; pass chat_template=")
        encoded = self._tokenize(rendered.text, rendered.answers, special, supervise, tiles)
        if supervise and all(label == IGNORE for label in encoded["labels"]):
            raise ValueError("no token is supervised: the conversation has no answer by the assistant")
        if supervise and self.encoder_decoder:
            prompt = self.encode(messages[:-1], add_generation_prompt=True, tiles=tiles, told=told)
            return prompt | {"labels": last_answer(encoded["labels"])}
        return encoded

    def tiles_of(self, images: Sequence[ImageRef]) -> Sequence[Any] | None:
        """How each picture is cut, where its placeholders depend on it."""
        return None

    def encode_text(self, text: str, tiles: Sequence[Any] | None = None) -> dict[str, list[int]]:
        """Token ids of a rendered prompt, with the tokenizer's own special tokens unless the prompt has them."""
        text = apart(text) if self.image_space else text
        return self._tokenize(text, [], special=not self._has_bos(text), tiles=tiles)

    @property
    def placeholders(self) -> Placeholders | TiledPlaceholders:
        """How a picture is written in tokens."""
        told = (self.tokenizer, self.image_token_id, self.num_image_tokens)
        if self.image_tag is not None:
            return tiled_placeholders(*told, str(self.image_boundary), self.image_tag)
        return framed_placeholders(*told, self.image_boundary, self.regions)

    @property
    def region_tokens(self) -> int:
        """Tokens of the names of a picture's regions, which stand in the sequence beside its visual tokens."""
        return 0 if self.regions is None else len(self.placeholders.of(1, False)) - self.num_image_tokens

    def _has_bos(self, text: str) -> bool:
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    def _tokenize(
        self,
        text: str,
        answers: list[tuple[int, int]],
        special: bool = False,
        supervise: bool = False,
        tiles: Sequence[Any] | None = None,
    ) -> dict[str, list[int]]:
        plain = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
        answered = supervised(plain["input_ids"], plain["offset_mapping"], answers, self._special_ids())
        ids: list[int] = []
        labels: list[int] = []
        types: list[int] = []
        end, marker, placeholders = None, self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), self.placeholders
        cut = iter(tiles or ())
        for token, learn, (start, stop) in zip(plain["input_ids"], answered, plain["offset_mapping"], strict=True):
            picture = token == marker
            written = placeholders.of(next(cut, self.image_tiles or 1), start == end) if picture else [token]
            end = stop if picture else None
            ids += written
            shown = learn and supervise and (self.draws or not picture)
            labels += written if shown else [IGNORE] * len(written)
            types += [int(learn or 1 in types[-1:])] * len(written)
        return {"input_ids": ids, "labels": labels} | ({"token_type_ids": types} if self.token_types else {})

    def _special_ids(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)

    def end_of_turn_id(self) -> int | None:
        """The special token that closes an answer by the chat template: what generation must stop at."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        labels = [label for label in self.encode(probe, supervise=True)["labels"] if label != IGNORE]
        return labels[-1] if labels[-1] in self._special_ids() else None

    def pad(self, encoded: list[dict[str, list[int]]], side: str = "right") -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` as tensors `(B, S)`, padded on one side.

        An encoder–decoder's are padded on the right always, for its encoder may count places; `labels` are `(B, A)`.
        """
        side = "right" if self.encoder_decoder else side
        ids = [item["input_ids"] for item in encoded]
        padded = {
            "input_ids": pad_rows(ids, filler(self.tokenizer), side),
            "attention_mask": mask_rows(ids, side),
            "labels": pad_rows([item["labels"] for item in encoded], IGNORE, side),
        }
        if self.token_types:
            padded["token_type_ids"] = pad_rows([item["token_type_ids"] for item in encoded], 0, side)
        return padded | self.shapes_of(encoded)

    def shapes_of(self, encoded: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What inputs say of the shapes of all pictures, where these have their own."""
        return {}

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, tokenize: bool = False, **kwargs: Any
    ) -> Any:
        """A conversation's prompt; with `tokenize`, its tokens; with `return_dict` too, the inputs with its pictures.

        Args:
            conversation: messages, or a batch of them; a picture stands in its part as `image`, `url`, `path` or
                `base64`, or as OpenAI's `image_url`.
            chat_template: in place of the processor's own, or the name of one of several.
            kwargs: what the template reads, and options of transformers that change nothing here.

        Raises:
            TypeError: an option that nothing reads.
        """
        options = dict(kwargs.pop("processor_kwargs", None) or {})
        side = options.pop("padding_side", "left")
        refuse_unknown(options)
        return_dict, add = kwargs.pop("return_dict", False), kwargs.pop("add_generation_prompt", False)
        told = for_template(self.tokenizer, chat_template, kwargs)
        batch, several = self._normalize_conversations(conversation)
        if not tokenize:
            texts = [render(self.tokenizer, messages, add, told, find=False).text for messages in batch]
            return texts if several else texts[0]
        dealt = deal_messages([pictures_of(messages) for messages in batch], batch)
        inputs = self._inputs(dealt, side, {"add_generation_prompt": add, "told": told})
        return inputs if return_dict else inputs["input_ids"]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        more = {"token_type_ids": self.token_types, "pixel_attention_mask": keeps_sizes(self.image_processor)}
        return ["input_ids", "attention_mask", "pixel_values", *(name for name, given in more.items() if given)]
