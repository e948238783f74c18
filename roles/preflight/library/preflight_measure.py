#!/usr/bin/python
"""Module ``preflight_measure``: what decides whether a host is fit, measured without changing it."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: preflight_measure
short_description: Measures what decides whether a host is fit
description: Reads only, and so does the same in check mode.
options:
  bind:
    description: Address that the UI is to listen on.
    type: str
    required: true
  port:
    description: Port that it is to listen on; what is no number is not tried.
    type: str
    required: true
  warehouse:
    description: The DuckDB file, of which there are snapshots.
    type: path
    required: true
  published:
    description: Directory of the snapshots.
    type: path
    required: true
  snapshots:
    description: How many of them are kept.
    type: int
    required: true
  users:
    description: Names that the host is to know.
    type: list
    elements: str
    default: []
"""

RETURN = """
memory:
  description: >-
    MiB of memory in all. It is the fact C(memtotal_mb) too, beside C(processor_vcpus): Ansible would look at disks and
    devices as well, which takes three times as long.
  type: int
disk:
  description: The directory for data or images with the least free space, C(path), and its MiB, C(free).
  type: dict
snapshots:
  description: MiB that the next snapshots of the warehouse need, C(need), and that are free for them, C(free).
  type: dict
installed:
  description: Whether the platform's configuration is there.
  type: bool
packages:
  description: Installed packages of a Docker engine, Debian's or Docker's own.
  type: list
foreign_settings:
  description: Whether the engine has settings that are not the platform's.
  type: bool
unknown_users:
  description: Those of the given users that there are not.
  type: list
versions:
  description: Versions that the data belong to, by package; empty where that is not known.
  type: dict
postgres:
  description: Major version of PostgreSQL that the metadata belong to; empty if there are none.
  type: str
unfinished:
  description: When an upgrade began that is not finished; empty if there is none.
  type: str
listen_error:
  description: Why the UI could not listen there, with the holder of the port where it can be known; empty if it could.
  type: str
"""

STORES = (Path("/var/lib"), Path("/var/lib/docker"), Path("/var/lib/data-platform"))
SETTINGS = Path("/etc/docker/daemon.json")
SHARING = ("btrfs", "xfs")
"""File systems on which a snapshot shares its blocks with the warehouse."""
KEPT_FREE = 1024
"""MiB that a snapshot leaves free."""
UNITS = Path("/etc/systemd/system")
DATA = Path("/var/lib/data-platform")
PACKAGES = ("docker.io", "containerd", "docker-ce", "containerd.io")


def memory() -> int:
    """Give the MiB of memory that the host has in all."""
    return int(re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[1]) // 1024


