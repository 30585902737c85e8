"""Exported folders answer in transformers' pipeline as Chiasm does, and refuse what they would read otherwise."""

from pathlib import Path
from typing import Any

import pytest
import test_convert
import test_llava
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, pipeline

import chiasm
import tiny
from chiasm.data.chat import user_message
from chiasm.interop.convert import convert

WIDE = tiny.picture(4).resize((70, 33))
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [*user_message("What?", 1), {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]


def exported(name: str, folder: Path) -> chiasm.VLM:
    """A model that has been written to `folder / "out"`."""
    test_convert.WITH_PROCESSORS[name](folder / "first")
    vlm = chiasm.load(folder / "first")
    convert(vlm.model, vlm.processor, "transformers", folder / "out")
    return vlm


@pytest.mark.parametrize("name", ["blip2", "blip2 t5", "instructblip", "chameleon"])
def test_the_pipeline_answers_prompts_as_chat_does(name: str, tmp_path: Path) -> None:
    vlm = exported(name, tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path / "out"))
    for picture in (WIDE, tiny.picture(2)):
        prompt = ask.processor.tokenizer.apply_chat_template(
            user_message("What is it?", 1), add_generation_prompt=True, tokenize=False
        )
        answer = ask(images=picture, text=prompt, **OPTIONS)[0]["generated_text"]
        assert answer.strip() == vlm.chat(picture, "What is it?", max_new_tokens=6)


def test_idefics_pipeline_puts_the_picture_first(tmp_path: Path) -> None:
    vlm = exported("idefics", tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path / "out"))
    words = "What is it?<end_of_utterance>\nAssistant:"
    answer = ask(images=WIDE, text=words, **OPTIONS)[0]["generated_text"]
    inputs = vlm.processor(text=f"<|bos|><image>{words}", images=[WIDE])
    tokens = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.strip() == vlm.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", test_convert.WITH_PROCESSORS)
def test_chat_is_the_same_after_a_round_trip(name: str, tmp_path: Path) -> None:
    """A template that another processor completes is whole again in Chiasm."""
    vlm = exported(name, tmp_path)
    again = chiasm.load(tmp_path / "out")
    for messages in (user_message("What is it?", 1), TURNS):
        expected, found = (one.processor(messages=messages, images=[WIDE]) for one in (vlm, again))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    if name in ("blip2", "blip2 t5", "instructblip"):
        return  # the other tokenizer marks where a text begins, as these models' own do
    expected, found = (one.processor(text="<image>A word", images=[WIDE])["input_ids"] for one in (vlm, again))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["blip2", "instructblip"])
def test_blips_template_refuses_what_its_processor_would_place_otherwise(name: str, tmp_path: Path) -> None:
    test_convert.WITH_PROCESSORS[name](tmp_path / "first")
    vlm = chiasm.load(tmp_path / "first")
    done = convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    assert any("refuses a conversation with more pictures" in note for note in done.notes)
    words = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    for refused in (user_message("Both?", 2), [SYSTEM, *user_message("What?", 1)]):
        with pytest.raises(Exception, match="puts one picture in front of all words"):
            words.apply_chat_template(refused, tokenize=False)
        assert "<image>" in vlm.processor.apply_chat_template(refused), "Chiasm's own processor takes it"
    assert words.apply_chat_template(user_message("Hello", 0), tokenize=False).strip().endswith(("Hello", "Answer:"))
    if name == "instructblip":
        with pytest.raises(Exception, match="takes all words for the instruction"):
            words.apply_chat_template(TURNS, tokenize=False)


def test_instructblip_whose_prompt_is_more_than_the_question_is_refused(tmp_path: Path) -> None:
    test_convert.WITH_PROCESSORS["instructblip"](tmp_path / "first")
    vlm = chiasm.load(tmp_path / "first")
    words = vlm.processor.tokenizer
    words.chat_template = words.chat_template.replace("{% if loop.first %}", "Q: {% if loop.first %}")
    with pytest.raises(ValueError, match="reads the whole prompt as the instruction, this model the question alone"):
        convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")


@pytest.mark.parametrize("name", ["llava", "paligemma", "idefics2", "idefics3", "blip2"])
def test_exported_templates_read_contents_that_are_texts(name: str, tmp_path: Path) -> None:
    if name == "llava":
        test_llava.reference(tmp_path / "first")
        test_llava.theirs(tmp_path / "first")
        vlm = chiasm.load(tmp_path / "first")
        convert(vlm.model, vlm.processor, "transformers", tmp_path / "out")
    else:
        exported(name, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    template = processor.chat_template or processor.tokenizer.chat_template
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    whole = [TURNS[0], *({**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS[1:])]
    written = words.apply_chat_template(TURNS, chat_template=template, tokenize=False)
    assert "A cat." in written and "Sure?" in written
    assert written == words.apply_chat_template(whole, chat_template=template, tokenize=False)


def test_a_picture_by_its_path(tmp_path: Path) -> None:
    """What transformers loads itself and what Chiasm loads is one picture."""
    vlm = exported("blip2", tmp_path)
    WIDE.save(tmp_path / "wide.png")
    ask = pipeline("image-text-to-text", model=str(tmp_path / "out"))
    prompt = ask.processor.tokenizer.apply_chat_template(user_message("What?", 1), tokenize=False)
    answer = ask(images=str(tmp_path / "wide.png"), text=prompt, **OPTIONS)[0]["generated_text"]
    assert answer.strip() == vlm.chat(Image.open(tmp_path / "wide.png"), "What?", max_new_tokens=6)
