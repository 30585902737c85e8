"""Recall@k: by hand, by chance, and of a tiny model with and without the matching head."""

import pytest
import torch

import tiny
from chiasm.data.captions import CaptionProcessor
from chiasm.evaluation.retrieval import chance, evaluate_retrieval, recall, same_pairs
from chiasm.fusion.qformer_retrieval import build_retrieval
from training import helpers


def test_recall_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.7, 0.7, 0.7]])
    right = torch.eye(3).bool()
    assert recall(scores, right, (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    right[1, 0] = True
    assert recall(scores, right, (1,)) == pytest.approx({1: 2 / 3})
    assert recall(torch.zeros(4, 4), torch.eye(4).bool(), (1, 4)) == {1: 0.0, 4: 1.0}


def test_chance_is_that_of_a_random_order() -> None:
    right = torch.eye(6).bool()
    right[0, 3] = True
    expected = torch.stack(
        [torch.tensor(list(recall(torch.rand(6, 6), right, (1, 3, 10)).values())) for _ in range(3000)]
    ).mean(dim=0)
    assert list(chance(right, (1, 3, 10)).values()) == pytest.approx(expected.tolist(), abs=0.02)


@pytest.mark.parametrize("rerank", [0, 3, 100])
def test_a_model_is_scored_in_both_directions(rerank: int) -> None:
    generative = helpers.vlm(connector=tiny.connector("qformer"))
    model = build_retrieval(generative.model, 260, space=16)
    processor = CaptionProcessor(generative.processor.image_processor, tiny.tokenizer())
    samples = [helpers.sample(index) for index in range(10)]
    assert same_pairs(samples)[0].tolist() == [index % 4 == 0 for index in range(10)]
    result = evaluate_retrieval(model, processor, samples, rerank=rerank, ks=(1, 10), batch_size=4)
    assert result.image_to_text[10] == result.text_to_image[10] == 1.0 or 0 < rerank < 10
    assert result.samples == 10 and result.reranked == bool(rerank)
    if rerank == 100:
        right = same_pairs(samples)
        pictures = torch.cat([processor(images=s.images[0].load())["pixel_values"] for s in samples])
        given = processor(text=[s.answer for s in samples])
        with torch.no_grad():
            cosines = model(**given, pixel_values=pictures).logits_per_image
            rows = [
                model.match(model.patches(pictures[i : i + 1]).expand(10, -1, -1), **given)[:, 1] for i in range(10)
            ]
        scores = cosines + torch.stack(rows)
        assert result.image_to_text == recall(scores, right, (1, 10))
        assert result.text_to_image == recall(scores.T, right.T, (1, 10))
