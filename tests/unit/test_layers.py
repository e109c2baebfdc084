"""The architecture as a test: imports go one way, files stay short, only the seam opens files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "mendfs").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LINES_MAX = 600
"""Aim at 150, split at 400: what is longer does two jobs."""

LAYERS: list[set[str]] = [
    {"model"},
    {"errors"},
    {"blocks", "extents", "placement"},
    {"merging"},
    {"world"},
    {"wire", "kv"},
    {"transfer"},
    {"data", "meta", "client"},
    {"promises"},
    {"fuse"},
    {"cluster"},
    {"sim"},
    {"cli"},
]
"""Lowest first. A package imports itself and earlier layers; packages of one layer never import each other."""

FORBIDDEN = {("client", "meta"), ("client", "data"), ("fuse", "meta"), ("fuse", "data"), ("fuse", "kv")}
"""Beyond the order: what a client knows of the servers is in wire.messages."""

MAY_OPEN = {"kv/rocks.py", "kv/rocks_files.py", "fuse/device.py"}
"""Besides world/: RocksDB and the kernel's FUSE device open their own files."""


def package_of(source: Path) -> str:
    return source.relative_to(ROOT / "src" / "mendfs").parts[0].removesuffix(".py")


def parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text(), filename=str(source))


def imported_packages(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """First components below `mendfs` of everything imported, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "mendfs":
            names = [f"mendfs.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "mendfs" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1], node.lineno


def short(source: Path) -> str:
    return str(source.relative_to(ROOT))


def test_every_package_is_in_a_layer() -> None:
    known = set().union(*LAYERS) | {"__init__"}
    assert {package_of(source) for source in SOURCES} <= known


@pytest.mark.parametrize("source", SOURCES, ids=short)
def test_imports_only_point_down(source: Path) -> None:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    importer = package_of(source)
    if importer == "__init__":
        return
    for imported, line in imported_packages(parsed(source)):
        if imported == importer:
            continue
        assert level[imported] < level[importer], f"{source}:{line}: {importer} must not import {imported}"
        assert (importer, imported) not in FORBIDDEN, f"{source}:{line}: {importer} must not import {imported}"


@pytest.mark.parametrize("source", SOURCES + TESTS, ids=short)
def test_files_are_short_and_import_absolutely(source: Path) -> None:
    lines = source.read_text().count("\n")
    assert lines <= LINES_MAX, f"{source}: {lines} lines, does it do two jobs?"
    for node in ast.walk(parsed(source)):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{source}:{node.lineno}: relative import"


@pytest.mark.parametrize("source", [source for source in SOURCES if source.name == "__init__.py"], ids=short)
def test_packages_open_with_words_and_few_definitions(source: Path) -> None:
    """An `__init__.py` says what its package is; only world also makes the value it is named after."""
    tree = parsed(source)
    assert ast.get_docstring(tree), f"{source}: say what the package is"
    if package_of(source) != "world":
        defined = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        assert not defined, f"{source}:{defined[0].lineno}: a package's __init__ defines no function"


@pytest.mark.parametrize("source", SOURCES, ids=short)
def test_only_the_seam_opens_files(source: Path) -> None:
    """Bytes that reach a disk past `world.disk` would be out of sight of simulated power cuts and full disks."""
    if package_of(source) == "world" or source.relative_to(ROOT / "src" / "mendfs").as_posix() in MAY_OPEN:
        return
    for node in ast.walk(parsed(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in {"open", "io.open", "os.open", "os.fdopen"}, (
            f"{source}:{node.lineno}: {name}() belongs to world"
        )
        method = name.rpartition(".")[2]
        assert method not in {"read_text", "write_text", "read_bytes", "write_bytes"}, (
            f"{source}:{node.lineno}: {name}()"
        )
