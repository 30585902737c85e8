"""Intermediate fusion: closed gates are the language model, open ones see the most recent picture and nothing else."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import chiasm
import contracts
import tiny
from chiasm.connectors import CONNECTORS
from chiasm.fusion.cross_attention_settings import cross_attention_settings
from chiasm.fusion.intermediate import IntermediateFusionModel
from tiny import ask, picture

SETTINGS: list[dict[str, Any]] = [
    {"every": 1, "heads": 3, "head_dim": 8},
    {"layers": [0, 2], "heads": 4, "kv_heads": 2, "head_dim": 5, "norm": "rms", "gated_feed_forward": True},
    {"every": 2, "qk_norm": True, "gate": "vector", "mask_feed_forward": False, "visual_norm": False},
]


def connect(language: str = "llama", gates: float | None = 1.0, **options: Any) -> chiasm.VLM:
    options = {"cross_attention": SETTINGS[0]} | options
    vlm = chiasm.connect(
        tiny.vision(), tiny.language(language), fusion="intermediate", tokenizer=tiny.tokenizer(), **options
    )
    contracts.open_gates(vlm.model, gates)
    return vlm


def batch(vlm: chiasm.VLM) -> dict[str, Tensor]:
    """Two prompts of one length, with two pictures and one."""
    messages = [ask("What?", 2), ask("What?12345678", 1)]
    return dict(vlm.processor(messages=messages, images=[[picture(1), picture(2)], [picture(3)]]))


@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_language_model(language: str, settings: dict[str, Any]) -> None:
    closed = connect(language, gates=None, cross_attention=settings)
    contracts.check_closed_gates_are_the_language_model(closed.model, tiny.language(language), batch(closed))
    vlm = connect(language, cross_attention=settings)
    inputs = batch(vlm)
    contracts.check_image_matters(vlm.model, inputs)
    contracts.check_cached_equals_full(vlm.model, inputs)
    contracts.check_saved_equals_loaded(vlm, inputs)
    contracts.check_padding_is_ignored(vlm.model, inputs, vlm.processor.tokenizer.pad_token_id)
    contracts.check_embeddings_equal_tokens(vlm.model, inputs)
    contracts.check_generation_strategies(vlm.model, inputs)
    contracts.check_continues(vlm.model, inputs)
    contracts.check_assistant(vlm)
    contracts.check_attention_implementations(
        vlm.model, lambda model: model(**inputs).logits[inputs["attention_mask"].bool()]
    )
    contracts.check_losses_agree(vlm.model, inputs, inputs["input_ids"].masked_fill(inputs["input_ids"] > 200, -100))


def test_embeddings_narrower_than_the_layers() -> None:
    sizes = {
        "hidden_size": 36,
        "ffn_dim": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "word_embed_proj_dim": 20,
    }
    torch.manual_seed(0)
    language = OPTForCausalLM(OPTConfig(vocab_size=261, max_position_embeddings=1024, **sizes))
    vlm = chiasm.connect(tiny.vision(), language, fusion="intermediate", tokenizer=tiny.tokenizer())
    contracts.open_gates(vlm.model, 1.0)
    inputs = batch(vlm)
    contracts.check_image_matters(vlm.model, inputs)
    contracts.check_saved_equals_loaded(vlm, inputs)


@pytest.mark.parametrize("settings", SETTINGS)
def test_gates_that_are_opened_first_change_nothing(settings: dict[str, Any]) -> None:
    """All weights but those behind the layers that are 0 have a gradient, and open gates are left alone."""
    vlm = connect(gates=None, cross_attention=settings)
    inputs = batch(vlm)
    part = vlm.model.cross_attention
    assert part.open_gates() and not part.open_gates(0.3) and min(part.gates()["attention_gate"]) > 0.7
    contracts.check_closed_gates_are_the_language_model(vlm.model, tiny.language(), inputs)
    vlm.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(block.o_proj.weight.grad.any() and block.down_proj.weight.grad.any() for block in part.blocks)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector(connector: str) -> None:
    vlm = connect(connector=tiny.connector(connector))
    contracts.check_saved_equals_loaded(vlm, batch(vlm))
    contracts.check_image_matters(vlm.model, batch(vlm))
    contracts.check_cached_equals_full(vlm.model, batch(vlm))


def test_tokens_may_keep_the_vision_width() -> None:
    vlm = connect(connector={**tiny.connector("perceiver_resampler"), "project": False})
    assert vlm.model.connector.width == vlm.model.vision.width
    contracts.check_saved_equals_loaded(vlm, batch(vlm))
    contracts.check_image_matters(vlm.model, batch(vlm))


@pytest.mark.parametrize("language", tiny.LANGUAGE_FAMILIES)
def test_batched_equals_single(language: str) -> None:
    vlm = connect(language)
    messages = [ask("What is this?"), ask("Which of the two?", 2), [{"role": "user", "content": "Hello there, you."}]]
    contracts.check_batched_equals_single(vlm, messages, [[picture(1)], [picture(2), picture(3)], []])


def test_text_without_pictures_stays_the_language_models_own() -> None:
    """Even with open gates, in a batch of its own and beside a row that has a picture."""
    vlm = connect()
    contracts.check_text_only_is_the_language_model(vlm.model, tiny.language(), torch.randint(0, 250, (2, 9)))
    ids = torch.randint(0, 250, (2, 9))
    ids[0, 4] = vlm.model.config.image_token_id
    with torch.no_grad():
        together = vlm.model(input_ids=ids, pixel_values=torch.randn(1, 3, 30, 30)).logits
        alone = tiny.language()(input_ids=ids[1:]).logits
        torch.testing.assert_close(together[1:], alone, **contracts.TOLERANCE)


def test_a_token_sees_the_most_recent_picture_only() -> None:
    """One block in front of the last layer: what reaches a position is that position's own look."""
    model = connect(cross_attention={"layers": [2], "heads": 2, "head_dim": 8}).model
    ids = torch.randint(0, 250, (1, 12))
    ids[0, [3, 7]] = model.config.image_token_id
    first, second, other = torch.randn(3, 1, 3, 30, 30)

    def logits(*pictures: Tensor) -> Tensor:
        with torch.no_grad():
            record: list[Tensor] = []
            output = model(input_ids=ids, pixel_values=torch.cat(pictures), record=record)
            weights = record[0].mean(dim=1).unflatten(-1, (2, -1)).sum(dim=-1)[0]
            torch.testing.assert_close(weights, torch.eye(2)[[0] * 7 + [1] * 5] * (torch.arange(12) > 2)[:, None])
            return output.logits[0]

    base, changed_first, changed_second = logits(first, second), logits(other, second), logits(first, other)
    assert torch.equal(base[:3], changed_first[:3]) and torch.equal(base[:7], changed_second[:7])
    assert not torch.allclose(base[3], changed_first[3]) and not torch.allclose(base[7], changed_second[7])
    own = model.language.model.layers[2].self_attn.o_proj.weight
    with torch.no_grad():
        own.zero_()  # without self-attention behind the block, a position knows its own look only
    base, changed_first = logits(first, second), logits(other, second)
    torch.testing.assert_close(base[7:], changed_first[7:])


