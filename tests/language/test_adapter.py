"""The adapter reaches every kind of language model the same way, and its logits are the model's own."""

import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedConfig, RwkvConfig

import chiasm
import tiny
from chiasm.language import adapter
from chiasm.language.next_token import next_token_loss, supervised_positions


@pytest.mark.parametrize("family", tiny.LANGUAGE_FAMILIES)
@pytest.mark.parametrize("direct", [True, False])
def test_logits_at_chosen_positions(family: str, direct: bool) -> None:
    model = tiny.language(family)
    ids = torch.randint(0, 256, (3, 9))
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([1, 7, 4])
    embeddings = model.get_input_embeddings()(ids)
    found = adapter.logits_at(model, {"inputs_embeds": embeddings}, rows, columns, direct)
    torch.testing.assert_close(found, model(input_ids=ids).logits[rows, columns], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiny.LANGUAGE_FAMILIES)
def test_what_is_read_from_a_model(family: str) -> None:
    model = tiny.language(family)
    assert adapter.embedding_width(model) == 36
    assert len(adapter.layers(model)) == 3
    assert adapter.head_is_direct(model)
    assert adapter.embedding_scale(model) > 0


@pytest.mark.parametrize("family", tiny.LANGUAGE_FAMILIES)
def test_a_model_of_its_first_layers(family: str, tmp_path: Path) -> None:
    whole, model = tiny.language(family), tiny.language(family)
    adapter.keep_first_layers(model, 2)
    ids = torch.randint(0, 256, (2, 9))
    states = whole(input_ids=ids, output_hidden_states=True).hidden_states
    cut = model(input_ids=ids, output_hidden_states=True, use_cache=True)
    assert len(adapter.layers(model)) == 2 and len(cut.cache.layers) == 2
    torch.testing.assert_close(cut.hidden_states[1], states[1])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, cut.logits)
    adapter.keep_first_layers(model, 5)
    assert len(adapter.layers(model)) == 2


@pytest.mark.parametrize("family", tiny.ENCODER_DECODERS)
def test_an_encoder_decoder_keeps_all_layers(family: str) -> None:
    model = tiny.language(family)
    before = sum(p.numel() for p in model.parameters())
    adapter.keep_first_layers(model, 1)
    assert sum(p.numel() for p in model.parameters()) == before


def test_loading_gives_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr("transformers.utils.generic.logger.warning_once", heard.append)
    adapter.load_language(tiny.language())
    assert heard == []


def test_a_capped_head_is_noticed() -> None:
    model = tiny.language("gemma3")
    model.config.final_logit_softcapping = 0.05
    assert not adapter.head_is_direct(model)


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        adapter.load_language(tiny.language().model)


def test_next_token_loss_shifts_by_one() -> None:
    labels = torch.tensor([[-100, -100, 5, 7], [-100, 3, -100, -100]])
    rows, columns, targets = supervised_positions(labels)
    assert (rows.tolist(), columns.tolist(), targets.tolist()) == ([0, 0, 1], [1, 2, 0], [5, 7, 3])
    logits = torch.randn(3, 11)
    total = next_token_loss(logits, targets, num_items=6)
    torch.testing.assert_close(total, next_token_loss(logits, targets) / 2)


@pytest.mark.parametrize("config", [MambaConfig(state_size=8), RwkvConfig(attention_hidden_size=16)])
def test_a_language_model_without_attention_is_refused(config: PreTrainedConfig) -> None:
    config.update({"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 261})
    with pytest.raises(ValueError, match=r"model type '\w+'\) keeps no keys and values of attention") as error:
        chiasm.connect(tiny.vision(), AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(error.value)


def test_an_error_can_be_told_by_another_process() -> None:
    error = pickle.loads(pickle.dumps(adapter.ContextError("too long", 3)))
    assert (str(error), error.room) == ("too long", 3)
