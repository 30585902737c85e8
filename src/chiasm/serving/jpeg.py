"""What a JPEG asks of its readers, told by its markers before any of them opens it (ITU-T T.81, annex B).

Its header is read in Python, table by table, and every scan goes through the whole picture: a small file can make both
take minutes. What stands behind the picture's end, such as a phone's short film, is nobody's work.
"""

import re
from dataclasses import dataclass

SCANS = 100
"""Scans of a progressive JPEG; encoders write about ten."""
TABLES = 65_536
"""Bytes of tables and frames in front of the first scan; encoders write about a thousand."""
EXIFS = 100
"""Blocks of EXIF, which are joined one by one, each time with a copy of all before."""
RESOURCES = 1_000
"""Photoshop's resources; it writes some dozens."""

MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker: neither a byte 255 of the picture nor one between its restart intervals."""
SCAN, END, COMMENT, EXIF, PHOTOSHOP = 0xDA, 0xD9, 0xFE, 0xE1, 0xED
APPLICATIONS = range(0xE0, 0xF0)
MEASURED = {*range(0xC0, 0xD0), *range(0xDA, 0xE0), *APPLICATIONS, COMMENT} - {0xC8}
"""Markers whose segment says its size."""


@dataclass
class Survey:
    """How much of everything a JPEG has.

    Args:
        scans: up to the picture's end.
        tables: bytes in front of the first scan that are neither comments nor of applications.
        pieces: segments that were gone through.
    """

    scans: int = 0
    tables: int = 0
    exifs: int = 0
    resources: int = 0
    pieces: int = 0

    def excess(self) -> str | None:
        """What it has too much of."""
        found = (
            (self.scans, SCANS, "scans"),
            (self.tables, TABLES, "bytes of tables"),
            (self.exifs, EXIFS, "blocks of EXIF"),
            (self.resources, RESOURCES, "Photoshop resources"),
        )
        return next((f"{count:,} {name}, more than {most:,}" for count, most, name in found if count > most), None)


def survey(data: bytes, most: int) -> Survey:
    """Goes through a JPEG as libjpeg and Pillow do.

    Args:
        most: segments to go through; where there are more, the rest is not counted.
    """
    found, place = Survey(), 2
    while found.pieces <= most and (marker := MARKER.search(data, place)):
        code, place = data[marker.end() - 1], marker.end()
        if code == END and found.scans:  # in front of the first scan nobody stops at it
            break
        found.pieces += 1
        if code not in MEASURED:
            continue
        end = place + max(2, int.from_bytes(data[place : place + 2], "big"))
        if code == SCAN:
            found.scans += 1
            if found.scans == 1 and data.count(b"\xff\xda", end) < SCANS:
                break  # however many of these bytes are no scans, there are not too many
        elif code in APPLICATIONS:
            found.exifs += code == EXIF and data.startswith(b"Exif\0\0", place + 2)
            found.resources += data.count(b"8BIM", place, end) if code == PHOTOSHOP else 0
        elif code != COMMENT and not found.scans:
            found.tables += end - place
        place = end
    return found
