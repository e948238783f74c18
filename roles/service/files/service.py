#!/usr/bin/python3
"""Mechanics of the units that run containers: standard library only.

    container-unit prepare UNIT          before the container starts: clear the way and write down what it is made of;
                                         if it failed again and again, wait first
    container-unit ready UNIT COMMAND…   wait until COMMAND succeeds inside the container
    container-unit reloaded UNIT         write down that the container has read its configuration again
    container-unit converge [--check] UNIT…
                                         bring the host to exactly these units, each with a container that is made of
                                         what the host now holds
    container-unit remove [--check]      remove all units, their containers and their networks

A unit's file is the description of its container. Its section [X-Container], which systemd ignores, names the image,
the network, the configuration files that the container reads when it starts, those that it reads again when it is
reloaded, its user, and the directories that it writes to.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
RUNTIME = Path("/run")
UPGRADE = Path("/var/lib/data-platform/upgrade/unfinished")
"""Journal of an upgrade that is not finished; /run/data-platform-upgrade names the units that it lets start."""
JOURNAL = Path("/etc/systemd/journald.conf.d/data-platform.conf")
SLICE = "dagster.slice"
LABEL = "data-platform.made-of"
BRIDGE = "com.docker.network.bridge.name"

LONGEST_WAIT = 30  # seconds between two attempts to start what fails at once
STABLE = 20  # seconds from one start to the next after which a failure is the first one


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
        self.reload = [Path(word) for word in container.get("Reload", "").split()]
        self.user = int(container.get("User", "0"))
        self.data = [Path(word) for word in container.get("Data", "").split()]

    def made_of(self, image_id: str) -> str:
        """Digest of all that the container is made of: unit, image, configuration.

        Args:
            image_id: The image's ID, or an empty string where there is none.
        """
        return digest(image_id, self.file, *self.config)

    @property
    def reloaded(self) -> Path:
        """Where it stands which configuration the container has read again last."""
        return RUNTIME / self.name / "reloaded"


def digest(start: str, *paths: Path) -> str:
    """Digest of ``start`` and of the files among and below ``paths``."""
    content = hashlib.sha256(start.encode())
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                content.update(f"\0{file}\0".encode() + file.read_bytes())
    return content.hexdigest()


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
    state = show(unit.name, "NRestarts", "NeedDaemonReload")
    back_off(unit, again=state["NRestarts"] != "0")
    refuse_while_upgrading(unit)
    ids = image_ids([unit])
    if unit.image not in ids:
        run("docker", "version")
        raise Failure(f"{unit.name} needs the image {unit.image}, which is not on this host: run the playbook again.")
    run("docker", "rm", "--force", "--volumes", unit.name, check=False)
    there = bridge(unit.network)
    if there not in (None, unit.network):  # as an older version made it; this fails while others use it
        run("docker", "network", "rm", unit.network, check=False)
    if there != unit.network:
        option = f"{BRIDGE}={unit.network}"
        created = run("docker", "network", "create", "--opt", option, unit.network, check=False)
        if created.returncode and "already exists" not in created.stderr:
            raise Failure(f"The network {unit.network} cannot be made: {created.stderr.strip()}")
    for path in unit.data:
        provide(path, unit.user)
    made_of = "outdated-unit" if state["NeedDaemonReload"] == "yes" else unit.made_of(ids[unit.image])
    (RUNTIME / unit.name / "labels").write_text(f"{LABEL}={made_of}\n")
    reloaded(unit)


def refuse_while_upgrading(unit: Unit) -> None:
    """Let no unit start on data that are between two versions, but those that the upgrade itself starts.

    Raises:
        Failure: An upgrade is not finished.
    """
    may_start = RUNTIME / "data-platform-upgrade"
    if UPGRADE.exists() and unit.name not in (may_start.read_text().split() if may_start.exists() else []):
        since = json.loads(UPGRADE.read_text())["since"]
        raise Failure(
            f"An upgrade that began at {since} is not finished, so {unit.name} does not start: "
            "run playbooks/upgrade.yml again."
        )


def show(unit: str, *properties: str) -> dict[str, str]:
    """Properties of a unit, as systemctl shows them."""
    options = [f"--property={name}" for name in properties]
    shown = run("systemctl", "show", *options, unit).stdout
    return dict(line.split("=", 1) for line in shown.splitlines())


def back_off(unit: Unit, again: bool) -> None:
    """Wait longer each time that systemd has to start the unit again soon, so that no failure keeps a processor busy.

    Args:
        unit: The unit that is starting.
        again: Whether systemd starts it by itself, because it failed.
    """
    tries = RUNTIME / unit.name / "tries"
    soon = again and tries.exists() and time.time() - tries.stat().st_mtime < STABLE
    count = int(tries.read_text()) + 1 if soon else 0
    time.sleep(min(max(2**count - 2, 0), LONGEST_WAIT))
    tries.write_text(str(count))


def bridge(network: str) -> str | None:
    """Name that was given to the bridge of a network, or None if there is no such network.

    The firewall knows the bridge by the network's name.
    """
    form = '{{index .Options "' + BRIDGE + '"}}'
    found = run("docker", "network", "inspect", "--format", form, network, check=False)
    return None if found.returncode else found.stdout.strip()


def provide(path: Path, user: int) -> None:
    """Make a directory that a container writes to, where it is missing, and give one that is root's to its user.

    A disk that was just mounted there is root's, and so is a directory that a killed start left.

    Args:
        path: The directory; its parents are root's.
        user: User and group ID of the container.
    """
    path.mkdir(0o700, parents=True, exist_ok=True)
    if owner(path) == 0:
        os.chown(path, user, user)


def owner(path: Path) -> int:
    """ID of the user whom a file or directory belongs to."""
    return path.stat().st_uid


def reloaded(unit: Unit) -> None:
    """Write down which configuration the container has read, of that which it reads again when reloaded."""
    unit.reloaded.write_text(digest("", *unit.reload))


def ready(unit: Unit, command: list[str], interval: float = 0.2) -> None:
    """Wait until ``command`` succeeds inside the container; systemd's TimeoutStartSec bounds the wait.

    Args:
        unit: The unit that is starting.
        command: What asks the service whether it does its job.
        interval: Seconds between two attempts, or as long as an attempt took: a slow host is to start, not to answer.

    Raises:
        Failure: The unit's main process has ended.
    """
    main = os.environ.get("MAINPID")
    asked = time.monotonic()
    while run("docker", "exec", unit.name, *command, check=False).returncode:
        if main and not Path("/proc", main).exists():
            raise Failure(f"{unit.name} ended before it was ready: see 'journalctl -u {unit.name}'.")
        time.sleep(max(interval, time.monotonic() - asked))
        asked = time.monotonic()


def converge(wanted: list[str], check: bool) -> list[str]:
    """Bring the host to exactly the units ``wanted``, each with a container that is made of what the host now holds.

    Args:
        wanted: Names of the units that this host is to have.
        check: Only say what would be done.

    Returns:
        What was done, a line for each unit concerned.

    Raises:
        Failure: A unit did not become ready.
    """
    found = described()
    units = [unit for unit in found if unit.name in wanted]
    unwanted = [unit for unit in found if unit.name not in wanted]
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
    misnamed = {network for network in {unit.network for unit in units} if bridge(network) not in (None, network)}
    stale = [
        unit.name
        for unit, state in zip(units, active, strict=True)
        if state != "active"
        or running.get(unit.name) != unit.made_of(ids.get(unit.image, ""))
        or unit.network in misnamed
    ]
    outdated = [
        unit.name
        for unit in units
        if unit.reload
        and unit.name not in stale
        and (not unit.reloaded.exists() or unit.reloaded.read_text() != digest("", *unit.reload))
    ]
    disabled = [name for name, state in zip(names, enabled, strict=True) if state != "enabled"]
    unread = show(SLICE, "NeedDaemonReload")["NeedDaemonReload"] == "yes"
    outgrown = JOURNAL.exists() and JOURNAL.stat().st_mtime > started("systemd-journald")
    if outgrown and not check:
        run("systemctl", "restart", "systemd-journald")
    if (stale or disabled or unread) and not check:
        run("systemctl", "daemon-reload")
        if disabled:
            run("systemctl", "enable", "--quiet", *disabled)
        if misnamed:
            run("systemctl", "stop", *stale)  # all at once, so that the first to start makes the network again
        if stale and run("systemctl", "restart", *stale, check=False).returncode:
            states = run("systemctl", "is-active", *stale, check=False).stdout.split()
            failed = [name for name, state in zip(stale, states, strict=False) if state != "active"] or stale
            journal = run("journalctl", "--no-pager", "--lines=30", "--output=cat", *(f"--unit={n}" for n in failed))
            raise Failure(f"{', '.join(failed)} did not become ready; the last lines of the journal:\n{journal.stdout}")
    if outdated and not check:
        run("systemctl", "reload", *outdated)
    return [
        *(f"restarted {name}" for name in stale),
        *(f"enabled {name}" for name in disabled if name not in stale),
        *(f"reloaded {name}" for name in outdated),
        *(["reloaded dagster.slice"] if unread else []),
        *(["restarted systemd-journald"] if outgrown else []),
        *remove(unwanted, [], check),
    ]


def started(unit: str) -> float:
    """When the unit's process started, in seconds since the epoch, to the microsecond."""
    booted = time.time() - time.monotonic()
    return booted + int(show(unit, "ExecMainStartTimestampMonotonic")["ExecMainStartTimestampMonotonic"]) / 1e6


