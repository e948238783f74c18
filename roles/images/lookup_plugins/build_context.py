"""Lookup plugin ``build_context``: the files of a directory that go into an image."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: build_context
short_description: Files of a directory that go into an image
description:
  - For each directory named, gives a dictionary with C(path), C(files) (relative paths, sorted) and C(hash),
    a digest of their paths, contents and executable bits. Times and owners do not count.
  - What tools leave behind (caches, virtual environments, dbt's target) is left out.
options:
  _terms:
    description: Directories on the controller.
    required: true
"""

LEFT_OUT = {
    ".cache",
    ".git",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".user.yml",
    ".venv",
    "__pycache__",
    "dbt_packages",
    "logs",
    "target",
}


def build_context(directory: str) -> dict[str, object]:
    """Describe the files under ``directory``.

    Args:
        directory: A directory on the controller.

    Returns:
        ``path``, the directory; ``files``, relative paths in order; ``hash``, a hexadecimal SHA-256.

    Raises:
        AnsibleLookupError: The directory does not exist.
    """
    top = Path(directory)
    if not top.is_dir():
        raise AnsibleLookupError(f"There is no directory {directory} to build an image from: correct its path.")
    digest = hashlib.sha256()
    files = []
    for folder, folders, names in os.walk(top, followlinks=True):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for name in sorted(set(names) - LEFT_OUT):
            file = Path(folder, name)
            if file.suffix == ".pyc" or not file.is_file():
                continue
            relative = file.relative_to(top).as_posix()
            files.append(relative)
            executable = bool(file.stat().st_mode & 0o100)
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{relative}\0{executable}\0{content}\n".encode())
    return {"path": str(top), "files": files, "hash": digest.hexdigest()}


class LookupModule(LookupBase):
    """Entry point for Ansible."""

    def run(self, terms: list[str], variables: dict | None = None, **kwargs: object) -> list[dict[str, object]]:
        """Describe each directory in ``terms``."""
        return [build_context(term) for term in terms]
