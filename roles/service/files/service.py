#!/usr/bin/python3
"""Mechanics of the units that run containers: standard library only.

    container-unit prepare UNIT          before the container starts: clear the way and write down what it is made of;
                                         if it failed again and again, wait first
    container-unit ready UNIT            wait until the container does its job
    container-unit replace UNIT          put a new container beside the one that serves; once ready it takes over
    container-unit retire UNIT NAME      let the container NAME, which was replaced, finish what it was asked, and end
    container-unit clear UNIT            remove the unit's containers
    container-unit reloaded UNIT         write down that the container has read its configuration again
    container-unit rehearse FILE         if the unit that FILE describes is running: start the container that is to
                                         replace its own, and run the rehearsal that FILE names in it
    container-unit converge [--check] [--only] UNIT…
                                         bring the host to exactly these units, each with a container that is made of
                                         what the host now holds; with --only, leave all others as they are
    container-unit remove [--check]      remove all units, their containers and their networks

A unit's file is the description of its container. Its section [X-Container], which systemd ignores, names the image,
the network, the configuration files that the container reads when it starts, those that it reads again when it is
reloaded, its user, the directories that it writes to, and the commands that, run inside, tell whether it does its job,
wait until nobody asks it any more, or tell whether it would do its job.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
RUNTIME = Path("/run")
PROCESSES = Path("/proc")
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
        parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
        try:
            self.text = file.read_text()
            parser.read_string(self.text)
            container = parser["X-Container"]
            self.start = words(parser["Service"]["ExecStart"])
            self.stop = words(parser["Service"].get("ExecStop", ""))
            self.after = parser["Unit"].get("After", "").split()
            self.name = self.start[self.start.index("--name") + 1]
        except (OSError, configparser.Error, KeyError, ValueError) as error:
            raise Failure(f"{file} does not describe a container ({error}): run the playbook again.") from error
        self.image = container["Image"]
        self.network = container["Network"]
        self.config = [Path(word) for word in container.get("Config", "").split()]
        self.reload = [Path(word) for word in container.get("Reload", "").split()]
        self.user = int(container.get("User", "0"))
        self.data = [Path(word) for word in container.get("Data", "").split()]
        self.ready = words(container.get("Ready", ""))
        self.drain = words(container.get("Drain", ""))
        self.rehearsal = words(container.get("Rehearsal", ""))

    def made_of(self, image_id: str) -> str:
        """Digest of all that the container is made of: unit, image, configuration.

        Args:
            image_id: The image's ID, or an empty string where there is none.
        """
        return digest(f"{image_id}\n{self.text}", *self.config)

    @property
    def reloaded(self) -> Path:
        """Where it stands which configuration the container has read again last."""
        return RUNTIME / self.name / "reloaded"


def words(line: str) -> list[str]:
    """Words of a command line of a unit file, which are in quotation marks wherever they are not plain."""
    plain = shlex.split(line.replace("\\\n", " "))
    return [word.replace("$$", "$").replace("%%", "%") for word in plain]


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
    image = image_id(unit)
    clear(unit)
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
    label(unit, "outdated-unit" if state["NeedDaemonReload"] == "yes" else unit.made_of(image))
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
            "run the playbook of that upgrade again."
        )


def image_id(unit: Unit) -> str:
    """ID of the unit's image.

    Raises:
        Failure: The image is missing, or Docker does not answer.
    """
    ids = image_ids([unit])
    if unit.image not in ids:
        run("docker", "version")
        raise Failure(f"{unit.name} needs the image {unit.image}, which is not on this host: run the playbook again.")
    return ids[unit.image]


def label(unit: Unit, made_of: str) -> None:
    """Write down what the unit's next container is made of, where docker run finds it."""
    (RUNTIME / unit.name / "labels").write_text(f"{LABEL}={made_of}\n")


def clear(unit: Unit) -> None:
    """Remove the unit's containers: its own, and those beside it if it is replaced while it serves."""
    beside = []
    if unit.drain:
        names = run("docker", "container", "ls", "--all", "--format", "{{.Names}}", check=False).stdout.split()
        beside = [name for name in names if name.startswith(f"{unit.name}.")]
    run("docker", "rm", "--force", "--volumes", unit.name, *beside, check=False)


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


def ready(unit: Unit, name: str, main: int | None, interval: float = 0.2) -> None:
    """Wait until a container of the unit does its job; systemd's TimeoutStartSec bounds the wait.

    Args:
        unit: The unit that is starting.
        name: The container.
        main: The process that the container ends with.
        interval: Seconds between two attempts, or as long as an attempt took: a slow host is to start, not to answer.

    Raises:
        Failure: The process has ended.
    """
    asked = time.monotonic()
    while run("docker", "exec", name, *unit.ready, check=False).returncode:
        if main and not (PROCESSES / str(main)).exists():
            raise Failure(f"{unit.name} ended before it was ready: see 'journalctl -u {unit.name}'.")
        time.sleep(max(interval, time.monotonic() - asked))
        asked = time.monotonic()


