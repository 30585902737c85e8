"""The comparison's tables: textbooks' adjectives as numbers, cost in closed form beside the measured, forgetting."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

from chiasm.comparison.curves import LARGE, MOST_IMAGES, PATCHES, TEXT, Crossing
from chiasm.comparison.recommend import to_first_token
from chiasm.comparison.ways import Row, interval, mean_of, score
from chiasm.evaluation.format import amount, count, duration, latency, operations, percent, percent_range

Table = dict[str, Any]
"""`heads` and `rows` of texts."""

KNOWN_FROM = {
    "linear": "LLaVA",
    "mlp": "LLaVA-1.5",
    "pixel_shuffle": "InternVL, Idefics3",
    "patch_merger": "Qwen2-VL",
    "avg_pool": "DeCo",
    "ldp": "MobileVLM V2",
    "c_abstractor": "Honeybee",
    "token_packer": "TokenPacker",
    "perceiver_resampler": "Flamingo",
    "idefics2_resampler": "Idefics2",
    "qformer": "BLIP-2, InstructBLIP",
}
KNOWN_FUSIONS = {"intermediate": "Flamingo", "late": "CLIP, SigLIP", "unified": "Fuyu, Chameleon"}


ABSENT = "not in this plan"


def adjectives(ways: Mapping[str, Sequence[Row]], named: Mapping[str, str] = MappingProxyType({})) -> Table:
    """What a textbook says of connectors in words (tokens, expressiveness, cost, who uses it), as numbers.

    Args:
        named: ways with names of regions in front of their tokens -> how many, such as "2×2".
    """
    heads = ["connection", "output tokens", "region names", "expressiveness: right", "patches lost", "cost: connector"]
    heads += ["to first token", "KV cache a picture", "known from"]
    rows = []
    for way, cells in ways.items():
        first, closed = cells[0], cells[0]["closed_form"]
        answered = score(cells)
        fusion, settings = first["choice"]["fusion"], first["choice"]["connector"]
        lost, flops = mean_of(cells, "diagnostics", "reconstruction_error"), closed.get("connect_flops")
        size = closed["parameters"].get("connector")
        connector = "–" if size is None else f"{count(size)} parameters"
        connector += f", {operations(flops)}" if flops else ""
        known = KNOWN_FUSIONS.get(fusion) or KNOWN_FROM.get(settings["name"] if settings else "", "–")
        right = (
            "–" if answered is None else f"{percent(answered.accuracy)} ({percent_range(answered.low, answered.high)})"
        )
        tokens = _tokens(first)
        costs = [connector, operations(to_first_token(closed)), _kib(closed)]
        rows.append([way, tokens, named.get(way, "none"), right, percent(lost), *costs, known])
    if all(cells[0]["choice"]["fusion"] != "unified" for cells in ways.values()):
        rows.append(["unified", *[ABSENT] * (len(heads) - 2), KNOWN_FUSIONS["unified"]])
    return {"heads": heads, "rows": rows}


def _tokens(result: Row) -> str:
    """Tokens of a picture, and whether their number follows the picture's patches."""
    shape, tokens = result["shape"], result["closed_form"]["visual_tokens"]
    if result["choice"]["fusion"] == "late":
        return "1 vector"
    if shape is None:
        return f"{tokens}"
    kind = {True: "grows with the patches", False: "fixed", None: "on other grids unknown"}[shape["grows"]]
    return f"{tokens} ({kind})" if shape["in_sequence"] else f"{tokens} beside the sequence ({kind})"


def costs(ways: Mapping[str, Sequence[Row]]) -> Table:
    """Closed form, and beside it what was counted or timed."""
    heads = ["connection", "encode", "connect + prefill", "decode a token", "KV cache a picture", "first token"]
    heads += ["decoding", "training", "peak memory", "time in all"]
    rows = []
    for way, cells in ways.items():
        closed, measured = cells[0]["closed_form"], cells[0]["measured"]
        first = mean_of(cells, "measured", "first_token_seconds")
        peak = mean_of(cells, "training", "peak_memory_bytes")
        rate, speed = (
            mean_of(cells, *path)
            for path in (("measured", "decode_tokens_per_second"), ("training", "samples_per_second"))
        )
        kept = measured.get("kv_cache_bytes_per_image")
        rows.append(
            [
                way,
                _both(operations(closed.get("encode_flops")), operations(measured.get("encode_flops"))),
                _both(
                    operations(closed.get("connect_and_prefill_flops")),
                    operations(measured.get("connect_and_prefill_flops")),
                ),
                _both(operations(closed.get("decode_flops")), operations(measured.get("decode_flops"))),
                _both(_kib(closed), "–" if kept is None else f"{kept / 1024:,.0f} KiB"),
                "–" if first is None else f"{1e3 * first:.0f} ms" + _quartiles(cells, "first_token_seconds", 1e3, 0),
                "–" if rate is None else f"{rate:.1f} tokens/s" + _quartiles(cells, "decode_tokens_per_second", 1, 1),
                f"{amount(speed, 1)} samples/s",
                "–" if peak is None else f"{peak / 1e9:.2f} GB",
                duration(sum(sum(cell["seconds"].values()) for cell in cells)),
            ]
        )
    return {"heads": heads, "rows": rows}


