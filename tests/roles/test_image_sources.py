"""What the images are named after, and what the controller must have to build them; Molecule builds real ones."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, load

REGISTRY = {"images_source": "registry", "images_registry_image": f"registry.example.com/debian@sha256:{64 * 'a'}"}
NAMES: dict[str, dict[str, Any]] = {
    "plain": {},
    "refreshed": {"images_refresh": "2026-11-23"},
    "refreshed-without-quotes": yaml.safe_load("images_refresh: 2026-11-23"),
    "pulled": REGISTRY,
    "pulled-by-another-digest": REGISTRY | {"images_registry_image": f"registry.example.com/debian@sha256:{64 * 'b'}"},
    "pulled-with-a-login": REGISTRY | {"images_registry_username": "me", "images_registry_password": "secret"},
    "archive": {"images_source": "archive"},
}
"""Hosts without a docker client, so that nothing comes after the names."""

TOOLS = {
    "docker": 'case "$*" in *--help) echo --secret;; image*) ;; *) exit 9;; esac',
    "uname": "/bin/uname -m",
    "id": "echo 0",
    "mmdebstrap": "exit 9",
    "unshare": "exit 9",
}
CONTROLLERS: dict[str, tuple[dict[str, str | None], str]] = {
    "without-an-engine": ({"docker": "exit 1"}, "no Docker engine answers there: install and start one"),
    "without-docker": ({"docker": None}, "no Docker engine answers there: install and start one"),
    "without-buildkit": ({"docker": "exit 0"}, "its docker client has no BuildKit: install docker-buildx"),
    "without-rights": ({"id": "echo 1000"}, "its user lacks the rights: run the playbook as root there, or install mm"),
    "of-another-kind": ({"uname": "echo pdp11"}, "it is no .* as the host is"),
}
"""Controllers of the source archive: what their tools are beside TOOLS, and what is said of them."""

PLAY = [
    {
        "hosts": "all",
        "gather_facts": False,
        "tasks": [
            {"ansible.builtin.setup": {"gather_subset": ["!all", "!min", "platform"]}},
            {
                "block": [
                    {
                        "ansible.builtin.include_role": {"name": "images", "tasks_from": "controller"},
                        "when": "tools is defined",
                    },
                    {"ansible.builtin.include_role": {"name": "images"}},
                ],
                "environment": {"PATH": "/nowhere"},
                "vars": {"names": ["{{ images_base }}", "{{ images_dagster }}", "{{ images_postgres }}"]},
                "rescue": [
                    {
                        "ansible.builtin.copy": {
                            "dest": "{{ playbook_dir }}/{{ inventory_hostname }}.json",
                            "content": {
                                "names": "{{ names | map('default', '') }}",
                                "said": "{{ ansible_failed_result | to_json }}",
                            },
                        }
                    }
                ],
            },
        ],
    }
]


def tools(folder: Path, changed: dict[str, str | None]) -> str:
    """Make a directory with stand-ins for a controller's tools; give a PATH to them and the shell."""
    folder.mkdir()
    (folder / "sh").symlink_to("/bin/sh")
    (folder / "grep").symlink_to("/bin/grep")
    for name, program in (TOOLS | changed).items():
        if program is not None:
            (folder / name).write_text(f"#!/bin/sh\n{program}\n")
            (folder / name).chmod(0o755)
    return str(folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What role images comes to for each host."""
    folder = tmp_path_factory.mktemp("sources")
    archive = {"images_source": "archive"}
    controllers = {name: archive | {"tools": tools(folder / name, case[0])} for name, case in CONTROLLERS.items()}
    hosts = NAMES | controllers
    connection = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": connection}}))
    (folder / "play.yml").write_text(yaml.safe_dump(PLAY))
    given = json.dumps({"__images_of_distribution": {"PATH": "{{ tools }}"}})
    command = ["ansible-playbook", "--forks=15", "--inventory=hosts.yml", f"--extra-vars={given}", "play.yml"]
    environment = {**os.environ, "ANSIBLE_ROLES_PATH": str(ROOT / "roles"), "ANSIBLE_INJECT_FACT_VARS": "false"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: load(folder / f"{name}.json") for name in hosts}


def different(outcomes: dict[str, Any], one: str, other: str) -> bool:
    """Whether each image of one host has another name than that of the other."""
    pairs = list(zip(outcomes[one]["names"], outcomes[other]["names"], strict=True))
    assert len({mine == theirs for mine, theirs in pairs}) == 1
    return pairs[0][0] != pairs[0][1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("plain", "refreshed"),
        ("plain", "pulled"),
        ("pulled", "pulled-by-another-digest"),
    ],
)
def test_another_base_is_another_image_of_all(outcomes: dict[str, Any], one: str, other: str) -> None:
    assert different(outcomes, one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("plain", "archive"), ("refreshed", "refreshed-without-quotes"), ("pulled", "pulled-with-a-login")],
)
def test_what_is_not_in_the_base_does_not_count(outcomes: dict[str, Any], one: str, other: str) -> None:
    assert not different(outcomes, one, other)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controller_that_cannot_build_is_told_in_one_sentence(outcomes: dict[str, Any], controller: str) -> None:
    results = json.loads(outcomes[controller]["said"])["results"]
    said = [result["msg"] for result in results if result.get("failed")]
    assert len(said) == 1
    assert said[0].startswith("With images_source: archive the controller builds")
    assert re.search(CONTROLLERS[controller][1], said[0])
