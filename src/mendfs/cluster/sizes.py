"""Sizes as people write them: `8`, `64KiB`, `4MiB`. Pure."""

import re

from mendfs.errors import UsageError

UNITS = ("", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtpe])i?b?|b)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """The bytes that `text` says: `8`, `64KiB`, `4M`, `1.5GiB`; units are powers of 1024. Raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no size: write 8, 64KiB or 4MiB")
    number, unit = found[1], (found[2] or "").upper()
    factor = 1 << (10 * " KMGTPE".index(unit)) if unit else 1
    if "." not in number:
        return int(number) * factor
    size = float(number) * factor
    if size != int(size):
        raise UsageError(f"{text!r} is no whole number of bytes")
    return int(size)


def exact_size(size: int) -> str:
    """As `parse_size` reads it back, without loss: `4MiB`, `65000`."""
    unit = 0
    while size and size % 1024 == 0 and unit < len(UNITS) - 1:
        size //= 1024
        unit += 1
    return f"{size}{UNITS[unit]}"


def short_size(size: float) -> str:
    """For people: three digits or so, `1.5GiB`."""
    unit = 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size /= 1024
        unit += 1
    if unit == 0:
        return f"{size:.0f}B" if size else "0"
    return f"{size:.0f}{UNITS[unit]}" if size >= 99.95 else f"{size:.1f}{UNITS[unit]}"