def replace(unit: Unit) -> None:
    """Put a new container beside the one that serves, and make it the unit's once it is ready.

    Until then nothing of the old one changes, so that a failure leaves it serving. systemd is told of the new main
    process; the old container is retired by a process of its own, which need not be waited for.

    Raises:
        Failure: There is nothing to replace, or the new container did not become ready.
    """
    old = run("docker", "container", "inspect", "--format", "{{.Id}}", unit.name, check=False).stdout.strip()
    if not old:
        raise Failure(f"{unit.name} has no container that could be replaced: run 'systemctl restart {unit.name}'.")
    made_of, new, retired = unit.made_of(image_id(unit)), next_of(unit), f"{unit.name}.{old[:12]}"
    form = '{{.State.Running}} {{index .Config.Labels "' + LABEL + '"}}'
    if run("docker", "container", "inspect", "--format", form, new, check=False).stdout.strip() == f"true {made_of}":
        main = spawn([*unit.start[: unit.start.index("run")], "attach", "--no-stdin", new])
    else:
        make_way(unit, made_of)
        main = spawn([new if word == unit.name else word for word in unit.start])
    try:
        ready(unit, new, main)
    except Failure:
        run("docker", "rm", "--force", "--volumes", new, check=False)
        raise
    notify(f"MAINPID={main}")
    run("docker", "rename", unit.name, retired)
    run("docker", "rename", new, unit.name)
    spawn([sys.executable, os.path.abspath(__file__), "retire", unit.name, retired])


def next_of(unit: Unit) -> str:
    """Name of the container that is to replace the unit's."""
    return f"{unit.name}.next"


def make_way(unit: Unit, made_of: str) -> None:
    """Provide what a container beside the unit's needs, and remove one that was to replace it and did not."""
    for path in unit.data:
        provide(path, unit.user)
    run("docker", "rm", "--force", "--volumes", next_of(unit), check=False)
    label(unit, made_of)


