#!/usr/bin/python3
"""Mechanics of the units that run containers: standard library only.

    container-unit prepare UNIT          before the container starts: clear the way and write down what it is made of
    container-unit ready UNIT COMMAND…   wait until COMMAND succeeds inside the container
    container-unit converge [--check]    start each unit whose running container is not made of what the host now holds

A unit's file is the description of its container. Its section [X-Container], which systemd ignores, names the image,
the network and the configuration files that the container reads.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
RUNTIME = Path("/run")
LABEL = "data-platform.made-of"


class Failure(Exception):
    """Something is wrong; the text is one sentence for the operator."""


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``command`` and give its result with its output as text.

    Raises:
        Failure: It failed, and ``check`` is set.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise Failure(f"'{' '.join(command)}' failed: {result.stderr.strip() or result.stdout.strip()}")
    return result


class Unit:
    """A unit that runs a container of the same name.

    Args:
        file: The unit's file.
    """

    def __init__(self, file: Path) -> None:
        """Read the unit's file."""
        self.file = file
        self.name = file.stem
        parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
        try:
            parser.read_string(file.read_text())
            container = parser["X-Container"]
        except (OSError, configparser.Error, KeyError) as error:
            raise Failure(f"{file} does not describe a container ({error}): run the playbook again.") from error
        self.image = container["Image"]
        self.network = container["Network"]
        self.config = [Path(word) for word in container.get("Config", "").split()]

    def made_of(self, image_id: str) -> str:
        """Digest of all that the container is made of: unit, image, configuration.

        Args:
            image_id: The image's ID, or an empty string where there is none.
        """
        digest = hashlib.sha256(image_id.encode())
        for path in (self.file, *self.config):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    digest.update(f"\0{file}\0".encode() + file.read_bytes())
        return digest.hexdigest()


def image_ids(units: list[Unit]) -> dict[str, str]:
    """IDs of the units' images by reference; those that are missing are left out."""
    references = sorted({unit.image for unit in units})
    lines = run("docker", "image", "inspect", "--format", "{{json .RepoTags}} {{.Id}}", *references, check=False).stdout
    return {ref: line.split()[-1] for line in lines.splitlines() for ref in references if f'"{ref}"' in line}


def prepare(unit: Unit) -> None:
    """Clear the way for the container, and write down in a label file what it is made of.

    Raises:
        Failure: The image is missing, or Docker does not answer.
    """
    ids = image_ids([unit])
    if unit.image not in ids:
        run("docker", "version")
        raise Failure(f"{unit.name} needs the image {unit.image}, which is not on this host: run the playbook again.")
    run("docker", "rm", "--force", unit.name, check=False)
    if run("docker", "network", "inspect", unit.network, check=False).returncode:
        created = run("docker", "network", "create", unit.network, check=False)
        if created.returncode and "already exists" not in created.stderr:
            raise Failure(f"The network {unit.network} cannot be made: {created.stderr.strip()}")
    outdated = run("systemctl", "show", "--property=NeedDaemonReload", "--value", unit.name).stdout.strip() == "yes"
    made_of = "outdated-unit" if outdated else unit.made_of(ids[unit.image])
    (RUNTIME / unit.name / "labels").write_text(f"{LABEL}={made_of}\nobject_systemd_unit={unit.name}.service\n")


def ready(unit: Unit, command: list[str], interval: float = 0.2) -> None:
    """Wait until ``command`` succeeds inside the container; systemd's TimeoutStartSec bounds the wait.

    Args:
        unit: The unit that is starting.
        command: What asks the service whether it does its job.
        interval: Seconds between two attempts.

    Raises:
        Failure: The unit's main process has ended.
    """
    main = os.environ.get("MAINPID")
    while run("docker", "exec", unit.name, *command, check=False).returncode:
        if main and not Path("/proc", main).exists():
            raise Failure(f"{unit.name} ended before it was ready: see 'journalctl -u {unit.name}'.")
        time.sleep(interval)


def converge(units: list[Unit], check: bool) -> list[str]:
    """Enable all ``units``, and start those whose running container is not made of what the host now holds.

    Args:
        units: The units of this host.
        check: Only say what would be done.

    Returns:
        What was done, a line for each unit concerned.

    Raises:
        Failure: A unit did not become ready.
    """
    names = [unit.name for unit in units]
    running = {}
    form = '{{.Name}} {{.State.Running}} {{index .Config.Labels "' + LABEL + '"}}'
    inspected = run("docker", "container", "inspect", "--format", form, *names, check=False).stdout
    for line in filter(None, inspected.split("\n")):
        name, state, label = line.lstrip("/").split(" ")
        running[name] = label if state == "true" else ""
    active = run("systemctl", "is-active", *names, check=False).stdout.split()
    enabled = run("systemctl", "is-enabled", *names, check=False).stdout.split()
    ids = image_ids(units)
    stale = [
        unit.name
        for unit, state in zip(units, active, strict=True)
        if state != "active" or running.get(unit.name) != unit.made_of(ids.get(unit.image, ""))
    ]
    disabled = [name for name, state in zip(names, enabled, strict=True) if state != "enabled"]
    if (stale or disabled) and not check:
        run("systemctl", "daemon-reload")
        if disabled:
            run("systemctl", "enable", "--quiet", *disabled)
        if stale and run("systemctl", "restart", *stale, check=False).returncode:
            states = run("systemctl", "is-active", *stale, check=False).stdout.split()
            failed = [name for name, state in zip(stale, states, strict=False) if state != "active"] or stale
            journal = run("journalctl", "--no-pager", "--lines=30", "--output=cat", *(f"--unit={n}" for n in failed))
            raise Failure(f"{', '.join(failed)} did not become ready; the last lines of the journal:\n{journal.stdout}")
    return [f"restarted {name}" for name in stale] + [f"enabled {name}" for name in disabled if name not in stale]


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status."""
    parser = argparse.ArgumentParser(prog="container-unit", description="Mechanics of the units that run containers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("unit")
    waiting = commands.add_parser("ready")
    waiting.add_argument("unit")
    waiting.add_argument("check", nargs=argparse.REMAINDER)
    commands.add_parser("converge").add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.command == "prepare":
            prepare(Unit(UNITS / f"{options.unit}.service"))
        elif options.command == "ready":
            ready(Unit(UNITS / f"{options.unit}.service"), options.check)
        else:
            files = [file for file in UNITS.glob("dagster-*.service") if "[X-Container]" in file.read_text()]
            for line in converge([Unit(file) for file in sorted(files)], options.check):
                print(line)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
