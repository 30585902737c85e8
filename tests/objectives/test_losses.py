"""Masks as explicit matrices, losses against computations of a few lines, negatives that are never right."""

import math

import pytest
import torch
from torch import Tensor

from chiasm.language.next_token import IGNORE
from chiasm.objectives.contrastive import contrastive_loss, identical_pairs, query_similarity
from chiasm.objectives.grounded_generation import decoder_inputs, grounded_generation_loss
from chiasm.objectives.masks import multimodal_causal_mask
from chiasm.objectives.matching import NONE, draw_negatives, matching_loss, pairs_to_match

TEXT = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_text_sees_the_queries_and_earlier_text() -> None:
    causal = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    padded = causal & torch.tensor([1, 1, 1, 1, 0]).bool()
    assert torch.equal(multimodal_causal_mask(2, TEXT), torch.stack([causal, padded]))


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_similarity_is_the_best_querys() -> None:
    images, texts = unit(3, 4, 5), unit(2, 5)
    scores = query_similarity(images, texts)
    for i in range(3):
        for t in range(2):
            assert scores[i, t].item() == pytest.approx(max(float(query @ texts[t]) for query in images[i]), abs=1e-6)


def smooth_cross_entropy(logits: Tensor, right: int) -> float:
    logs = logits.log_softmax(dim=0)
    return -(0.9 * logs[right] + 0.1 * logs.mean()).item()


def test_contrastive_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    to_text, to_image, temperature = torch.rand(4, 4), torch.rand(4, 4), torch.tensor(0.07)
    loss = contrastive_loss(to_text, to_image, torch.eye(4).bool(), temperature)
    by_hand = [smooth_cross_entropy(s[i] / 0.07, i) for s in (to_text, to_image) for i in range(4)]
    assert loss.item() == pytest.approx(sum(by_hand) / 8, rel=1e-5)
    half = contrastive_loss(to_text, to_image, torch.eye(4).bool(), temperature, num_items=8)
    assert half.item() == pytest.approx(loss.item() / 2)
    one = contrastive_loss(to_text[:1, :1], to_image[:1, :1], torch.ones(1, 1).bool(), temperature)
    assert one.item() == 0.0


def test_the_temperature_learns() -> None:
    temperature = torch.nn.Parameter(torch.tensor(0.07))
    contrastive_loss(torch.eye(3), torch.eye(3), torch.eye(3).bool(), temperature).backward()
    assert temperature.grad is not None and temperature.grad != 0


def test_identical_pairs_are_all_right() -> None:
    texts = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]])
    pictures = torch.tensor([7, 8, 9, 8])
    same = identical_pairs(pictures, texts, pictures, texts)
    expected = torch.eye(4).bool()
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    assert torch.equal(same, expected)
    assert torch.equal(identical_pairs(pictures[1:2], texts[1:2], pictures, texts), expected[1:2])
    scores = torch.zeros(4, 4)
    scores[0, 0] = scores[0, 2] = scores[2, 0] = scores[2, 2] = 1.0
    scores[1, 1] = scores[1, 3] = scores[3, 1] = scores[3, 3] = 1.0
    blind = contrastive_loss(scores, scores, torch.eye(4).bool(), torch.tensor(0.07), smoothing=0.0)
    aware = contrastive_loss(scores, scores, same, torch.tensor(0.07), smoothing=0.0)
    assert aware.item() == pytest.approx(math.log(2), abs=1e-4) and blind.item() == pytest.approx(math.log(2), abs=1e-4)
    scores[0, 2] = 0.0
    assert contrastive_loss(scores, scores, same, torch.tensor(0.07), smoothing=0.0) > blind + 1


def test_negatives_are_drawn_by_softmax_and_never_right() -> None:
    torch.manual_seed(0)
    scores = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    same = torch.tensor([[True, False, False, True]])
    drawn = torch.stack([draw_negatives(scores, same) for _ in range(2000)])
    assert set(drawn.flatten().tolist()) == {1, 2}
    share = (drawn == 2).float().mean().item()
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.04)
    generator = torch.Generator().manual_seed(3)
    first = draw_negatives(torch.randn(64, 64), torch.eye(64).bool(), generator)
    assert (first != torch.arange(64)).all()


def test_rows_without_a_wrong_candidate_draw_none() -> None:
    same = torch.tensor([[True, True], [False, True]])
    assert draw_negatives(torch.zeros(2, 2), same).tolist() == [NONE, 0]
    assert draw_negatives(torch.zeros(1, 1), torch.ones(1, 1).bool()).tolist() == [NONE]


def test_pairs_are_one_right_one_wrong_picture_one_wrong_text() -> None:
    pictures, texts, belong = pairs_to_match(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    assert pictures.tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
    assert texts.tolist() == [0, 1, 2, 0, 1, 2, 2, 0, 1]
    assert belong.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_pairs_of_a_later_process_and_missing_negatives() -> None:
    pictures, texts, belong = pairs_to_match(torch.tensor([0, NONE]), torch.tensor([NONE, NONE]), first=4)
    assert (pictures.tolist(), texts.tolist(), belong.tolist()) == ([4, 0], [4, 4], [1, 0])
    assert all(len(part) == 0 for part in pairs_to_match(torch.tensor([NONE]), torch.tensor([NONE])))


def test_matching_loss() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.5, 0.5]])
    expected = -sum(math.log(p) for p in (1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1)), 0.5)) / 3
    assert matching_loss(logits, torch.tensor([1, 0, 0])).item() == pytest.approx(expected, rel=1e-5)
    nothing = torch.zeros(0, 2, requires_grad=True)
    loss = matching_loss(nothing, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0


def test_generation_predicts_every_token_after_the_decoders() -> None:
    ids, labels = decoder_inputs(torch.tensor([[5, 6, 7], [5, 8, 0]]), TEXT, 99)
    assert ids.tolist() == [[99, 6, 7], [99, 8, 0]]
    assert labels.tolist() == [[IGNORE, 6, 7], [IGNORE, 8, IGNORE]]
    logits, targets = torch.randn(3, 6), torch.tensor([1, 5, 0])
    by_hand = sum(smooth_cross_entropy(row, int(t)) for row, t in zip(logits, targets, strict=True))
    assert grounded_generation_loss(logits, targets).item() == pytest.approx(by_hand / 3, rel=1e-5)
    assert grounded_generation_loss(logits, targets, num_items=6).item() == pytest.approx(by_hand / 6, rel=1e-5)
