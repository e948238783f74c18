#!/usr/bin/python3
"""An upgrade of the platform as a transaction: standard library only.

    upgrade begin [--patience SECONDS] [--dumped-elsewhere]
                         let runs end, stop the services, keep a copy of all data and of the configuration
    upgrade finish UNIT… with the new configuration in place: migrate the metadata, start UNIT…, prove that they work;
                         if it names another directory of PostgreSQL, move all that the server held there first
    upgrade revert       return to the data and the configuration that were kept
    upgrade halt         if an upgrade is not finished, stop all services, or else have the daemon, which may have been
                         stopped for one that did not begin (systemd runs it when one of the others ended)

From the moment that services stop to the end of an upgrade there is a journal, which says how far it got. While it is
there, no service starts (container-unit prepare), but those that this program lets start until the next boot. One that
was killed is begun again, and takes up what is there; the copy that was made before the first change is never made
again. The directory that PostgreSQL was moved from stays as it was.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import fcntl
import filecmp
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from datetime import datetime
from pathlib import Path
from urllib.parse import quote, unquote

UNITS = Path("/etc/systemd/system")
CONFIG = Path("/etc/data-platform")
PROGRAMS = Path("/usr/local/lib/data-platform")
ROOT = Path("/")
DATA = Path("/var/lib/data-platform")
RUNTIME = Path("/run")

POSTGRES, WEBSERVER, DAEMON = "dagster-postgres", "dagster-webserver", "dagster-daemon"
HELPER = "data-platform-upgrade"
"""Container of what runs once, and name of the file in /run that says which units may start."""
DATABASE = "dagster"
KEPT_FREE = 512 << 20
"""Bytes that the copies leave free."""
UNTOUCHED = "saving"
"""Step before the copy is complete, and after all was returned to it: nothing but the services' state has changed."""
ELSEWHERE = (
    "etc/systemd/system/dagster.slice",
    "etc/systemd/journald.conf.d/data-platform.conf",
    "etc/sudoers.d/data-platform",
    "usr/local/bin/data-platform-*",
)
"""Files of the platform beside its own directories and its services."""

IN_PROGRESS = """
import os, psycopg2
with psycopg2.connect(os.environ["DATA_PLATFORM_METADATA"], connect_timeout=10) as connection:
    cursor = connection.cursor()
    cursor.execute("SELECT count(*) FROM runs WHERE status IN ('STARTING', 'STARTED', 'CANCELING')")
    print(cursor.fetchone()[0])
"""
"""Counts the runs in progress, in the webserver's container."""

DATABASES = "SELECT datname FROM pg_database WHERE datallowconn AND NOT datistemplate AND datname <> 'postgres'"
ROWS = """
    SELECT format('%I.%I ', schemaname, tablename) || (xpath('/row/count/text()',
        query_to_xml(format('SELECT count(*) FROM %I.%I', schemaname, tablename), false, true, '')))[1]
    FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')
"""
"""Counts the rows of each table of a database."""

LOCATIONS = """
import json, urllib.request
query = '''{ workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError { __typename
    ... on PythonError { message } ... on RepositoryLocation { repositories { jobs { name } } } } } } } }'''
request = urllib.request.Request("http://127.0.0.1:3001/graphql", data=json.dumps({"query": query}).encode(),
    headers={"Content-Type": "application/json"})
print(json.dumps(json.load(urllib.request.urlopen(request, timeout=60))["data"]["workspaceOrError"]["locationEntries"]))
"""
"""Asks the webserver, in its container, for the code locations."""


class Failure(Exception):
    """Something is wrong; the text is one sentence for the operator."""


