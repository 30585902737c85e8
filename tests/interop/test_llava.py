"""A transformers LLaVA checkpoint gives the same logits and the same text here."""

from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import chiasm
import tiny


def reference(tmp_path: Path, layer: int = -2) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=tiny.vision("clip").config.to_dict(),
        text_config=tiny.language("llama").config.to_dict(),
        image_token_index=260,
        image_seq_length=9,
        vision_feature_layer=layer,
    )
    torch.manual_seed(3)
    llava = LlavaForConditionalGeneration(config).eval()
    llava.save_pretrained(tmp_path)
    return llava


def test_logits_and_text_equal_the_reference(tmp_path: Path) -> None:
    llava = reference(tmp_path)
    ours = chiasm.load(tmp_path).model
    ids = torch.randint(0, 255, (2, 20))
    ids[:, 3:12] = 260
    pixels = torch.randn(2, 3, 30, 30)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, llava(**inputs).logits, rtol=1e-4, atol=1e-4)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
    assert torch.equal(ours.generate(**inputs, **greedy), llava.generate(**inputs, **greedy))