def kept(ways: Mapping[str, Sequence[Row]]) -> Table:
    """What a connector keeps of a picture, and what training cost the language model."""
    texts = list(
        dict.fromkeys(t for cells in ways.values() for t in (cells[0]["forgetting"] or {}).get("perplexity", {}))
    )
    heads = ["connection", "neighbours kept", "patches lost", "lost without a connector"]
    heads += [f"{text} perplexity" for text in texts]
    rows = []
    for way, cells in ways.items():
        told = [
            mean_of(cells, "diagnostics", key)
            for key in ("knn_overlap", "reconstruction_error", "reconstruction_floor")
        ]
        row = [way, *map(percent, told)]
        for text in texts:
            now = mean_of(cells, "forgetting", "perplexity", text)
            change = mean_of(cells, "forgetting", "perplexity_change", text)
            row.append("–" if now is None else f"{now:.2f} ({'unchanged' if not change else f'{change:+.2f}'})")
        rows.append(row)
    return {"heads": heads, "rows": rows}


def skills(ways: Mapping[str, Sequence[Row]], names: Sequence[str]) -> Table:
    """Accuracy by skill with intervals, and beside another sample's picture."""
    rows = []
    for way, cells in ways.items():
        found = [score(cells, name) for name in names]
        texts = [
            "–" if s is None else f"{percent(s.accuracy)} ({percent_range(s.low, s.high)}); {percent(s.control)}"
            for s in found
        ]
        rows.append([way, *texts])
    return {"heads": ["connection", *names], "rows": rows}


def finding(ways: Mapping[str, Sequence[Row]]) -> Table:
    """How often a caption's picture was found and how long that took; ways that were asked alone."""
    heads, rows = ["connection", "pictures"], []
    for way, cells in ways.items():
        found = [one for cell in cells if (one := cell.get("retrieval"))]
        if not found:
            continue
        pictures, ks = found[0]["pictures"], list(found[0]["recall"])
        heads = ["connection", "pictures", *(f"recall@{k} (by chance)" for k in ks), "one more caption"]
        shares = [_recall([one["recall"][k] for one in found], int(k) / pictures) for k in ks]
        rows.append([way, str(pictures), *shares, latency(mean_of(cells, "retrieval", "seconds_per_query"))])
    return {"heads": heads, "rows": rows}


def _recall(shares: Sequence[Mapping[str, float]], chance: float) -> str:
    means = [share["accuracy"] for share in shares]
    low, high = interval(means, [(share["low"], share["high"]) for share in shares])
    return f"{percent(fmean(means))}, {percent_range(low, high)} ({percent(min(1.0, chance))})"


def to_markdown(table: Table) -> str:
    """A table for a page: the first column is words, the others are numbers."""
    lines = ["| " + " | ".join(table["heads"]) + " |", "|---" + "|---:" * (len(table["heads"]) - 1) + "|"]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in table["rows"]]
    return "\n".join(lines) + "\n"


def _quartiles(cells: Sequence[Row], name: str, scale: float, digits: int) -> str:
    low, high = (mean_of(cells, "measured", f"{name}_{end}") for end in ("low", "high"))
    return "" if low is None or high is None else f" ({scale * low:.{digits}f}–{scale * high:.{digits}f})"


def crossing_table(found: Sequence[Crossing]) -> Table:
    """Where one way overtakes another, as sentences would say it; ways that do so alike share a row."""
    dear: dict[tuple[str, str, str], list[str]] = {}
    for c in found:
        dear.setdefault((c.measure, c.cheap, _from(c)), []).append(c.dear)
    cheap: dict[tuple[str, str, str], list[str]] = {}
    for (measure, than, told), names in dear.items():
        cheap.setdefault((measure, ", ".join(names), told), []).append(than)
    rows = [[measure, names, ", ".join(than), told] for (measure, names, told), than in cheap.items()]
    return {
        "heads": ["measure", "this costs more", "than this", f"with {TEXT} text tokens"],
        "rows": rows,
    }


def _from(crossing: Crossing) -> str:
    of_one = crossing.along == "patches"
    most, what = (PATCHES[-1], "patches of one picture") if of_one else (MOST_IMAGES, f"pictures of {LARGE} patches")
    if crossing.at is None:
        return f"never up to {most:,} {what}"
    return f"always, {what} up to {most:,}" if crossing.at <= 1 else f"from {crossing.at:,} {what} on"


def _both(closed: str, measured: str) -> str:
    return closed if measured == "–" else f"{closed}; counted {measured}"


def _kib(closed: Mapping[str, Any]) -> str:
    kept = closed.get("kv_cache_bytes_per_image")
    return "–" if kept is None else f"{kept / 1024:,.0f} KiB"
