"""Embeddings of texts and pictures by a late fusion model, as OpenAI's client asks for them."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from asking import data_url
from fastapi.testclient import TestClient
from torch import Tensor

import tiny
from chiasm.serving.served import EmbeddingModel
from chiasm.serving.settings import Limits

WIDTH = 6


class Encoder:
    """A dual encoder whose vectors tell what they are of: a text's letters, a picture's colours."""

    model = None
    processor = SimpleNamespace(tokenizer=tiny.tokenizer())

    def __init__(self, queries: int | None = None) -> None:
        self.queries = queries

    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        rows = [[float(sum(text.encode()[place::WIDTH])) for place in range(WIDTH)] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)

    def embed_images(self, images: Any) -> Tensor:
        rows = torch.stack([torch.tensor(np.asarray(image)[0, :WIDTH, 0], dtype=torch.float32) for image in images])
        rows = torch.nn.functional.normalize(rows, dim=-1)
        return rows if self.queries is None else rows[:, None].expand(-1, self.queries, -1)


def test_texts_and_pictures(client: Callable[..., TestClient]) -> None:
    api, encoder = client(EmbeddingModel("clip", Encoder())), Encoder()
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    inputs = ["a cat", picture, {"type": "text", "text": "a dog"}, tiny.tokenizer()("ab")["input_ids"]]
    answer = api.post("/v1/embeddings", json={"model": "clip", "input": inputs}).json()
    got = torch.tensor([item["embedding"] for item in answer["data"]])
    expected = [*encoder.embed_texts(["a cat"]), *encoder.embed_images([tiny.picture()])]
    torch.testing.assert_close(got[:2], torch.stack(expected))
    torch.testing.assert_close(got[2], encoder.embed_texts(["a dog"])[0])
    assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    one = api.post("/v1/embeddings", json={"model": "clip", "input": picture}).json()
    assert one["data"][0]["embedding"] == answer["data"][1]["embedding"]


def test_several_vectors_for_a_picture_say_their_shape(client: Callable[..., TestClient]) -> None:
    api = client(EmbeddingModel("blip", Encoder(queries=3)))
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    item = api.post("/v1/embeddings", json={"model": "blip", "input": [picture]}).json()["data"][0]
    assert item["shape"] == [3, WIDTH] and len(item["embedding"]) == 3 * WIDTH


def test_a_client_that_leaves_keeps_its_turn_until_it_is_over(address: Callable[..., str]) -> None:
    """Nobody makes the model work on many requests at once by hanging up on them."""
    encoder, running, most, go_on = Encoder(), [0], [0], threading.Event()

    def slow(texts: Sequence[str]) -> Tensor:
        running[0] += 1
        most[0] = max(most[0], running[0])
        assert go_on.wait(30)
        running[0] -= 1
        return Encoder().embed_texts(texts)

    encoder.embed_texts = slow  # type: ignore[method-assign]
    url, body = address(EmbeddingModel("clip", encoder)) + "/v1/embeddings", {"model": "clip", "input": "a"}
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=0.15)
    go_on.set()
    assert httpx.post(url, json=body, timeout=30).status_code == 200 and most == [1]


def test_a_full_line_says_when_to_come_back(address: Callable[..., str]) -> None:
    encoder, begun, go_on = Encoder(), threading.Event(), threading.Event()

    def slow(texts: Sequence[str]) -> Tensor:
        begun.set()
        assert go_on.wait(30)
        return Encoder().embed_texts(texts)

    encoder.embed_texts = slow  # type: ignore[method-assign]
    model, body = EmbeddingModel("clip", encoder), {"model": "clip", "input": "a"}
    url = address(model, limits=Limits(line=1)) + "/v1/embeddings"
    with ThreadPoolExecutor() as threads:
        first = threads.submit(httpx.post, url, json=body, timeout=30)
        assert begun.wait(30)
        second = threads.submit(httpx.post, url, json=body, timeout=30)
        while not model.turn.waiting:
            time.sleep(0.01)
        third = httpx.post(url, json=body, timeout=30)
        go_on.set()
    assert third.status_code == 429 and third.headers["retry-after"] == "1"
    assert first.result().status_code == second.result().status_code == 200 and model.turn.waiting == 0


def test_the_python_client(address: Callable[..., str], chat_model: Any) -> None:
    url = address(EmbeddingModel("clip", Encoder()), chat_model("talker"))
    api = openai.OpenAI(base_url=url + "/v1", api_key="-", max_retries=0)
    answer = api.embeddings.create(model="clip", input=["a", "b c"])
    torch.testing.assert_close(
        torch.tensor([item.embedding for item in answer.data]), Encoder().embed_texts(["a", "b c"])
    )
    for model, word in (("talker", "no embeddings"), ("none", "does not exist")):
        with pytest.raises(openai.NotFoundError, match=word):
            api.embeddings.create(model=model, input="a")
    with pytest.raises(openai.NotFoundError, match="no answers") as refused:
        api.chat.completions.create(model="clip", messages=[{"role": "user", "content": "a"}])
    assert refused.value.code == "unsupported_model"


@pytest.mark.parametrize(
    "change",
    [{"input": []}, {"input": ""}, {"input": [""]}, {"input": 3}, {"input": ["a"] * 300}, {"input": [10**9]},
     {"input": [1, "a"]},
     {"input": ["a", 1]}, {"input": [[]]}, {"input": [-1]}, {"input": [True]},
     {"dimensions": 3}, {"input": {"type": "image_url"}}, {"encoding_format": "hex"}],
)  # fmt: skip
def test_what_is_refused(client: Callable[..., TestClient], change: dict[str, Any]) -> None:
    response = client(EmbeddingModel("clip", Encoder())).post(
        "/v1/embeddings", json={"model": "clip", "input": "a", **change}
    )
    assert response.status_code == 400 and response.json()["error"]["param"], response.text
