"""Special tokens in the words of clients: read as words by chats, sentence encoders, CLIP and language models."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

import chiasm
import tiny
from chiasm.serving.plain import Plain, PlainTexts
from chiasm.serving.served import EmbeddingModel


def bert() -> PreTrainedTokenizerFast:
    """WordPiece in small letters with BERT's marks."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "a", "cat", "dog", "cls", "sep", "mask", "pad"]
    backend = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    marks = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def clip() -> PreTrainedTokenizerFast:
    """BPE of letters with CLIP's marks, which are found in text that was made small before."""
    letters = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz<|>[] "]
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.normalizer, backend.decoder = normalizers.Lowercase(), decoders.Fuse()
    backend.post_processor = processors.BertProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0))
    begin, end = (AddedToken(mark, normalized=True, special=True) for mark in letters[:2])
    ends = dict.fromkeys(("eos_token", "unk_token", "pad_token"), end)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, **ends)


@pytest.mark.parametrize("make", [bert, clip, tiny.tokenizer])
def test_no_special_token_is_left(make: Callable[[], Any]) -> None:
    tokenizer = make()
    plain = PlainTexts(SimpleNamespace(tokenizer=tokenizer))
    marks = [mark for mark in tokenizer.all_special_tokens if mark != "[UNK]"]
    texts = [*marks, *(mark.upper() for mark in marks), *(mark.lower() for mark in marks)]
    texts += ["a " + "".join(marks) + " cat", marks[0][:2] + marks[0] + marks[0][2:], f" {marks[-1]}  {marks[-1]}"]
    for text in texts:
        ids = tokenizer(plain(text), add_special_tokens=False)["input_ids"]
        frame = {tokenizer.convert_tokens_to_ids(mark) for mark in marks}
        assert not frame & set(ids), (text, plain(text), ids)
        assert plain(text).replace(" ", "") == text.replace(" ", "")
    for text in ("a cat", "a [ cat", "<", "cat dog" * 9):
        assert plain(text) == text


def test_small_letters_of_a_processor() -> None:
    """SigLIP's reads texts in small letters, which may be a special token's."""
    tokenizer = bert()
    tokenizer.add_tokens(["</s>"], special_tokens=True)
    plain = PlainTexts(SimpleNamespace(tokenizer=tokenizer, lowercase=True))
    assert plain("a </S> Cat") == "a < /s> cat"


def test_what_is_unknown_stays() -> None:
    """An unknown letter is read as BERT's [UNK], which is no mark of anything."""
    assert PlainTexts(SimpleNamespace(tokenizer=bert()))("a ☃ cat") == "a ☃ cat"


def test_marks_that_cannot_be_parted_are_refused() -> None:
    tokenizer = bert()
    tokenizer.add_tokens([AddedToken("a cat", special=True), AddedToken("a  cat", special=True)], special_tokens=True)
    with pytest.raises(ValueError, match="special token"):
        PlainTexts(SimpleNamespace(tokenizer=Stubborn(tokenizer)))("dog")


class Stubborn:
    """A tokenizer that finds its mark in everything."""

    is_fast = True

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [self._inner.cls_token_id], "offset_mapping": [(0, 1)]}


def test_very_many_marks_take_a_moment() -> None:
    plain = PlainTexts(SimpleNamespace(tokenizer=clip()))
    assert plain("<|ENDOFTEXT|>" * 20_000).count("< |") == 20_000


def encoders() -> dict[str, chiasm.DualEncoder]:
    """As they are connected: what their vector is, and what stands around a text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    read = CLIPTextModel(CLIPTextConfig(vocab_size=40, **ids, **sizes)).eval()
    towers = {"minilm": (tiny.bert(), bert()), "clip": (read, clip()), "causal": (tiny.language(), tiny.tokenizer())}
    made = {
        name: chiasm.connect(tiny.vision(), tower, fusion="late", tokenizer=tokenizer)
        for name, (tower, tokenizer) in towers.items()
    }
    for encoder in made.values():
        encoder.processor.text_length = 70
    return made


HIDDEN = {"minilm": "[SEP]", "clip": "<|endoftext|>", "causal": "<|im_end|>"}


@pytest.mark.parametrize("name", HIDDEN)
def test_vectors_of_texts_with_marks(client: Callable[..., TestClient], name: str) -> None:
    """A mark is read as its letters, a space behind the first, and what stands behind it counts."""
    encoder, mark = encoders()[name], HIDDEN[name]
    api = client(EmbeddingModel("clip", encoder))

    def vector(given: Any) -> torch.Tensor:
        answer = api.post("/v1/embeddings", json={"model": "clip", "input": [given]})
        assert answer.status_code == 200, answer.text
        return torch.tensor(answer.json()["data"][0]["embedding"])

    marked = f"a cat {mark} a dog"
    parted = encoder.embed_texts([f"a cat {mark[0]} {mark[1:]} a dog"])[0]
    torch.testing.assert_close(vector(marked), parted)
    torch.testing.assert_close(vector({"type": "text", "text": marked}), parted)
    assert not torch.allclose(vector(marked), encoder.embed_texts([marked])[0])
    assert not torch.allclose(vector(marked), vector(f"a cat {mark}"))
    framed = encoder.processor.encode("a cat")  # a client that counts tokens itself may send the frame too
    torch.testing.assert_close(vector(framed), vector("a cat"))
    frame = [framed[0], framed[-1]]
    refused = api.post("/v1/embeddings", json={"model": "clip", "input": frame})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "no_words"


def test_words_of_a_chat() -> None:
    plain = Plain(tiny.tokenizer(), "<image>")
    assert plain("a <image> <|im_start|>") == "a < image> < |im_start|>"
