"""What the tests of the roles share: the project's YAML as data, and programs loaded from where the roles keep them."""

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]

STAND_IN = f"""#!{sys.executable} -IS
import json, pathlib, sys
here = pathlib.Path(__file__).parent
line = " ".join([pathlib.Path(__file__).name, *sys.argv[1:]])
with open(here / "calls", "a") as calls:
    print(line, file=calls)
answers = json.loads((here / "answers").read_text())
given = [answers[start] for start in sorted(answers, key=len) if line.startswith(start)]
code, out, err = given[-1] if given else (0, "", "")
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
"""A program that answers what it is told, and writes down what it is asked."""

ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())
SHARED_MODULES = {path.stem for path in (ROOT / "playbooks" / "library").glob("*.py")}
WIRING = ROOT / "playbooks" / "group_vars" / "all"

os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
sys.dont_write_bytecode = True


class Task(NamedTuple):
    """One task, with the file that it stands in."""

    file: Path
    content: dict[str, Any]

    @property
    def name(self) -> str:
        """Where to find it."""
        return f"{self.file.relative_to(ROOT)}: {self.content.get('name')}"

    @property
    def module(self) -> str:
        """Its module, without the collection."""
        return self._call[0].rsplit(".", 1)[-1]

    @property
    def arguments(self) -> Any:
        """What its module is given."""
        return self._call[1]

    @property
    def _call(self) -> tuple[str, Any]:
        calls = (part for part in self.content.items() if part[0].count(".") == 2 or part[0] in SHARED_MODULES)
        return next(calls, ("", None))


def load(path: Path) -> Any:
    """Give the content of a YAML file, or an empty dictionary if it is missing or says nothing."""
    return (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}


def wiring() -> dict[str, Any]:
    """Give what the playbooks set for all roles."""
    return {name: value for file in sorted(WIRING.iterdir()) for name, value in load(file).items()}


def role_files(role: str, *folders: str) -> list[Path]:
    """Give the files in some folders of a role."""
    found = (path for folder in folders for path in (ROOT / "roles" / role / folder).rglob("*"))
    return sorted(path for path in found if path.is_file() and path.parent.name != "__pycache__")


def entry_points(role: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Give the options of each entry point of a role."""
    specs = load(ROOT / "roles" / role / "meta" / "argument_specs.yml").get("argument_specs", {})
    return {name: spec.get("options", {}) for name, spec in specs.items()}


def options(role: str) -> dict[str, dict[str, Any]]:
    """Give the options of all entry points of a role."""
    return {name: option for entry in entry_points(role).values() for name, option in entry.items()}


def _tasks(file: Path, entries: list[dict[str, Any]]) -> Iterator[Task]:
    for entry in entries:
        yield Task(file, entry)
        for part in ("block", "rescue", "always", "pre_tasks", "tasks", "post_tasks", "handlers"):
            yield from _tasks(file, entry.get(part) or [])


def role_tasks(role: str) -> list[Task]:
    """Give all tasks and handlers of a role, those in blocks too."""
    return [task for file in role_files(role, "tasks", "handlers") for task in _tasks(file, load(file) or [])]


def all_tasks() -> list[Task]:
    """Give all tasks of the project: of the roles, the playbooks, the scenarios."""
    plays = [*(ROOT / "playbooks").glob("*.yml"), *(ROOT / "molecule").rglob("*.yml")]
    lists = [(file, content) for file in sorted(plays) if isinstance(content := load(file), list)]
    return [task for role in ROLES for task in role_tasks(role)] + [
        task for file, content in lists for task in _tasks(file, content)
    ]


def strings(value: Any) -> Iterator[str]:
    """Give all strings in a piece of YAML, keys left out."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from strings(part)
    elif isinstance(value, str):
        yield value


def words_in(text: str) -> set[str]:
    """Give all names in a text."""
    return set(re.findall(r"\w+", text))


def module_at(path: Path) -> ModuleType:
    """Load a Python file that is not on the path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
