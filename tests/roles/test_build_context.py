"""The hash of a build context changes with what goes into an image, and with nothing else."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible.errors import AnsibleLookupError
from conftest import ROOT, module_at

build_context = module_at(ROOT / "roles/images/lookup_plugins/build_context.py").build_context


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree with two folders and a program."""
    for name in ("b.py", "a/z.sql", "a/y.sql", "c/x.sql", "run"):
        write(tmp_path / "tree" / name, name)
    (tmp_path / "tree" / "run").chmod(0o755)
    return tmp_path / "tree"


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda tree: write(tree / "b.py", "other"),
    "name": lambda tree: (tree / "b.py").rename(tree / "c.py"),
    "folder": lambda tree: (tree / "a" / "y.sql").rename(tree / "y.sql"),
    "executable": lambda tree: (tree / "b.py").chmod(0o755),
    "no longer executable": lambda tree: (tree / "run").chmod(0o644),
    "one more, though empty": lambda tree: write(tree / "new.py", ""),
    "one less": lambda tree: (tree / "b.py").unlink(),
    "contents swapped": lambda tree: (write(tree / "a" / "y.sql", "a/z.sql"), write(tree / "a" / "z.sql", "a/y.sql")),
    "hidden file": lambda tree: write(tree / ".dockerignore", "x"),
}
NO_CHANGES: dict[str, Callable[[Path], object]] = {
    "times": lambda tree: os.utime(tree / "b.py", (0, 0)),
    "other permissions": lambda tree: (tree / "b.py").chmod(0o600),
    "bytecode": lambda tree: write(tree / "a" / "__pycache__" / "b.cpython-311.pyc", "x"),
    "lone bytecode": lambda tree: write(tree / "b.pyc", "x"),
    "caches": lambda tree: [write(tree / f".{tool}_cache" / "x", "x") for tool in ("pytest", "ruff", "mypy")],
    "dbt's target": lambda tree: write(tree / "dbt" / "target" / "manifest.json", "x"),
    "dbt's logs": lambda tree: write(tree / "dbt" / "logs" / "dbt.log", "x"),
    "dbt's user": lambda tree: write(tree / "dbt" / ".user.yml", "x"),
    "git": lambda tree: write(tree / ".git" / "HEAD", "x"),
    "environment": lambda tree: write(tree / ".venv" / "bin" / "python", "x"),
    "empty folder": lambda tree: (tree / "empty").mkdir(),
    "dangling link": lambda tree: (tree / "link").symlink_to("nowhere"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_hash_changes_with(change: str, tree: Path) -> None:
    before = build_context(str(tree))
    CHANGES[change](tree)
    assert build_context(str(tree))["hash"] != before["hash"]


@pytest.mark.parametrize("change", NO_CHANGES)
def test_nothing_changes_with(change: str, tree: Path) -> None:
    before = build_context(str(tree))
    NO_CHANGES[change](tree)
    assert build_context(str(tree)) == before


def test_place_of_the_tree_does_not_count(tree: Path) -> None:
    before = build_context(str(tree))
    moved = tree.rename(tree.with_name("moved"))
    assert build_context(str(moved)) == before | {"path": str(moved)}


def test_order_is_not_the_file_systems(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build_context(str(tree))
    walk = os.walk

    def backwards(top: Path, **options: bool) -> object:
        for folder, folders, names in walk(top, **options):
            folders.sort(reverse=True)
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert build_context(str(tree)) == expected
    assert expected["files"] == ["b.py", "run", "a/y.sql", "a/z.sql", "c/x.sql"]


@pytest.mark.parametrize("name", ["missing", "b.py"])
def test_missing_directory_is_named(name: str, tree: Path) -> None:
    with pytest.raises(AnsibleLookupError, match=f"There is no directory {tree / name} .*correct its path"):
        build_context(str(tree / name))
