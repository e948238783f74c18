"""The module host_files, as a play calls it, on files of this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

Files = list[dict[str, Any]]
ME = str(os.getuid())


@pytest.fixture
def lay_down(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Call the module on this machine; gives its result."""

    def run(files: Files, *options: str, **more: str) -> dict[str, Any]:
        mine = [{"owner": ME, **file} for file in files]
        play = {"hosts": "localhost", "gather_facts": False, "tasks": [{"host_files": {"files": mine, **more}}]}
        (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
        environment = {
            **os.environ,
            "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.json",
            "ANSIBLE_LIBRARY": str(ROOT / "playbooks/library"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        }
        command = ["ansible-playbook", "--diff", *options, str(tmp_path / "play.yml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return json.loads(done.stdout)["plays"][0]["tasks"][0]["hosts"]["localhost"]

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory for the files."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def mode(path: Path) -> str:
    """Give the permissions of a file, in octal."""
    return f"{path.stat().st_mode & 0o7777:04o}"


def test_files_and_directories_are_made_once(root: Path, lay_down: Callable[..., dict[str, Any]]) -> None:
    files = [
        {"path": f"{root}/above/folder", "mode": "2750"},
        {"path": f"{root}/above/folder/file", "content": "première ligne\n{{ 6 * 7 }} = 42\n"},
        {"path": f"{root}/above/folder/empty", "content": "", "mode": "0400"},
    ]
    assert lay_down(files)["changed"]
    folder = root / "above/folder"
    assert (folder / "file").read_text() == "première ligne\n42 = 42\n"
    assert (folder / "empty").read_text() == ""
    modes = {path.name: mode(path) for path in (root / "above", folder, folder / "file", folder / "empty")}
    assert modes == {"above": "0755", "folder": "2750", "file": "0644", "empty": "0400"}
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "file"], "nothing else is left"

    result = lay_down(files)
    assert not result["changed"]
    assert result["diff"] == []


def test_what_differs_is_put_right_and_shown(root: Path, lay_down: Callable[..., dict[str, Any]]) -> None:
    file = root / "file"
    file.write_text("old\n")
    file.chmod(0o666)
    result = lay_down([{"path": str(file), "content": "new\n", "mode": "0640"}, {"path": str(root), "mode": "0711"}])
    assert result["changed"]
    assert (file.read_text(), mode(file), mode(root)) == ("new\n", "0640", "0711")
    shown = [(diff["before_header"], diff["before"], diff["after"]) for diff in result["diff"]]
    assert shown == [
        (str(file), "old\n", "new\n"),
        (str(file), {"mode": "0666"}, {"mode": "0640"}),
        (str(root), {"mode": "0755"}, {"mode": "0711"}),
    ]


def test_check_mode_says_so_and_changes_nothing(root: Path, lay_down: Callable[..., dict[str, Any]]) -> None:
    (root / "file").write_text("old\n")
    files = [
        {"path": f"{root}/file", "content": "new\n", "validate": "false %s"},
        {"path": f"{root}/folder"},
        {"path": f"{root}/folder/file", "content": "x"},
    ]
    result = lay_down(files, "--check")
    assert result["changed"]
    assert [diff["before_header"] for diff in result["diff"]] == [file["path"] for file in files]
    assert [path.name for path in root.iterdir()] == ["file"]
    assert (root / "file").read_text() == "old\n"


def test_content_that_is_made_once_stays(root: Path, lay_down: Callable[..., dict[str, Any]]) -> None:
    password = {"path": f"{root}/password", "force": False, "mode": "0400"}
    assert lay_down([{**password, "content": "first"}])["changed"]
    assert not lay_down([{**password, "content": "second"}])["changed"]
    (root / "password").chmod(0o644)
    assert lay_down([{**password, "content": "third"}])["changed"]
    assert ((root / "password").read_text(), mode(root / "password")) == ("first", "0400")


def test_content_that_is_refused_is_not_written(root: Path, lay_down: Callable[..., dict[str, Any]]) -> None:
    (root / "file").write_text("old\n")
    file = {"path": f"{root}/file", "validate": "grep --quiet good %s"}
    result = lay_down([{**file, "content": "bad\n", "validate": "ls --no-such-option %s"}])
    assert result["failed"]
    assert result["msg"].startswith(f"The new content of {root}/file is refused: ls: unrecognized option")
    assert (root / "file").read_text() == "old\n"
    assert lay_down([{**file, "content": "good\n"}])["changed"]
    assert (root / "file").read_text() == "good\n"


def test_what_is_said_of_content_that_is_accepted_comes_back(
    root: Path, lay_down: Callable[..., dict[str, Any]]
) -> None:
    file = {"path": f"{root}/file", "content": "look", "validate": "cat %s"}
    assert lay_down([file])["said"] == ["look"]
    assert lay_down([file])["said"] == []


def test_host_is_asked_when_all_is_in_place(root: Path, lay_down: Callable[..., dict[str, Any]]) -> None:
    files = [{"path": f"{root}/file", "content": "look\n"}]
    ask = f"cat {root}/file\nls {root}/other\necho $((6 * 7))"
    assert lay_down(files, "--check", ask=ask)["answer"] == ["42"]
    assert lay_down(files, ask=ask)["answer"] == ["look", "42"]
    asked = lay_down(files, ask=ask)
    assert (asked["answer"], asked["changed"]) == (["look", "42"], False)
    assert lay_down(files, ask="exit 3")["answer"] == lay_down(files)["answer"] == []


def test_content_that_stays_is_returned_to_whom_asks(root: Path, lay_down: Callable[..., dict[str, Any]]) -> None:
    (root / "kept").write_text("old")
    files = [
        {"path": f"{root}/kept", "content": "new", "force": False, "returned": True},
        {"path": f"{root}/made", "content": "made", "force": False, "returned": True},
        {"path": f"{root}/silent", "content": "silent"},
    ]
    assert lay_down(files, "--check")["contents"] == {f"{root}/kept": "old"}
    assert lay_down(files)["contents"] == {f"{root}/kept": "old", f"{root}/made": "made"}


def test_members_of_an_object_that_the_content_does_not_name_stay_if_it_is_joined(
    root: Path, lay_down: Callable[..., dict[str, Any]]
) -> None:
    file = {"path": f"{root}/file", "content": json.dumps({"b": 2}), "join": True}
    assert lay_down([file])["changed"]
    assert (root / "file").read_text() == file["content"]
    (root / "file").write_text('{"b": 1, "a": 1}')
    assert lay_down([file])["changed"]
    assert (root / "file").read_text() == '{\n    "a": 1,\n    "b": 2\n}\n'
    assert not lay_down([file])["changed"]
