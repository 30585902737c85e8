"""Regions: visual tokens in the order of the parts of a picture, so that words can name each part in front of them.

Idefics3 (arXiv 2408.12637) and NVLM (arXiv 2409.11402) write such marks, in plain text, in front of tiles.
"""


def region_order(grid: tuple[int, int], regions: tuple[int, int]) -> list[int]:
    """Places in a row-major grid, region by region, and row by row within each.

    Raises:
        ValueError: the regions do not divide the grid.
    """
    (rows, columns), (down, across) = grid, regions
    if rows % down or columns % across:
        raise ValueError(
            f"regions {down}×{across} do not divide the connector's grid of {rows}×{columns} visual tokens; "
            "choose divisors of its rows and columns"
        )
    height, width = rows // down, columns // across
    return [
        (r * height + y) * columns + c * width + x
        for r in range(down)
        for c in range(across)
        for y in range(height)
        for x in range(width)
    ]
