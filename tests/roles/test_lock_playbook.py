"""The playbook that locks what code locations need beside the shared image: it asks no host, but the package index."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, module_at

plugin = module_at(ROOT / "playbooks/lookup_plugins/code_locations.py")
SHARED = ROOT / "roles/images/files/dagster/requirements.txt"


class Project:
    """A project of its own with the real playbooks and roles, and two sources beside it."""

    def __init__(self, root: Path) -> None:
        """Make it below ``root``."""
        self.root, self.inventory = root, root / "inventory"
        shutil.copytree(ROOT / "playbooks", root / "playbooks")
        (root / "roles").symlink_to(ROOT / "roles")
        self.inventory.mkdir()
        for source in ("directory", "repository"):
            (root / source).mkdir()
            (root / source / "requirements.in").write_text("pyyaml\n")
        for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=x"], ["tag", "v1"]):
            identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
            subprocess.run(["git", *identity, *command], cwd=root / "repository", check=True)

    def lock(self, *locations: dict[str, Any], offline: bool, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the playbook for a host that nobody can reach."""
        given = {"dagster_code_locations": [{"module": "x", **location} for location in locations], **variables}
        hosts = {"data_platform": {"hosts": {"vm.example.invalid": {}}, "vars": given}}
        (self.inventory / "hosts.yml").write_text(yaml.safe_dump(hosts))
        return subprocess.run(
            ["ansible-playbook", "-vvv", f"--inventory={self.inventory}", "playbooks/lock.yml"],
            cwd=self.root,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "UV_OFFLINE": str(int(offline))},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project without locks."""
    return Project(tmp_path)


def test_locks_are_those_that_the_lookup_asks_for(project: Project) -> None:
    locations = [
        {"name": "plain", "source": "directory"},
        {"name": "here", "source": "directory", "requirements": ["resolvelib", "requirements.in"]},
        {"name": "git", "source": "repository", "revision": "v1", "requirements": ["requirements.in"]},
    ]
    result = project.lock(*locations, offline=True)  # what uv has in its cache mostly does, and takes a second
    if result.returncode:
        result = project.lock(*locations, offline=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "as an inventory source" not in result.stderr
    locks = project.inventory / "locks"
    assert sorted(file.name for file in locks.iterdir()) == ["git.txt", "here.txt"]
    places = plugin.Places(project.root, project.root / ".cache" / "code", locks, SHARED)
    resolved = plugin.code_locations(locations, places)
    assert [location["problems"] + location["lock_problems"] for location in resolved] == [[], [], []]
    text = (locks / "here.txt").read_text()
    assert set(plugin.pins(text)) == {"pyyaml", "resolvelib"}
    assert "--hash=sha256:" in text
    assert [path for path in (ROOT, project.root) if str(path) in text] == []


def test_what_cannot_be_met_is_said_without_the_indexs_password(project: Project) -> None:
    here = {"name": "here", "source": "directory", "requirements": ["pyyaml<6"]}
    index = "https://somebody:sesame@example.invalid/python"
    result = project.lock(here, offline=True, images_package_index=index)
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert "The requirements of the code location here cannot be locked together with the shared image: " in said
    assert "pyyaml<6 and pyyaml==" in said
    assert "sesame" not in said
    assert not (project.inventory / "locks").exists()


def test_code_that_is_not_there_is_not_locked(project: Project) -> None:
    git = {"name": "git", "source": "repository", "revision": "v2", "requirements": ["requirements.in"]}
    result = project.lock(git, {"name": "here", "source": "nowhere"}, offline=True)
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert f"The code location here has no source: there is no directory {project.root}/nowhere." in said
    assert f"The code location git cannot be fetched from {project.root}/repository at v2, git says: " in said
    assert "Look for versions" not in said
