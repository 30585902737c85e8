"""Losses of two towers: by hand, as transformers has them, in chunks, and over two processes as over one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import chiasm
import tiny
from chiasm.fusion.late import LateFusionModel
from chiasm.language.next_token import IGNORE
from chiasm.objectives.gradient_cache import in_chunks
from chiasm.objectives.late import LARGEST_SCALE, answer_loss, pair_losses
from chiasm.objectives.sigmoid import sigmoid_loss
from objectives.two_processes import joined, results_of

KINDS = {"contrastive": None, "sigmoid": -3.0}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def model(objective: str = "contrastive") -> LateFusionModel:
    connector = {"name": "mlp", "space": 13, "hidden": 9, "logit_bias": KINDS[objective]}
    return chiasm.connect(tiny.vision("siglip"), tiny.language("qwen2"), connector, "late").model.train()


def batch(count: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    mask = torch.ones(count, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "input_ids": torch.randint(0, 256, (count, 6)),
        "attention_mask": mask,
        "pixel_values": torch.randn(count, 3, 30, 30),
        "picture_ids": torch.arange(count),
        "text_ids": torch.arange(count) + 100,
    }


def gradients(made: LateFusionModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", KINDS)
def test_without_duplicates_it_is_the_models_own_loss(objective: str) -> None:
    made, inputs = model(objective), batch(5)
    loss = pair_losses(made, inputs, [objective])[objective]
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    torch.testing.assert_close(loss, made(**plain, return_loss=True).loss, **CLOSE)


def test_sigmoid_loss_by_hand() -> None:
    logits, same = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[True, False], [True, True]])
    by_hand = sum(math.log1p(math.exp(-x)) for x in (1.0, 2.0, 0.5, 3.0))
    assert sigmoid_loss(logits, same).item() == pytest.approx(by_hand / 2)
    assert sigmoid_loss(logits, same, num_items=4).item() == pytest.approx(by_hand / 4)


def test_what_is_the_same_is_no_negative() -> None:
    made, inputs = model(), batch(2)
    for name in ("input_ids", "attention_mask", "text_ids"):
        inputs[name][1] = inputs[name][0]
    loss = pair_losses(made, inputs)["contrastive"]
    assert loss.item() == pytest.approx(math.log(2), abs=0.05)


def test_the_scale_is_bounded_while_it_learns() -> None:
    made = model()
    with torch.no_grad():
        made.connector.logit_scale.fill_(9.0)
    pair_losses(made, batch(2))
    assert made.connector.logit_scale.item() == pytest.approx(LARGEST_SCALE)


@pytest.mark.parametrize("objective", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_gradient_caching_gives_the_gradient_of_the_whole_batch(objective: str, chunk: int) -> None:
    whole, cached = model(objective), model(objective)
    losses = []
    for made, size in ((whole, None), (cached, chunk)):
        loss = pair_losses(made, batch(8), [objective], chunk=size)[objective]
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    expected, found = gradients(whole), gradients(cached)
    assert expected.keys() == found.keys() and any(name.startswith("vision") for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


def test_chunks_draw_the_same_dropout_twice_and_keep_no_activations() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    seen: list[int] = []

    def embed(rows: Tensor, nothing: Tensor | None) -> Tensor:
        seen.append(len(rows))
        return layer(rows)

    rows = torch.randn(5, 4)
    made = in_chunks(embed, 2, rows, None)
    assert seen == [2, 2, 1]
    made.square().sum().backward()
    assert sorted(seen) == [1, 1, 2, 2, 2, 2]
    kept = (made != 0).float()
    again = torch.nn.functional.linear(rows, layer[0].weight, layer[0].bias) * kept * 2
    torch.testing.assert_close(made, again)
    torch.testing.assert_close(layer[0].bias.grad, (2 * made * kept * 2).sum(dim=0).detach())


def test_answers_beyond_the_list_have_no_loss() -> None:
    made = model()
    made.add_answer_head(["red", "green", "blue"], combine="concat")
    inputs = batch(4) | {"labels": torch.tensor([0, 2, IGNORE, 1])}
    questions = made.pooled_texts(inputs["input_ids"], inputs["attention_mask"])
    logits = made.answers(made.patches(inputs["pixel_values"]), questions)
    by_hand = -sum(logits[row].log_softmax(dim=0)[label] for row, label in ((0, 0), (1, 2), (3, 1)))
    torch.testing.assert_close(answer_loss(made, inputs), by_hand / 3, **CLOSE)
    assert answer_loss(made, inputs | {"labels": torch.full((4,), IGNORE)}).item() == 0


def process(rank: int, port: int, folder: str) -> None:
    with joined(rank, port) as own:
        results: dict[str, Any] = {}
        for objective in KINDS:
            made = model(objective)
            inputs = {name: tensor[own] for name, tensor in _with_duplicates(batch(5)).items()}
            loss = pair_losses(made, inputs, [objective], num_samples=5, chunk=2)[objective]
            loss.backward()
            results[objective] = [loss.detach(), gradients(made)]
        torch.save(results, Path(folder) / str(rank))


def _with_duplicates(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in ("input_ids", "attention_mask", "text_ids"):
        inputs[name][4] = inputs[name][0]
    return inputs


def test_two_processes_are_one_big_batch(tmp_path: Path) -> None:
    parts = results_of(process, tmp_path)
    for objective in KINDS:
        made = model(objective)
        whole = pair_losses(made, _with_duplicates(batch(5)), [objective])[objective]
        whole.backward()
        (one, first), (other, second) = (part[objective] for part in parts)
        torch.testing.assert_close(one + other, whole.detach(), **CLOSE)
        for name, gradient in gradients(made).items():
            torch.testing.assert_close(first[name] + second[name], gradient, **CLOSE)