def spawn(command: list[str]) -> int:
    """Start ``command`` as a child of the host's first process, in the control group of this one; give its process ID.

    systemd watches a main process only if it is its own child.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        grandchild = os.fork()
        if not grandchild:
            os.execv(command[0], command)
        os.write(writing, str(grandchild).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading, encoding="ascii") as pipe:
        return int(pipe.read())


def notify(message: str) -> None:
    """Tell systemd something of this unit, as sd_notify(3) does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        datagram.connect(re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"]))
        datagram.send(message.encode())


def retire(unit: Unit, name: str) -> None:
    """Let a container that was replaced finish what it was asked, then stop and remove it."""
    run("docker", "exec", name, *unit.drain, check=False)
    run(*(name if word == unit.name else word for word in unit.stop), check=False)
    run("docker", "rm", "--force", "--volumes", name, check=False)


def rehearse(unit: Unit) -> str:
    """Start the container that is to replace the unit's, and run the unit's rehearsal in it; give what that says.

    The container stays, to be what the unit is replaced by. A unit that is not running, or whose network or
    requirements are not there, has nothing to lose: its start will tell.

    Raises:
        Failure: The rehearsal failed.
    """
    state = run("docker", "container", "inspect", "--format", "{{.State.Running}}", unit.name, check=False).stdout
    if not unit.rehearsal or state.strip() != "true" or bridge(unit.network) is None:
        return ""
    needed = [name for name in unit.after if name.startswith("dagster-")]
    if any(run("systemctl", "is-active", "--quiet", name, check=False).returncode for name in needed):
        return ""
    new = next_of(unit)
    make_way(unit, unit.made_of(image_id(unit)))
    given = [new if word == unit.name else word for word in unit.start[unit.start.index("run") + 1 :]]
    run("docker", "run", "--detach", *given)
    done = run("docker", "exec", new, *unit.rehearsal, check=False)
    if done.returncode:
        run("docker", "rm", "--force", "--volumes", new, check=False)
    if done.returncode and not (done.stderr.strip() or done.stdout.strip()):  # it ended with the service beside it
        alone = given[: given.index(unit.image) + 1]
        done = run("docker", "run", "--rm", *alone, *unit.rehearsal, check=False)
    if done.returncode:
        ended = f"The rehearsal ended with status {done.returncode} and said nothing."
        raise Failure(done.stderr.strip() or done.stdout.strip() or ended)
    return done.stdout


def converge(wanted: list[str], check: bool, only: bool = False) -> list[str]:
    """Bring the host to exactly the units ``wanted``, each with a container that is made of what the host now holds.

    If nothing differs but units whose container can be replaced while it serves, those that serve are replaced, not
    restarted.

    Args:
        wanted: Names of the units that this host is to have.
        check: Only say what would be done.
        only: Leave all other units as they are.

    Returns:
        What was done, a line for each unit concerned.

    Raises:
        Failure: A unit did not become ready.
    """
    found = described()
    units = [unit for unit in found if unit.name in wanted]
    unwanted = [unit for unit in found if unit.name not in wanted and not only]
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
    replaceable = {
        unit.name for unit in units if unit.drain and running.get(unit.name) and unit.network not in misnamed
    }
    replaceable &= {name for name, state in zip(names, active, strict=True) if state == "active"}
    seamless = {unit.name for unit in units if unit.drain}
    replaced = [name for name in stale if name in replaceable] if seamless.issuperset(stale) else []
    stale = [name for name in stale if name not in replaced]
    disabled = [name for name, state in zip(names, enabled, strict=True) if state != "enabled"]
    unread = not only and show(SLICE, "NeedDaemonReload")["NeedDaemonReload"] == "yes"
    outgrown = not only and JOURNAL.exists() and JOURNAL.stat().st_mtime > started("systemd-journald")
    if outgrown and not check:
        run("systemctl", "restart", "systemd-journald")
    if (stale or replaced or disabled or unread) and not check:
        run("systemctl", "daemon-reload")
        if disabled:
            run("systemctl", "enable", "--quiet", *disabled)
        if misnamed:
            run("systemctl", "stop", *stale)  # all at once, so that the first to start makes the network again
        if stale and run("systemctl", "restart", *stale, check=False).returncode:
            states = run("systemctl", "is-active", *stale, check=False).stdout.split()
            failed = [name for name, state in zip(stale, states, strict=False) if state != "active"] or stale
            raise Failure(f"{', '.join(failed)} did not become ready; {last_lines(failed)}")
        if replaced and run("systemctl", "reload", *replaced, check=False).returncode:
            names = ", ".join(replaced)
            raise Failure(
                f"{names} could not be replaced, and the containers before still serve; {last_lines(replaced)}"
            )
    if outdated and not check:
        run("systemctl", "reload", *outdated)
    return [
        *(f"restarted {name}" for name in stale),
        *(f"replaced {name}" for name in replaced),
        *(f"enabled {name}" for name in disabled if name not in stale + replaced),
        *(f"reloaded {name}" for name in outdated),
        *(["reloaded dagster.slice"] if unread else []),
        *(["restarted systemd-journald"] if outgrown else []),
        *remove(unwanted, [], check),
        *([] if check else forget([unit for unit in units if unit.drain])),
    ]


def forget(units: list[Unit]) -> list[str]:
    """Remove containers that were to replace the units' and did not; give a line for each.

    Those that were replaced, and whose process that retires them was killed, get another one.
    """
    names = run("docker", "container", "ls", "--format", "{{.Names}}", check=False).stdout.split() if units else []
    left = sorted(set(names) & {next_of(unit) for unit in units})
    if left:
        run("docker", "rm", "--force", "--volumes", *left, check=False)
    for unit in (unit for unit in units if next_of(unit) in left):  # which may have been found ready, and so by others
        run("docker", "exec", unit.name, *unit.ready, check=False)
    retired = {name: unit for unit in units for name in names if re.fullmatch(rf"{unit.name}\.[0-9a-f]{{12}}", name)}
    for name in retired.keys() - retiring():
        run("systemd-run", "--collect", "--quiet", os.path.abspath(__file__), "retire", retired[name].name, name)
    return [f"removed {name}" for name in left]


def retiring() -> set[str]:
    """Names of the containers that a process of this host retires."""
    found = set()
    for file in PROCESSES.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            words = file.read_text().split("\0")[:-1]
            found |= {words[-1]} if "retire" in words else set()
    return found


def last_lines(units: list[str]) -> str:
    """What the journal holds of these units last, with a word of introduction."""
    journal = run("journalctl", "--no-pager", "--lines=30", "--output=cat", *(f"--unit={name}" for name in units))
    return f"the last lines of the journal:\n{journal.stdout}"


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
    for command in ("prepare", "ready", "replace", "clear", "reloaded", "forget"):
        commands.add_parser(command).add_argument("unit")
    retiring = commands.add_parser("retire")
    retiring.add_argument("unit")
    retiring.add_argument("name")
    commands.add_parser("rehearse").add_argument("file", type=Path)
    converging = commands.add_parser("converge")
    converging.add_argument("--check", action="store_true")
    converging.add_argument("--only", action="store_true")
    converging.add_argument("units", nargs="+")
    commands.add_parser("remove").add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    alone = {"prepare": prepare, "replace": replace, "clear": clear, "reloaded": reloaded}
    alone["forget"] = lambda unit: forget([unit])
    try:
        if options.command == "converge":
            for line in converge(options.units, options.check, options.only):
                print(line)
        elif options.command == "remove":
            for line in remove_all(options.check):
                print(line)
        elif options.command == "rehearse":
            print(rehearse(Unit(options.file)), end="")
        else:
            unit = Unit(UNITS / f"{options.unit}.service")
            if options.command == "ready":
                ready(unit, unit.name, int(os.environ.get("MAINPID", "0")) or None)
            elif options.command == "retire":
                retire(unit, options.name)
            else:
                alone[options.command](unit)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
