"""Recall@k: by hand, by chance, and of a tiny model with and without the matching head."""

from pathlib import Path
from typing import Any

import pytest
import torch

import chiasm
import chiasm.api
import tiny
from chiasm.data.captions import CaptionProcessor
from chiasm.data.schema import ImageError
from chiasm.data.splits import Subset
from chiasm.evaluation import paired
from chiasm.evaluation.evaluate import EvalResult
from chiasm.evaluation.retrieval import chance, evaluate_retrieval, recall, same_pairs
from chiasm.evaluation.skills import to_table
from chiasm.evaluation.usable import of_one_picture
from chiasm.evaluation.zero_shot import label_vectors
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


def seeing(encoder: chiasm.DualEncoder) -> chiasm.DualEncoder:
    """The encoder, whose vectors of the four colours' pictures and names are told apart perfectly."""
    colours = list(helpers.COLOURS)
    words = encoder.embed_texts(colours).clone()

    def of_texts(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        said = encoder.processor.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return torch.stack([words[next(i for i, c in enumerate(colours) if c in text)] for text in said])

    def of_images(patches: torch.Tensor) -> torch.Tensor:
        shown = [pixels.flatten(1).mean(dim=1) for pixels in patches]
        return torch.stack([words[3 if s.max() - s.min() < 0.2 else int(s.argmax())] for s in shown])

    model: Any = encoder.model
    model.patches = lambda pixels=None, image_features=None: pixels if pixels is not None else image_features
    model.encode_images, model.embed_images, model.embed_texts = (lambda pixels: pixels), of_images, of_texts
    return encoder


def test_two_towers_are_scored_beside_the_wrong_picture() -> None:
    samples = [helpers.sample(index) for index in range(12)]
    encoder = helpers.dual_encoder()
    result = evaluate_retrieval(encoder.model, encoder.processor, samples, ks=(1, 12))
    with torch.no_grad():
        scores = encoder.score([s.images[0].load() for s in samples], [s.answer for s in samples])
    assert result.image_to_text == recall(scores, same_pairs(samples), (1, 12))
    assert result.text_to_image == recall(scores.T, same_pairs(samples).T, (1, 12))
    with pytest.raises(ValueError, match="rerank=3 needs a matching head"):
        evaluate_retrieval(encoder.model, encoder.processor, samples, rerank=3)
    for task in ("retrieval", "zero-shot"):
        with pytest.raises(ValueError, match="batch_size is 0"):
            chiasm.api.evaluate(encoder, samples, task=task, batch_size=0)


def test_samples_without_exactly_one_picture_are_left_out_and_counted() -> None:
    samples = [helpers.sample(index) for index in range(12)]
    mixed = [*samples[:6], helpers.sample(20, images=0), *samples[6:], helpers.sample(21, images=2)]
    for task in ("retrieval", "zero-shot"):
        alone = chiasm.api.evaluate(helpers.dual_encoder(), samples, task=task)
        result = chiasm.api.evaluate(helpers.dual_encoder(), mixed, task=task)
        assert result.summary == alone.summary
        assert "samples left out, since they do not have exactly one picture: 2" in result.notes
        with pytest.raises(ValueError, match="none of the 1 samples has exactly one picture"):
            chiasm.api.evaluate(helpers.dual_encoder(), [helpers.sample(1, images=2)], task=task)
    kept, _ = of_one_picture(mixed)
    assert isinstance(kept, Subset) and list(kept) == samples


def test_an_error_does_not_advise_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise ImageError("missing", "7.png", "it is gone")

    monkeypatch.setattr(chiasm.api, "evaluate_retrieval", gone)
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match=r"7\.png") as told:
            chiasm.api.evaluate(helpers.dual_encoder(), [helpers.sample(0)], task="retrieval", skip_bad=skip_bad)
        assert ("--skip-bad" in str(told.value)) != skip_bad