def run(*command: str, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run ``command`` and give its result with its output as text.

    Raises:
        Failure: It failed, and ``check`` is set.
    """
    result = subprocess.run(
        command, stderr=subprocess.PIPE, text=True, check=False, **{"stdout": subprocess.PIPE, **options}
    )
    if check and result.returncode:
        output = result.stderr.strip() or (result.stdout or "").strip() or f"status {result.returncode}"
        raise Failure(f"'{' '.join(command[:3])}' failed: {reason(output)}")
    return result


class State:
    """What an upgrade keeps on the host, from the directory ``home`` on."""

    def __init__(self) -> None:
        """Make the directory."""
        self.home = DATA / "upgrade"
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.journal = self.home / "unfinished"
        self.databases = self.home / "databases"
        self.dump = self.databases / f"{DATABASE}.dump"
        self.warehouse = self.home / "warehouse"
        self.before = self.home / "from"
        self.copies = (self.databases, self.warehouse, self.before)

    def read(self) -> dict[str, object]:
        """Give what the journal says; nothing if no upgrade is unfinished."""
        return json.loads(self.journal.read_text()) if self.journal.exists() else {}

    def write(self, **values: object) -> None:
        """Write into the journal, so that a power cut leaves it as it was or as it is to be."""
        new = self.journal.with_suffix(".new")
        with new.open("w") as file:
            json.dump({**self.read(), **values}, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.journal)
        self.sync()

    def end(self) -> None:
        """Remove the journal: from now on the services start as ever."""
        self.journal.unlink(missing_ok=True)
        self.sync()
        allowed().unlink(missing_ok=True)

    def sync(self) -> None:
        """See to it that names in the directory are on the disk."""
        directory = os.open(self.home, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one at work; wait for what a killed play left running."""
        with (self.home / "lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


class Clock:
    """Says how long each step took."""

    def __init__(self) -> None:
        """Start."""
        self.last = time.monotonic()

    def tell(self, done: str) -> None:
        """Print what was done, and the seconds since the last time."""
        now = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # a killed play reads no more
            print(f"{done} ({now - self.last:.1f} s)", flush=True)
        self.last = now


def units() -> list[str]:
    """Names of the host's units that run containers."""
    return [file.stem for file in sorted(UNITS.glob("dagster-*.service")) if "[X-Container]" in file.read_text()]


def container(unit: str, folder: Path | None = None) -> tuple[list[str], list[str], str]:
    """Give options, command and image of a unit's container, without what only one container can have."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    parser.read_string(((folder or UNITS) / f"{unit}.service").read_text())
    plain = shlex.split(parser["Service"]["ExecStart"].replace("\\\n", " "))
    words = [word.replace("$$", "$").replace("%%", "%") for word in plain]
    image = parser["X-Container"]["Image"]
    given = words[words.index("run") + 1 : words.index(image)]
    own = [at for at, word in enumerate(given) if word in ("--name", "--label-file", "--log-driver", "--publish")]
    options = [word for at, word in enumerate(given) if at not in own and at - 1 not in own]
    return options, words[words.index(image) + 1 :], image


def once(unit: str, *command: str) -> str:
    """Run a command in a container that is like a unit's; give what it prints.

    Raises:
        Failure: It failed.
    """
    options, _, image = container(unit)
    user = int(options[options.index("--user") + 1].partition(":")[0])
    for mount in (word.split(",") for word in options if word.startswith("type=bind,") and ",readonly" not in word):
        provide(Path(mount[1].removeprefix("source=")), user)
    run("docker", "rm", "--force", "--volumes", HELPER, check=False)
    done = run("docker", "run", "--rm", "--name", HELPER, *options, image, *command, check=False)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise Failure(reason(done.stdout + done.stderr))
    return done.stdout


def provide(path: Path, user: int) -> None:
    """Make a directory that a container writes to, as its unit's start does: one in /run is gone after a boot."""
    if not path.exists():
        path.mkdir(mode=0o700, parents=True)
        os.chown(path, user, user)


def reason(output: str) -> str:
    """Give the line that says why a program failed: the last that names an exception or an error, or else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [
        line
        for line in lines
        if re.match(r"[\w.]+(Error|Exception|Failure)\b.*: |.*\b(error|ERROR|Error response from daemon): ", line)
    ]
    return (named or lines or ["it says nothing"])[-1]


def allowed() -> Path:
    """The file that says which units may start although an upgrade is not finished."""
    return RUNTIME / HELPER


def start(*names: str, broken: Container[object] = ()) -> None:
    """Let units start, until the next boot, and start them.

    Args:
        names: The units.
        broken: Code locations of which nothing else is expected than that they do not start.

    Raises:
        Failure: One did not become ready.
    """
    known = allowed().read_text().split() if allowed().exists() else []
    allowed().write_text("\n".join(dict.fromkeys([*known, *names])))
    if names and run("systemctl", "start", *names, check=False).returncode:
        states = run("systemctl", "is-active", *names, check=False).stdout.split()
        down = [name for name, state in zip(names, states, strict=False) if state != "active"] or list(names)
        if failed := [name for name in down if location(name) not in broken]:
            raise Failure(f"{' and '.join(failed)} did not become ready: see 'journalctl -u {failed[0]}'.")


def location(unit: str) -> str | None:
    """Give the name of the code location that a unit serves."""
    words = container(unit)[1]
    return next((word.partition("=")[2] for word in words if word.startswith("--location-name=")), None)


def stop(*names: str) -> None:
    """Stop units, and let none start again by itself; what runs once may have outlived the program that was killed."""
    allowed().unlink(missing_ok=True)
    run("docker", "rm", "--force", "--volumes", HELPER, check=False)
    if names:
        run("systemctl", "stop", *names)


def size(*paths: Path) -> int:
    """Bytes that files and directories take on the disk."""
    files = [file for path in paths if path.exists() for file in (path, *path.rglob("*"))]
    return sum(file.lstat().st_blocks * 512 for file in files)


def cluster(folder: Path | None = None) -> Path:
    """Give the directory that PostgreSQL keeps its data in, as its unit says, or the one in another folder."""
    (found,) = (word for word in container(POSTGRES, folder)[0] if word.startswith("PGDATA="))
    return DATA / "postgres" / Path(found).name


def room(state: State, external: bool) -> None:
    """See whether there is room for the copies and for a second database while they are read back.

    Raises:
        Failure: There is not.
    """
    files = {file: file.lstat().st_blocks * 512 for file in (DATA / "warehouse").rglob("*") if file.is_file()}
    shared = shares(max(files, key=files.get), state.home) if files else False
    copies = 0 if shared else sum(files.values())
    base = 0 if external else size(cluster() / "base")
    # A file that is brought back is written beside the one in its place, and a database too.
    largest = 0 if shared else max(files.values(), default=0)
    wanted = [(state.home, base + copies), (DATA / "warehouse", largest), (DATA / "postgres", base)]
    needs: dict[int, tuple[Path, int]] = {}
    for path, need in (entry for entry in wanted if entry[0].exists()):
        first, sum_ = needs.get(device(path), (path, KEPT_FREE))
        needs[device(path)] = first, sum_ + need
    coming = size(state.databases, state.before) + (0 if shared else size(state.warehouse))
    for path, need in needs.values():
        free = shutil.disk_usage(path).free + (coming if path == state.home else 0)
        if free < need:
            raise Failure(f"{path} has {free >> 20} MiB free, and an upgrade needs {need >> 20}: make room there.")


def device(path: Path) -> int:
    """Give the file system that a file or directory is on."""
    return path.stat().st_dev


def shares(file: Path, folder: Path) -> bool:
    """Tell whether a copy of a file in a directory shares its blocks with the file, and takes no room."""
    probe = folder / "probe"
    done = run("cp", "--reflink=always", str(file), str(probe), check=False)
    remove(probe)
    return done.returncode == 0


def locations() -> list[dict[str, object]] | None:
    """Give the code locations as the webserver sees them; None if it cannot be asked."""
    asked = run("docker", "exec", WEBSERVER, "python", "-c", LOCATIONS, check=False)
    return json.loads(asked.stdout) if asked.returncode == 0 else None


def broken(found: list[dict[str, object]]) -> dict[str, str]:
    """Why code locations do not load, the first line each, by name."""
    errors = {entry["name"]: entry["locationOrLoadError"] or {} for entry in found}
    return {
        name: (error.get("message") or "it is still loading").strip().splitlines()[0]
        for name, error in errors.items()
        if error.get("__typename") != "RepositoryLocation"
    }


def drain(patience: float) -> None:
    """Stop the daemon, so that what is queued stays so, and wait until the runs in progress have ended.

    Raises:
        Failure: They take too long.
    """
    run("systemctl", "stop", DAEMON)
    deadline = time.monotonic() + patience
    while count := in_progress():
        if time.monotonic() > deadline:
            raise Failure(
                f"{count} {'run or command is' if count == 1 else 'runs or commands are'} still in progress after "
                f"{patience:.0f} s: wait for them or end them, or allow more (upgrade_patience)."
            )
        time.sleep(1)


def in_progress() -> int:
    """How many runs a process works on, and commands that people run in the services' containers.

    Raises:
        Failure: It cannot be known.
    """
    listed = run("docker", "container", "ls", "--format", "{{.Names}}").stdout.split()
    known = set(units()) - {POSTGRES}
    services = [name for name in listed if name.partition(".")[0] in known]  # one that was replaced has a dot
    inside = run("docker", "inspect", "--format", "{{len .ExecIDs}}", *services, check=False).stdout.split()
    count = sum(map(int, inside))
    if (CONFIG / "runs" / "runs.json").exists():
        return count + len(runs_containers())
    asked = run("docker", "exec", WEBSERVER, "python", "-c", IN_PROGRESS, check=False)
    if asked.returncode == 0:
        return count + int(asked.stdout)
    if inside:  # runs are processes of services
        raise Failure(f"{WEBSERVER} does not say whether runs are in progress: start it, or stop all other services.")
    return 0


def runs_containers() -> list[str]:
    """IDs of the containers of the runs in progress."""
    return run("docker", "container", "ls", "--quiet", "--filter", "label=dagster/run_id").stdout.split()


def save(state: State, external: bool) -> None:
    """Keep a copy of all databases, the warehouse and the configuration; nothing writes to them now.

    Raises:
        Failure: A copy could not be made.
    """
    for old in state.copies:
        remove(old)
    if not external:
        start(POSTGRES)
        with new(state.databases) as path:
            path.mkdir()
            for name in psql(DATABASES):
                dump = path / f"{quote(name, safe='')}.dump"
                with dump.open("wb") as file:
                    run(
                        "docker",
                        "exec",
                        POSTGRES,
                        "pg_dump",
                        "--username=postgres",
                        "--format=custom",
                        name,
                        stdout=file,
                    )
                with dump.open("rb") as file:
                    run("docker", "exec", "--interactive", POSTGRES, "pg_restore", "--list", stdin=file)
                dump.with_suffix(".rows").write_text("\n".join(sorted(psql(ROWS, name))))
            with (path / "roles.sql").open("wb") as file:
                run("docker", "exec", POSTGRES, "pg_dumpall", "--username=postgres", "--globals-only", stdout=file)
    if (DATA / "warehouse").exists():
        with new(state.warehouse) as path:
            run("cp", "--archive", "--reflink=auto", "-H", str(DATA / "warehouse"), str(path))
    with new(state.before) as path:
        units_kept = path / UNITS.relative_to("/")
        whole = {there: path / there.relative_to("/") for there in (CONFIG, PROGRAMS)}
        whole |= {file: path / file.relative_to(ROOT) for name in ELSEWHERE for file in ROOT.glob(name)}
        for folder in (units_kept, *(copy.parent for copy in whole.values())):
            folder.mkdir(parents=True, exist_ok=True)
        found = [*UNITS.glob("dagster-*.service"), *UNITS.glob("data-platform-*")]
        run("cp", "--archive", *map(str, found), str(units_kept))
        for there, copy in whole.items():
            run("cp", "--archive", str(there), str(copy))
        (path / "deployments").mkdir()
        for name, content in served().items():
            (path / "deployments" / f"{name}.json").write_text(content)
    run("sync", "--file-system", str(state.home))


def served() -> dict[str, str]:
    """What is written down of the code that each location serves, or did before this change was written down."""
    lock = DATA / "deployments" / "lock"
    if lock.exists():
        return {name: json.dumps(content) for name, content in json.loads(lock.read_text())["records"].items()}
    return {file.stem: file.read_text() for file in DATA.glob("deployments/*.json")}


@contextlib.contextmanager
def new(path: Path) -> Iterator[Path]:
    """Give a place to make a file or directory in, which has the name ``path`` only once it is complete."""
    yield unfinished(path)
    unfinished(path).rename(path)


def unfinished(path: Path) -> Path:
    """Give the name that a copy has before it is complete."""
    return path.with_name(f"{path.name}.new")


def forget_unfinished(state: State) -> None:
    """Remove copies that are not complete, which only take room."""
    for path in state.copies:
        remove(unfinished(path))


def remove(path: Path) -> None:
    """Remove a file or directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def bring_back_data(state: State) -> None:
    """Make metadata and warehouse what they were when they were kept; may be killed and done again.

    Raises:
        Failure: The database refuses.
    """
    if containers := runs_containers():
        run("docker", "rm", "--force", "--volumes", *containers)
    if moved := state.read().get("moved"):
        for name in (moved, f"{moved}.new"):
            remove(DATA / "postgres" / name)
    elif state.dump.exists():
        start(POSTGRES)
        psql(f"DROP DATABASE IF EXISTS {DATABASE}_kept WITH (FORCE)")
        psql(f"CREATE DATABASE {DATABASE}_kept OWNER {DATABASE} TEMPLATE template0")
        with state.dump.open("rb") as dump:
            restore = ["pg_restore", "--username=postgres", "--exit-on-error", f"--dbname={DATABASE}_kept"]
            run("docker", "exec", "--interactive", POSTGRES, *restore, stdin=dump)
        psql(f"DROP DATABASE IF EXISTS {DATABASE}_failed WITH (FORCE)")
        psql(
            f"BEGIN; ALTER DATABASE {DATABASE} RENAME TO {DATABASE}_failed; "
            f"ALTER DATABASE {DATABASE}_kept RENAME TO {DATABASE}; COMMIT"
        )
        psql(f"DROP DATABASE {DATABASE}_failed WITH (FORCE)")
        stop(POSTGRES)
    if state.warehouse.exists():
        bring_back(state.warehouse, DATA / "warehouse")


def psql(statement: str, database: str = "postgres") -> list[str]:
    """Have the database server do something, as its administrator; give the lines of the answer.

    Raises:
        Failure: It refuses.
    """
    options = ["--username=postgres", f"--dbname={database}", "--no-align", "--tuples-only", "--quiet"]
    done = run("docker", "exec", POSTGRES, "psql", *options, "--set=ON_ERROR_STOP=1", f"--command={statement}")
    return done.stdout.splitlines()


def move(state: State) -> int:
    """Bring all databases and roles that were kept into PostgreSQL's new directory; give the number of their rows.

    Raises:
        Failure: The new server refuses, or does not hold the same afterwards.
    """
    start(POSTGRES)
    psql(f"DROP DATABASE {DATABASE}")
    psql(f"DROP ROLE {DATABASE}")
    inside, count = ["docker", "exec", "--interactive", POSTGRES], 0
    kept = (state.databases / "roles.sql").read_text().splitlines()
    roles = "\n".join(line for line in kept if line != "CREATE ROLE postgres;")
    run(*inside, "psql", "--username=postgres", "--quiet", "--set=ON_ERROR_STOP=1", input=roles)
    for path in sorted(state.databases.glob("*.dump")):
        name = unquote(path.stem)
        with path.open("rb") as dump:
            restore = ["pg_restore", "--username=postgres", "--create", "--exit-on-error", "--dbname=postgres"]
            run(*inside, *restore, stdin=dump)
        before, after = path.with_suffix(".rows").read_text().splitlines(), sorted(psql(ROWS, name))
        if other := set(before) ^ set(after):
            raise Failure(f"The database {name} does not hold what it held before: {', '.join(sorted(other)[:3])}.")
        count += sum(int(line.rpartition(" ")[2]) for line in after)
    run("docker", "exec", POSTGRES, "vacuumdb", "--username=postgres", "--all", "--analyze-only", "--quiet")
    return count


def bring_back(kept: Path, there: Path) -> None:
    """Make the directory ``there``, which may be a mount of its own, hold what ``kept`` holds.

    What is too much goes first: a database file must not meet the journal of another.
    """
    for path in sorted(there.rglob("*"), reverse=True):
        if not os.path.lexists(kept / path.relative_to(there)):
            remove(path)
    for path in sorted(kept.rglob("*")):
        target = there / path.relative_to(kept)
        if path.is_dir() and not path.is_symlink():
            if not target.is_dir():
                run("cp", "--archive", "--reflink=auto", str(path), str(target))
        elif not same(path, target):
            place = target.with_name(f".{target.name}.new")
            run("cp", "--archive", "--reflink=auto", str(path), str(place))
            with place.open("rb") as file:
                os.fsync(file.fileno())
            place.rename(target)


def same(one: Path, other: Path) -> bool:
    """Tell whether two files, or links, are the same, with owner and mode."""
    if not os.path.lexists(other):
        return False
    first, second = one.lstat(), other.lstat()
    if (first.st_mode, first.st_uid, first.st_gid) != (second.st_mode, second.st_uid, second.st_gid):
        return False
    return os.readlink(one) == os.readlink(other) if one.is_symlink() else filecmp.cmp(one, other, shallow=False)


def bring_back_configuration(state: State) -> None:
    """Make units, configuration and programs what they were when they were kept; may be killed and done again.

    Raises:
        Failure: systemd refuses.
    """
    kept = state.before / UNITS.relative_to("/")
    there = [*UNITS.glob("dagster-*.service"), *UNITS.glob("data-platform-*")]
    added = [file for file in there if not (kept / file.name).exists()]
    if added:
        run("systemctl", "disable", "--now", "--quiet", *(file.name for file in added), check=False)
    elsewhere = [file for name in ELSEWHERE for file in ROOT.glob(name)]
    for file in added + [file for file in elsewhere if not (state.before / file.relative_to(ROOT)).exists()]:
        remove(file)
    bring_back(state.before / CONFIG.relative_to("/"), CONFIG)
    for file in kept.iterdir():
        run("cp", "--archive", "--remove-destination", str(file), str(UNITS / file.name))
    for file in (file for name in ELSEWHERE for file in state.before.glob(name)):
        run("cp", "--archive", "--remove-destination", str(file), str(ROOT / file.relative_to(state.before)))
    for file in DATA.glob("deployments/*.json"):  # which code is served; lock and log beside it stay
        file.unlink()
    for file in (state.before / "deployments").iterdir():
        run("cp", "--archive", str(file), str(DATA / "deployments" / file.name))
    run("systemctl", "daemon-reload")
    run("systemctl", "try-restart", "data-platform-engine.service", check=False)


def bring_back_programs(state: State) -> None:
    """Make the programs that the units call what they were, but for this one."""
    for file in (state.before / PROGRAMS.relative_to("/")).iterdir():
        if file.name != "upgrade" and file.is_file():
            run("cp", "--archive", "--remove-destination", str(file), str(PROGRAMS / file.name))


def begin(state: State, patience: float, dumped_elsewhere: bool) -> None:
    """Let the runs in progress end, stop the services, keep a copy; bring back what an earlier attempt changed.

    Raises:
        Failure: The upgrade cannot begin.
    """
    clock, names, journal = Clock(), units(), state.read()
    external = POSTGRES not in names
    if external and not dumped_elsewhere:
        raise Failure(
            "The metadata are on a server of somebody else's, where no copy can be made: have its owner dump the "
            "database, and say upgrade_external_dumped: true."
        )
    if journal.get("step", UNTOUCHED) == UNTOUCHED:
        forget_unfinished(state)
        room(state, external)
        before = journal.get("broken", sorted(broken(locations() or [])))
        drain(patience)
        clock.tell("Waited until no run was in progress")
        since = journal.get("since", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"))
        state.write(since=since, step=UNTOUCHED, broken=before, touched=False, moved="")
        stop(*(name for name in names if name != POSTGRES))
        save(state, external)
        stop(*names)
        state.write(step="saved")
        kept = f"{size(state.databases) >> 10} KiB of metadata, {size(state.warehouse) >> 20} MiB of warehouse"
        clock.tell(f"Stopped the services and kept a copy in {state.home}: {kept}")
        return
    stop(*names)
    if journal["touched"]:
        bring_back_data(state)
        clock.tell("Brought the data back to what they were before the upgrade that was not finished")
    state.write(step="saved", touched=False, moved="")


def finish(state: State, names: list[str]) -> None:
    """Migrate the metadata, start the services, and prove that they work.

    Raises:
        Failure: They do not.
    """
    journal, clock = state.read(), Clock()
    if journal.get("step") != "saved":
        raise Failure("No upgrade has begun, or its services are not stopped: run playbooks/upgrade.yml.")
    run("systemctl", "daemon-reload")
    run("systemctl", "enable", "--quiet", *names)
    kept = state.before / UNITS.relative_to("/")
    wanted = cluster() if POSTGRES in names and state.dump.exists() and cluster(kept) != cluster() else None
    if wanted and wanted.exists():
        raise Failure(f"{wanted}, which PostgreSQL is to have its data in, is there already: move it away.")
    state.write(step="migrating", touched=True, moved=wanted.name if wanted else "")
    if wanted:
        count = move(state)
        clock.tell(f"Moved PostgreSQL from {cluster(kept)}, which stays as it was, to {wanted}: {count} rows in both")
    elif POSTGRES in names:
        start(POSTGRES)
    try:
        once(WEBSERVER, "dagster", "instance", "migrate")
    except Failure as failure:
        raise Failure(f"'dagster instance migrate' failed: {failure}") from failure
    clock.tell("Migrated the metadata")
    state.write(step="checking")
    start(*(name for name in names if name not in (POSTGRES, DAEMON)), broken=journal["broken"])
    clock.tell("Started webserver and code servers")
    check(journal, names, clock)
    start(DAEMON)
    clock.tell("Started the daemon")
    state.end()


def check(journal: dict[str, object], names: list[str], clock: Clock) -> None:
    """Prove that code locations load, and that a run works.

    Raises:
        Failure: They do not.
    """
    found = locations()
    if found is None:
        raise Failure(f"The webserver does not answer: see 'journalctl -u {WEBSERVER}'.")
    for name, error in broken(found).items():
        if name not in journal["broken"]:
            raise Failure(
                f"The code location {name} does not load any more ({error}): see 'journalctl -u dagster-code'."
            )
    clock.tell(f"All code locations load: {', '.join(entry['name'] for entry in found)}")
    tried = next((location for location in map(smoke, found) if location), None)
    for name in names if tried else []:
        words = container(name)[1]
        if f"--location-name={tried}" in words:
            given = [word for word in words if word.startswith(("--module-name=", "--working-directory="))]
            secrets = [word.removeprefix("--secrets=") for word in words if word.startswith("--secrets=")]
            prefix = ["python", "-m", "data_platform_runtime.with_secrets", *secrets] if secrets else []
            try:
                once(name, *prefix, "dagster", "job", "execute", "--job=smoke", *given)
            except Failure as failure:
                raise Failure(f"A run of the job smoke failed: {failure}") from failure
            clock.tell("Ran the job smoke")


def smoke(entry: dict[str, object]) -> str | None:
    """Give the name of a code location if it has a job smoke."""
    repositories = (entry["locationOrLoadError"] or {}).get("repositories", [])
    jobs = [job["name"] for repository in repositories for job in repository["jobs"]]
    return entry["name"] if "smoke" in jobs else None


def revert(state: State) -> None:
    """Return to what was kept, and start the services.

    Raises:
        Failure: That is not possible.
    """
    journal, clock = state.read(), Clock()
    if not journal:
        print("Nothing was changed.")
        return
    forget_unfinished(state)
    if journal["step"] != UNTOUCHED:
        state.write(step="reverting")
        stop(*units())
        bring_back_configuration(state)
        if journal["touched"]:
            bring_back_data(state)
        bring_back_programs(state)
        run("sync")
        state.write(step=UNTOUCHED, touched=False, moved="")  # what the services write from now on is not to be undone
    try:
        start(*units(), broken=journal["broken"])
    finally:
        state.end()
    clock.tell("The platform is as it was before")
    if journal["touched"] and POSTGRES not in units():
        print("The metadata on the server elsewhere may have been migrated: have its owner bring the dump back.")


def halt(state: State) -> None:
    """Stop all services if an upgrade is not finished; if none is, have the daemon, which is the first to stop."""
    if state.read():
        stop(*units())
    elif run("systemctl", "is-active", WEBSERVER, check=False).stdout.strip() == "active":
        run("systemctl", "start", DAEMON, check=False)


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status."""
    parser = argparse.ArgumentParser(prog="upgrade", description="An upgrade of the platform as a transaction.")
    commands = parser.add_subparsers(dest="command", required=True)
    beginning = commands.add_parser("begin")
    beginning.add_argument("--patience", type=float, default=600, help="seconds that runs in progress may take")
    beginning.add_argument("--dumped-elsewhere", action="store_true", help="a database elsewhere has been dumped there")
    commands.add_parser("finish").add_argument("units", nargs="+")
    commands.add_parser("revert")
    commands.add_parser("halt")
    options = parser.parse_args(arguments)
    state = State()
    try:
        with state.locked():
            if options.command == "begin":
                begin(state, options.patience, options.dumped_elsewhere)
            elif options.command == "finish":
                finish(state, options.units)
            elif options.command == "revert":
                revert(state)
            else:
                halt(state)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
