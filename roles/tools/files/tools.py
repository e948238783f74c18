#!/usr/bin/python3 -I
"""A person's hands on the data and on Dagster: standard library only.

    data-platform-sql [OPTION]… [SQL]      DuckDB's prompt, on the published snapshot of the warehouse
    data-platform-dagster [ARGUMENT]…      Dagster's command line

Installed under both names. Members of a group come here through sudo, and root directly.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIGURATION = Path("/etc/data-platform/tools.json")
WORKSPACE = "/etc/data-platform/workspace"

LABEL = "data-platform.prompt"
LINK = "warehouse.duckdb"
STATE = "state.json"
STATE_BYTES = 4096
SHELL = 'exec /opt/dagster/lib/python3*/site-packages/duckdb_cli/duckdb "$@"'  # its launcher would end at Ctrl-C
NEEDS_CODE = (["asset", "list"], ["asset", "materialize"], ["job", "execute"])
CODE_OPTIONS = (
    *("-a", "-d", "-f", "-m", "-w", "--attribute", "--autoload-defs-module-name", "--empty-workspace", "--grpc"),
    *("--module-name", "--package-name", "--python-file", "--working-directory", "--workspace"),
)
ENDINGS = (signal.SIGHUP, signal.SIGTERM)


class Failure(Exception):
    """Something is wrong; the text is one sentence for the person."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` and give its result with its output as text."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def changed_since(published: Path, warehouse: Path) -> str:
    """When the newest snapshot was taken, if the warehouse has changed since; else, or if unknown, an empty string.

    Pipelines write both directories, so root follows no link there and believes nothing but a short text.
    """
    try:
        handle = os.open(published / STATE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            snapshot = json.loads(os.read(handle, STATE_BYTES))
        finally:
            os.close(handle)
        at, state = snapshot["at"], snapshot["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    files = []
    for path in (warehouse, warehouse.with_name(f"{warehouse.name}.wal")):
        if path.exists():
            found = path.lstat()
            files.append(f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}")
    return "" if state == " ".join(files) else re.sub("[^0-9T:+-]", "", str(at))


def terminal() -> list[str]:
    """Options of docker that pass on stdin, and the terminal where there is one."""
    return ["--interactive", *(["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else [])]


def sql(arguments: list[str], configuration: dict[str, Any]) -> int:
    """Run DuckDB's prompt on the published snapshot of the warehouse; give its exit status.

    Args:
        arguments: What DuckDB's command line is given beside the file.
        configuration: The programs' configuration.

    Raises:
        Failure: There is no snapshot yet.
    """
    published, warehouse = Path(configuration["published"]), Path(configuration["warehouse"])
    if not os.path.lexists(published / LINK):
        raise Failure(
            "Nothing is published yet: the first snapshot of the warehouse comes from a run of publish_warehouse, "
            "seconds after the first run that writes it."
        )
    if at := changed_since(published, warehouse):
        print(
            f"This is the warehouse of {at}; what was written since is published once the runs have ended.",
            file=sys.stderr,
        )
    memory, name = configuration["memory"], f"data-platform-sql-{os.getpid()}"
    container = [
        *("docker", "run", "--rm", "--pull=never", "--init", "--log-driver=none", f"--name={name}", f"--label={LABEL}"),
        *(
            "--network=none",
            "--read-only",
            "--tmpfs=/tmp:rw,nosuid,nodev,mode=1777",
            "--workdir=/tmp",
            "--env=HOME=/tmp",
        ),
        *(f"--user=65534:{published.stat().st_gid}", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
        *("--pids-limit=256", f"--memory={memory}m", f"--memory-swap={memory}m", "--oom-score-adj=500"),
        *(f"--mount=type=bind,source={published},target=/published,readonly", "--env=TERM", *terminal()),
        configuration["image"],
    ]
    settings = f"set memory_limit='{memory * 3 // 4}MiB'; set temp_directory='/tmp/duckdb'"
    prompt = ["sh", "-c", SHELL, "duckdb", "-readonly", "-cmd", settings, f"/published/{LINK}", *arguments]
    signal.signal(signal.SIGINT, lambda *_: None)  # it is meant for the prompt
    status = -1
    try:
        status = subprocess.call([*container, *prompt])
    finally:
        ignore_endings()
        if status < 0:
            run("docker", "rm", "--force", name)
    return status if status >= 0 else 128 - status


def code_locations() -> dict[str, tuple[str, list[str]]]:
    """Container and command of each code location that runs, by its name."""
    there = run("docker", "container", "ls", "--filter=name=^dagster-code", "--format={{.Names}}").stdout.split()
    listed = [name for name in there if "." not in name]  # one with a dot comes or goes beside the one that serves
    form = "--format={{slice .Name 1}} {{json .Config.Cmd}}"
    found = run("docker", "container", "inspect", form, *listed).stdout.splitlines() if listed else []
    commands = [(name, json.loads(command)) for name, command in (line.split(" ", 1) for line in found)]
    return {option(command, "--location-name"): (name, command) for name, command in commands}


def option(command: list[str], name: str) -> str:
    """Value of an option that is written name=value."""
    return next(word.partition("=")[2] for word in command if word.startswith(f"{name}="))


def dagster(arguments: list[str], configuration: dict[str, Any]) -> int:
    """Run Dagster's command line where it finds what it needs; give its exit status.

    What loads code runs in the container of the code location, which -l names if there are several. All else runs
    beside the webserver, and reaches the code through the workspace.

    Args:
        arguments: What it is given.
        configuration: The programs' configuration.

    Raises:
        Failure: The container is not running, or there are several to choose from.
    """
    del configuration
    container, place, command = "dagster-webserver", [f"--workdir={WORKSPACE}"], ["dagster", *arguments]
    if arguments[:2] in NEEDS_CODE:
        wanted, rest = named_location(arguments[2:])
        if foreign := [word for word in rest if word.startswith(CODE_OPTIONS)]:
            raise Failure(f"{foreign[0]} names other code than the location's: leave it out, -l chooses the location.")
        locations = code_locations()
        if not locations:
            raise Failure("No code location is running: see 'systemctl status dagster-code*'.")
        if wanted is None and len(locations) > 1:
            raise Failure(f"Say which code location, one of {', '.join(sorted(locations))}: -l NAME.")
        wanted = wanted or next(iter(locations))
        if wanted not in locations:
            raise Failure(f"The code location {wanted} is not running: see 'systemctl status dagster-code*'.")
        (container, served), place = locations[wanted], []
        pointer = [f"{name}={option(served, name)}" for name in ("--working-directory", "--module-name")]
        secrets = [word.partition("=")[2] for word in served if word.startswith("--secrets=")]
        prefix = ["python", "-m", "data_platform_runtime.with_secrets", *secrets] if secrets else []
        command = [*prefix, "dagster", *arguments[:2], *pointer, *rest]
    elif run("docker", "container", "inspect", "--format={{.State.Running}}", container).stdout.strip() != "true":
        raise Failure(f"{container} is not running: see 'systemctl status {container}'.")
    return subprocess.call(["docker", "exec", *terminal(), "--env=TERM", *place, container, *command])


def named_location(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Value of -l or --location, and the arguments without it."""
    for index, word in enumerate(arguments):
        if word in ("-l", "--location") and arguments[index + 1 :]:
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if word.startswith("--location="):
            return word.partition("=")[2], arguments[:index] + arguments[index + 1 :]
    return None, arguments


PROGRAMS = {"data-platform-sql": sql, "data-platform-dagster": dagster}


def configured() -> dict[str, Any]:
    """What the role says of the group, the image, the memory, the warehouse and its snapshots.

    Raises:
        Failure: Its file cannot be read.
    """
    try:
        return json.loads(CONFIGURATION.read_text())
    except (OSError, ValueError) as error:
        raise Failure(f"{CONFIGURATION} cannot be read ({error}): run the playbook again.") from error


def become_root(name: str, arguments: list[str], group: str) -> None:
    """Start the program again through sudo, whose rule is for the members of a group; return if this is root.

    Raises:
        Failure: This user is not a member.
    """
    if os.geteuid() == 0:
        return
    try:
        member = grp.getgrnam(group).gr_gid in {os.getgid(), *os.getgroups()}
    except KeyError:
        member = False
    if not member:
        user = pwd.getpwuid(os.getuid()).pw_name
        raise Failure(
            f"{name} is for members of the group {group}: have {user} added to tools_members in the inventory, "
            "and log in again."
        )
    os.execv("/usr/bin/sudo", ["sudo", "--non-interactive", "--", f"/usr/local/bin/{name}", *arguments])


def ignore_endings() -> None:
    """Tidy up in peace: the terminal and sudo both pass on that a terminal was closed."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)


def leave(number: int, _: object) -> None:
    """End as the signal wants it, but tidy up on the way."""
    ignore_endings()
    raise SystemExit(128 + number)


def main(name: str, arguments: list[str]) -> int:
    """Be the program ``name``; give the exit status."""
    try:
        configuration = configured()
        become_root(name, arguments, configuration["group"])
        for number in ENDINGS:
            signal.signal(number, leave)
        return PROGRAMS[name](arguments, configuration)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
