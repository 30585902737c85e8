"""Special tokens in somebody's words, of models that have thousands of them."""

import re
import threading
import time
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from asking import CHAT, ask
from fastapi.testclient import TestClient

from chiasm.serving.plain import Plain


def plain(*marks: str) -> Plain:
    return Plain(SimpleNamespace(added_tokens_decoder={}, all_special_tokens=[]), *marks)


def test_the_longest_mark_is_parted_and_none_inside_of_it() -> None:
    marks = ["<a>", "<a>b", "<<a", "ab", "aab", "[^]", "]-", "b<", "a"]
    longest = sorted((mark for mark in marks if len(mark) > 1), key=len, reverse=True)
    alternation, parted, chance = re.compile("|".join(map(re.escape, longest))), plain(*marks), Random(0)
    for _ in range(2000):
        text = "".join(chance.choices("<<a>b[^]-", k=chance.randrange(12)))
        assert parted(text) == alternation.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text), text
    assert plain()("<a>") == "<a>"


@pytest.mark.parametrize("begin", ["<", "<u", "<unused", "<unused6248", "<unused6248>"])
def test_thousands_of_marks_take_no_longer(begin: str) -> None:
    parted = plain(*(f"<unused{number}>" for number in range(6249)))
    text = (begin * 200_000)[:200_000]
    started = time.thread_time()
    parted(text)
    assert time.thread_time() - started < 1


def test_marks_are_gathered_once_and_long_texts_read_beside_the_loop(
    client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, threads = [], []
    gather, part = Plain.__init__, Plain.__call__

    def gathering(self: Plain, *given: Any) -> None:
        made.append(self)
        gather(self, *given)

    def parting(self: Plain, text: str) -> str:
        threads.append(threading.get_ident())
        return part(self, text)

    monkeypatch.setattr(Plain, "__init__", gathering)
    monkeypatch.setattr(Plain, "__call__", parting)
    api = client()
    for text in ("a", "b"):
        assert api.post(CHAT, json=ask(text=text)).status_code == 200
    (loop,) = set(threads)
    threads.clear()
    assert api.post(CHAT, json=ask(text="a" * 20_000)).status_code == 400
    assert len(made) == 1 and threads and loop not in threads
