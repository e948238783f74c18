#!/usr/bin/python3 -I
"""A person's hands on the data and on Dagster: standard library only.

    data-platform-sql [OPTION]… [SQL]      DuckDB's prompt, on a copy of the warehouse
    data-platform-dagster [ARGUMENT]…      Dagster's command line

Installed under both names. Members of a group come here through sudo, and root directly.

DuckDB locks its file between processes: whoever reads it keeps writers out, and the other way round. So the prompt
reads a copy, and the copy is made without a lock. A checkpoint writes to free blocks, and last of all to a header. That
has a counter: as long as the headers stay the same, the blocks of the last checkpoint stay as well. The journal, copied
first, adds what was committed since; one that breaks off is what DuckDB expects after a crash. The exception are blocks
of metadata, to which a checkpoint in progress adds in place: DuckDB checks their sums when the copy is verified.
"""

from __future__ import annotations

import fcntl
import grp
import hashlib
import json
import os
import pwd
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CONFIGURATION = Path("/etc/data-platform/tools.json")
COPIES = Path("/var/lib/data-platform/sql")
WORKSPACE = "/etc/data-platform/workspace"

HEADERS = 3 * 4096  # bytes: the main header and two database headers
JOURNALS = (".wal", ".wal.checkpoint")
KEPT_FREE = 1024  # MiB of the disk that a copy leaves to the platform
SETTLED = 0.2  # seconds: blocks are freed shortly before the header says so
PATIENCE = 30.0  # seconds that a copy is tried for
PATIENCE_WITH_A_COPY = 5.0  # seconds, when there is an older one
LABEL = "data-platform.copy"
CLONE = 0x40049409  # FICLONE of linux/fs.h: both files share their blocks, where the file system can

VERIFY = """
import duckdb, sys
connection = duckdb.connect(sys.argv[1], read_only=True)
for names in connection.execute("select schema_name, table_name from duckdb_tables()").fetchall():
    table = ".".join('"' + name.replace('"', '""') + '"' for name in names)
    connection.execute("select count(*) from pragma_storage_info(?)", [table]).fetchall()
"""
SHELL = 'exec /opt/dagster/lib/python3*/site-packages/duckdb_cli/duckdb "$@"'  # its launcher would end at Ctrl-C
NEEDS_CODE = (["asset", "list"], ["asset", "materialize"], ["job", "execute"])
CODE_OPTIONS = (
    *("-a", "-d", "-f", "-m", "-w", "--attribute", "--autoload-defs-module-name", "--empty-workspace", "--grpc"),
    *("--module-name", "--package-name", "--python-file", "--working-directory", "--workspace"),
)
ENDINGS = (signal.SIGHUP, signal.SIGTERM)
DOCKER_FAILED = 125  # docker run's own exit status


class Failure(Exception):
    """Something is wrong; the text is one sentence for the person."""


class NoRoom(Failure):
    """The disk is too full for a copy."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run ``command`` and give its result with its output as text."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file below a directory that pipelines write to, for reading: root follows no link there.

    Raises:
        Failure: It is no file.
        FileNotFoundError: There is none.
    """
    try:
        file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror}): a pipeline put something else in its place."
        raise Failure(reason) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Failure(f"{path} is no file: a pipeline put something else in its place.")
        yield file


def checkpoint(warehouse: Path) -> str:
    """Digest of a DuckDB file's headers, one of which changes with each checkpoint."""
    with opened(warehouse) as file:
        return hashlib.sha256(file.read(HEADERS)).hexdigest()


def in_use(warehouse: Path) -> bool:
    """Whether a process holds DuckDB's lock on the warehouse; asks without taking one."""
    question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with opened(warehouse) as file:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    return struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK


def state(warehouse: Path) -> dict[str, Any]:
    """What changes with each commit: the file's identity and headers; inode, size and time (ns) of its journals."""
    journals = {}
    for suffix in JOURNALS:
        try:
            found = os.lstat(f"{warehouse}{suffix}")
        except FileNotFoundError:
            continue
        journals[suffix] = [found.st_ino, found.st_size, found.st_mtime_ns]
    found = warehouse.lstat()
    return {"file": [found.st_dev, found.st_ino], "checkpoint": checkpoint(warehouse), "journals": journals}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, sharing its blocks where the file system can.

    Raises:
        NoRoom: The disk has none for it.
    """
    with opened(source) as reader, target.open("xb") as writer:
        os.fchmod(writer.fileno(), 0o444)
        try:
            fcntl.ioctl(writer, CLONE, reader.fileno())
        except OSError:  # this file system cannot do that
            size = os.fstat(reader.fileno()).st_size
            need, free = size >> 20, shutil.disk_usage(target.parent).free >> 20
            if free - need < KEPT_FREE:
                raise NoRoom(
                    f"A copy of {source} needs {need} MiB, but the disk of {COPIES} has {free} MiB free, of which "
                    f"{KEPT_FREE} are for the platform: make room there."
                ) from None
            while sent := os.sendfile(writer.fileno(), reader.fileno(), None, min(size, 1 << 30)):
                size -= sent


class Copies:
    """The copies of the warehouse: one that is current, and older ones for as long as somebody reads them.

    Args:
        directory: Directory that holds them, for root alone.
        warehouse: The DuckDB file.
        image: Image with DuckDB.
        memory: MiB that a container may use.
    """

    def __init__(self, directory: Path, warehouse: Path, image: str, memory: int) -> None:
        """Take note of where all is."""
        self.directory, self.warehouse, self.image, self.memory = directory, warehouse, image, memory
        self.link = directory / "current"

    def container(self, copy: Path, *options: str) -> list[str]:
        """Command that runs a program in a container which sees one copy and nothing else; it ends with the image.

        Args:
            copy: Directory of the copy.
            options: Further options of docker run.
        """
        return [
            *("docker", "run", "--rm", "--pull=never", "--init", "--log-driver=none", f"--label={LABEL}={copy.name}"),
            *(
                "--network=none",
                "--read-only",
                "--tmpfs=/tmp:rw,nosuid,nodev,mode=1777",
                "--workdir=/tmp",
                "--env=HOME=/tmp",
            ),
            *("--user=65534:65534", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pids-limit=256"),
            *(f"--memory={self.memory}m", f"--memory-swap={self.memory}m", "--oom-score-adj=500"),
            *(f"--mount=type=bind,source={copy},target=/warehouse,readonly", *options, self.image),
        ]

    @contextmanager
    def latest(self) -> Iterator[Path]:
        """Directory of the newest copy that can be had, which stays for as long as the ``with`` block lasts.

        Raises:
            Failure: There is none, and none can be made.
        """
        with self._alone():
            copy = self._current()
            if copy is None or not self._holds_what_the_warehouse_holds(copy):
                copy = self._renew(copy)
            reading = os.open(copy, os.O_RDONLY)
            fcntl.flock(reading, fcntl.LOCK_SH)
            self._tidy()
        try:
            yield copy
        finally:
            os.close(reading)
            try:
                with self._alone(fcntl.LOCK_NB):
                    self._tidy()
            except BlockingIOError:
                pass  # whoever is at it tidies too

    @contextmanager
    def _alone(self, option: int = 0) -> Iterator[None]:
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | option)
            yield

    def _current(self) -> Path | None:
        return self.link.resolve() if (self.link / "state.json").is_file() else None

    def _holds_what_the_warehouse_holds(self, copy: Path) -> bool:
        """Compare their states; and while nobody writes it, the file's time: another may have been put in its place."""
        known = json.loads((copy / "state.json").read_text())
        unchanged = known["time_ns"] == self.warehouse.stat().st_mtime_ns or in_use(self.warehouse)
        return unchanged and known["state"] == state(self.warehouse)

    def _renew(self, old: Path | None) -> Path:
        """Try until a copy holds together; give the old one, and say so, if that takes too long."""
        deadline = time.monotonic() + (PATIENCE_WITH_A_COPY if old else PATIENCE)
        problem = "Unsettled"
        while problem:
            try:
                problem = self._try()
            except NoRoom:
                if not old or not self._drop(old):
                    raise
                old = None
                continue
            if problem and time.monotonic() > deadline:
                if not old:
                    raise Failure(f"{self.warehouse} cannot be copied ({problem}): try again when no run writes it.")
                made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((old / "state.json").stat().st_mtime))
                print(f"The warehouse cannot be copied now ({problem}): this is how it was at {made}.", file=sys.stderr)
                return old
        return self.link.resolve()

    def _try(self) -> str:
        """Make a copy the current one; give what is wrong with it, or an empty string.

        Raises:
            Failure: There is no room for it, or Docker does not run the container that verifies it.
        """
        self._tidy()
        copy = Path(tempfile.mkdtemp(prefix="copy-", dir=self.directory))
        copy.chmod(0o755)  # the user in the container reads it; the directory above is for root
        target = copy / self.warehouse.name
        time_ns, before = self.warehouse.stat().st_mtime_ns, state(self.warehouse)
        for suffix in JOURNALS:
            try:
                copy_file(Path(f"{self.warehouse}{suffix}"), Path(f"{target}{suffix}"))
            except FileNotFoundError:
                continue
        copy_file(self.warehouse, target)
        if in_use(self.warehouse):
            time.sleep(SETTLED)
        if checkpoint(self.warehouse) != before["checkpoint"]:
            return "it was checkpointed meanwhile"
        verified = run(*self.container(copy), "python", "-c", VERIFY, f"/warehouse/{target.name}")
        if verified.returncode == DOCKER_FAILED:
            raise Failure(f"No container can be started: {verified.stderr.strip()}")
        if verified.returncode:
            return (verified.stderr.strip().splitlines() or ["killed"])[-1]
        (copy / "state.json").write_text(json.dumps({"time_ns": time_ns, "state": before}))
        following = self.directory / "next"
        following.unlink(missing_ok=True)
        following.symlink_to(copy.name)
        following.replace(self.link)
        return ""

    def _tidy(self) -> None:
        """Remove the copies that are not current and that nobody reads."""
        current = self._current()
        for copy in self.directory.glob("copy-*"):
            if copy != current:
                self._drop(copy)

    def _drop(self, copy: Path) -> bool:
        """Remove a copy, and containers that lost their person, unless somebody reads it; say whether it is gone."""
        handle = os.open(copy, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        lost = run("docker", "container", "ls", "--quiet", f"--filter=label={LABEL}={copy.name}").stdout.split()
        if lost:
            run("docker", "rm", "--force", *lost)
        shutil.rmtree(copy)
        return True


def terminal() -> list[str]:
    """Options of docker that pass on stdin, and the terminal where there is one."""
    return ["--interactive", *(["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else [])]


def sql(arguments: list[str], configuration: dict[str, Any]) -> int:
    """Run DuckDB's prompt on a copy of the warehouse; give its exit status.

    Args:
        arguments: What DuckDB's command line is given beside the file.
        configuration: The programs' configuration.

    Raises:
        Failure: There is no copy to run it on.
    """
    warehouse = Path(configuration["warehouse"])
    if not warehouse.exists():
        raise Failure(f"There is no warehouse yet: {warehouse} comes with the first run that writes it.")
    copies = Copies(COPIES, warehouse, configuration["image"], configuration["memory"])
    settings = f"set memory_limit='{copies.memory * 3 // 4}MiB'; set temp_directory='/tmp/duckdb'"
    name = f"data-platform-sql-{os.getpid()}"
    with copies.latest() as copy:
        container = copies.container(copy, f"--name={name}", "--env=TERM", *terminal())
        prompt = [
            "sh",
            "-c",
            SHELL,
            "duckdb",
            "-readonly",
            "-cmd",
            settings,
            f"/warehouse/{warehouse.name}",
            *arguments,
        ]
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
    listed = run("docker", "container", "ls", "--filter=name=^dagster-code", "--format={{.Names}}").stdout.split()
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
        command = [*served[: served.index("dagster")], "dagster", *arguments[:2], *pointer, *rest]
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
    """What the role says of the group, the image, the memory and the warehouse.

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
