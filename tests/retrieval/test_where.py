"""Conditions on metadata mean the same in a folder and on a server."""

import pytest

from chiasm.retrieval.where import Where

ITEM = {"colour": "red", "year": 2020, "tags": ["big", "5"], "sold": True, "size": 1.5}
ITEM |= {"Camera Model": "X-T5", "city": "Paris, Texas", "said": '"so"', "색상": "빨강", "f.stop": 4, "from in": "a"}


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
        ('colour="red"', True),
        ('colour in "red"', True),
        ('year="2020"', False),
        ('tags="5"', True),
        ('said="so"', True),
        ("said!=so", True),
        ("Camera Model=X-T5", True),
        ("Camera Model != X-T5", False),
        ("Camera Model in X-T4, X-T5", True),
        ("from in=a", True),
        ("from in = a", True),
        ("from in != a", False),
        ("city=Paris, Texas", True),
        ('city in "Paris, Texas",Rome', True),
        ("city in Paris, Texas", False),
        ('city in 4", 5"', False),
        ("색상=빨강", True),
        ("f.stop>=4", True),
    ],
)
def test_conditions(text: str, holds: bool) -> None:
    assert Where.parse(text).holds(ITEM) is holds


@pytest.mark.parametrize("text", ["red", "=red", "colour==red", "year>==2020", "colour in", "year>red", ""])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(ValueError, match="condition"):
        Where.parse(text)


def test_parts_of_a_list() -> None:
    wanted = {"a, b": ("a", "b"), 'x in,"b, c" , d': ("x in", '"b, c"', "d"), "a,": ("a", ""), '4", 5"': ('4"', '5"')}
    for text, values in wanted.items():
        assert Where.parse(f"k in {text}").values == values
