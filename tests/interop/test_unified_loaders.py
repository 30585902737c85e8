"""Chameleon, Fuyu and Qwen2-VL checkpoints of odd sizes: logits to 1e-4, loss, and greedy text of the reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    FuyuConfig,
    FuyuForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import chiasm
import contracts
import tiny
from chiasm.fusion.packed import PackedFusionModel
from chiasm.fusion.unified import UnifiedModel
from chiasm.generation.batched import BatchedDecoder
from chiasm.generation.lean_decoder import LeanDecoder
from chiasm.interop.fuyu import image_processor_of

SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE, VIDEO = 90, 91


def _shaken(model: Any) -> Any:
    """Weights that are all different from what they start as."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


CODES = [f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z" for code in range(13)]


def chameleon(**options: Any) -> Any:
    words = {"<image>": IMAGE, **{word: 60 - code for code, word in enumerate(CODES)}}
    vq = {"embed_dim": 6, "num_embeddings": 13, "latent_channels": 5, "resolution": 16, "base_channels": 32}
    vq |= {"channel_multiplier": [1, 2, 1], "num_res_blocks": 1, "attn_resolutions": [4]}
    options = {"vocabulary_map": words, "num_key_value_heads": 2, **options}
    return _shaken(ChameleonForConditionalGeneration(ChameleonConfig(**SIZES | options, vq_config=vq)))


def chameleon_with_processor(folder: Path) -> None:
    words = tiny.tokenizer(None)
    words.add_tokens(["<image>", "<racm3:break>", "<eoss>", "<reserved08706>", *CODES], special_tokens=True)
    words.sep_token = "<reserved08706>"
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    chameleon(vocab_size=len(words), vocabulary_map=words.get_vocab(), **ids).save_pretrained(folder)
    images = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    ChameleonProcessor(images, words, image_seq_length=16).save_pretrained(folder)


def fuyu() -> Any:
    text = {**SIZES, "model_type": "persimmon", "partial_rotary_factor": 0.5, "qk_layernorm": True, "head_dim": None}
    text.pop("head_dim")
    config = FuyuConfig(text_config={**text, "hidden_size": 48}, patch_size=5, image_size=20, image_token_id=IMAGE)
    return _shaken(FuyuForCausalLM(config))


def qwen2_vl(**options: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 9000.0, "mrope_section": [1, 1, 1]}
    text = {**SIZES, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 36, "patch_size": 3, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, **options
    )
    return _shaken(Qwen2VLForConditionalGeneration(config))


def qwen2_vl_with_processor(folder: Path) -> Qwen2VLImageProcessorPil:
    words = tiny.tokenizer()
    words.add_tokens(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    model = qwen2_vl()
    text = {**model.config.text_config.to_dict(), "vocab_size": len(words), "max_position_embeddings": 600}
    vision = model.config.vision_config
    ids = dict(zip(("image_token_id", "video_token_id"), range(len(words) - 2, len(words)), strict=True))
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).save_pretrained(
        folder
    )
    images = Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    images.save_pretrained(folder)
    words.save_pretrained(folder)
    return images


def _text(*pieces: Any) -> torch.Tensor:
    """Rows of tokens: numbers, and lists that stand for as many placeholders as they say."""
    return torch.tensor([[token for piece in pieces for token in (piece if isinstance(piece, list) else [piece])]] * 2)


def _loaded(reference: Any, folder: Path) -> Any:
    reference.save_pretrained(folder)
    return chiasm.load(folder).model


@pytest.mark.parametrize("options", [{}, {"swin_norm": True, "attention_bias": True, "mlp_bias": True}])
def test_chameleon(tmp_path: Path, options: dict[str, Any]) -> None:
    reference = chameleon(**options)
    model = _loaded(reference, tmp_path)
    assert isinstance(model, UnifiedModel)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = _text(1, 7, [IMAGE] * 16, *range(3, 27))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    contracts.check_equals_reference(model, reference, inputs, pad_token_id=0)
    contracts.check_image_matters(model, inputs)


def test_a_text_ends_as_chameleons_processor_ends_it(tmp_path: Path) -> None:
    chameleon_with_processor(tmp_path)
    text, pictures = "What <image> is <image> it?", [tiny.picture(1), tiny.picture(2).resize((70, 21))]
    expected = ChameleonProcessor.from_pretrained(tmp_path)(images=pictures, text=f"<|bos|>{text}", return_tensors="pt")
    found = chiasm.load(tmp_path).processor(images=pictures, text=text)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changed", [{"image_mean": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255}, {"do_normalize": False}]
)
def test_chameleons_own_settings_of_pictures_count(changed: dict[str, Any], tmp_path: Path) -> None:
    chameleon_with_processor(tmp_path)
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    theirs = ChameleonImageProcessorPil(**sizes, **changed)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink(missing_ok=True)
    shown = tiny.picture(2).resize((70, 21))
    found, expected = chiasm.load(tmp_path).processor.image_processor([shown]), theirs([shown], return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=1e-4, atol=1e-4)


