"""Conditions on metadata mean the same in a folder and on a server."""

import pytest

from chiasm.retrieval.where import Where

ITEM = {"colour": "red", "year": 2020, "tags": ["big", "5"], "sold": True, "size": 1.5}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("colour=red", True),
        ("colour = blue", False),
        ("colour!=blue", True),
        ("missing!=blue", True),
        ("missing=blue", False),
        ("year=2020", True),
        ("year>=2020", True),
        ("year>2020", False),
        ("year<=2021.5", True),
        ("colour>1", False),
        ("colour in red, blue", True),
        ("colour in green,blue", False),
        ("year in 2019,2020", True),
        ("tags=big", True),
        ("tags=5", True),
        ("sold=true", True),
        ("sold=1", False),
        ("size=1.5", True),
        ("colour=", False),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    assert Where.parse(text).holds(ITEM) is holds


@pytest.mark.parametrize("text", ["red", "=red", "colour==red", "year>==2020", "colour in", "year>red", ""])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError, match="condition"):
        Where.parse(text)
