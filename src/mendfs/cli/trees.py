"""`tree` and `du`: whole trees, many directories asked for at a time."""

import functools
import json
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

from mendfs.cli.command import At
from mendfs.cli.crew import Crew, Family
from mendfs.cli.file_actions import children_of, each, is_directory
from mendfs.cli.file_text import document, json_name, link_text
from mendfs.client.paths import resolve
from mendfs.errors import OperationError
from mendfs.model import Attributes, Inode


class Node:
    """A name in a tree. `children` is None for what was not looked into."""

    __slots__ = ("attributes", "children", "name", "target")

    def __init__(self, name: bytes, attributes: Attributes) -> None:
        self.name = name
        self.attributes = attributes
        self.target: bytes | None = None
        self.children: list[Node] | None = None


async def load(at: At, path: str, depth_max: int | None) -> Node:
    """Everything below a path, `depth_max` levels deep."""
    inside = at.path(path)
    root = Node(os.fsencode(path), await resolve(at.volume, inside))
    crew = Crew()

    async def list_children(node: Node, where: str, depth: int) -> None:
        try:
            entries = await children_of(at.volume, node.attributes.inode)
        except OperationError as error:
            at.skip(OperationError(error.errno, where))
            return
        node.children = [Node(name, attributes) for name, attributes in entries]
        for child in node.children:
            below = f"{where.rstrip('/')}/{os.fsdecode(child.name)}"
            if stat.S_ISLNK(child.attributes.mode):
                crew.add(functools.partial(read_link, child, below))
            elif is_directory(child.attributes) and (depth_max is None or depth < depth_max):
                crew.add(functools.partial(list_children, child, below, depth + 1))

    async def read_link(node: Node, where: str) -> None:
        try:
            node.target = await at.volume.readlink(node.attributes.inode)
        except OperationError as error:
            at.skip(OperationError(error.errno, where))

    if is_directory(root.attributes) and depth_max != 0:
        crew.add(functools.partial(list_children, root, inside, 1))
    await crew.run()
    return root


def tree_text(root: Node, at: At) -> Iterator[str]:
    """Lines as tree(1) draws them, and a count."""
    yield at.name(root.name)
    directories = files = 0
    # A stack of our own: a tree may be deeper than Python lets functions call themselves.
    waiting = _with_indents(root.children or [], "")
    while waiting:
        node, indent, is_last = waiting.pop()
        yield indent + ("└── " if is_last else "├── ") + at.name(node.name) + link_text(node.target, at.name)
        if is_directory(node.attributes):
            directories += 1
            waiting += _with_indents(node.children or [], indent + ("    " if is_last else "│   "))
        else:
            files += 1
    yield ""
    yield f"{directories} director{'y' if directories == 1 else 'ies'}, {files} file{'' if files == 1 else 's'}"


def _with_indents(children: Sequence[Node], indent: str) -> list[tuple[Node, str, bool]]:
    return [(child, indent, at == 0) for at, child in enumerate(reversed(children))]


def tree_json(root: Node) -> str:
    """One document, each directory with its `children`. Put together here: json.dumps gives up at some depth."""
    parts: list[str] = []
    waiting: list[Node | str] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            parts.append(node)
            continue
        text = json.dumps(document(node.name, node.attributes, node.target))
        if node.children is None:
            parts.append(text)
            continue
        parts.append(text[:-1] + ', "children": [')
        waiting.append("]}")
        for place, child in enumerate(reversed(node.children)):
            waiting.append(child)
            if place < len(node.children) - 1:
                waiting.append(", ")
    return "".join(parts) + "\n"


async def tree(at: At, path: str, *, depth_max: int | None, as_json: bool) -> None:
    """Show a tree."""
    root = await load(at, path, depth_max)
    await at.write(tree_json(root) if as_json else "".join(f"{line}\n" for line in tree_text(root, at)))


# --- du ---------------------------------------------------------------------------------------------------------------


class Usage:
    """What a directory and everything below it holds. Each inode counts once, where it was met first."""

    __slots__ = ("above", "directories", "files", "path", "size", "stored")

    def __init__(self, path: str, above: "Usage | None") -> None:
        self.path = path
        self.above = above
        self.stored = self.size = self.files = self.directories = 0

    def add(self, attributes: Attributes) -> None:
        """A file, link or other name that is no directory."""
        self.files += 1
        self.stored += attributes.stored
        self.size += attributes.size

    def add_below(self, below: "Usage") -> None:
        """A directory below this one."""
        self.stored += below.stored
        self.size += below.size
        self.files += below.files
        self.directories += below.directories + 1

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        path = json_name(os.fsencode(self.path))["name"]
        return {"path": path, **{name: getattr(self, name) for name in ("stored", "size", "files", "directories")}}


async def usage_of(at: At, path: str) -> list[Usage]:
    """The usage of every directory in a tree, each after those below it; the last one is `path` itself."""
    inside = at.path(path)
    found = await resolve(at.volume, inside, follow=False)
    top = Usage(path, None)
    if not is_directory(found):
        top.add(found)
        return [top]
    crew = Crew()
    seen: set[Inode] = set()
    order: list[Usage] = []

    def enter(usage: Usage, inode: Inode, above: Family | None) -> None:
        async def leave() -> None:
            order.append(usage)
            if usage.above is not None:
                usage.above.add_below(usage)

        family = crew.family(leave, above)
        crew.add(functools.partial(measure, usage, inode, family), family)

    async def measure(usage: Usage, inode: Inode, family: Family) -> None:
        try:
            entries = await children_of(at.volume, inode)
        except OperationError as error:
            at.skip(OperationError(error.errno, usage.path))
            return
        for name, attributes in entries:
            if is_directory(attributes):
                enter(Usage(f"{usage.path.rstrip('/')}/{os.fsdecode(name)}", usage), attributes.inode, family)
            elif attributes.nlink == 1 or attributes.inode not in seen:
                seen.add(attributes.inode) if attributes.nlink > 1 else None
                usage.add(attributes)

    enter(top, found.inode, None)
    await crew.run()
    return order


async def disk_usage(at: At, paths: Sequence[str], *, summary: bool, human: bool, as_json: bool) -> None:
    """`du`: bytes stored, and the sum of the sizes, of each directory."""
    from mendfs.cluster.sizes import short_size

    found: list[Usage] = []

    async def measure(path: str) -> None:
        usages = await usage_of(at, path)
        # Those of one tree in order of their names; those below a directory before it, as du(1) does.
        found.extend(usages[-1:] if summary else sorted(usages, key=lambda usage: _order(usage.path)))

    await each(at, paths, measure)
    if as_json:
        await at.write_json([usage.document() for usage in found])
        return
    lines = [
        f"{short_size(usage.stored) if human else usage.stored}\t{at.name(os.fsencode(usage.path))}\n"
        for usage in found
    ]
    await at.write("".join(lines))


def _order(path: str) -> list[tuple[int, str]]:
    # The end of a path sorts after everything that goes on.
    return [(0, name) for name in path.split("/") if name] + [(1, "")]
