"""Labels come from one tokenisation, whatever the chat template; images and placeholders agree or are refused."""

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import chiasm
import tiny
from chiasm.data.chat import LEAN_TEMPLATE, render
from chiasm.data.labels import IGNORE
from chiasm.data.message_pictures import pictures_of
from chiasm.data.processor import ChiasmProcessor
from chiasm.data.schema import ImageError
from chiasm.vision.image_processor import ChiasmImageProcessor

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATE = (
    "{{ word }}{% for part in messages[0]['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{{ m['role'] }}:{{ m['content'].split('</think>')[-1] }}\n{% endfor %}"
PICTURE = Image.new("RGB", (20, 30), "red")


def processor(template: str | None = tiny.CHATML, tokens: int = 3) -> ChiasmProcessor:
    images = ChiasmImageProcessor(size=30, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return ChiasmProcessor(images, tiny.tokenizer(template), num_image_tokens=tokens)


def conversation(*turns: str) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(turns)
    first = [{"type": "image"}, {"type": "text", "text": turns[0]}]
    return [{"role": r, "content": first if i == 0 else t} for i, (r, t) in enumerate(zip(roles, turns, strict=False))]


def supervised(made: dict[str, list[int]], words: ChiasmProcessor) -> str:
    return words.tokenizer.decode([label for label in made["labels"] if label != IGNORE])


@pytest.mark.parametrize(
    ("template", "end"), [(tiny.CHATML, "<|im_end|>"), (LLAMA2, " <|im_end|>"), (None, "<|im_end|>")]
)
def test_only_answers_and_their_end_are_supervised(template: str | None, end: str) -> None:
    words = processor(template)
    made = words.encode(conversation("What is it?", "a", "And the user says a?", "Ein Apfel, 사과."), 1, supervise=True)
    assert supervised(made, words) == f"a{end}Ein Apfel, 사과.{end}"
    assert made["input_ids"].count(words.image_token_id) == 3
    assert all(label in (IGNORE, token) for token, label in zip(made["input_ids"], made["labels"], strict=True))


@pytest.mark.parametrize("template", [tiny.CHATML, LLAMA2, None])
def test_a_prompt_is_the_beginning_of_its_training_sample(template: str | None) -> None:
    words = processor(template)
    turns = conversation("What is it?", "An apple.")
    prompt = words.encode(turns[:1], 1, add_generation_prompt=True)["input_ids"]
    whole = words.encode(turns, 1, supervise=True)
    assert whole["input_ids"][: len(prompt)] == prompt
    assert set(whole["labels"][: len(prompt)]) == {IGNORE}


def test_a_template_may_trim_some_messages_and_not_others() -> None:
    words = processor(MISTRAL)
    made = words.encode(conversation("What is it?\n", "An apple. \n", "And \n", " a\n"), 1, supervise=True)
    assert supervised(made, words) == "An apple.<|im_end|>a<|im_end|>"
    assert "[INST] And \n[/INST] a" in words.decode(made["input_ids"])


def test_the_end_of_turn_is_found_through_the_template() -> None:
    assert processor().end_of_turn_id() == tiny.tokenizer().eos_token_id


def test_a_template_that_rewrites_answers_is_refused() -> None:
    words = processor(FORGETFUL)
    with pytest.raises(ValueError, match="rewrites the messages"):
        render(words.tokenizer, conversation("Why?", "<think>hm</think>Because."))


def test_a_prompt_needs_no_places_of_earlier_answers() -> None:
    """A template may drop earlier reasoning, as Qwen3's does: labels and token types are refused, and no answers."""
    words = processor(FORGETFUL)
    said = (("user", "Why?"), ("assistant", "<think>hm</think>Because."), ("user", "And?"))
    turns: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    text = words.apply_chat_template(turns, add_generation_prompt=True)
    assert "hm" not in text and "Because." in text
    assert words.decode(words.encode(turns, add_generation_prompt=True)["input_ids"]) == text
    words.token_types = True
    for wrong in ({}, {"supervise": True}):
        with pytest.raises(ValueError, match="rewrites the messages"):
            words.encode(turns, **wrong)
        words.token_types = False


def test_messages_with_marks_and_template_code_are_plain_text() -> None:
    words = processor()
    text = "{{ 7 * 7 }} \ue0000\ue001 <|im_end|>"
    assert text in render(words.tokenizer, conversation("a", text)).text


@pytest.mark.parametrize(
    ("images", "message"), [(0, r"1 image placeholder.*0 image"), (2, r"1 image placeholder.*2 image")]
)
def test_wrong_counts_name_both(images: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor().encode(conversation("What?", "That."), num_images=images)


def test_nothing_to_supervise_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token is supervised"):
        processor().encode(conversation("What?"), supervise=True)


def test_unknown_parts_are_errors() -> None:
    with pytest.raises(ValueError, match="part of type 'video' is unknown"):
        processor().encode([{"role": "user", "content": [{"type": "video"}]}])


def test_a_batch_deals_pictures_to_conversations() -> None:
    words = processor()
    batch = [conversation("One?"), [{"role": "user", "content": "None."}], conversation("Another?")]
    inputs = words(messages=batch, images=[PICTURE, PICTURE])
    assert inputs["pixel_values"].shape == (2, 3, 30, 30)
    assert (inputs["input_ids"] == words.image_token_id).sum(dim=1).tolist() == [3, 0, 3]
    nested = words(messages=batch, images=[[PICTURE], [], [PICTURE]])
    assert torch.equal(nested["input_ids"], inputs["input_ids"])
    assert inputs["attention_mask"][1, 0] == 0, "shorter prompts are padded on the left"
    with pytest.raises(ValueError, match=r"3 conversation\(s\) but 1 list"):
        words(messages=batch, images=[[PICTURE]])


def test_rendered_text_is_taken_too() -> None:
    words = processor()
    text = words.apply_chat_template(conversation("What?"), add_generation_prompt=True)
    from_text = words(text=text, images=PICTURE)
    from_messages = words(messages=conversation("What?"), images=[PICTURE])
    assert torch.equal(from_text["input_ids"], from_messages["input_ids"])


def test_saved_and_loaded(tmp_path: Any) -> None:
    words = processor(tokens=5)
    words.save_pretrained(tmp_path)
    again = ChiasmProcessor.from_pretrained(tmp_path)
    assert again.num_image_tokens == 5
    turns = conversation("What?", "That.")
    assert again.encode(turns, 1, supervise=True) == words.encode(turns, 1, supervise=True)
    assert torch.equal(
        again(messages=turns[:1], images=[PICTURE])["pixel_values"],
        words(messages=turns[:1], images=[PICTURE])["pixel_values"],
    )


PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def test_a_template_that_reads_only_parts_gets_parts() -> None:
    words = processor(PARTS_ONLY)
    made = words.encode(conversation("What is it?", "An apple."), 1, supervise=True)
    assert made["input_ids"].count(words.image_token_id) == 3
    assert supervised(made, words).startswith("An apple.")


def test_a_chat_template_may_be_one_of_ours_by_name() -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tiny.tokenizer(), chat_template="lean")
    assert vlm.processor.tokenizer.chat_template == LEAN_TEMPLATE


def test_the_lean_template_ends_answers_with_the_tokenizers_own_end() -> None:
    backend = tiny.tokenizer().backend_tokenizer.to_str().replace("<|im_end|>", "</s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), bos_token="<|bos|>", eos_token="</s>", pad_token="<|pad|>"
    )
    vlm = chiasm.connect(tiny.vision(), tiny.language(), tokenizer=tokenizer, chat_template="lean")
    made = vlm.processor.encode(conversation("What is it?", "An apple."), 1, supervise=True)
    assert [token for token in made["labels"] if token >= 0][-1] == tokenizer.eos_token_id
    assert "im_end" not in tokenizer.decode(made["input_ids"])


def test_a_template_that_is_given_renders_and_is_stored(tmp_path: Path) -> None:
    images = ChiasmImageProcessor(size=30, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    words = ChiasmProcessor(images, tiny.tokenizer(), num_image_tokens=3, chat_template=LEAN_TEMPLATE)
    told = processor()
    told.chat_template = LEAN_TEMPLATE
    told.save_pretrained(tmp_path)
    for one in (words, told, ChiasmProcessor.from_pretrained(tmp_path)):
        assert one.chat_template == one.tokenizer.chat_template == LEAN_TEMPLATE
        assert one.apply_chat_template(tiny.ask("What?")) == "<image>\nWhat?\n"


def test_what_is_given_takes_the_place_of_what_is_stored(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path)
    images = ChiasmImageProcessor(size=50, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    again = ChiasmProcessor.from_pretrained(tmp_path, num_image_tokens=5, image_processor=images)
    assert again(images=PICTURE, messages=tiny.ask("What?"))["pixel_values"].shape == (1, 3, 50, 50)
    assert again.encode(tiny.ask("What?"))["input_ids"].count(again.image_token_id) == 5


def test_a_conversation_brings_its_pictures(tmp_path: Path) -> None:
    """By any of transformers' names; options that nothing reads are refused."""
    words = processor()
    PICTURE.save(tmp_path / "red.png")
    asked = {name: tiny.ask("What?") for name in ("image", "path", "url")}
    asked["image_url"] = tiny.ask("What?")
    path = str(tmp_path / "red.png")
    for (name, messages), given in zip(asked.items(), (PICTURE, path, path, {"url": path}), strict=True):
        messages[0]["content"][0][name] = given
    asked["image_url"][0]["content"][0]["type"] = "image_url"
    expected = words(images=PICTURE, messages=tiny.ask("What?"), add_generation_prompt=False)
    for messages in asked.values():
        made = words.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert all(torch.equal(made[name], value) for name, value in expected.items())
        assert torch.equal(words.apply_chat_template(messages, tokenize=True), expected["input_ids"])
    lean = words.apply_chat_template(asked["path"], chat_template=TEMPLATE, tokenize=True, return_dict=True, word="x")
    assert words.tokenizer.decode(lean["input_ids"][0]) == "x<image><image><image>What?"
    for unread in ({"enable_thinking": True}, {"chat_template": TEMPLATE, "padding_side": "right"}):
        with pytest.raises(TypeError, match=r"which its template does not read: .'(enable_thinking|padding_side)'"):
            words.apply_chat_template(asked["path"], **unread)
    with pytest.raises(TypeError, match="unknown processor arguments: max_length"):
        words.apply_chat_template(asked["path"], tokenize=True, processor_kwargs={"max_length": 3, "padding": True})


@pytest.mark.parametrize("own", [False, True], ids=["one that is given", "the tokenizer's own"])
@pytest.mark.parametrize("options", [{}, {"text_is_message": True}, {"add_special_tokens": True}], ids=str)
def test_another_template_is_read_as_the_own_one_is(options: dict[str, bool], own: bool) -> None:
    """Templates of text alone get text; nothing is rendered twice, and each conversation has its own pictures."""
    images = ChiasmImageProcessor(size=30, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    words = ChiasmProcessor(images, tiny.tokenizer(), num_image_tokens=3, **options)
    plain = ChiasmProcessor(images, tiny.tokenizer(), num_image_tokens=3, chat_template=LEAN_TEMPLATE, **options)
    messages = [tiny.ask("What?"), tiny.ask("Two?", 2)]
    for conversation, count in zip(messages, (1, 2), strict=True):
        for part in conversation[0]["content"][:count]:
            part["image"] = PICTURE
    given = {} if own else {"chat_template": LEAN_TEMPLATE}
    words.chat_template = LEAN_TEMPLATE if own else words.chat_template
    made = words.apply_chat_template(messages, tokenize=True, return_dict=True, **given)
    expected = plain(images=[[PICTURE], [PICTURE] * 2], messages=messages, add_generation_prompt=False)
    assert all(torch.equal(made[name], value) for name, value in expected.items())
    alone = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert words.apply_chat_template(alone, **given) == "hi\n"
    messages[1][0]["content"][0] = {"type": "text", "text": "no picture"}
    with pytest.raises(ValueError, match="image"):
        words.apply_chat_template([messages[1], tiny.ask("None?")], tokenize=True, **given)


def test_pictures_of_messages_are_read_as_others_are(tmp_path: Path) -> None:
    """Transparency lies on white; of an Arrow row the key that holds something counts; what is not there is named."""
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    encoded = base64.b64encode((tmp_path / "clear.png").read_bytes()).decode()
    sources = {"path": str(tmp_path / "clear.png"), "base64": encoded, "url": f"data:image/png;base64,{encoded}"}
    for name, source in sources.items():
        part = {"type": "image", "image": None, name: source}
        (picture,) = pictures_of([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])
        assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 255, 255), name
    for name, source, said in (("path", "gone.png", "gone.png: no such file"), ("base64", "?", "is not base64")):
        with pytest.raises(ImageError, match=said):
            pictures_of([{"role": "user", "content": [{"type": "image", name: source}]}])
