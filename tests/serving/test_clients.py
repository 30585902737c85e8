"""OpenAI's own clients, unchanged: Python always, Node where its package is (CHIASM_NODE_MODULES names the folder)."""

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from asking import ask, data_url
from openai.types.chat import ParsedChatCompletionMessage
from pydantic import BaseModel

import chiasm
import tiny
from chiasm.serving.settings import Limits


@pytest.fixture
def api(address: Callable[..., str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=address(api_keys=("secret",)) + "/v1", api_key="secret", max_retries=0)


def test_answers(api: openai.OpenAI, vlm: chiasm.VLM) -> None:
    completion = api.chat.completions.create(**ask(data_url(), n=2, seed=1, stop=["\x00"]))
    assert completion.choices[1].message.content == vlm.chat(tiny.picture(), "What is it?", max_new_tokens=5)
    assert completion.usage is not None and completion.usage.completion_tokens == 10
    earlier = [*ask(data_url())["messages"], completion.choices[0].message]
    again = api.chat.completions.create(
        model="tiny", messages=[*earlier, {"role": "user", "content": "Sure?"}], max_completion_tokens=3
    )
    assert again.choices[0].message.role == "assistant"


def test_what_a_client_read_out_of_an_answer_comes_back_with_it(api: openai.OpenAI) -> None:
    class Count(BaseModel):
        number: int

    parsed = ParsedChatCompletionMessage[Count](role="assistant", content='{"number":1}', parsed=Count(number=1))
    reasoned = {"role": "assistant", "content": "Two.", "reasoning_content": "One and one.", "reasoning": None}
    asked = {"role": "user", "content": "How many?"}
    for earlier in (parsed, reasoned):
        messages: Any = [asked, earlier, asked]
        again = api.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=3)
        assert again.choices[0].message.role == "assistant"


def test_streams(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(**ask(data_url(), max_tokens=8))
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = list(api.chat.completions.create(**ask(data_url(), max_tokens=8, **options)))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == whole.choices[0].message.content
    assert last.usage.total_tokens == whole.usage.total_tokens and last.choices == []
    with api.chat.completions.stream(**ask(data_url(), max_tokens=8), logprobs=True, top_logprobs=2) as stream:
        for _ in stream:
            final = stream.current_completion_snapshot
    assert final.choices[0].message.content.strip() == text.strip()
    assert len(final.choices[0].logprobs.content[0].top_logprobs) == 2


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").owned_by == "chiasm"


def test_errors(api: openai.OpenAI, address: Callable[..., str]) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(**ask(model="other"))
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="Unknown parameter: 'colour'"):
        api.chat.completions.create(**ask(), extra_body={"colour": 1})
    with pytest.raises(openai.BadRequestError, match="not supported"):
        api.chat.completions.create(**ask(), prediction={"type": "content", "content": "a"})
    small = openai.OpenAI(base_url=address(limits=Limits(body_bytes=10_000)) + "/v1", api_key="-", max_retries=0)
    with pytest.raises(openai.APIStatusError) as large:
        small.chat.completions.create(**ask(text="a" * 30_000))
    assert large.value.status_code == 413


def test_a_client_retries_where_the_line_is_full(address: Callable[..., str], chat_model: Any) -> None:
    model = chat_model(max_batch=1, max_waiting=1)
    client = openai.AsyncOpenAI(base_url=address(model) + "/v1", api_key="-", max_retries=8)

    async def several() -> list[Any]:
        async with client:
            return await asyncio.gather(*(client.chat.completions.create(**ask(max_tokens=30)) for _ in range(5)))

    assert all(answer.usage.completion_tokens <= 30 for answer in asyncio.run(several()))


NODE = """
import OpenAI from "openai";
const [url, body] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "-", maxRetries: 0 });
const request = JSON.parse(body);
const whole = await client.chat.completions.create(request);
let text = "", usage = null;
const asStream = { ...request, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(asStream)) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
let code = null;
try {
  await client.chat.completions.create({ ...request, model: "other" });
} catch (error) {
  code = [error.status, error.code];
}
const models = []; for await (const model of client.models.list()) models.push(model.id);
console.log(JSON.stringify({ whole: whole.choices[0].message.content, text: text.trim(), usage, code, models }));
"""


@pytest.mark.skipif("CHIASM_NODE_MODULES" not in os.environ, reason="CHIASM_NODE_MODULES names no folder with openai")
def test_node(address: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(Path(os.environ["CHIASM_NODE_MODULES"]).resolve())
    (tmp_path / "ask.mjs").write_text(NODE)
    command = ["node", "ask.mjs", address() + "/v1", json.dumps(ask(data_url()))]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    got = json.loads(ran.stdout)
    assert got["whole"] == got["text"] and got["models"] == ["tiny"]
    assert got["code"] == [404, "model_not_found"] and got["usage"]["completion_tokens"] == 5
