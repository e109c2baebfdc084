"""Attributes of directories that answers brought along a moment ago: with a name that was looked up, with a change.

A mount may answer the kernel from them within the time that it lets the kernel believe attributes anyway: a walk of a
path asks again and again for the directories it goes through, and each question would be a round trip. Everything that
this client changes comes with new attributes of it, so its own changes are never missing here. Files are noted only
where they are opened or made, and while this client writes them: reads through a descriptor must see what others write.
"""

import asyncio
import stat
from collections import OrderedDict

from mendfs.model import Attributes, Inode

RECENT_MAX = 256
"""Directories in use at one moment; more are forgotten, and asked for."""


class Recent:
    """The newest attributes of some inodes, and when they came."""

    def __init__(self) -> None:
        self._noted: OrderedDict[Inode, tuple[Attributes, float]] = OrderedDict()

    def note(self, *found: Attributes | None) -> None:
        """The directories among what an answer has just brought."""
        for attributes in found:
            if attributes is not None and stat.S_ISDIR(attributes.mode):
                self.note_any(attributes)

    def note_any(self, attributes: Attributes) -> None:
        """Attributes in an answer that has just come. Answers may overtake one another: the version decides."""
        known = self._noted.pop(attributes.inode, None)
        if known is not None and known[0].version > attributes.version:
            self._noted[attributes.inode] = known
            return
        self._noted[attributes.inode] = attributes, asyncio.get_running_loop().time()
        if len(self._noted) > RECENT_MAX:
            self._noted.popitem(last=False)

    def find(self, inode: Inode, within_s: float) -> tuple[Attributes, float] | None:
        """Attributes that came no longer ago than this, and their age in seconds."""
        known = self._noted.get(inode)
        if known is None:
            return None
        age_s = asyncio.get_running_loop().time() - known[1]
        return (known[0], age_s) if age_s < within_s else None

    def clear(self) -> None:
        """The meta server has lost changes: nothing noted counts."""
        self._noted.clear()