def disk(stores: tuple[Path, ...] = STORES) -> dict[str, str | int]:
    """Give the one of ``stores`` that has the least free space, as ``path``, and its MiB, as ``free``."""
    mebibytes = {str(path): os.statvfs(path) for path in stores if path.is_dir()}
    free = {path: found.f_bavail * found.f_frsize // 2**20 for path, found in mebibytes.items()}
    path = min(free, key=free.get)
    return {"path": path, "free": free[path]}


def output(*command: str) -> str:
    """Give what a command prints; nothing if there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def snapshots(warehouse: Path, published: Path, kept: int) -> dict[str, int]:
    """Give the MiB that the next snapshots of the warehouse need, as ``need``, and those free for them, as ``free``.

    One more than are kept is there for a moment. Without a warehouse, none is needed.
    """
    if not warehouse.is_file():
        return {"need": 0, "free": 0}
    place = next(path for path in (published, *published.parents) if path.is_dir())
    found = os.statvfs(place)
    shared = place.stat().st_dev == warehouse.stat().st_dev and (
        output("stat", "--file-system", "--format=%T", str(place)).strip() in SHARING
    )
    coming = 0 if shared else max(kept + 1 - len(list(published.glob("warehouse-*.duckdb"))), 1)
    need = coming * (warehouse.stat().st_size >> 20) + KEPT_FREE
    return {"need": need, "free": found.f_bavail * found.f_frsize >> 20}


def versions(units: Path = UNITS, data: Path = DATA) -> dict[str, str]:
    """Give the versions that the data belong to, by package, as the webserver's unit names them.

    Of a platform that was taken off, its last unit is beside the data. There are none if the unit is older than the
    line.
    """
    last = data / "dagster" / "last-unit"
    text = unit("dagster-webserver", units, data) or (last.read_text() if last.is_file() else "")
    found = re.search(r"^Versions=(.+)$", text, re.MULTILINE)
    return dict(word.split("=", 1) for word in found[1].split()) if found else {}


def postgres(units: Path = UNITS, data: Path = DATA) -> str:
    """Give the major version of PostgreSQL that the metadata belong to, as its unit says; empty if there are none.

    Data that an upgrade left behind stay beside them. Of a platform that was taken off, the newest count.
    """
    there = [file.parent.name for file in data.glob("postgres/*/PG_VERSION") if file.parent.name.isdigit()]
    found = re.search(r'PGDATA=[^"\s]*/([^"/\s]+)', unit("dagster-postgres", units, data))
    return found[1] if found and found[1] in there else max(there, key=int, default="")


def unit(name: str, units: Path, data: Path) -> str:
    """Give the text of a unit: in an upgrade that is not finished, of the one that was kept; empty if there is none."""
    kept = journal(data).get("step") not in (None, "saving")
    file = (data / "upgrade" / "from" if kept else Path("/")) / str(units).lstrip("/") / f"{name}.service"
    return file.read_text() if file.is_file() else ""


def journal(data: Path = DATA) -> dict[str, str]:
    """Give what an upgrade that is not finished wrote down of itself; nothing if there is none."""
    file = data / "upgrade" / "unfinished"
    return json.loads(file.read_text()) if file.is_file() else {}


def packages() -> list[str]:
    """Give the installed packages of a Docker engine, Debian's or Docker's own."""
    listed = output("dpkg-query", "--show", "--showformat=${db:Status-Abbrev} ${Package}\n", *PACKAGES)
    return [line.split()[1] for line in listed.splitlines() if line.startswith("ii")]


def unknown(users: list[str]) -> list[str]:
    """Give those of the ``users`` whose names the host does not know, from whatever source it takes users."""
    return [user for user in users if not user or output("getent", "passwd", "--", user).partition(":")[0] != user]


def holder(port: int) -> str | None:
    """Name what listens on a port of the host; None if it is the platform itself."""
    form = '{{.Names}} {{.Label "data-platform.made-of"}}'
    containers = output("docker", "container", "ls", "--filter", f"publish={port}", "--format", form).splitlines()
    if any(len(line.split()) == 2 for line in containers):
        return None
    if containers:
        return f"container {containers[0].strip()}"
    listening = output("ss", "--tcp", "--listening", "--numeric", "--processes", "--no-header", f"sport = :{port}")
    found = re.search(r'\(\("(.+?)",pid=(\d+)', listening)
    return f"{found[1]} (process {found[2]})" if found else "another process"


def listen_error(bind: str, port: str) -> str:
    """Say why the UI could not listen on an address and port of the host; empty if it could, or does.

    Args:
        bind: An IP address, in brackets if it is of version 6; empty means all.
        port: A number; anything else is not tried.
    """
    if not port.isdigit():
        return ""
    if int(port) not in range(1, 2**16):
        return "there is no such port"
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            bind.strip("[]") or "0.0.0.0", int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror):
            return "it is not an IP address"
        if error.errno == errno.EADDRNOTAVAIL:
            return "the host has no such address"
        if error.errno != errno.EADDRINUSE:
            return error.strerror
        held = holder(int(port))
        return f"{held} listens there" if held else ""
    return ""


def main() -> None:
    """Entry point for Ansible."""
    options = {
        "bind": {"type": "str", "required": True},
        "port": {"type": "str", "required": True},
        "warehouse": {"type": "path", "required": True},
        "published": {"type": "path", "required": True},
        "snapshots": {"type": "int", "required": True},
        "users": {"type": "list", "elements": "str", "default": []},
    }
    module = AnsibleModule(options, supports_check_mode=True)
    found = memory()
    module.exit_json(
        changed=False,
        ansible_facts={"ansible_memtotal_mb": found, "ansible_processor_vcpus": os.cpu_count()},
        memory=found,
        disk=disk(),
        snapshots=snapshots(
            *(Path(module.params[name]) for name in ("warehouse", "published")), module.params["snapshots"]
        ),
        installed=Path("/etc/data-platform/dagster").exists(),
        packages=packages(),
        foreign_settings=SETTINGS.exists() and "data-platform.options=" not in SETTINGS.read_text(),
        versions=versions(),
        postgres=postgres(),
        unfinished=journal().get("since", ""),
        unknown_users=unknown(module.params["users"]),
        listen_error=listen_error(module.params["bind"], module.params["port"]),
    )


if __name__ == "__main__":
    main()
