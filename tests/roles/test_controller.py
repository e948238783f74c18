"""What a play says of itself and of its tree, as a play gives it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, module_at

git_revision = module_at(ROOT / "playbooks/lookup_plugins/git_revision.py").git_revision


def said(tmp_path: Path, wrapper: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Give what the lookup says twice in one play, in a task and in one more."""
    tasks = [{"ansible.builtin.debug": {"msg": "{{ lookup('controller') }}"}} for _ in range(2)]
    (tmp_path / "play.yml").write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    environment = {
        **os.environ,
        "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.json",
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_LOOKUP_PLUGINS": str(ROOT / "playbooks/lookup_plugins"),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
    }
    command = [*wrapper, "ansible-playbook", str(tmp_path / "play.yml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [task["hosts"]["localhost"]["msg"] for task in json.loads(done.stdout)["plays"][0]["tasks"]]


def test_a_play_is_one_process_that_lives_for_as_long_as_it_does(tmp_path: Path) -> None:
    first, second = said(tmp_path, ("sh", "-c", '"$@"; true --connection=ansible', "ansible"))
    assert first["process"] == second["process"]
    assert first["process"] in first["alive"]
    assert "@" in first["by"]
    (other, _) = said(tmp_path)
    assert other["host"] == first["host"]
    assert other["process"] != first["process"]
    assert first["process"] not in other["alive"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one commit."""
    for command in (
        ["init", "--quiet"],
        ["-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_revision_of_a_tree_says_whether_it_is_that_commit(tree: Path) -> None:
    commit = git_revision(str(tree))
    assert len(commit) >= 10
    assert set(commit) <= set("0123456789abcdef")
    (tree / "beside").mkdir()
    (tree / "code").mkdir()
    (tree / "code" / "new.py").touch()
    assert git_revision(str(tree / "code")) == f"{commit}+changes"
    assert git_revision(str(tree / "beside")) == commit


def test_revision_of_what_is_in_no_repository_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_revision(str(tmp_path)) == ""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert git_revision(str(tmp_path)) == ""
