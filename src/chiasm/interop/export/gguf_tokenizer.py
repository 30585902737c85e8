"""A byte-level BPE tokenizer → the fields of a GGUF file that llama.cpp tokenizes with."""

import json
from collections.abc import Sequence
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

GPT2_REGEX = "byte_level"
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

PRE_TOKENIZERS = {
    (GPT2_REGEX,): "gpt-2",
    ("digits", GPT2_REGEX): "smollm",
    (QWEN2_REGEX, "bytes"): "qwen2",
    (LLAMA3_REGEX, "bytes"): "llama-bpe",
}
"""How a text is cut before merges → llama.cpp's name of it."""


NO_MERGE = "\u00ad \u00ad"
"""A merge without a token, which changes nothing: llama.cpp does not take an empty list."""


def write_tokenizer(
    writer: GGUFWriter,
    words: PreTrainedTokenizerBase,
    rows: int,
    add_bos: bool,
    template: str,
    ends: Sequence[int] = (),
) -> None:
    """Writes a tokenizer for an embedding table of so many rows.

    Args:
        ends: tokens that end an answer, of which llama.cpp knows two beside the end of text.

    Raises:
        ValueError: llama.cpp has no tokenizer that cuts texts like this one.
    """
    backend = json.loads(words.backend_tokenizer.to_str())
    pre = PRE_TOKENIZERS.get(_steps(backend.get("pre_tokenizer")))
    if backend["model"]["type"] != "BPE" or backend["model"].get("byte_fallback") or pre is None:
        raise ValueError(
            f"the tokenizer {type(words).__name__} is not one that this conversion knows llama.cpp's name of "
            f"({', '.join(PRE_TOKENIZERS.values())}); take a language model with one of those, or convert --to onnx"
        )
    names, kinds = _tokens(words, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    merges = [one if isinstance(one, str) else " ".join(one) for one in backend["model"]["merges"]]
    writer.add_token_merges(merges or [NO_MERGE])
    for field, token in (("bos", words.bos_token_id), ("eos", words.eos_token_id), ("pad", words.pad_token_id)):
        if token is not None:
            getattr(writer, f"add_{field}_token_id")(token)
    for field, token in zip(("eot", "eom"), more_ends(words, ends), strict=False):
        getattr(writer, f"add_{field}_token_id")(token)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(template)


def more_ends(words: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[int]:
    """Tokens that end an answer beside the tokenizer's own end of text."""
    return [token for token in dict.fromkeys(ends) if token != words.eos_token_id]


def _steps(pre: dict[str, Any] | None) -> tuple[str, ...]:
    """What a pre-tokenizer does, as the keys of `PRE_TOKENIZERS` say it."""
    if pre is None:
        return ()
    if pre["type"] == "Sequence":
        return tuple(step for one in pre["pretokenizers"] for step in _steps(one))
    if pre["type"] == "ByteLevel" and not pre["add_prefix_space"]:
        return (GPT2_REGEX if pre["use_regex"] else "bytes",)
    if pre["type"] == "Digits" and pre["individual_digits"]:
        return ("digits",)
    if pre["type"] == "Split" and pre["behavior"] == "Isolated" and not pre["invert"]:
        return (pre["pattern"].get("Regex", "?"),)
    return (pre["type"],)


def _tokens(words: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[TokenType]]:
    by_id = {token: name for name, token in words.get_vocab().items()}
    added = words.added_tokens_decoder
    names, kinds = [], []
    for token in range(rows):
        names.append(by_id.get(token, f"[PAD{token}]"))
        if token in added:
            kinds.append(TokenType.CONTROL if added[token].special else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL if token in by_id else TokenType.UNUSED)
    return names, kinds
