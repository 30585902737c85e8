"""The prefix mask with any language model: both directions before the answer, causal behind it."""

from typing import Any

import pytest
import torch

import chiasm
import contracts
import tiny
from chiasm.data.collation import Item, collate
from chiasm.fusion.config import ChiasmConfig
from tiny import ask, picture


def connect(language: str = "qwen2", **options: Any) -> chiasm.VLM:
    return chiasm.connect(
        tiny.vision(), tiny.language(language), tokenizer=tiny.tokenizer(), **{"attention": "prefix"} | options
    )


def batch(vlm: chiasm.VLM) -> dict[str, torch.Tensor]:
    return dict(vlm.processor(messages=[ask("What?"), ask("This?")], images=[[picture(1)], [picture(2)]]))


@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_it_keeps_the_invariants(language: str) -> None:
    vlm = connect(language)
    inputs = batch(vlm)
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}
    contracts.check_image_matters(vlm.model, inputs)
    contracts.check_cached_equals_full(vlm.model, inputs)
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_embeddings_equal_tokens(vlm.model, inputs)
    contracts.check_generation_strategies(vlm.model, inputs)
    contracts.check_batched_equals_single(vlm, [ask("Short?"), ask("And a longer one?")], [[picture(1)], [picture(2)]])


@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_what_sees_what(language: str) -> None:
    """A change of a token reaches the whole prefix and all behind it, or only what is behind it."""
    model = connect(language).model
    ids, types = torch.randint(0, 250, (1, 7)), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    window = ids.shape[1]
    with torch.no_grad():
        before = model(input_ids=ids, token_type_ids=types).logits[0]
        for changed in range(window):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % 250
            moved = (model(input_ids=other, token_type_ids=types).logits[0] - before).abs().amax(dim=1) > 1e-6
            first = 0 if changed < 4 else changed
            assert moved.tolist() == [position >= first for position in range(window)], changed


def test_a_prefix_of_nothing_is_causal() -> None:
    model, ids = connect().model, torch.randint(0, 250, (2, 9))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        found = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.ones_like(ids)).logits
        torch.testing.assert_close(found, expected)
        other = model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits
    assert not torch.allclose(other, expected)


def test_the_mask_is_the_one_that_the_paper_draws() -> None:
    """The language model itself with a mask of four dimensions gives the same logits."""
    language = tiny.language("llama")
    model = connect("llama").model
    ids, types = torch.randint(0, 250, (1, 6)), torch.tensor([[0, 0, 0, 1, 1, 1]])
    mask = torch.ones(6, 6).tril().bool()
    mask[:3, :3] = True
    with torch.no_grad():
        expected = language(input_ids=ids, attention_mask=mask[None, None]).logits
        torch.testing.assert_close(model(input_ids=ids, token_type_ids=types).logits, expected)


def test_the_answer_is_the_suffix_of_a_training_batch() -> None:
    vlm = connect()
    turns = [*ask("What?"), {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
    encoded = vlm.processor.encode([*turns, {"role": "assistant", "content": "Yes."}], 1, supervise=True)
    prompt = vlm.processor.encode(ask("What?"), 1, add_generation_prompt=True)
    start = len(prompt["input_ids"])
    assert encoded["token_type_ids"] == [0] * start + [1] * (len(encoded["input_ids"]) - start)
    assert vlm.processor.encode(turns, 1)["token_type_ids"][start - 1 : start + 1] == [0, 1]
    pixels = vlm.processor(messages=ask("What?"), images=picture())["pixel_values"]
    made = collate([Item("a", encoded, pixels), Item("b", vlm.processor.encode(ask("No?"), 1), pixels)], vlm.processor)
    assert made.inputs["token_type_ids"].shape == made.inputs["input_ids"].shape
    vlm.model.train()(**made.inputs).loss.backward()


def test_wrong_words_are_refused() -> None:
    with pytest.raises(ValueError, match="attention 'both' is unknown; choose one of causal, prefix"):
        connect(attention="both")
    with pytest.raises(ValueError, match="attention 'prefix' is not for fusion 'intermediate'"):
        connect(fusion="intermediate")
    with pytest.raises(ValueError, match="attention 'prefix' is not for fusion 'intermediate'"):
        ChiasmConfig(fusion="intermediate", attention="prefix")


def test_flash_attention_is_refused() -> None:
    model = connect().model
    model.language.config._attn_implementation = "flash_attention_2"
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="attention: prefix needs a mask, which flash_attention_2 does not take"):
        model(input_ids=ids, token_type_ids=ids)
