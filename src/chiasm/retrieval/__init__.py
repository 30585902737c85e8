"""The index for late fusion: pictures found by text or by picture, exactly, with conditions on their metadata."""

from chiasm.retrieval.index import Index
from chiasm.retrieval.pictures import read_pictures
from chiasm.retrieval.records import Added, Hit, Item
from chiasm.retrieval.sheet import contact_sheet
from chiasm.retrieval.where import Where

__all__ = ["Added", "Hit", "Index", "Item", "Where", "contact_sheet", "read_pictures"]