def described() -> list[Unit]:
    """The units of this host that run containers."""
    return [Unit(file) for file in sorted(UNITS.glob("dagster-*.service")) if "[X-Container]" in file.read_text()]


def remove(units: list[Unit], networks: list[str], check: bool) -> list[str]:
    """Remove ``units`` with their containers; their files last, so that a run that was killed is finished by the next.

    Args:
        units: Units of this host.
        networks: Networks that nothing uses without them.
        check: Only say what would be done.

    Returns:
        What was done, a line for each unit.

    Raises:
        Failure: A unit did not stop, or others use a network.
    """
    if units and not check:
        run("systemctl", "disable", "--now", "--quiet", *(unit.name for unit in units))
        run("systemctl", "reset-failed", *(unit.name for unit in units), check=False)
        for network in networks:
            if run("docker", "network", "inspect", network, check=False).returncode == 0:
                run("docker", "network", "rm", network)
        for unit in units:
            unit.file.unlink()
        run("systemctl", "daemon-reload")
    return [f"removed {unit.name}" for unit in units]


def remove_all(check: bool) -> list[str]:
    """Remove all units, their containers and their networks.

    Args:
        check: Only say what would be done.

    Returns:
        What was done, a line for each unit.

    Raises:
        Failure: A unit did not stop, or others use a network.
    """
    units = described()
    return remove(units, sorted({unit.network for unit in units}), check)


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status."""
    parser = argparse.ArgumentParser(prog="container-unit", description="Mechanics of the units that run containers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("unit")
    waiting = commands.add_parser("ready")
    waiting.add_argument("unit")
    waiting.add_argument("check", nargs=argparse.REMAINDER)
    commands.add_parser("reloaded").add_argument("unit")
    converging = commands.add_parser("converge")
    converging.add_argument("--check", action="store_true")
    converging.add_argument("units", nargs="+")
    commands.add_parser("remove").add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if options.command == "prepare":
            prepare(Unit(UNITS / f"{options.unit}.service"))
        elif options.command == "ready":
            ready(Unit(UNITS / f"{options.unit}.service"), options.check)
        elif options.command == "reloaded":
            reloaded(Unit(UNITS / f"{options.unit}.service"))
        else:
            check = options.check
            for line in converge(options.units, check) if options.command == "converge" else remove_all(check):
                print(line)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