def test_seeing_beats_the_control() -> None:
    samples = [helpers.sample(index) for index in range(12)]
    found = chiasm.api.evaluate(seeing(helpers.dual_encoder()), samples)
    names = [row["skill"] for row in found.summary]
    assert names == [f"{way}, recall@{k}" for way in ("image → text", "text → image") for k in (1, 5, 10)]
    first = found.summary[0]
    assert first["accuracy"] == 1.0 and first["low"] > 0.7 and first["control_accuracy"] < 0.5
    assert first["control_n"] == first["n"] == 12 and found.rows[0]["recall@1"] is True
    assert len(list(to_table(found.summary).rows)) == 6


def test_zero_shot_classification_by_prompts() -> None:
    samples = [helpers.sample(index) for index in range(12)]
    encoder = seeing(helpers.dual_encoder())
    found = chiasm.api.evaluate(encoder, samples, task="zero-shot", templates=["{}", "the colour {}"])
    assert [row["skill"] for row in found.summary] == ["accuracy@1", "accuracy@5"]
    assert found.summary[0]["accuracy"] == 1.0 and found.summary[0]["control_accuracy"] < 0.5
    assert found.summary[0]["chance"] == pytest.approx(0.25) and found.notes == ["4 labels, 2 prompt(s) each"]
    assert encoder.classify([s.images[0].load() for s in samples[:4]], list(helpers.COLOURS)) == list(helpers.COLOURS)


def test_a_labels_vector_is_the_mean_of_its_prompts() -> None:
    encoder = helpers.dual_encoder()
    vectors = label_vectors(encoder.model, encoder.processor, ["cat", "dog"], ["{}", "a {}"])
    by_hand = encoder.embed_texts(["cat", "a cat"]).mean(dim=0)
    torch.testing.assert_close(vectors[0], by_hand / by_hand.norm(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="labels is the text 'cat', expected a list"):
        label_vectors(encoder.model, encoder.processor, "cat")
    with pytest.raises(ValueError, match=r"template 'a cat' has no \{\}"):
        label_vectors(encoder.model, encoder.processor, ["cat"], ["a cat"])


@pytest.mark.parametrize(("task", "skills"), [("retrieval", 2), ("zero-shot", 1)])
def test_two_models_are_compared_query_by_query(task: str, skills: int, tmp_path: Path) -> None:
    samples = [helpers.sample(index) for index in range(12)] * 2
    encoders = (seeing(helpers.dual_encoder()), helpers.dual_encoder())
    here, there = (chiasm.api.evaluate(encoder, samples, task=task) for encoder in encoders)
    compared = paired.compare(here, EvalResult.load(there.save(tmp_path)))
    assert [row["n"] for row in compared] == [24] * skills + [24 * skills]
    first = {row["skill"]: row["accuracy"] for row in there.summary}
    for row in compared[:-1]:
        assert row["accuracy"] == 1.0 and row["other_accuracy"] == pytest.approx(first[row["skill"]])
    assert "is better than" in paired.verdict(compared[-1], "here", "there")


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("retrieval", {"metric": "anls"}),
        ("zero-shot", {"shots": 2}),
        ("retrieval", {"templates": ["a {}"]}),
        ("answers", {"templates": ["a {}"]}),
    ],
)
def test_what_a_task_does_not_read_is_refused(task: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"is not for task '{task}', which does not read it"):
        chiasm.api.evaluate(helpers.dual_encoder(), [helpers.sample(index) for index in range(4)], task=task, **given)


def test_tasks_that_a_model_does_not_have_are_refused() -> None:
    samples = [helpers.sample(index) for index in range(4)]
    with pytest.raises(ValueError, match="task 'retrieval' is not one of this model; choose of answers"):
        chiasm.api.evaluate(helpers.vlm(), samples, task="retrieval")
    with pytest.raises(ValueError, match="this model has no answer head"):
        chiasm.api.evaluate(helpers.dual_encoder(), samples, task="answers")


def test_answers_of_two_towers_are_scored_per_skill() -> None:
    encoder = helpers.dual_encoder()
    encoder.model.add_answer_head(list(helpers.COLOURS), combine="product", hidden=5)
    found = chiasm.api.evaluate(encoder, [helpers.sample(index) for index in range(8)])
    assert found.summary[-1]["n"] == 8 and found.summary[-1]["control_n"] == 8
    assert {row["answer"] for row in found.rows} <= set(helpers.COLOURS)
