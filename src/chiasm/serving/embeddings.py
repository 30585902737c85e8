"""`POST /v1/embeddings`: texts and pictures of a late fusion model in one space."""

import base64
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse

from chiasm.serving.answers import EmbeddingList
from chiasm.serving.body import Lease, lease_of, limited_route
from chiasm.serving.chat import GONE
from chiasm.serving.errors import RESPONSES, ApiError, of_exception
from chiasm.serving.messages import ImagePart, Part, WordPart
from chiasm.serving.prompt import find_pictures, loaded
from chiasm.serving.schema import EmbeddingRequest
from chiasm.serving.served import EmbeddingModel, Shared
from chiasm.serving.stream import Gone, while_there

Item = str | list[int] | Part


def router(shared: Shared) -> APIRouter:
    """The route, on these models."""
    routes = APIRouter(route_class=limited_route(shared.settings.limits))
    described = {200: {"model": EmbeddingList}, **RESPONSES}

    @routes.post("/v1/embeddings", responses=described, response_model=None, tags=["embeddings"])
    async def create_embedding(request: Request, body: Annotated[EmbeddingRequest, Body()]) -> Response:
        """A vector for every text and picture."""
        try:
            return JSONResponse(await while_there(request, _embed(shared, body, lease_of(request))))
        except Gone:
            shared.metrics.vanished.inc()
            return Response(status_code=GONE)

    return routes


async def _embed(shared: Shared, body: EmbeddingRequest, lease: Lease) -> dict[str, Any]:
    model = shared.embedding_model(body.model)
    limits = shared.settings.limits
    items = _items(body, limits.inputs, limits.input_characters)
    shown = {number: item.image_url.url for number, item in enumerate(items) if isinstance(item, ImagePart)}
    texts = {number: _text(model, item) for number, item in enumerate(items) if not isinstance(item, ImagePart)}
    found = await find_pictures(shared, [(url, f"input[{number}]") for number, url in shown.items()], lease)
    pictures = await loaded(shared, found, lease) if found else []
    try:
        rows, tokens = await shared.in_turn(model.turn, lease, _run, model, list(texts.values()), pictures)
    except Exception as error:
        raise of_exception(error) from error
    vectors = dict(zip([*texts, *shown], rows, strict=True))
    _check_width(body, next(iter(vectors.values())).shape[-1])
    data = [_item(number, vectors[number], body.encoding_format == "base64") for number in range(len(items))]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def _items(body: EmbeddingRequest, most: int, characters: int) -> list[Item]:
    given: Any = body.input
    items = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if sum(len(item if isinstance(item, str | list) else item.words) for item in items) > characters:
        raise ApiError(400, f"input has more than {characters:,} characters.", param="input")
    if len(items) > most:
        raise ApiError(400, f"Too many inputs: {len(items)}, but a request may have {most}.", param="input")
    return items


def _text(model: EmbeddingModel, item: str | list[int] | WordPart) -> str:
    """A text, or the text of token ids."""
    if not isinstance(item, list):
        return item if isinstance(item, str) else item.words
    tokenizer = model.encoder.processor.tokenizer
    if any(token >= len(tokenizer) for token in item):
        known = f"0 to {len(tokenizer) - 1}"
        raise ApiError(400, f"a token id is outside of the vocabulary: {known}.", param="input", code="unknown_token")
    text = str(tokenizer.decode(item, skip_special_tokens=True))  # the frame of a text is put around it anew
    if not text:
        raise ApiError(400, "token ids without a single word.", param="input", code="no_words")
    return text


def _run(model: EmbeddingModel, texts: list[str], pictures: list[Any]) -> tuple[list[torch.Tensor], int]:
    """Vectors of the texts and then of the pictures, and how many tokens the texts have."""
    encoder, plain = model.encoder, model.plain
    texts = [plain(text) for text in texts]
    rows: list[torch.Tensor] = []
    tokens = 0
    if texts:
        rows += list(encoder.embed_texts(texts).float().cpu())
        tokens = sum(len(ids) for ids in encoder.processor.tokenizer(texts)["input_ids"])
    if pictures:
        rows += [
            row[0] if row.ndim == 2 and len(row) == 1 else row for row in encoder.embed_images(pictures).float().cpu()
        ]
    return rows, tokens


def _check_width(body: EmbeddingRequest, width: int) -> None:
    if body.dimensions is not None and body.dimensions != width:
        raise ApiError(400, f"dimensions={body.dimensions}, but this model's vectors have {width}.", param="dimensions")


def _item(number: int, vector: torch.Tensor, as_base64: bool) -> dict[str, Any]:
    flat = vector.flatten().contiguous()
    values: Any = base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode() if as_base64 else flat.tolist()
    shape = {} if vector.ndim == 1 else {"shape": list(vector.shape)}
    return {"object": "embedding", "index": number, "embedding": values, **shape}
