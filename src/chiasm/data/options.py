"""Options that transformers, its trainers and TRL hand to every processor: what changes nothing here, what a chat
template reads, and the refusal of all others."""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from chiasm.data.chat import names_in, template_of

NEUTRAL = ("return_tensors", "padding")
"""Options of transformers that change nothing here."""

OF_COLLATORS = ("add_special_tokens", "pad_to_multiple_of", "truncation", "max_length")
"""Options of collators that label a picture's placeholders and the questions too, as TRL's own does."""

KNOWN = inspect.signature(ProcessorMixin.apply_chat_template).parameters
"""Options of transformers that may be given where they are off."""


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Refuses all but those that change nothing.

    Raises:
        TypeError: an option that nothing reads.
    """
    if unknown := [name for name in options if name not in NEUTRAL]:
        collator = "to train, pass the trainer data_collator=Collator(processor, logits=True) of chiasm.data.collation"
        hint = f"; {collator}" if any(name in OF_COLLATORS for name in unknown) else ""
        raise TypeError(f"unknown processor arguments: {', '.join(unknown)}{hint}")


def for_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a chat template is told: those of the options that it reads, and which template it is.

    Raises:
        TypeError: an option that nothing reads.
    """
    read = names_in(template_of(tokenizer, chat_template))
    told = {name: value for name, value in options.items() if name in read}
    unread = {name: value for name, value in options.items() if name not in (*told, *NEUTRAL)}
    if unknown := [name for name, value in unread.items() if value or name not in KNOWN]:
        raise TypeError(f"unknown options of apply_chat_template, which its template does not read: {unknown}")
    return told | ({} if chat_template is None else {"chat_template": chat_template})
