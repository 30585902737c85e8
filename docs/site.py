"""The site's navigation, in the order of the guide's chapters."""

import re
from typing import Any

CHAPTERS: list[tuple[str, list[str]]] = [
    ("", ["index.md", "index.ko.md", "guide.md", "guide.ko.md"]),
    ("How to", ["howto.md", "howto.ko.md", "data.md", "overnight.md"]),
    ("Connectors", ["connectors/README.md", "connectors/linear.md", "connectors/mlp.md", "connectors/qformer.md"]),
    ("Connectors", ["connectors/perceiver_resampler.md", "connectors/pixel_shuffle.md", "connectors/patch_merger.md"]),
    ("Connectors", ["connectors/avg_pool.md", "connectors/ldp.md", "connectors/c_abstractor.md"]),
    ("Connectors", ["connectors/token_packer.md", "connectors/idefics2_resampler.md", "new_connector.md"]),
    ("Fusion", ["early_fusion.md", "intermediate_fusion.md", "late_fusion.md", "retrieval.md", "unified.md"]),
    ("Training", ["training.md", "recipes.md", "scale.md"]),
    ("Which is best?", ["comparison.md", "plan.md", "claims.md"]),
    ("Answering", ["decoding.md", "serving.md", "convert.md"]),
    ("Reference", ["reference.md", "papers.md", "glossary.md"]),
]
"""Chapter → pages; a page's title is its own first heading."""


def on_config(config: Any) -> Any:
    """Gives mkdocs the navigation."""
    nav: dict[str, list[str]] = {}
    for chapter, pages in CHAPTERS:
        nav.setdefault(chapter, []).extend(pages)
    config["nav"] = [*nav.pop("", []), *({chapter: pages} for chapter, pages in nav.items())]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of `docs/` and to its scripts lead nowhere in the site: their text stays."""
    outside = r"(?:(?:\.\./)+(?:src|recipes|benchmarks|tests|README|CONTRIBUTING)[^)#]*|[\w/]+\.py)"
    return re.sub(rf"\[([^\]]+)\]\({outside}(?:#[^)]*)?\)", r"\1", markdown)
