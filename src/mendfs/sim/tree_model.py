"""A small tree as POSIX says it must be: what each operation makes of it, or with which errors it must be refused.

Pure. Names are worked on by their directory's key and their own; keys are given once and say nothing to anybody else.
"""

import copy
import errno
from collections.abc import Callable
from typing import Any

import msgspec

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
XATTR_CREATE, XATTR_REPLACE = 1, 2
ROOT = 0

Shown = dict[str, tuple[Any, ...]]
"""Path -> what is there, as `Tree.shown` makes it and as a client sees it."""


class Refused(Exception):
    """The operation must be refused, with one of these."""

    def __init__(self, *codes: int) -> None:
        super().__init__(codes)
        self.codes = frozenset(codes)


class Node(msgspec.Struct):
    """An inode."""

    kind: str
    mode: int
    uid: int = 0
    size: int = 0
    target: bytes = b""
    mtime_ns: int | None = None
    """None: whatever it was made of."""
    parent: int = ROOT
    children: dict[bytes, int] = msgspec.field(default_factory=dict)
    xattrs: dict[bytes, bytes] = msgspec.field(default_factory=dict)


class Tree:
    """All of it."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {ROOT: Node("directory", 0o755)}

    def copy(self) -> "Tree":
        """Another one like it."""
        return copy.deepcopy(self)

    def after(self, change: "Change") -> "Tree | None":
        """As it is after a change; None if that is refused."""
        other = self.copy()
        try:
            change(other)
        except Refused:
            return None
        return other

    # --- looking -------------------------------------------------------------------------------------------------

    def find(self, directory: int, name: bytes) -> int | None:
        """The key of what a name stands for. Raises Refused if the directory is gone."""
        if directory not in self.nodes:
            raise Refused(errno.ENOENT)
        return self.nodes[directory].children.get(name)

    def directories(self) -> list[int]:
        """The keys of all directories."""
        return [key for key, node in self.nodes.items() if node.kind == "directory"]

    def depth(self, key: int) -> int:
        """Steps to the root."""
        steps = 0
        while key != ROOT:
            key, steps = self.nodes[key].parent, steps + 1
        return steps

    def path(self, directory: int, name: bytes = b"") -> str:
        """For people, and for finding it."""
        parts = [name.decode()] if name else []
        while directory != ROOT:
            parent = self.nodes[directory].parent
            mine = next(name for name, key in self.nodes[parent].children.items() if key == directory)
            parts.insert(0, mine.decode())
            directory = parent
        return "/".join(parts)

    def links(self, key: int) -> int:
        """What its link count must be."""
        node = self.nodes[key]
        if node.kind == "directory":
            return 2 + sum(self.nodes[child].kind == "directory" for child in node.children.values())
        return sum(child == key for each in self.nodes.values() for child in each.children.values())

    def shown(self) -> Shown:
        """Everything that a client can see. Names of one inode say which of them is the first."""
        first: dict[int, str] = {}
        found: Shown = {}
        waiting = [(ROOT, "")]
        while waiting:
            directory, path = waiting.pop(0)
            for name, key in sorted(self.nodes[directory].children.items()):
                node, here = self.nodes[key], f"{path}/{name.decode()}"
                xattrs = tuple(sorted(node.xattrs.items()))
                shown = (node.kind, node.mode, node.uid, node.size, node.target, self.links(key), xattrs)
                found[here] = (*shown, first.setdefault(key, here), node.mtime_ns)
                if node.kind == "directory":
                    waiting.append((key, here))
        return found

    # --- changing ------------------------------------------------------------------------------------------------

    def make(self, key: int, directory: int, name: bytes, kind: str, target: bytes, mode: int) -> None:
        """A new inode."""
        if self.find(directory, name) is not None:
            raise Refused(errno.EEXIST)
        self.nodes[key] = Node(kind, mode, size=len(target), target=target, parent=directory)
        self._enter(directory, name, key)

    def _enter(self, directory: int, name: bytes, key: int) -> None:
        self.nodes[directory].children[name] = key
        self.nodes[directory].mtime_ns = None
        if self.nodes[key].kind == "directory":
            self.nodes[key].parent = directory

    def _leave(self, directory: int, name: bytes) -> None:
        key = self.nodes[directory].children.pop(name)
        self.nodes[directory].mtime_ns = None
        if not any(key in each.children.values() for each in self.nodes.values()):
            del self.nodes[key]

    def link(self, key: int, directory: int, name: bytes) -> None:
        """One more name."""
        node = self.nodes.get(key)
        if node is None:
            raise Refused(errno.ENOENT)
        taken = self.find(directory, name) is not None
        if node.kind == "directory":
            raise Refused(errno.EPERM, *([errno.EEXIST] if taken else []))
        if taken:
            raise Refused(errno.EEXIST)
        self._enter(directory, name, key)

    def remove(self, directory: int, name: bytes, *, is_rmdir: bool) -> None:
        """unlink and rmdir."""
        key = self.find(directory, name)
        if key is None:
            raise Refused(errno.ENOENT)
        node = self.nodes[key]
        if is_rmdir and node.kind != "directory":
            raise Refused(errno.ENOTDIR)
        if not is_rmdir and node.kind == "directory":
            raise Refused(errno.EISDIR, errno.EPERM)
        if node.children:
            raise Refused(errno.ENOTEMPTY, errno.EEXIST)
        self._leave(directory, name)

    def _is_below(self, key: int, above: int) -> bool:
        while key not in (above, ROOT):
            key = self.nodes[key].parent
        return key == above

    def rename(self, old: tuple[int, bytes], new: tuple[int, bytes], flags: int) -> None:
        """renameat2."""
        source, target = self.find(*old), self.find(*new)
        if source is None:
            raise Refused(errno.ENOENT)
        codes: list[int] = []
        if self.nodes[source].kind == "directory" and self._is_below(new[0], source):
            codes.append(errno.EINVAL)
        if flags & RENAME_EXCHANGE:
            self._exchange(old, new, source, target, codes)
            return
        if target is not None:
            codes += self._not_over(source, target, flags)
        if codes:
            raise Refused(*codes)
        if target == source:
            return
        if target is not None:
            self._leave(*new)
        self._enter(*new, source)
        self._leave(*old)

    def _not_over(self, source: int, target: int, flags: int) -> list[int]:
        """Why `source` cannot take the place of `target`."""
        if flags & RENAME_NOREPLACE:
            return [errno.EEXIST]
        if target == source:
            return []
        codes = []
        mine, other = self.nodes[source].kind == "directory", self.nodes[target].kind == "directory"
        if mine != other:
            codes.append(errno.ENOTDIR if mine else errno.EISDIR)
        if self.nodes[target].children:
            codes += [errno.ENOTEMPTY, errno.EEXIST]
        return codes

    def _exchange(
        self, old: tuple[int, bytes], new: tuple[int, bytes], source: int, target: int | None, codes: list[int]
    ) -> None:
        if target is None:
            raise Refused(errno.ENOENT, *codes)
        if self.nodes[target].kind == "directory" and self._is_below(old[0], target):
            codes.append(errno.EINVAL)
        if codes:
            raise Refused(*codes)
        self._enter(*old, target)
        self._enter(*new, source)

    def set_attributes(self, key: int, **fields: Any) -> None:
        """Mode, owner, size, time."""
        node = self.nodes.get(key)
        if node is None:
            raise Refused(errno.ENOENT)
        if "size" in fields:
            if node.kind != "file":
                raise Refused(errno.EISDIR, errno.EINVAL)
            node.mtime_ns = None
        for name, value in fields.items():
            setattr(node, name, value)

    def set_xattr(self, key: int, name: bytes, value: bytes, flags: int) -> None:
        """setxattr."""
        node = self.nodes.get(key)
        if node is None:
            raise Refused(errno.ENOENT)
        if name in node.xattrs and flags == XATTR_CREATE:
            raise Refused(errno.EEXIST)
        if name not in node.xattrs and flags == XATTR_REPLACE:
            raise Refused(errno.ENODATA)
        node.xattrs[name] = value

    def remove_xattr(self, key: int, name: bytes) -> None:
        """removexattr."""
        node = self.nodes.get(key)
        if node is None:
            raise Refused(errno.ENOENT)
        if name not in node.xattrs:
            raise Refused(errno.ENODATA)
        del node.xattrs[name]


Change = Callable[[Tree], None]


def differences(found: Shown, wanted: Shown) -> list[str]:
    """What is not as it must be, one line each."""
    lines = []
    for path in sorted(found.keys() | wanted.keys()):
        if path not in found or path not in wanted:
            lines.append(f"{path} is {'missing' if path not in found else 'there'}")
            continue
        # The time counts only where it was set.
        if found[path][:-1] != wanted[path][:-1] or wanted[path][-1] not in (None, found[path][-1]):
            lines.append(f"{path} is {found[path]} instead of {wanted[path]}")
    return lines