def test_pictures_of_one_row_never_reach_another() -> None:
    vlm = connect()
    inputs = batch(vlm)
    with torch.no_grad():
        before = vlm.model(**inputs).logits
        inputs["pixel_values"][2] += 1.0
        after = vlm.model(**inputs).logits
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_keys_and_values_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = connect()
    calls: list[int] = []
    part = vlm.model.cross_attention
    original = type(part).keys_values
    monkeypatch.setattr(type(part), "keys_values", lambda self, visual: calls.append(1) or original(self, visual))
    vlm.chat(picture(1), "What?", max_new_tokens=6)
    assert calls == [1]


def test_nothing_stays_on_modules_between_calls() -> None:
    vlm = connect()
    inputs = batch(vlm)
    before = {name: set(vars(module)) for name, module in vlm.model.named_modules()}
    with torch.no_grad():
        seen = vlm.model(**inputs).logits
        vlm.model(input_ids=torch.randint(0, 250, (1, 5)))
        assert {name: set(vars(module)) for name, module in vlm.model.named_modules()} == before
        assert torch.equal(vlm.model(**inputs).logits, seen)
        assert torch.equal(tiny.language()(input_ids=inputs["input_ids"] % 250).logits, plain(vlm.model, inputs))


def plain(model: IntermediateFusionModel, inputs: dict[str, Tensor]) -> Tensor:
    """The language model inside, called by itself."""
    return model.language(input_ids=inputs["input_ids"] % 250).logits


def test_a_copy_looks_through_its_own_blocks() -> None:
    vlm = connect()
    inputs = batch(vlm)
    copied = copy.deepcopy(vlm.model)
    contracts.open_gates(copied, 0.0)
    with torch.no_grad():
        assert not torch.allclose(copied(**inputs).logits, vlm.model(**inputs).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    """And the blocks of cross-attention are computed again, as the language model's layers are."""
    vlm = connect()
    inputs = batch(vlm)

    def gradients() -> dict[str, Tensor]:
        vlm.model.zero_grad()
        vlm.model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {n: p.grad.clone() for n, p in vlm.model.named_parameters() if p.grad is not None}

    before = gradients()
    vlm.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    runs = list[None]()
    vlm.model.cross_attention.blocks[0].q_proj.register_forward_hook(lambda *_: runs.append(None))
    after = gradients()
    assert len(runs) == 2
    assert before.keys() == after.keys() and any("connector" in name for name in after)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-6)


def test_text_only_training_reaches_every_new_weight_with_zero() -> None:
    vlm = connect()
    vlm.model.train()
    ids = torch.randint(0, 250, (2, 7))
    vlm.model(input_ids=ids, labels=ids).loss.backward()
    for part in (vlm.model.connector, vlm.model.cross_attention.blocks):
        assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in part.parameters())


