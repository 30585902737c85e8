"""Cost curves: what is said of a model agrees with the cost model, and crossings are where the formulas say."""

import json
from dataclasses import replace

import pytest

import chiasm
import tiny
from chiasm.comparison.cost import cost
from chiasm.comparison.curves import (
    LARGE,
    MEASURES,
    MOST_IMAGES,
    PATCHES,
    TEXT,
    Shape,
    cache_bytes,
    crossings,
    decode_flops,
    prefill_flops,
    shape_of,
    unknown,
)
from chiasm.comparison.tables import crossing_table
from chiasm.connectors import CONNECTORS
from chiasm.connectors.linear import LinearProjector


class Lines(LinearProjector):
    """A token for every row and every column of patches; made for no grid of more than 1,000."""

    def __init__(self, vision_width: int, language_width: int, grid: tuple[int, int], *, most: int = 10**6) -> None:
        super().__init__(vision_width, language_width, grid)
        assert grid[0] * grid[1] <= most

    @property
    def num_tokens(self) -> int:
        return sum(self.grid)


SMALL = {"every": 2, "heads": 3, "head_dim": 8}


@pytest.mark.parametrize(
    ("connector", "fusion"), [("mlp", "early"), ("perceiver_resampler", "early"), ("mlp", "intermediate")]
)
@pytest.mark.parametrize("images", [1, 3])
def test_a_shape_costs_what_its_model_costs(connector: str, fusion: str, images: int) -> None:
    options = {"cross_attention": SMALL} if fusion == "intermediate" else {}
    connected = chiasm.connect(tiny.vision(), tiny.language(), tiny.connector(connector), fusion, **options)
    shape, costs = shape_of(connected.model), cost(connected.model, images=images, text_tokens=20)
    assert prefill_flops(shape, shape.patches, images, 20) == costs.prefill_flops
    assert decode_flops(shape, shape.patches, images, 20) == costs.decode_flops
    assert cache_bytes(shape, shape.patches, images, 20) == costs.kv_cache_bytes
    assert shape.grows == (connector == "mlp")


def test_early_fusions_cache_overtakes_a_fixed_connector_behind_its_tokens() -> None:
    early = Shape(49, 49, True, True, matrices=1000, head=10, pair=4, kv_bytes=8)
    fixed = Shape(32, 49, False, True, matrices=1000, head=10, pair=4, kv_bytes=8)
    found = {crossing.measure: crossing.at for crossing in crossings({"mlp": early, "qformer": fixed})}
    assert found == {"KV cache": 33, "prefill": 33, "decoding": 33}


def test_cross_attention_overtakes_the_sequence_behind_so_many_pictures() -> None:
    early = Shape(49, 49, True, True, matrices=1000, head=10, pair=4, kv_bytes=8)
    outside = replace(early, in_sequence=False, cross_token=900_000, cross_look=3, cross_keys=100, cross_kept=4)
    found = {c.measure: c for c in crossings({"mlp": early, "gated": outside}) if c.along == "pictures"}
    for measure, costs in MEASURES.items():
        dearer = [n for n in range(1, MOST_IMAGES + 1) if costs(early, LARGE, n, TEXT) > costs(outside, LARGE, n, TEXT)]
        assert found[measure].at == (dearer[0] if dearer else None)
        assert (found[measure].dear, found[measure].cheap) == ("mlp", "gated")
    assert 1 < (found["prefill"].at or 0) < MOST_IMAGES and found["KV cache"].at == 1
    told = [row[-1] for row in crossing_table([found["prefill"], found["KV cache"]])["rows"]]
    assert told[0].startswith("from ") and "pictures of 576 patches on" in told[0] and told[1].startswith("always")


@pytest.mark.parametrize(
    ("connector", "grows"),
    [("avg_pool", True), ({"name": "avg_pool", "output_size": 2}, False), ("patch_merger", True)],
)
def test_tokens_grow_where_a_finer_grid_gives_more(connector: str | dict, grows: bool) -> None:
    assert shape_of(chiasm.connect(tiny.vision(), tiny.language(), connector).model).grows == grows


def test_tokens_are_those_that_the_connector_gives_on_every_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONNECTORS, "lines", Lines)
    shape = shape_of(chiasm.connect(tiny.vision(), tiny.language(), "lines").model)
    assert [shape.visual_tokens(patches) for patches in (9, 49, 2304)] == [6, 14, 96]
    assert 48 < (shape.visual_tokens(600) or 0) < 56, "between two grids, on a line"
    assert shape.grows and not unknown({"lines": shape})
    again = Shape(**json.loads(json.dumps(shape.to_dict())))
    assert [again.visual_tokens(patches) for patches in PATCHES] == [2 * round(n**0.5) for n in PATCHES]


@pytest.mark.parametrize(("most", "grows"), [(9, None), (1000, True)])
def test_a_connector_that_refuses_a_grid_is_unknown_there(
    most: int, grows: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONNECTORS, "lines", Lines)
    model = chiasm.connect(tiny.vision(), tiny.language(), {"name": "lines", "most": most}).model
    shapes = {"lines": shape_of(model), "mlp": shape_of(chiasm.connect(tiny.vision(), tiny.language(), "mlp").model)}
    shape = shapes["lines"]
    assert shape.grows is grows and (shape.visual_tokens(9), shape.visual_tokens(2304)) == (6, None)
    assert prefill_flops(shape, 2304) is decode_flops(shape, 2304) is cache_bytes(shape, 2304) is None
    assert unknown(shapes) == ["lines"]
    assert not [one for one in crossings(shapes) if "lines" in (one.dear, one.cheap)]
