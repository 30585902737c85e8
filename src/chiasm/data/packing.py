"""Several samples in one sequence, none of which sees another: what would be padding is learned from instead.

Positions restart with every sample, and there is no attention mask: transformers' own masks keep apart what begins at
position 0 again. Sequences are filled first-fit, longest sample first.
"""

from collections.abc import Sequence

import torch

from chiasm.data.collation import Batch, Item, cut_of, stack_pictures
from chiasm.data.labels import IGNORE, num_predicted
from chiasm.data.padding import filler
from chiasm.data.processor import ChiasmProcessor

ROOM = 512
"""A sequence is filled up to so many tokens, or to the longest sample of the batch where that is longer."""


def fill_sequences(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which samples share a sequence of at most `room` tokens; a longer one has a sequence for itself."""
    rows: list[list[int]] = []
    left: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        row = next((row for row, free in enumerate(left) if free >= lengths[sample]), None)
        if row is None:
            rows.append([sample])
            left.append(room - lengths[sample])
        else:
            rows[row].append(sample)
            left[row] -= lengths[sample]
    return rows


def collate_packed(items: Sequence[Item], processor: ChiasmProcessor, room: int = ROOM) -> Batch:
    """Items in as few sequences as fit, with `position_ids` in the place of an attention mask.

    Padding at a sequence's end is a block of its own. Pictures are in the order of their placeholders.
    """
    lengths = [len(item.tokens["input_ids"]) for item in items]
    rows = fill_sequences(lengths, max(room, *lengths))
    width = max(sum(lengths[index] for index in row) for row in rows)
    pad_id = filler(processor.tokenizer)
    ids, labels, positions = [], [], []
    for row in rows:
        gap = width - sum(lengths[index] for index in row)
        tokens = [items[index].tokens for index in row]
        ids.append([token for one in tokens for token in one["input_ids"]] + [pad_id] * gap)
        labels.append([label for one in tokens for label in [IGNORE, *one["labels"][1:]]] + [IGNORE] * gap)
        positions.append([place for one in tokens for place in range(len(one["input_ids"]))] + list(range(gap)))
    inputs = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "position_ids": torch.tensor(positions)}
    order = [items[index] for row in rows for index in row]
    return Batch(
        inputs=inputs | processor.shapes_of([item.tokens for item in order]) | stack_pictures(order),
        ids=[item.id for item in order],
        supervised=sum(num_predicted(item.tokens["labels"], processor.encoder_decoder) for item in order),
        tokens=sum(lengths),
        cut=cut_of(order),
    )
