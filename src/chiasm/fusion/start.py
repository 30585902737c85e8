"""What a fresh connector starts from: options of `connect` that a saved model does not need again."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chiasm import sources
from chiasm.connectors import as_mapping, connector_settings
from chiasm.connectors.bert import initialise_from_bert, load_bert, qformer_sizes
from chiasm.data.instruction import InstructionProcessor
from chiasm.data.processor import ChiasmProcessor
from chiasm.language.adapter import load_tokenizer


@dataclass(frozen=True)
class Start:
    """A connector's settings, and what only its first weights and its tokenizer come from.

    Args:
        settings: what the configuration keeps, defaults included.
        encoder: a BERT-shaped encoder that a Q-Former starts as.
        tokenizer: of the instruction, where it is not the language model's own.
    """

    settings: dict[str, Any]
    encoder: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def initialise(self, connector: Any) -> None:
        """Gives a fresh connector its first weights."""
        if self.encoder is not None:
            initialise_from_bert(connector, self.encoder)

    def processor(self, images: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> ChiasmProcessor:
        """The processor that the connector needs; its tokenizer decides on the size of the connector's vocabulary."""
        if not self.settings.get("instruction"):
            return ChiasmProcessor(images, tokenizer, **options)
        length = min(128, self.settings["max_positions"])
        made = InstructionProcessor(images, tokenizer, self.tokenizer, instruction_length=length, **options)
        if self.settings["vocabulary"] is None:
            self.settings["vocabulary"] = len(made.instruction_tokenizer)
        return made


def start_of(connector: str | dict[str, Any]) -> Start:
    """The start of a connector, its settings checked. Only a Q-Former has options here.

    `init_from` names a BERT-shaped encoder (hub id, folder or alias), whose sizes and tokenizer are taken over where
    none are given; `tokenizer` names the one that reads instructions.

    Raises:
        ValueError: a name or an option is unknown, or the encoder has another shape.
    """
    given = as_mapping(connector)
    if given.get("name") != "qformer":
        return Start(connector_settings(given))
    init_from, named = given.pop("init_from", None), given.pop("tokenizer", None)
    settings = connector_settings(given)
    if init_from is None and named is None:
        return Start(settings)
    encoder = None if init_from is None else load_bert(sources.resolve(init_from))
    if encoder is not None:
        settings |= qformer_sizes(encoder.config) | given
    tokenizer = load_tokenizer(sources.resolve(str(named or init_from))) if settings["instruction"] else None
    if named is not None and tokenizer is None:
        why = "holds no tokenizer" if settings["instruction"] else "is not read without instruction: true"
        raise ValueError(f"connector qformer: tokenizer={named!r} {why}")
    return Start(settings, encoder, tokenizer)
