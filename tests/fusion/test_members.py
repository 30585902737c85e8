"""Every generative member of the family hands back what a causal language model of transformers does."""

from typing import Any

import pytest
import torch

import members

GENERATIVE = (members.MLP, members.TiedQFormer, members.Packed, members.Gated, members.Patches, members.Codes)


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
