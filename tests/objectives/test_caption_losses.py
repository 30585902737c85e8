"""The three losses of a batch: against the model's own scores, alone, and over two processes."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tiny
from chiasm.fusion.qformer_retrieval import QFormerRetrieval, build_retrieval
from chiasm.objectives import CAPTION_OBJECTIVES
from chiasm.objectives.captions import caption_losses
from chiasm.objectives.processes import gather
from objectives.two_processes import joined, results_of
from training import helpers


def model() -> QFormerRetrieval:
    generative = helpers.vlm(connector=tiny.connector("qformer", max_positions=19)).model
    torch.manual_seed(0)
    made = build_retrieval(generative, 260, space=16)
    for name, parameter in made.connector.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "head" in name or "projection" in name else 0.1)
    return made


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(1, 250, (count, 6)), torch.ones(count, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "image_features": torch.randn(count, 9, 24),
        "picture_ids": torch.arange(count),
    }


def test_losses_agree_with_the_models_scores() -> None:
    retrieval, inputs = model(), batch()
    with torch.no_grad():
        torch.manual_seed(5)
        losses = caption_losses(retrieval, inputs)
        assert set(losses) == set(CAPTION_OBJECTIVES)
        scores = retrieval(inputs["input_ids"], inputs["attention_mask"], image_features=inputs["image_features"])
        right, t = torch.arange(4), 0.07
        expected = (
            F.cross_entropy(scores.logits_per_image / t, right, label_smoothing=0.1)
            + F.cross_entropy(scores.logits_per_text / t, right, label_smoothing=0.1)
        ) / 2
        torch.testing.assert_close(losses["contrastive"], expected, rtol=1e-4, atol=1e-5)
        torch.manual_seed(5)
        not_right = torch.eye(4).bool()
        texts, pictures = (
            torch.multinomial((s / t).masked_fill(not_right, -torch.inf).softmax(dim=1), 1).flatten()
            for s in (scores.logits_per_image, scores.logits_per_text)
        )
        rows = [(i, i) for i in range(4)] + [(int(pictures[i]), i) for i in range(4)]
        rows += [(i, int(texts[i])) for i in range(4)]
        logits = torch.stack([pair(retrieval, inputs, picture, text) for picture, text in rows])
        expected = F.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 8))
        torch.testing.assert_close(losses["matching"], expected, rtol=1e-4, atol=1e-5)


def pair(retrieval: QFormerRetrieval, inputs: dict[str, torch.Tensor], picture: int, text: int) -> torch.Tensor:
    row = slice(text, text + 1)
    return retrieval(
        inputs["input_ids"][row],
        inputs["attention_mask"][row],
        image_features=inputs["image_features"][picture : picture + 1],
        use_image_text_matching_head=True,
    ).logits_per_image[0]


def test_generation_is_causal_and_reads_the_picture() -> None:
    retrieval, inputs = model(), batch(2)
    losses = []
    with torch.no_grad():
        for changed in ("nothing", "last word", "picture"):
            given = {name: tensor.clone() for name, tensor in inputs.items()}
            if changed == "last word":
                given["input_ids"][1, -1] = 3
            if changed == "picture":
                given["image_features"][1] *= -1
            losses.append(caption_losses(retrieval, given, ["grounded_generation"])["grounded_generation"].item())
    assert len(set(losses)) == 3
    assert 4.0 < losses[0] < 8.0  # near the logarithm of the vocabulary, 5.6


def test_several_batches_weigh_as_one() -> None:
    retrieval, inputs = model(), batch(4)
    halves = [{name: tensor[rows] for name, tensor in inputs.items()} for rows in (slice(0, 3), slice(3, 4))]
    tokens = int(inputs["attention_mask"].sum()) - 4
    with torch.no_grad():
        whole = caption_losses(retrieval, inputs, ["grounded_generation"])["grounded_generation"]
        parts = [caption_losses(retrieval, half, ["grounded_generation"], 4, tokens) for half in halves]
    torch.testing.assert_close(sum(part["grounded_generation"] for part in parts), whole)


def test_a_batch_of_one_teaches_generation_only() -> None:
    retrieval = model().train()
    losses = caption_losses(retrieval, batch(1))
    assert losses["contrastive"].item() == 0 and losses["matching"].item() == 0
    assert losses["grounded_generation"].item() > 1
    sum(losses.values()).backward()
    for name, parameter in retrieval.connector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert retrieval.connector.matching_head.weight.grad.abs().sum() == 0
    assert retrieval.match(retrieval.patches(None, torch.randn(1, 9, 24)), batch(1)["input_ids"]).shape == (1, 2)


def test_the_same_picture_or_text_is_never_a_negative() -> None:
    retrieval, inputs = model(), batch(3)
    inputs["picture_ids"] = torch.tensor([7, 7, 8])
    inputs["input_ids"][2], inputs["attention_mask"][2] = inputs["input_ids"][0], inputs["attention_mask"][0]
    seen: list[torch.Tensor] = []
    retrieval.match = lambda patches, ids, mask: seen.append(ids) or torch.zeros(len(ids), 2)  # type: ignore[method-assign]
    for _ in range(5):
        losses = caption_losses(retrieval, inputs, ["matching"])
        assert len(seen[-1]) == 6 and losses["matching"].item() == pytest.approx(0.6931, abs=1e-3)


def process(rank: int, port: int, folder: str) -> None:
    with joined(rank, port) as own:
        rows = torch.arange(10.0).reshape(5, 2)[own].requires_grad_()
        everyone, first = gather(rows)
        assert torch.equal(everyone, torch.arange(10.0).reshape(5, 2)) and first == own.start
        (everyone * everyone).sum().backward()
        assert torch.equal(rows.grad, 2 * rows.detach())
        retrieval = model()
        inputs = {name: tensor[own] for name, tensor in batch(5).items()}
        losses = caption_losses(retrieval, inputs, num_samples=5)
        sum(losses.values()).backward()
        gradient = retrieval.connector.text_projection.weight.grad
        torch.save([losses["contrastive"].detach(), gradient], Path(folder) / str(rank))


def test_two_processes_compare_with_each_others_pairs(tmp_path: Path) -> None:
    parts = results_of(process, tmp_path)
    whole = caption_losses(model(), batch(5), ["contrastive"])["contrastive"]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole.detach(), rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().sum() > 0 for _, gradient in parts)
