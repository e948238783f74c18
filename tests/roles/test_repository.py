"""Nothing of one machine or one company is in the repository, and nothing large."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

LEFT_BEHIND = {
    "a package index": r"https?://(?!\S*\bexample\b)\S+/simple\b",
    "a Debian mirror": r"\bhttps?://(?!\S*\bexample\b|download\.docker\.com/)\S+/debian(?:-security)?\b|\b(?:deb|security|snapshot|ftp\S*)\.debian\.org\b",
    "somebody's home": r"(?<!target=)(?<!\w)/(?:root|home)/[\w.]",
    "a password in an address": r"\w://[^\s/:@{}\"']+:[^\s/:@{}\"']+@(?!example)",
    "a private key": r"BEGIN [A-Z ]*PRIVATE KEY",
}


def files() -> list[Path]:
    """All files that are tracked, or would be by the next commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in sorted(set(listed.split("\0"))) if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_nothing_is_left_behind(what: str) -> None:
    texts = {file: file.read_bytes().decode(errors="replace") for file in files()}
    found = {
        str(file.relative_to(ROOT)): match[0]
        for file, text in texts.items()
        if (match := re.search(LEFT_BEHIND[what], text))
    }
    assert found == {}


def test_no_file_is_large() -> None:
    assert [str(file) for file in files() if file.stat().st_size > 1_000_000] == []
