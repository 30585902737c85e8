"""Every generative member of the family hands back what a causal language model of transformers does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import members

GENERATIVE = (
    members.MLP,
    members.TiedQFormer,
    members.Tiled,
    members.Packed,
    members.Gated,
    members.Patches,
    members.Codes,
)


def built(kind: type[members.Member]) -> tuple[Any, dict[str, torch.Tensor]]:
    member = kind()
    config, inputs = member.prepare_config_and_inputs_for_common()
    return member.classes[-1](config).eval(), inputs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", GENERATIVE, ids=lambda kind: kind.__name__)
def test_targets_may_stand_at_their_logits(kind: type[members.Member], training: bool) -> None:
    """`shift_labels` take the labels' place: a trainer that splits sequences shifts the whole ones before."""
    model, inputs = built(kind)
    model.train(training)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 20, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, labels=labels.flip(1), shift_labels=shifted).loss, expected)
    assert not torch.allclose(model(**inputs, labels=labels, shift_labels=labels).loss, expected)


@pytest.mark.parametrize("kind", GENERATIVE, ids=lambda kind: kind.__name__)
def test_states_of_some_layers(kind: type[members.Member]) -> None:
    model, inputs = built(kind)
    with torch.no_grad():
        every = model(**inputs, output_hidden_states=True).hidden_states
        some = model(**inputs, output_hidden_states=[0, -1]).hidden_states
    assert len(some) == len(every) == members.LAYERS + 1 and some[1] is None
    torch.testing.assert_close((some[0], some[-1]), (every[0], every[-1]))


EVERY = (*GENERATIVE, members.EncoderDecoder, members.DualEncoder, members.Retrieval)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_what_a_checkpoint_lacks_is_drawn(kind: type[members.Member], tmp_path: Path) -> None:
    """As in a fresh model, and what it holds stays."""
    model, _ = built(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    held = {name: weights[name] for name in list(weights)[::2]}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, fresh = type(model).from_pretrained(tmp_path), type(model)(kind().get_config())
    drawn = dict(fresh.named_parameters())
    for name, parameter in loaded.named_parameters():
        if name in held:
            assert (parameter == 7.0).all(), name
        elif name not in weights or parameter.data_ptr() in {p.data_ptr() for p in map(loaded.get_parameter, held)}:
            continue  # tied to one that is held
        elif drawn[name].numel() > 100 and drawn[name].std() > 0:
            assert parameter.std().item() == pytest.approx(drawn[name].std().item(), rel=0.4), name
        else:
            assert parameter.abs().max() < 5.0, name
