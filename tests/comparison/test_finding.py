"""A caption's picture among others: likelihoods are the model's own, cosines those of the towers, places by hand."""

import math
from typing import Any

import pytest
import torch

import tiny
from chiasm.comparison import finding
from chiasm.comparison.finding import find_pictures
from chiasm.data.collation import Item, collate, encode_sample, load_pixels
from chiasm.evaluation.retrieval import places_of
from training import helpers

SAMPLES = [helpers.sample(index) for index in range(4)]


@pytest.mark.parametrize(
    ("fusion", "more"), [("early", {}), ("intermediate", {}), ("early", {"language": "gemma3"})], ids=str
)
def test_a_captions_scores_are_the_models_mean_log_likelihoods(
    fusion: str, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "AT_ONCE", 3)
    vlm = helpers.vlm(fusion=fusion, **more)
    query = finding._query_of(vlm.model, vlm.processor, SAMPLES)
    assert query is not None
    with torch.no_grad():
        for asked in SAMPLES[:2]:
            tokens = encode_sample(asked, vlm.processor)
            losses = []
            for shown in SAMPLES:
                item = Item(shown.id, tokens, load_pixels(shown, vlm.processor))
                losses.append(-vlm.model(**collate([item], vlm.processor).inputs).loss.item())
            assert query(asked).tolist() == pytest.approx(losses, abs=1e-5)
            assert len(set(losses)) == 4


def test_pictures_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (helpers.vlm(), helpers.dual_encoder()):
        seen: list[int] = []
        encode = type(model.model).encode_images

        def counted(self: Any, pixels: Any, *more: Any, encode: Any = encode, seen: list[int] = seen) -> Any:
            seen.append(len(pixels))
            return encode(self, pixels, *more)

        monkeypatch.setattr(type(model.model), "encode_images", counted)
        found = find_pictures(model.model, model.processor, SAMPLES)
        assert seen == [4]
        assert found is not None and found["seconds_per_query"] > 0


def test_towers_find_by_cosine() -> None:
    model = helpers.dual_encoder()
    cosines = model.score([sample.images[0].load() for sample in SAMPLES], [sample.answer for sample in SAMPLES]).T
    found = find_pictures(model.model, model.processor, SAMPLES)
    assert found is not None
    places = places_of(cosines, torch.eye(4).bool()).tolist()
    assert found["places"] == dict(zip(["s0", "s1", "s2", "s3"], places, strict=True))
    assert found["pictures"] == 4
    assert found["recall"]["1"]["accuracy"] == places.count(0) / 4
    assert found["recall"]["5"]["accuracy"] == 1.0
    assert found["recall"]["5"]["low"] < 1.0


def test_a_connector_that_reads_the_request_is_not_asked() -> None:
    vlm = helpers.vlm(connector=tiny.connector("qformer", instruction=True))
    assert vlm.model.reads_instruction
    assert find_pictures(vlm.model, vlm.processor, SAMPLES) is None


def test_places_count_what_is_as_good_and_what_is_no_number() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.3], [0.7, 0.8, 0.6], [math.nan, 0.1, math.nan]])
    right = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()
    assert places_of(scores, right).tolist() == [0, 1, 2, 2]
