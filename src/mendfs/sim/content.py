"""What a file on a disk that forgets holds: what reads see, what is durable, and the changes between the two."""

import random

SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""
Change = tuple[int, bytes] | int
"""A write (offset, bytes), or a new length."""


class Node:
    """A file's content."""

    __slots__ = ("changes", "content", "durable", "is_linked", "is_named")

    def __init__(self) -> None:
        self.content = bytearray()
        self.durable = bytearray()
        self.changes: list[Change] = []
        self.is_linked = True
        self.is_named = False

    def apply(self, change: Change) -> None:
        """A write or truncation that is not durable yet."""
        apply_change(self.content, change)
        self.changes.append(change)

    def forget_cached(self) -> None:
        """What is seen is what the disk has, and what is still to be written to it."""
        self.content[:] = self.durable
        for change in self.changes:
            apply_change(self.content, change)


def apply_change(content: bytearray, change: Change) -> None:
    """Write, cut or extend."""
    if isinstance(change, int):
        if change < len(content):
            del content[change:]
        else:
            content.extend(bytes(change - len(content)))
        return
    offset, data = change
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def apply_by_chance(content: bytearray, changes: list[Change], rng: random.Random, chance: float) -> None:
    """What a power cut leaves of `changes`: any sectors, in no order."""
    for change in changes:
        if isinstance(change, int):
            if rng.random() < chance:
                apply_change(content, change)
            continue
        offset, data = change
        for start in range(0, len(data), SECTOR_BYTES):
            if rng.random() < chance:
                apply_change(content, (offset + start, data[start : start + SECTOR_BYTES]))
