"""Text tables for people: columns as wide as they must be, numbers to the right. Pure."""

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines of aligned columns under their heads; numbers are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(head), *(len(row[at]) for row in cells)]) for at, head in enumerate(heads)]
    is_right = [bool(rows) and all(isinstance(row[at], int | float) for row in rows) for at in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, is_right, strict=True)
        return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in pairs).rstrip()

    return "\n".join([line(list(heads)), *(line(row) for row in cells)])
