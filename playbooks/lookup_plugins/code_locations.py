"""Lookup plugin ``code_locations``: what each code location's image is made of, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: code_locations
short_description: What the images of code locations are made of
description:
  - For each code location given, gives what it says and leaves out (of its secrets the names alone), its C(path) on
    the controller, its C(requirements) (what uv is to lock) and the C(lock) that came of them, its C(git) repository
    where it has one, C(problems) and C(lock_problems), a sentence each.
  - Fetches and changes nothing.
options:
  _terms:
    description: Code locations, as C(dagster_code_locations) has them.
    required: true
  project:
    description: Directory that relative sources start from.
    required: true
  cache:
    description: Directory that git repositories are checked out below.
    required: true
  locks:
    description: Directory of the locks, NAME.txt each.
    required: true
  shared:
    description: Lock of the shared image.
    required: true
"""

NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)
REMOTE = re.compile(r"\w[\w+.-]*://|[\w.-]+@[\w.-]+:")
FILES = (".txt", ".in", ".toml")
LOCK = "playbooks/lock.yml"


class Places(NamedTuple):
    """Where to look on the controller."""

    project: Path
    """Directory that relative sources start from."""
    cache: Path
    """Directory that git repositories are checked out below."""
    locks: Path
    """Directory of the locks."""
    shared: Path
    """Lock of the shared image."""


def pins(lock: str) -> dict[str, str]:
    """Versions by package that the text of a lock names, spelt as PEP 503 wants."""
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PIN.findall(lock)}


def requirements(location: dict[str, Any], path: Path) -> dict[str, Any]:
    """What is to be locked for a location.

    Args:
        location: The location, as the user describes it.
        path: Its source on the controller.

    Returns:
        ``files``, paths; ``lines``, requirements; ``hash`` of both and of the files' contents, empty where there is
        nothing to lock.
    """
    asked = location.get("requirements") or []
    files = [str(path / item) for item in asked if item.endswith(FILES)]
    lines = [item for item in asked if not item.endswith(FILES)]
    contents = [Path(file).read_text() if Path(file).is_file() else "" for file in files]
    digest = hashlib.sha256(json.dumps([lines, contents]).encode()).hexdigest() if asked else ""
    return {"files": files, "lines": lines, "hash": digest}


def dbt_source(path: Path, project: str) -> str:
    """Directory in a source that holds all that dbt reads to parse a project; empty stands for the whole source.

    Args:
        path: The source on the controller.
        project: The dbt project in it.
    """
    packages = [path / project / name for name in ("packages.yml", "dependencies.yml")]
    beside = any(file.is_file() and "local:" in file.read_text() for file in packages)
    return "" if beside or not (path / project / "profiles.yml").is_file() else project


def resolve(location: dict[str, Any], places: Places) -> dict[str, Any]:
    """Say where a location stands on the controller, and what is wrong with it.

    Args:
        location: The location, as the user describes it.
        places: Where to look.

    Returns:
        The location with what it leaves out, its ``host`` on the containers' network, its ``path`` on the controller,
        ``git`` (``repository`` and ``revision``, or nothing), its ``lock`` (a path, empty without requirements),
        ``problems`` and, of the lock alone, ``lock_problems``, a sentence each. Of ``secrets`` only the names.
    """
    name = str(location.get("name", ""))
    source, revision = str(location.get("source", "")), str(location.get("revision") or "")
    which, shown = f"The code location {name}", re.sub("(https?:)//[^/]*@", r"\1//", source)  # less user and password
    git: dict[str, str] = {}
    if revision:
        repository = source if REMOTE.match(source) else str(places.project / source)
        path = places.cache / f"{name}-{hashlib.sha256(f'{repository}@{revision}'.encode()).hexdigest()[:12]}"
        git = {"repository": repository, "revision": revision}
    else:
        path = places.project / source
    problems, lock_problems = [], []
    if not NAME.fullmatch(name):
        problems.append(f"{which} cannot be named so: use lower-case letters, digits and hyphens inside, 40 at most.")
    if not revision and REMOTE.match(source):
        problems.append(f"{which} comes from {shown} at no revision: say which (revision).")
    elif not revision and not path.is_dir():
        problems.append(f"{which} has no source: there is no directory {path}.")
    elif path.is_dir():
        for option in ("directory", "dbt_project"):
            if not (path / str(location.get(option) or ".")).is_dir():
                problems.append(f"{which} has no directory {location[option]} in {shown}: correct its {option}.")
    asked = requirements(location, path)
    lock = places.locks / f"{name}.txt"
    if asked["hash"]:
        if missing := [file for file in asked["files"] if path.is_dir() and not Path(file).is_file()]:
            problems.append(f"{which} has no file {', '.join(missing)}: correct its requirements.")
        elif path.is_dir():
            lock_problems = wrong_lock(which, lock, asked["hash"], places.shared)
    return {
        "name": name,
        "host": "dagster-code" if name == "core" else f"dagster-code-{name}",
        "path": str(path),
        "git": git,
        "directory": str(location.get("directory") or "."),
        "module": str(location.get("module", "")),
        "dbt_project": str(location.get("dbt_project") or ""),
        "dbt_source": dbt_source(path, str(location.get("dbt_project") or "")),
        "requirements": asked,
        "lock": str(lock) if asked["hash"] else "",
        "env": location.get("env") or {},
        "secrets": sorted(location.get("secrets") or {}),
        "writable": bool(location.get("writable")),
        "limits": location.get("limits") or {},
        "run_limits": location.get("run_limits") or {},
        "problems": problems,
        "lock_problems": lock_problems,
    }


def wrong_lock(which: str, lock: Path, digest: str, shared: Path) -> list[str]:
    """What is wrong with the lock of a location, a sentence each.

    Args:
        which: The location, as a sentence starts.
        lock: Its lock.
        digest: Hash of what was to be locked.
        shared: Lock of the shared image.
    """
    text = lock.read_text() if lock.is_file() else ""
    if f"# {digest}" not in text.splitlines():
        state = "older than its requirements" if text else "missing"
        return [f"{which} has requirements, and their lock {lock} is {state}: run {LOCK} with this inventory."]
    there = pins(shared.read_text())
    return [
        f"{which} is locked to {package} {version}, and the shared image has {there[package]}: "
        f"run {LOCK} with this inventory."
        for package, version in pins(text).items()
        if there.get(package, version) != version
    ]


def code_locations(locations: list[dict[str, Any]], places: Places) -> list[dict[str, Any]]:
    """Resolve each of ``locations``; two of one name are a problem of the second. What is no location is left out."""
    resolved = [resolve(location, places) for location in locations if isinstance(location, dict)]
    for name, times in Counter(location["name"] for location in resolved).items():
        if times > 1:
            again = [location for location in resolved if location["name"] == name][-1]
            again["problems"].append(f"{times} code locations are named {name}: give each a name of its own.")
    return resolved


class LookupModule(LookupBase):
    """Entry point for Ansible."""

    def run(self, terms: list[dict[str, Any]], variables: dict | None = None, **kwargs: Any) -> list[dict[str, Any]]:
        """Resolve each location in ``terms``."""
        self.set_options(var_options=variables, direct=kwargs)
        names = ("project", "cache", "locks", "shared")
        return code_locations(terms, Places(*(Path(self.get_option(name)).resolve() for name in names)))
