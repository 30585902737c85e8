"""A tokenizer of bytes, for models that are trained from scratch, in any language (ByT5, arXiv 2105.13626)."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = ("system\n", "user\n", "assistant\n")
"""Written as one token each, so that a short conversation stays short."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, the marks of a conversation, and its roles."""
    fast = plain_byte_tokenizer()
    marks = [f"<|im_start|>{role}" for role in ROLES]
    fast.add_special_tokens({"extra_special_tokens": ["<|im_start|>", *marks]})
    fast.chat_template = CHATML
    return fast


def plain_byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, and the marks for beginning, end and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
