"""The site's navigation, in the order of the guide's chapters: pages that are not written yet are left out."""

import re
from pathlib import Path
from typing import Any

CHAPTERS: list[tuple[str, list[str]]] = [
    ("", ["index.md"]),
    ("Connectors", ["connectors/README.md", "connectors/linear.md", "connectors/mlp.md", "connectors/qformer.md"]),
    ("Connectors", ["connectors/perceiver_resampler.md", "connectors/pixel_shuffle.md", "connectors/patch_merger.md"]),
    ("Connectors", ["connectors/avg_pool.md", "connectors/ldp.md", "connectors/c_abstractor.md"]),
    ("Connectors", ["connectors/token_packer.md", "connectors/idefics2_resampler.md"]),
    ("Fusion", ["early_fusion.md", "intermediate_fusion.md", "late_fusion.md", "retrieval.md", "unified.md"]),
    ("Training", ["training.md", "recipes.md", "scale.md"]),
    ("Which is best?", ["comparison.md", "claims.md"]),
    ("Answering", ["decoding.md", "serving.md"]),
    ("How to", ["howto.md", "convert.md", "new_connector.md"]),
    ("Reference", ["reference.md", "papers.md", "glossary.md"]),
]
"""Chapter → pages; a page's title is its own first heading."""


def navigation(docs: Path) -> list[Any]:
    """What mkdocs takes as `nav`."""
    nav: dict[str, list[str]] = {}
    for chapter, pages in CHAPTERS:
        nav.setdefault(chapter, []).extend(page for page in pages if (docs / page).is_file())
    return [*nav.pop("", []), *({chapter: pages} for chapter, pages in nav.items() if pages)]


def on_config(config: Any) -> Any:
    """Gives mkdocs the navigation."""
    config["nav"] = navigation(Path(config["docs_dir"]))
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links out of `docs/`, and to chapters that are not written yet, lead nowhere in the site: their text stays."""
    folder = Path(page.file.abs_src_path).parent
    planned = {Path(name).name for _, pages in CHAPTERS for name in pages}

    def shown(link: re.Match[str]) -> str:
        text, target = link.groups()
        outside = re.match(r"(?:\.\./)+(?:src|recipes|benchmarks|tests|README|CONTRIBUTING)", target)
        missing = Path(target).name in planned and not (folder / target).is_file()
        return text if outside or missing else link.group(0)

    return re.sub(r"\[([^\]]+)\]\(([^)#]+)(?:#[^)]*)?\)", shown, markdown)
