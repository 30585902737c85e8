"""Cost curves: what is said of a model agrees with the cost model, and crossings are where the formulas say."""

import pytest

import chiasm
import tiny
from chiasm.comparison.cost import cost
from chiasm.comparison.curves import Shape, cache_bytes, crossings, decode_flops, prefill_flops, shape_of

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


@pytest.mark.parametrize(
    ("connector", "grows"),
    [("avg_pool", True), ({"name": "avg_pool", "output_size": 2}, False), ("patch_merger", True)],
)
def test_tokens_grow_where_a_finer_grid_gives_more(connector: str | dict, grows: bool) -> None:
    assert shape_of(chiasm.connect(tiny.vision(), tiny.language(), connector).model).grows == grows
