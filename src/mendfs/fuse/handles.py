"""The numbers that the kernel is given for open files and directories."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from mendfs.errors import BadMessage

Opened = TypeVar("Opened")


class Handles(Generic[Opened]):
    """Number -> open thing. A number is never used twice during a mount."""

    def __init__(self) -> None:
        self._opened: dict[int, Opened] = {}
        self._next = 1

    def __iter__(self) -> Iterator[Opened]:
        return iter(list(self._opened.values()))

    def add(self, opened: Opened) -> int:
        """Its number from now on."""
        number = self._next
        self._next += 1
        self._opened[number] = opened
        return number

    def get(self, number: int) -> Opened:
        """Raises BadMessage for a number that is not open: the kernel names none such."""
        try:
            return self._opened[number]
        except KeyError:
            raise BadMessage(f"handle {number} is not open") from None

    def remove(self, number: int) -> Opened:
        """The number is not open any more."""
        opened = self.get(number)
        del self._opened[number]
        return opened
