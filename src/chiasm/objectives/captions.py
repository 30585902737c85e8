"""BLIP-2's first stage as one function: the losses of a batch of pictures and captions (arXiv 2301.12597)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from chiasm.fusion.qformer_retrieval import QFormerRetrieval, query_similarity
from chiasm.language.next_token import supervised_positions
from chiasm.objectives import CAPTION_OBJECTIVES
from chiasm.objectives.contrastive import contrastive_loss, identical_pairs
from chiasm.objectives.grounded_generation import decoder_inputs, grounded_generation_loss
from chiasm.objectives.masks import multimodal_causal_mask
from chiasm.objectives.matching import draw_negatives, matching_loss, pairs_to_match
from chiasm.objectives.processes import gather, gather_with_gradient, reaching


def caption_losses(
    model: QFormerRetrieval,
    inputs: dict[str, Tensor],
    objectives: Sequence[str] = CAPTION_OBJECTIVES,
    num_samples: int | None = None,
    num_tokens: int | None = None,
) -> dict[str, Tensor]:
    """Each objective's loss; the paper's is their sum.

    Args:
        inputs: `input_ids` and `attention_mask` of the captions, `pixel_values` or `image_features` of the pictures,
            and `picture_ids`, a number for each picture that is equal where the pictures are.
        num_samples: of all batches of a step, where this is one of several.
        num_tokens: supervised tokens of all of them.
    """
    patches = reaching(model.patches, inputs.get("pixel_values"), inputs.get("image_features"))
    losses = {}
    if "contrastive" in objectives or "matching" in objectives:
        losses = _comparisons(model, inputs, patches, objectives, num_samples)
    if "grounded_generation" in objectives:
        losses["grounded_generation"] = _generation(model, inputs, patches, num_tokens)
    return losses


def _comparisons(
    model: QFormerRetrieval, inputs: dict[str, Tensor], patches: Tensor, objectives: Sequence[str], total: int | None
) -> dict[str, Tensor]:
    """Both objectives that compare a pair with other pairs: of this batch, and of all processes."""
    ids, mask, pictures = inputs["input_ids"], inputs["attention_mask"], inputs["picture_ids"]
    with torch.set_grad_enabled("contrastive" in objectives and torch.is_grad_enabled()):
        images, texts = model.embed_images(patches), model.embed_texts(ids, mask)
        all_images, first = gather_with_gradient(images)
        to_text = query_similarity(images, gather_with_gradient(texts)[0])
        to_image = query_similarity(all_images, texts).T
    all_ids, all_masks = _gather_texts(ids, mask, model)
    own = slice(first, first + len(ids))
    same = identical_pairs(pictures, all_ids[own], gather(pictures)[0], all_ids)
    losses = {}
    if "contrastive" in objectives:
        losses["contrastive"] = contrastive_loss(to_text, to_image, same, model.temperature, num_items=total)
    if "matching" in objectives:
        temperature = model.temperature.detach()
        wrong_texts = draw_negatives(to_text.detach() / temperature, same)
        wrong_pictures = draw_negatives(to_image.detach() / temperature, same)
        seen, read, belong = pairs_to_match(wrong_pictures, wrong_texts, first)
        logits = model.match(gather(patches)[0][seen], all_ids[read], all_masks[read])
        share = 1.0 if total is None else len(ids) / total
        losses["matching"] = matching_loss(logits, belong) * share
    return losses


def _gather_texts(ids: Tensor, mask: Tensor, model: QFormerRetrieval) -> tuple[Tensor, Tensor]:
    """Captions of all processes, whose own padding may differ, with as little padding as possible."""
    connector: Any = model.connector
    room = (0, connector.positions.num_embeddings - ids.shape[1])
    everyone, masks = gather(F.pad(ids, room))[0], gather(F.pad(mask, room))[0]
    width = int(masks.sum(dim=1).max())
    return everyone[:, :width], masks[:, :width]


def _generation(model: QFormerRetrieval, inputs: dict[str, Tensor], patches: Tensor, total: int | None) -> Tensor:
    connector: Any = model.connector
    ids, labels = decoder_inputs(inputs["input_ids"], inputs["attention_mask"], connector.decoder_token_id)
    mask = multimodal_causal_mask(connector.num_tokens, inputs["attention_mask"])
    _, states = connector.encode(connector.query_tokens(patches), ids, mask, patches)
    rows, columns, targets = supervised_positions(labels)
    logits = connector.language_head(states[rows, columns], connector.words.weight)
    return grounded_generation_loss(logits, targets, num_items=total)
