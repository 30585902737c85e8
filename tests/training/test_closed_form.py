"""The closed-form start reads captions: a picture's visual tokens lie nearer to its own word than to another one's."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

import chiasm
import tiny
from chiasm.connectors import CONNECTORS, AffineConnector, build_connector
from chiasm.data.schema import ImageRef, Sample
from chiasm.training import closed_form as start
from chiasm.training.closed_form import (
    FEWEST_CAPTIONS,
    Kept,
    WordEmbeddings,
    caption_indices,
    closed_form,
    rarity,
    words_by_picture,
)


def ends_linear(name: str) -> bool:
    return build_connector(tiny.connector(name), 20, 36, (3, 3)).output is not None


FITTED = [name for name, kind in CONNECTORS.items() if not issubclass(kind, AffineConnector) and ends_linear(name)]
PICTURES = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20)}


def samples(number: int = 30, answer: str = "A picture in {}.") -> list[Sample]:
    made = []
    for index in range(number):
        name = list(PICTURES)[index % len(PICTURES)]
        picture = Image.new("RGB", (40, 40), PICTURES[name])
        question = [{"type": "image"}, {"type": "text", "text": "What?"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.format(name)}]
        made.append(Sample(str(index), turns, [ImageRef.of(picture, name)], None, {}))
    return made


def encoder(vlm: chiasm.VLM) -> Callable[[Sample], Tensor]:
    def features_of(sample: Sample) -> Tensor:
        pixels = vlm.processor.image_processor([image.load() for image in sample.images])["pixel_values"]
        with torch.no_grad():
            return vlm.model.encode_images(pixels)

    return features_of


def nearest_words(vlm: chiasm.VLM, data: list[Sample], features_of: Callable[[Sample], Tensor]) -> list[int]:
    """For every sample the word, by number, that its mean visual token lies nearest to."""
    words = WordEmbeddings(vlm.model, vlm.processor.tokenizer)
    vocabulary = torch.stack([words.of(name) for name in PICTURES])
    with torch.no_grad():
        tokens = torch.stack([vlm.model.connect_features(features_of(s))[0].mean(dim=0) for s in data])
    return ((tokens - tokens.mean(dim=0)) @ (vocabulary - vocabulary.mean(dim=0)).T).argmax(dim=1).tolist()


@pytest.mark.parametrize("connector", ["linear", "mlp"])
@pytest.mark.parametrize("vision", ["clip", "convnext"])
@pytest.mark.parametrize("fusion", ["early", "intermediate"])
def test_tokens_lie_near_their_words(connector: str, vision: str, fusion: str) -> None:
    vlm = chiasm.connect(tiny.vision(vision), tiny.language(), connector, fusion, tokenizer=tiny.tokenizer())
    data, features_of = samples(), encoder(vlm)
    assert closed_form(vlm.model, vlm.processor.tokenizer, data, features_of) == (len(data), 0.0)
    assert nearest_words(vlm, data[:3], features_of) == [0, 1, 2]


def test_a_norm_at_the_end_cannot_be_fitted() -> None:
    connector = tiny.connector("idefics2_resampler")
    vlm = chiasm.connect(tiny.vision(), tiny.language(), connector, tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match="connector idefics2_resampler does not end in a linear layer"):
        closed_form(vlm.model, vlm.processor.tokenizer, samples(), encoder(vlm))


def test_features_are_kept_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.arange(60.0).reshape(20, 3, 1).expand(20, 3, 5).contiguous()
    monkeypatch.setattr(start, "KEPT_BYTES", 5 * pictures[0].nbytes)
    kept = Kept(20)
    for count in (3, 1, 6, 10):
        kept.add(pictures[kept.seen : kept.seen + count])
    assert torch.equal(torch.cat(kept.features), pictures[::4])
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.features) == 5 * pictures[0].nbytes


def test_each_picture_has_its_own_words() -> None:
    def ask(images: int) -> dict:
        return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": "What?"}]}

    def say(text: str) -> dict:
        return {"role": "assistant", "content": text}

    turns = [ask(1), say("A cat."), ask(0), say("It is red."), ask(2), say("Two dogs")]
    assert words_by_picture(Sample("s", turns)) == [{"a", "cat", "it", "is", "red"}, *[{"two", "dogs"}] * 2]


def test_words_of_every_answer_weigh_nothing() -> None:
    weights = rarity(samples())
    assert weights["picture"] == 0
    assert weights["red"] > 0


def test_pictures_may_stand_in_an_answer() -> None:
    sample = samples(1)[0]
    turns = [
        {"role": "user", "content": "Show a red one."},
        {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "red"}]},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": "Yes, crimson"},
    ]
    assert words_by_picture(replace(sample, messages=turns)) == [{"red", "yes", "crimson"}]


def test_captions_that_agree_are_refused() -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match="captions that differ"):
        closed_form(vlm.model, vlm.processor.tokenizer, samples()[::3], encoder(vlm))


def test_it_starts_from_captions_where_there_are_enough() -> None:
    captions, short = samples(FEWEST_CAPTIONS, "All of the picture is {}."), samples(40, "{}")
    words_only = replace(captions[0], images=[])
    mixed = [*short, *captions]
    assert caption_indices(mixed, range(len(mixed))) == list(range(len(short), len(mixed)))
    assert caption_indices(mixed, range(len(mixed) - 1)) == list(range(len(mixed) - 1))
    assert caption_indices(short, [3, 5]) == [3, 5]
    assert len(caption_indices([*mixed, words_only], range(len(mixed) + 1))) == len(captions)


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
@pytest.mark.parametrize("name", FITTED)
def test_other_connectors_are_fitted_to_it(name: str, fusion: str) -> None:
    """Their tokens, too, lie near the words for their pictures."""
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tiny.connector(name), fusion, tokenizer=tiny.tokenizer())
    data, features_of = samples(), encoder(vlm)
    pictures, missed = closed_form(vlm.model, vlm.processor.tokenizer, data, features_of)
    assert pictures == len(data) and 0 < missed < 1
    assert nearest_words(vlm, data[:3], features_of) == [0, 1, 2]
