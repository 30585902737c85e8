"""Which of N pictures belongs to a caption, by either way: cosines of two towers, or a language model's likelihoods.

What does not depend on the caption is made once: a picture's vector, or its visual tokens. What one more caption takes
against all N pictures is timed; a language model reads each pair from its beginning.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chiasm.data.captions import encode_caption
from chiasm.data.collation import encode_sample, load_pixels
from chiasm.data.schema import Sample, Samples
from chiasm.evaluation.evaluate import names_of
from chiasm.evaluation.retrieval import places_of, same_pairs
from chiasm.evaluation.skills import wilson
from chiasm.fusion.early import EarlyFusionModel
from chiasm.fusion.intermediate import IntermediateFusionModel
from chiasm.fusion.late import LateFusionModel
from chiasm.fusion.sequence import PositionedModel
from chiasm.language.next_token import supervised_positions

KS = (1, 5)
AT_ONCE = 16
"""Pictures that a caption is read with at once."""
Query = Callable[[Sample], Float[Tensor, " N"]]


@torch.no_grad()
def find_pictures(model: Any, processor: Any, samples: Samples) -> dict[str, Any] | None:
    """Every sample's caption against the pictures of all of them.

    `places` has the number of wrong pictures that stand before the right one, by sample; `recall` the share of captions
    with fewer than k of them and its 95 % interval, by k; `seconds_per_query` is a median. None for a model that is
    asked in neither way: without a connector, with one that reads the request, or with an encoder–decoder.

    Args:
        model: in evaluation mode.
        samples: of one picture and its caption each.
    """
    query = _query_of(model, processor, samples)
    if query is None:
        return None
    query(samples[0])
    scores, seconds = [], []
    for sample in samples:
        started = time.perf_counter()
        scores.append(query(sample))
        seconds.append(time.perf_counter() - started)
    places = places_of(torch.stack(scores), same_pairs(samples)).tolist()
    return {
        "pictures": len(samples),
        "recall": {str(k): _share([place < k for place in places]) for k in KS},
        "seconds_per_query": median(seconds),
        "places": dict(zip(names_of(samples), places, strict=True)),
    }


def _share(found: Sequence[bool]) -> dict[str, float]:
    low, high = wilson(sum(found), len(found))
    return {"accuracy": sum(found) / len(found), "low": low, "high": high}


def _query_of(model: Any, processor: Any, samples: Samples) -> Query | None:
    if isinstance(model, LateFusionModel):
        return _by_cosine(model, processor, samples)
    connected = isinstance(model, EarlyFusionModel | IntermediateFusionModel)
    if not connected or isinstance(model, PositionedModel) or model.reads_instruction:
        return None
    return None if model.config.is_encoder_decoder else _by_likelihood(model, processor, samples)


def _by_cosine(model: LateFusionModel, processor: Any, samples: Samples) -> Query:
    images = torch.cat([model.embed_images(model.patches(pixels)) for pixels in _pixels(model, processor, samples)])

    def query(sample: Sample) -> Tensor:
        padded = processor.pad([encode_caption(sample, processor)["input_ids"]])
        texts = model.embed_texts(**{name: tensor.to(model.device) for name, tensor in padded.items()})
        return model.similarity(images.float(), texts.float())[:, 0].cpu()

    return query


def _by_likelihood(model: EarlyFusionModel | IntermediateFusionModel, processor: Any, samples: Samples) -> Query:
    """The mean log-likelihood of a caption's tokens as the answer to its request about each picture."""
    shown = [
        _seen(model, model.connect_features(model.encode_images(pixels)))
        for pixels in _pixels(model, processor, samples)
    ]

    def query(sample: Sample) -> Tensor:
        padded = processor.pad([encode_sample(sample, processor)])
        row = {name: tensor.to(model.device) for name, tensor in padded.items()}
        _, columns, targets = supervised_positions(row.pop("labels"))
        scores = []
        for count, inputs_of in shown:
            inputs = inputs_of({name: tensor.expand(count, -1) for name, tensor in row.items()})
            logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
            logits = logits if logits.shape[1] == len(columns) else logits[:, columns]
            wanted = targets.expand(count, -1)
            scores.append(-F.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none").mean(dim=1))
        return torch.cat(scores).cpu()

    return query


def _seen(model: Any, tokens: Tensor) -> tuple[int, Callable[[dict[str, Tensor]], dict[str, Any]]]:
    """How many pictures these are, and a text's inputs with them: one row for each picture."""
    if isinstance(model, EarlyFusionModel):

        def spliced(inputs: dict[str, Tensor]) -> dict[str, Any]:
            return inputs | {"input_ids": None, "inputs_embeds": model.embed(inputs["input_ids"], None, tokens)}

        return len(tokens), spliced
    alone = torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    cache = model.remember(tokens, alone, None)

    def beside(inputs: dict[str, Tensor]) -> dict[str, Any]:
        visible = model.placeholders(inputs["input_ids"], None).cumsum(dim=1)[..., None] > 0
        return inputs | {"image_cache": cache, "image_attention_mask": visible}

    return len(tokens), beside


def _pixels(model: Any, processor: Any, samples: Samples) -> Iterator[Float[Tensor, "images 3 height width"]]:
    """The pictures, `AT_ONCE` at a time, where the vision encoder reads them."""
    for start in range(0, len(samples), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(samples)))
        loaded = [load_pixels(samples[index], processor) for index in rows]
        yield torch.cat([one for one in loaded if one is not None]).to(model.device, model.vision.model.dtype)
