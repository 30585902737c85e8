"""Few-shot prompts: examples are turns in front of the question, in chat, stream and evaluation, for every fusion."""

import pytest

import chiasm
import contracts
import tiny
from chiasm.api import evaluate
from chiasm.data.schema import ImageRef, Sample
from chiasm.evaluation.evaluate import evaluate as evaluate_answers
from tiny import picture


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
def test_chat_and_stream(fusion: str) -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language(), fusion=fusion, tokenizer=tiny.tokenizer())
    contracts.open_gates(vlm.model, 1.0)
    examples = [(picture(1), "Colour?", "red"), ([picture(2), picture(3)], "Colours?", "red and blue")]
    turns = [
        *tiny.ask("Colour?"),
        {"role": "assistant", "content": "red"},
        *tiny.ask("Colours?", 2),
        {"role": "assistant", "content": "red and blue"},
        *tiny.ask("What?"),
    ]
    expected = vlm.generate([turns], [[picture(n) for n in (1, 2, 3, 4)]], max_new_tokens=8)[0]
    assert vlm.chat(picture(4), "What?", examples=examples, max_new_tokens=8) == expected
    assert "".join(vlm.stream(picture(4), "What?", examples=examples, max_new_tokens=8)).strip() == expected
    told = [*tiny.ask("Colour?"), {"role": "assistant", "content": "red"}]
    again = vlm.chat(
        [picture(2), picture(3), picture(4)], "What?", history=turns[2:4], examples=[examples[0]], max_new_tokens=8
    )
    assert again == vlm.generate([[*told, *turns[2:]]], [[picture(n) for n in (1, 2, 3, 4)]], max_new_tokens=8)[0]
    with pytest.raises(ValueError, match="example 1 has 2 parts"):
        vlm.chat(picture(4), "What?", examples=[(picture(1), "Colour?")])
    with pytest.raises(ValueError, match=r"4 image placeholder\(s\) in the messages but 3 image"):
        vlm.chat(None, "<image>What?", examples=examples)


def samples(count: int) -> list[Sample]:
    answers = [{"role": "assistant", "content": str(number)} for number in range(count)]
    made = [ImageRef.of(picture(number), str(number)) for number in range(count)]
    return [
        Sample(str(n), [*tiny.ask("Which?"), answers[n]], [made[n]], ("odd", "even")[n % 2 == 0]) for n in range(count)
    ]


def test_the_control_keeps_the_examples() -> None:
    data = samples(4)
    examples = [[data[(n + 2) % 4]] for n in range(4)]
    calls: list[tuple[int, bytes, bytes]] = []

    def generate(messages: list, images: list) -> list[str]:
        calls.extend((len(m), *(shown.tobytes() for shown in i)) for m, i in zip(messages, images, strict=True))
        return ["0"] * len(messages)

    rows = evaluate_answers(generate, data, examples=examples).rows
    assert [row["examples"] for row in rows] == [["2"], ["3"], ["0"], ["1"]]
    right, wrong = calls[:4], calls[4:]
    assert [call[0] for call in calls] == [3] * 8
    for number in range(4):
        example, own = (data[place].images[0].load().tobytes() for place in ((number + 2) % 4, number))
        assert right[number][1:] == (example, own) and wrong[number][1] == example and wrong[number][2] != own


@pytest.mark.parametrize("fusion", ["early", "intermediate"])
def test_evaluation_with_shots(fusion: str) -> None:
    vlm = chiasm.connect(tiny.vision(), tiny.language(), fusion=fusion, tokenizer=tiny.tokenizer())
    data = samples(6)
    result = evaluate(vlm, data[:4], shots=1, shots_from=data, max_new_tokens=2)
    for row in result.rows:
        assert len(row["examples"]) == 1 and row["examples"][0] != row["sample"]
    with pytest.raises(ValueError, match=r"has 2 other sample.* of skill 'even' to take 5 examples"):
        evaluate(vlm, data[:4], shots=5, shots_from=data, max_new_tokens=2)
