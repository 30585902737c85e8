"""The retrieval model scores as transformers' BLIP-2 does, and shares its weights with a generative model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
)

import chiasm
import contracts
import tiny
from chiasm.data.captions import CaptionProcessor
from chiasm.fusion.qformer_retrieval import QFormerRetrieval, build_retrieval
from chiasm.interop.blip2_retrieval import load_blip2_retrieval
from chiasm.vlm import load_vlm
from training import helpers

VOCABULARY = 260
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def vlm(**options: Any) -> Any:
    return helpers.vlm(connector=tiny.connector("qformer", **options))


def retrieval(**options: Any) -> QFormerRetrieval:
    torch.manual_seed(0)
    return build_retrieval(vlm(**options).model, VOCABULARY, space=16)


def texts(count: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(count, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return torch.randint(0, VOCABULARY, (count, length)), mask


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Blip2ForImageTextRetrieval]:
    torch.manual_seed(0)
    vision = Blip2VisionConfig(
        hidden_size=28, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, image_size=30, patch_size=10
    )
    qformer = Blip2QFormerConfig(
        vocab_size=41,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=44,
        encoder_hidden_size=28,
        max_position_embeddings=19,
        use_qformer_text_input=True,
    )
    sizes = {"num_query_tokens": 5, "image_text_hidden_size": 13}
    config = Blip2Config(
        vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), text_config=OPTConfig().to_dict(), **sizes
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("blip2")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("together", [False, True])
def test_scores_equal_the_reference(reference: tuple, together: bool) -> None:
    folder, theirs = reference
    ours, processor = load_blip2_retrieval(str(folder))
    assert processor is None
    ids, mask = texts(2)
    inputs = {"input_ids": ids % 41, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 30, 30)}
    with torch.no_grad():
        expected = theirs(**inputs, use_image_text_matching_head=together)
        found = ours(**inputs, use_image_text_matching_head=together)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, **CLOSE)
    torch.testing.assert_close(found.logits_per_text, expected.logits_per_text, **CLOSE)
    if not together:
        torch.testing.assert_close(found.image_embeds, expected.image_embeds, **CLOSE)
        torch.testing.assert_close(found.text_embeds, expected.text_embeds, **CLOSE)


def test_one_pass_with_the_unimodal_mask_equals_two_passes() -> None:
    model = retrieval()
    connector, (ids, mask) = model.connector, texts()
    patches = model.patches(torch.randn(3, 3, 30, 30))
    apart = torch.block_diag(torch.ones(2 * [connector.num_tokens]), torch.ones(2 * [mask.shape[1]])).bool()
    joint = apart & torch.nn.functional.pad(mask.bool(), (connector.num_tokens, 0), value=True)[:, None]
    with torch.no_grad():
        queries, words = connector.encode(connector.query_tokens(patches), ids, joint, patches)
        alone, _ = connector.encode(connector.query_tokens(patches), features=patches)
        _, read = connector.encode(text_ids=ids, mask=mask.bool()[:, None])
    torch.testing.assert_close(queries, alone, **CLOSE)
    torch.testing.assert_close(words[mask.bool()], read[mask.bool()], **CLOSE)


@pytest.mark.parametrize("instruction", [False, True])
def test_the_generative_model_and_its_retrieval_model_are_one(instruction: bool) -> None:
    options = {"instruction": True, "vocabulary": VOCABULARY} if instruction else {}
    generative = vlm(**options).model
    before = {name: tensor.clone() for name, tensor in generative.state_dict().items()}
    model = build_retrieval(generative, VOCABULARY, space=16)
    assert all(torch.equal(before[name], tensor) for name, tensor in generative.state_dict().items())
    ours, theirs = dict(model.named_parameters()), dict(generative.named_parameters())
    shared = {name for name in ours.keys() & theirs.keys() if ours[name] is theirs[name]}
    assert shared == ours.keys() & theirs.keys()
    connector = {name for name in theirs if name.startswith("connector.")}
    assert connector - shared == {"connector.proj.weight", "connector.proj.bias"}
    own = {name.split(".")[1] for name in ours.keys() - shared}
    heads = {"image_projection", "text_projection", "matching_head", "language_head", "temperature"}
    assert own >= heads and ("positions" in own) == (not instruction)
    assert all(name.startswith(("vision.", "connector.")) for name in ours)


def test_new_text_layers_start_as_the_queries() -> None:
    generative = vlm().model
    model = build_retrieval(generative, VOCABULARY)
    for new, old in zip(model.connector.blocks, generative.connector.blocks, strict=True):
        assert new.query_feed_forward.up.weight is old.query_feed_forward.up.weight
        assert new.text_feed_forward.up.weight is not old.query_feed_forward.up.weight


def test_saved_equals_loaded(tmp_path: Path) -> None:
    model = retrieval()
    ids, mask = texts()
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 30, 30)}
    processor = CaptionProcessor(helpers.vlm().processor.image_processor, tiny.tokenizer(), text_length=9)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = QFormerRetrieval.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
        assert torch.equal(again(**inputs, return_dict=False)[0], model(**inputs).logits_per_image)
    contracts.check_attention_implementations(model, lambda one: one(**inputs).logits_per_image)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    read = CaptionProcessor.from_pretrained(tmp_path)
    given = read(images=[tiny.picture()], text=["a long caption", "b"])
    assert given["input_ids"].shape == (2, 9) and given["pixel_values"].shape == (1, 3, 30, 30)
    bos, end = read.tokenizer.bos_token_id, read.tokenizer.eos_token_id
    assert given["input_ids"][0, 0] == bos and given["input_ids"][0, -1] == end
    assert given["attention_mask"].tolist() == [[1] * 9, [1] * 3 + [0] * 6]


def test_parts_of_different_precision_stay_so(tmp_path: Path) -> None:
    model = retrieval()
    model.vision.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = QFormerRetrieval.from_pretrained(tmp_path)
    assert again.vision.model.dtype == torch.bfloat16 and again.connector.dtype == torch.float32
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_pixels_and_features_score_alike_and_padding_is_ignored() -> None:
    model = retrieval()
    ids, mask = texts()
    pixels = torch.randn(3, 3, 30, 30)
    wide = {"input_ids": torch.cat([ids, ids], 1), "attention_mask": torch.cat([mask, mask * 0], 1)}
    with torch.no_grad():
        features = model.encode_images(pixels)
        for together in (False, True):
            plain = model(ids, mask, pixels, use_image_text_matching_head=together).logits_per_image
            other = model(**wide, image_features=features, use_image_text_matching_head=together).logits_per_image
            torch.testing.assert_close(plain, other, **CLOSE)


def test_other_connectors_and_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="this model has the connector 'mlp'; connect one with fusion='late' or"):
        build_retrieval(helpers.vlm().model, VOCABULARY)
    with pytest.raises(ValueError, match="text branch has 99 tokens, the captions' tokenizer 260"):
        build_retrieval(vlm(vocabulary=99).model, VOCABULARY)


def test_the_reference_loads_as_a_dual_encoder(reference: tuple[Path, Blip2ForImageTextRetrieval]) -> None:
    folder, theirs = reference
    loaded = chiasm.load(folder)
    assert isinstance(loaded, chiasm.DualEncoder)
    ids, mask = texts()
    inputs = {"pixel_values": torch.randn(3, 3, 30, 30), "input_ids": ids % 41, "attention_mask": mask}
    for matching in (True, False):
        with torch.no_grad():
            ours = loaded.model(**inputs, use_image_text_matching_head=matching)
            expected = theirs(**inputs, use_image_text_matching_head=matching)
        torch.testing.assert_close(ours.logits_per_image, expected.logits_per_image, **CLOSE)
    with pytest.raises(ValueError, match="no processor"):
        loaded.score(tiny.picture(), "a cat")
    with pytest.raises(ValueError, match="holds a retrieval model"):
        load_vlm(folder)


def test_pictures_and_texts_are_scored_saved_and_loaded(tmp_path: Path) -> None:
    source = vlm()
    processor = CaptionProcessor(source.processor.image_processor, tiny.tokenizer())
    dual = chiasm.DualEncoder(build_retrieval(source.model, VOCABULARY + 1, space=16), processor)
    images, words = [tiny.picture(1), tiny.picture(2)], ["a cat", "two dogs", "a house"]
    scores = dual.score(images, words)
    assert scores.shape == (2, 3) and scores.abs().max() <= 1 + 1e-5
    assert dual.match(images, words[:2]).shape == (2,)
    with pytest.raises(ValueError, match=r"2 picture\(s\) but 3 text\(s\)"):
        dual.match(images, words)
    dual.save_pretrained(tmp_path)
    assert torch.equal(chiasm.load(tmp_path).score(images, words), scores)


@pytest.mark.parametrize("words", [VOCABULARY + 7, VOCABULARY - 7])
def test_the_table_of_words_can_be_resized(words: int, tmp_path: Path) -> None:
    """The head and the configuration have as many, so that it loads."""
    model, (ids, mask) = retrieval(), texts()
    model.resize_token_embeddings(words)
    assert model.config.vocab_size == model.connector.decoder_token_id == words
    head = model.connector.language_head
    assert head(torch.randn(1, 24), model.connector.words.weight).shape == (1, words)
    model.save_pretrained(tmp_path)
    again = QFormerRetrieval.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.embed_texts(ids % words, mask), model.embed_texts(ids % words, mask))


def test_the_table_of_words_can_be_given() -> None:
    """A plain one keeps the [DEC] token; one of another size does not fit the head."""
    model, (ids, mask) = retrieval(), texts()
    old = model.get_input_embeddings()
    table = torch.nn.Embedding(*old.weight.shape)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings().weight is table.weight
    assert model.connector.words.decoder is old.decoder and model.connector.decoder_token_id == VOCABULARY
    model.embed_texts(ids, mask).sum().backward()
    assert table.weight.grad is not None and table.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"a table of words of \(260, 24\), got \(9, 24\); another vocabulary"):
        model.set_input_embeddings(torch.nn.Embedding(9, 24))
