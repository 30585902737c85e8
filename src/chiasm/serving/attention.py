"""`POST /api/attention`: where every word of an answer looked, for the chat page."""

import base64
from io import BytesIO
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse

from chiasm.generation import heatmap
from chiasm.generation.attention import Attention, NoAttention, look
from chiasm.generation.decode import Decoding
from chiasm.serving.answers import AttentionAnswer
from chiasm.serving.body import Lease, lease_of, limited_route
from chiasm.serving.chat import GONE
from chiasm.serving.errors import RESPONSES, ApiError, of_exception
from chiasm.serving.prompt import Prompt, loaded, read_prompt
from chiasm.serving.schema import AttentionRequest
from chiasm.serving.served import ChatModel, Shared
from chiasm.serving.stream import Gone, while_there

BYTES_PER_WEIGHT = 4


def router(shared: Shared) -> APIRouter:
    """The route, on these models."""
    routes = APIRouter(route_class=limited_route(shared.settings.limits))
    described = {200: {"model": AttentionAnswer}, **RESPONSES}

    @routes.post("/api/attention", responses=described, response_model=None, tags=["page"])
    async def explain_answer(request: Request, body: Annotated[AttentionRequest, Body()]) -> Response:
        """What each word of the last message had of every patch of a picture."""
        try:
            return JSONResponse(await while_there(request, _explain(shared, body, lease_of(request))))
        except Gone:
            shared.metrics.vanished.inc()
            return Response(status_code=GONE)

    return routes


async def _explain(shared: Shared, body: AttentionRequest, lease: Lease) -> dict[str, Any]:
    model = shared.chat_model(body.model)
    *asked, answer = body.messages
    if answer.role != "assistant" or not isinstance(answer.content, str) or not answer.content.strip():
        raise ApiError(400, "the last message must be the assistant's answer, as a text", param="messages")
    prompt = await read_prompt(shared, model, asked, lease)
    count = len(prompt.pictures)
    if not -count <= body.image < count:
        raise ApiError(400, f"image {body.image}, but the conversation has {count}", param="image")
    most = shared.settings.limits.attention_bytes
    try:
        words, images = model.plain(answer.content), await loaded(shared, prompt.pictures, lease)
        return await shared.in_turn(shared.looking, lease, _look, model, prompt, images, words, body.image, most)
    except NoAttention as error:
        raise ApiError(400, f"{error}", param="model", code="no_attention") from None
    except Exception as error:
        raise of_exception(error) from error


def _look(model: ChatModel, prompt: Prompt, images: list[Any], answer: str, image: int, most: int) -> dict[str, Any]:
    _check_size(model, prompt, answer, most)
    seen = look(model.model, model.processor, prompt.messages, images, Decoding(), image, answer=answer)
    rows, columns = seen.patches.shape[1:]
    return {
        "answer": "".join(seen.tokens),
        "picture": _data_url(seen),
        "rows": rows,
        "columns": columns,
        "queries": None if seen.queries is None else len(seen.queries),
        "words": _words(seen),
    }


def _check_size(model: ChatModel, prompt: Prompt, answer: str, most: int) -> None:
    """Refuses a look whose weights of all layers and heads would not fit."""
    config = model.model.config.get_text_config()
    asked = model.processor.encode(prompt.messages, add_generation_prompt=True)["input_ids"]
    length = len(asked) + len(model.processor.tokenizer(answer)["input_ids"])
    size = BYTES_PER_WEIGHT * config.num_hidden_layers * config.num_attention_heads * length**2
    if size > most:
        raise ApiError(400, f"the conversation is too long to look into: {length} tokens", code="too_long")


def _words(seen: Attention) -> list[dict[str, Any]]:
    ends = [0]
    for token in seen.tokens:
        ends.append(ends[-1] + len(token))
    found = []
    for text, rows in heatmap.words(seen.tokens):
        whole = "".join(seen.tokens)[ends[rows[0]] : ends[rows[-1] + 1]]
        start = ends[rows[0]] + len(whole) - len(whole.lstrip())
        weights = seen.patches[rows].mean(dim=0).flatten().tolist()
        found.append(
            {"text": text, "start": start, "end": start + len(whole.strip()), "weights": [round(w, 5) for w in weights]}
        )
    return found


def _data_url(seen: Attention) -> str:
    file = BytesIO()
    seen.picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
