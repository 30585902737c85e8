"""A report as one HTML file: a template filled in, with the style of all reports and no script."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from chiasm.evaluation.format import amount, clip, count, duration, percent
from chiasm.sources.writing import whole_file

STYLE = Path(__file__).parent / "report.css"
FILTERS: dict[str, Callable[..., Any]] = {
    "count": count,
    "duration": duration,
    "percent": percent,
    "clip": clip,
    "amount": amount,
}


def write_page(path: Path, template: Path, fields: dict[str, Any], **filters: Callable[..., Any]) -> Path:
    """Writes the page to `path` and returns it.

    Args:
        fields: what the template is told, beside `css` and `created`.
        filters: of this template, beside `FILTERS`.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | filters
    css, created = STYLE.read_text(encoding="utf-8"), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = environment.get_template(template.name).render(css=Markup(css), created=created, **fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole_file(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path