def test_codes_that_nothing_is_read_as_are_hidden_too(tmp_path: Path) -> None:
    words = {"<image>": IMAGE, **{word: 60 - code for code, word in enumerate(CODES)}, "IMGIMGCAZ": 70}
    reference = chameleon(vocabulary_map=words)
    model, ids = _loaded(reference, tmp_path), torch.arange(3, 27)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert model(input_ids=ids).logits[..., 70].max() < -1e30


def test_the_engine_answers_as_they_do(tmp_path: Path) -> None:
    """Requests share the steps of Chameleon and Qwen2-VL too."""
    chameleon_with_processor(tmp_path / "chameleon")
    contracts.check_engine_equals_generate(chiasm.load(tmp_path / "chameleon"), kind=BatchedDecoder)
    qwen2_vl_with_processor(tmp_path / "qwen2_vl")
    contracts.check_engine_equals_generate(chiasm.load(tmp_path / "qwen2_vl"), kind=LeanDecoder)
    contracts.check_a_new_picture(chiasm.load(tmp_path / "qwen2_vl"), "encode_pictures")


def test_pictures_beyond_the_context_are_refused_by_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patches of some large pictures would take gigabytes before anything counts their tokens."""
    qwen2_vl_with_processor(tmp_path)
    vlm, picture = chiasm.load(tmp_path), tiny.picture().resize((120, 90))
    asked = [{"role": "user", "content": [{"type": "image"}] * 6 + [{"type": "text", "text": "What?"}]}]
    tokens = vlm.processor(messages=asked, images=[picture] * 6)["input_ids"][0].tolist()
    monkeypatch.setattr(vlm.processor, "image_processor", Sized(vlm.processor.image_processor))
    expected = rf"pictures alone are {tokens.count(vlm.processor.image_token_id)} tokens, .* context is 600; show fewer"
    with pytest.raises(ValueError, match=expected):
        vlm.generate([asked], [[picture] * 6])


class Sized:
    """An image processor that tells sizes and makes nothing."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        pytest.fail("made")


def test_chameleon_without_a_code(tmp_path: Path) -> None:
    reference = chameleon()
    reference.config.vocabulary_map.pop("IMGIMGBAZ")
    reference.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vocabulary_map in config.json has no word for code 10 of 13"):
        chiasm.load(tmp_path)


def test_fuyu(tmp_path: Path) -> None:
    reference = fuyu()
    model = _loaded(reference, tmp_path)
    assert isinstance(model, UnifiedModel) and model.kind == "raster"
    ids = _text([IMAGE] * 3, 71, [IMAGE] * 3, 71, 1, *range(3, 14))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 6, 75),
    }
    contracts.check_equals_reference(model, reference, inputs, pad_token_id=0)
    contracts.check_image_matters(model, inputs)


SHAPES = [(60, 90), (47, 31), (5, 5), (8, 260), (77, 13)]


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_fuyu_reads_pictures_as_the_reference_does(size: tuple[int, int], tmp_path: Path) -> None:
    """Of any shape, also those that are shrunk, and where the folder has settings of its own."""
    sizes = {"size": {"height": 50, "width": 80}, "patch_size": {"height": 5, "width": 5}}
    theirs = FuyuImageProcessorPil(**sizes, image_std=0.3, rescale_factor=1 / 127.5)
    theirs.save_pretrained(tmp_path)
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours = image_processor_of(str(tmp_path), 5)([shown])
    _, rows, columns = ours["image_grid_thw"][0].tolist()
    pixels = torch.tensor(np.asarray(theirs([[shown]])["images"][0][0]))[:, : rows * 5, : columns * 5]
    patches = (
        pixels.unflatten(1, (rows, 5)).unflatten(3, (columns, 5)).permute(1, 3, 2, 4, 0).reshape(rows * columns, 75)
    )
    torch.testing.assert_close(ours["pixel_values"], patches.float(), atol=1e-6, rtol=0)
    FuyuImageProcessorPil(padding_mode="edge").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"padding edge 1\.0 in preprocessor_config.json is not known here"):
        image_processor_of(str(tmp_path), 5)


