"""Programs that build and keep versions on the mount: git, make with a C compiler, Python's venv and pip."""

import zipfile
from pathlib import Path

import pytest

from tests.mount.programs import PYTHON, Place, as_ordinary_user, lines, need
from tests.real_cluster import needs_mounts

pytestmark = [needs_mounts, pytest.mark.timeout(600)]

FILES, FEWER_FILES = 500, 200
MODULES = 40


# --- git ----------------------------------------------------------------------------------------------------------


class Git:
    """git with settings of its own."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __call__(self, *arguments: object, cwd: Path) -> str:
        who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        settings = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}
        return self._place.run("git", *arguments, cwd=cwd, environment=who | settings)


@as_ordinary_user
def test_git_commits_packs_and_clones_some_hundred_files(place: Place) -> None:
    need("git")
    git = Git(place)
    work = place.path / "work"
    files = FILES if place.is_long else FEWER_FILES
    place.python(
        "import pathlib, sys\n"
        "for number in range(int(sys.argv[2])):\n"
        "    folder = pathlib.Path(sys.argv[1], f'folder{number % 20}')\n"
        "    folder.mkdir(parents=True, exist_ok=True)\n"
        "    (folder / f'file{number}').write_text(''.join(f'{number} {line}\\n' for line in range(number % 40)))\n",
        work,
        files,
    )
    git("init", "-q", "-b", "main", cwd=work)
    git("add", "-A", cwd=work)
    git("commit", "-qm", "some hundred files", cwd=work)
    assert len(lines(git("ls-files", cwd=work))) == files
    assert git("status", "--porcelain", cwd=work) == ""
    git("fsck", "--strict", cwd=work)

    git("checkout", "-qb", "branch", cwd=work)
    (work / "folder1" / "file1").write_text("changed")
    (work / "folder2" / "file2").unlink()
    git("commit", "-qam", "a branch", cwd=work)
    git("checkout", "-q", "main", cwd=work)
    assert (work / "folder1" / "file1").read_text() == "1 0\n" and (work / "folder2" / "file2").exists()
    git("merge", "-q", "branch", cwd=work)
    assert not (work / "folder2" / "file2").exists()
    git("gc", "-q", "--prune=now", cwd=work)
    git("fsck", "--strict", cwd=work)
    git("clone", "-q", "work", "clone", cwd=place.path)

    with place.second_mount() as second:
        for copy in ("work", "clone"):
            # The index knows size, times and inode of each file: nothing may look changed after a remount.
            assert git("status", "--porcelain", cwd=second / copy) == ""
            git("diff-files", "--quiet", cwd=second / copy)
        git("fsck", "--strict", cwd=second / "clone")


# --- make ---------------------------------------------------------------------------------------------------------


def write_c_project(folder: Path) -> None:
    """Modules that call one another, a library of them, and a program."""
    for number in range(MODULES):
        (folder / f"part{number}.h").write_text(f"int part{number}(int value);\n")
        following = f"part{number + 1}(value + 1)" if number + 1 < MODULES else "value"
        include = f'#include "part{number + 1}.h"\n' if number + 1 < MODULES else ""
        (folder / f"part{number}.c").write_text(
            f'#include <stdio.h>\n#include <stdlib.h>\n#include "part{number}.h"\n{include}'
            f"int part{number}(int value) {{ return {following} + {number}; }}\n"
        )
    (folder / "main.c").write_text(
        '#include <stdio.h>\n#include "part0.h"\nint main(void) { return printf("%d\\n", part0(0)) < 0; }\n'
    )
    objects = " ".join(f"part{number}.o" for number in range(MODULES))
    (folder / "Makefile").write_text(
        "CFLAGS = -O1 -Wall -MMD\n"
        "program: main.o libparts.a\n\t$(CC) -o $@ $^\n"
        f"libparts.a: {objects}\n\t$(AR) rcs $@ $^\n"
        "-include $(wildcard *.d)\n"
    )


@as_ordinary_user
def test_make_compiles_a_c_project_and_rebuilds_only_what_changed(place: Place) -> None:
    need("make", "gcc")
    write_c_project(place.path)
    place.give()
    expected = sum(range(MODULES)) + MODULES - 1
    out = place.run("make", "-j2")
    assert out.count("-c -o") == MODULES + 1 and "warning" not in out
    assert place.run("./program") == f"{expected}\n"
    # Times of what was made must order as the making did, or everything is made again.
    assert "up to date" in place.run("make", "-j2")
    place.shell("sed -i 's/+ 7;/+ 1007;/' part7.c")
    out = place.run("make", "-j2")
    assert out.count("-c -o") == 1 and "part7.c" in out
    assert place.run("./program") == f"{expected + 1000}\n"
    place.shell("touch part9.h")
    assert place.run("make", "-j2").count("-c -o") == 2
    with place.second_mount() as second:
        assert "up to date" in place.run("make", cwd=second)
        assert place.run(second / "program") == f"{expected + 1000}\n"


# --- venv and pip -------------------------------------------------------------------------------------------------


BUNDLED_PIP = """
import ensurepip, pathlib
folders = pathlib.Path("/usr/share/python-wheels"), pathlib.Path(ensurepip.__file__).parent / "_bundled"
print(next(wheel for folder in folders for wheel in folder.glob("pip-*.whl")) / "pip")
"""
"""Prints where the pip is that comes with Python, or with Debian's."""


def write_wheel(folder: Path) -> Path:
    """A package with a command, as a wheel: the index of packages may be out of reach."""
    path = folder / "greeting-1.0-py3-none-any.whl"
    about = "greeting-1.0.dist-info"
    files = {
        "greeting/__init__.py": "def main():\n    from greeting.words import WORDS\n    print(WORDS)\n",
        "greeting/words.py": "WORDS = 'hi how are you'\n",
        **{f"greeting/data/{number}.txt": "x" * number * 100 for number in range(50)},
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": "[console_scripts]\ngreet = greeting:main\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in {**files, f"{about}/RECORD": record}.items():
            wheel.writestr(name, content)
    return path


@as_ordinary_user
def test_a_virtual_environment_takes_packages_from_pip(place: Place) -> None:
    need("python3")
    if "No module" in place.run("bash", "-c", f"{PYTHON} -c 'import ensurepip, venv' 2>&1 || true"):
        pytest.skip("python3-venv is not installed: apt-get install python3-venv")
    wheel = write_wheel(place.path)
    # pip and setuptools are 750 files, which are compiled too: the wheel that pip comes as does as well.
    place.run(PYTHON, "-m", "venv", *([] if place.is_long else ["--without-pip"]), "environment")
    pip = ["-m", "pip"] if place.is_long else [place.run(PYTHON, "-c", BUNDLED_PIP).strip()]
    python = place.path / "environment" / "bin" / "python"
    place.run(python, *pip, "install", "--no-index", "--quiet", "--disable-pip-version-check", wheel)
    assert place.run(place.path / "environment" / "bin" / "greet") == "hi how are you\n"
    place.run(python, *pip, "uninstall", "-y", "--quiet", "greeting")
    assert not (place.path / "environment" / "bin" / "greet").exists()
    assert not list((place.path / "environment").rglob("greeting*"))