def test_beams_keep_the_pictures_of_a_row_together() -> None:
    vlm = connect()
    messages, images = [ask("Both?", 2), ask("One of?")], [[picture(1), picture(2)], [picture(3)]]
    greedy = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 258}
    inputs = vlm.processor(messages=messages, images=images)
    beams = vlm.model.generate(**inputs, **greedy)
    single = vlm.processor(messages=messages[:1], images=images[:1])
    alone = vlm.model.generate(**single, **greedy)
    assert torch.equal(beams[0, inputs["input_ids"].shape[1] :], alone[0, single["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"evry": 2}, "no option 'evry'; its options are: every, layers"),
        ({"every": 9}, "every=9, expected 1 to 6"),
        ({"layers": [1, 6]}, r"layers=\[1, 6\], expected ascending indices from 0 to 5"),
        ({"every": 2, "layers": [1]}, "contradict"),
        ({"heads": 6, "kv_heads": 4}, "6 heads, which 4 kv_heads do not divide"),
        ({"norm": "batch"}, "norm 'batch' is unknown; choose one of layer, rms"),
    ],
)
def test_wrong_settings_are_refused(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_attention_settings(wanted, 6, 32)


def test_wrong_image_counts_name_both() -> None:
    vlm = connect()
    inputs = batch(vlm)
    with pytest.raises(ValueError, match=r"3 image placeholders but 2 image\(s\)"):
        vlm.model(**(inputs | {"pixel_values": inputs["pixel_values"][:2]}))
    inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="3 image placeholders but no image"):
        vlm.model(**inputs)
    with pytest.raises(ValueError, match="is for fusion='intermediate', got fusion='early'"):
        chiasm.connect(tiny.vision(), tiny.language(), cross_attention={"every": 2})


def test_two_models_around_one_language_model_keep_apart() -> None:
    language = tiny.language()
    options = {"fusion": "intermediate", "tokenizer": tiny.tokenizer()}
    first = chiasm.connect(tiny.vision(), language, cross_attention={"every": 1, "heads": 2, "head_dim": 8}, **options)
    inputs = batch(first)
    contracts.open_gates(first.model, 1.0)
    with torch.no_grad():
        alone = first.model(**inputs).logits
        second = chiasm.connect(tiny.vision(), language, cross_attention={"every": 2, "heads": 3}, **options)
        contracts.check_closed_gates_are_the_language_model(second.model, tiny.language(), inputs)
        assert torch.equal(first.model(**inputs).logits, alone)


def test_new_pictures_beside_kept_ones_are_refused() -> None:
    model = connect().model
    inputs = batch(connect())
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    more = torch.full((2, 1), model.config.image_token_id)
    with pytest.raises(
        ValueError, match="2 new image placeholders, but image_cache holds pictures of earlier text only"
    ):
        model(input_ids=more, cache=output.cache, image_cache=output.image_cache)


def test_a_drafted_end_of_text_that_is_taken_back_hides_no_picture() -> None:
    """As assisted decoding does it: two drafted tokens are read, refused, and cut from the cache."""
    vlm = connect(cross_attention={**SETTINGS[0], "end_of_text": 97}, gates=2.0)
    asked = vlm.processor(messages=[ask("What?")], images=[[picture(1)]])
    ids, pixels = asked["input_ids"], asked["pixel_values"]

    def after(*tokens: int) -> Tensor:
        return torch.cat([ids, torch.tensor([tokens])], dim=1)

    with torch.no_grad():
        drafted = vlm.model(after(73, 97), pixel_values=pixels, use_cache=True)
        drafted.cache.crop(-2)
        step = {
            "cache": drafted.cache,
            "image_cache": drafted.image_cache,
            "attention_mask": torch.ones_like(after(74)),
        }
        inputs = vlm.model.prepare_inputs_for_generation(after(74), next_sequence_length=1, **step)
        said = vlm.model(**inputs).logits[:, -1]
        expected = vlm.model(after(74), pixel_values=pixels).logits[:, -1]
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)


def test_new_pictures_may_follow_on_a_cache() -> None:
    """A text that begins with another picture is read with that one, which is the most recent."""
    vlm = chiasm.connect(tiny.vision(), tiny.language(), "mlp", "intermediate", tokenizer=tiny.tokenizer())
    contracts.open_gates(vlm.model, 2.0)
    first, second = (vlm.processor(messages=[tiny.ask("What?")], images=[[tiny.picture(n)]]) for n in (1, 2))
    more = second["input_ids"][:, int((second["input_ids"] == vlm.model.config.image_token_id).int().argmax()) :]
    with torch.no_grad():
        cache = vlm.model(**first, use_cache=True).cache
        ids = torch.cat([first["input_ids"], more], dim=1)
        mask, pixels = torch.ones_like(ids), torch.cat([first["pixel_values"], second["pixel_values"]])
        whole = vlm.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        went_on = vlm.model(more, attention_mask=mask, cache=cache, pixel_values=second["pixel_values"]).logits
    torch.testing.assert_close(went_on, whole[:, first["input_ids"].shape[1] :], rtol=1e-4, atol=1e-5)