@pytest.mark.parametrize("size", [(77, 13), (9, 40), (60, 90)], ids=str)
def test_qwen2_vl_reads_pictures_as_the_reference_does(size: tuple[int, int], tmp_path: Path) -> None:
    """Tokens, pixels and grids; a video or a picture too many is refused."""
    images = qwen2_vl_with_processor(tmp_path)
    vlm = chiasm.load(tmp_path)
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours, theirs = vlm.processor(images=[shown], messages=tiny.ask("What?")), images([shown], return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    tokens = int(theirs["image_grid_thw"].prod()) // images.merge_size**2
    assert int((ours["input_ids"] == vlm.model.config.image_token_id).sum()) == tokens
    with pytest.raises(ValueError, match="reads pictures, and a video was given"):
        vlm.processor(images=[np.zeros((4, 28, 28, 3), dtype=np.uint8)], messages=tiny.ask("What?"))
    more = ours | {name: torch.cat([ours[name]] * 2) for name in ("pixel_values", "image_grid_thw")}
    with pytest.raises(ValueError, match=r"1 picture.s. have placeholders in input_ids, but 2 were given"):
        vlm.model.generate(**more, max_new_tokens=2)


def test_a_picture_is_read_as_its_file_is(tmp_path: Path) -> None:
    """Upright by its EXIF orientation, and with 8 bits."""
    qwen2_vl_with_processor(tmp_path / "model")
    processor, turned = chiasm.load(tmp_path / "model").processor, Image.Exif()
    turned[0x0112] = 6
    tiny.picture(3).resize((60, 30)).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70).save(tmp_path / "deep.png")
    for file in (tmp_path / "turned.jpg", tmp_path / "deep.png"):
        asked = tiny.ask("What?")
        one, other = (processor(images=[shown], messages=asked) for shown in (file, Image.open(file)))
        assert torch.equal(one["image_grid_thw"], other["image_grid_thw"])
        assert torch.equal(one["pixel_values"], other["pixel_values"]), file


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_vl(tmp_path: Path, tied: bool) -> None:
    """Pictures of two shapes, and a video, in a batch that is padded on the left."""
    reference = qwen2_vl(tie_word_embeddings=tied)
    model = _loaded(reference, tmp_path)
    assert isinstance(model, PackedFusionModel)
    grids, videos = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 4, 2]]), torch.tensor([[2, 4, 2]])
    first = [1, 7, *[IMAGE] * 6, 8, *[VIDEO] * 4, 9]
    second = [1, *[IMAGE], 5, *[IMAGE] * 2, 3]
    pad = len(first) - len(second)
    ids = torch.tensor([first, [0] * pad + second])
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(int(grids.prod(dim=1).sum()), 54),
        "image_grid_thw": grids,
        "pixel_values_videos": torch.randn(int(videos.prod(dim=1).sum()), 54),
        "video_grid_thw": videos,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
    }
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, reference(**inputs).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)
    for options in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3}):
        greedy = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE]} | options
        assert torch.equal(model.generate(**inputs, **greedy), reference.generate(**inputs, **greedy))
    assert torch.equal(model(**inputs).visual_tokens[:, 0], model.encode_pictures(inputs["pixel_values"], grids)[:, 0])


def test_qwen2_vl_continues_without_being_told_positions(tmp_path: Path) -> None:
    """What a decoding loop that knows nothing of M-RoPE gets is what the whole forward gives."""
    model = _loaded(qwen2_vl(), tmp_path)
    ids = torch.tensor([[1, 7, *[IMAGE] * 6, 8, 9, 4, 5]])
    picture = {"pixel_values": torch.randn(24, 54), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    with torch.no_grad():
        whole = model(input_ids=ids, **picture).logits
        begun = model(input_ids=ids[:, :10], **picture, use_cache=True)
        rest = [
            model(input_ids=ids[:, at : at + 1], cache=begun.cache, use_cache=True).logits[:, -1] for at in (10, 11)
        ]
    torch.testing.assert_close(torch.stack(rest, dim=1), whole[:, 10:], rtol=1e-4, atol=1e-4)


def test_saved_again_and_loaded(tmp_path: Path) -> None:
    for name, reference in (("chameleon", chameleon()), ("fuyu", fuyu()), ("qwen2_vl", qwen2_vl())):
        model = _loaded(reference, tmp_path / name)
        model.save_pretrained(tmp_path / f"{name}-again")
        again = chiasm.load(tmp_path / f"{name}-again").model
        assert type(again) is type(model)
        for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(parameter, other)


@pytest.mark.parametrize("make", [chameleon, fuyu, qwen2_vl])
def test_weights_are_read_strictly(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    contracts.check_strict_loading(tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    reference = qwen2_vl()
    with pytest.raises(ValueError, match="sliding_window of this qwen2_vl_text model is 7"):
        reference.config.text_config.sliding_window = 7
        reference.config.text_config.use_sliding_window = True
        _loaded(reference, tmp_path)


def test_costs_of_a_packed_picture(tmp_path: Path) -> None:
    model = _loaded(qwen2_vl(), tmp_path)
    tower = model.vision
    rows, columns = (side * tower.merge for side in tower.grid)
    grids = torch.tensor([[1, rows, columns]])
    tower.model.set_attn_implementation("eager")  # the fused kernel is not counted on a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_pictures(torch.zeros(rows * columns, 54), grids)
    told = chiasm.VLM(model, None).cost(images=1, text_tokens=5)
    assert (told.visual_tokens, told.sequence) == (256, 261)
    assert counter.get_total_flops() == told.encode_flops + told.connect_flops
