"""Lookup plugin ``git_revision``: the commit that a directory is at."""

from __future__ import annotations

import subprocess

from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: git_revision
short_description: The commit that a directory is at
description:
  - Gives for each directory the short name of the last commit of its git repository, with C(+changes) where files below
    the directory are not as they are there; an empty string where there is no repository.
options:
  _terms:
    description: Directories on the controller.
    required: true
"""


def git(directory: str, *arguments: str) -> str:
    """Give what git says of a directory; an empty string if it fails or is not installed."""
    command = ["git", "-C", directory, "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def git_revision(directory: str) -> str:
    """Name the commit that a directory is at."""
    commit = git(directory, "rev-parse", "--short=10", "HEAD")
    return f"{commit}+changes" if commit and git(directory, "status", "--porcelain", "--", ".") else commit


class LookupModule(LookupBase):
    """Entry point for Ansible."""

    def run(self, terms: list[str], variables: dict | None = None, **kwargs: object) -> list[str]:
        """Name the commit of each directory in ``terms``."""
        return [git_revision(term) for term in terms]
