"""Lookup plugin ``controller``: who runs this play, from where, and which plays of this controller are alive."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: controller
short_description: Who runs this play, and from where
description:
  - Gives a dictionary with C(by) (user and host name), C(host) (the controller, until it boots again), C(process) (this
    play's process there) and C(alive) (all processes of plays there).
  - With the last three a lock tells whether the play that took it lives.
options: {}
"""

PROC = Path("/proc")


def plays() -> Iterator[tuple[int, str]]:
    """ID and identity, which no later process has too, of each process of ansible-playbook."""
    for directory in PROC.glob("[0-9]*"):
        try:
            program = (directory / "cmdline").read_bytes().split(b"\0")[:2]
            started = (directory / "stat").read_text().rsplit(")", 1)[1].split()[19]
        except OSError:
            continue
        if any(word.rpartition(b"/")[2] == b"ansible-playbook" for word in program):
            yield int(directory.name), f"{directory.name}.{started}"


def parent(process: int) -> int:
    """ID of the parent of a process."""
    return int((PROC / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[1])


def controller() -> dict[str, object]:
    """Describe this controller and this play; without /proc, no process is told from another."""
    name = socket.gethostname()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    described: dict[str, object] = {"by": f"{user}@{name}", "host": name, "process": "-", "alive": ["-"]}
    if (boot := PROC / "sys/kernel/random/boot_id").exists():
        alive = dict(plays())
        process = os.getpid()
        while (above := parent(process)) in alive:
            process = above
        described["host"] = f"{name}-{boot.read_text().strip()}-{(PROC / 'self/ns/pid').stat().st_ino}"
        described |= {"process": alive.get(process, "-"), "alive": sorted(alive.values())}
    return described


class LookupModule(LookupBase):
    """Entry point for Ansible."""

    def run(self, terms: list[str], variables: dict | None = None, **kwargs: object) -> list[dict[str, object]]:
        """Describe this controller."""
        return [controller()]
