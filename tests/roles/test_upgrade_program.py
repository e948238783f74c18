"""The program that upgrades, on a host that is made of files and dictionaries; Molecule has a real one."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, module_at

UNIT = """[Service]
ExecStart=/usr/local/lib/data-platform/with-levels \\
    /usr/bin/docker run \\
    --name {name} \\
    --label-file /run/{name}/labels \\
    --log-driver none \\
    --network net \\
    --user {user}:{user} \\
    --mount type=bind,source={root}/config,target={root}/config,readonly \\
    --mount type=bind,source={root}/run/sockets,target={root}/run/sockets \\
    --env "A=50%% of $$HOME" \\
    {options}\\
    --publish 127.0.0.1:3001:3001 \\
    {image}{command}
[X-Container]
Image={image}
"""
SERVE = ' "dagster" "api" "grpc" "--location-name=core" "--working-directory=/here" "--module-name=core.definitions"'
NAMES = ["dagster-code", "dagster-daemon", "dagster-postgres", "dagster-webserver"]
OLD = {"dagster": "runs of old"}
LOADED = {"name": "core", "locationOrLoadError": {"__typename": "RepositoryLocation", "repositories": []}}
LOADED["locationOrLoadError"]["repositories"] = [{"jobs": [{"name": "everything"}, {"name": "smoke"}]}]
SALES = SERVE.replace("=core", "=sales")
BROKEN = {"name": "sales", "locationOrLoadError": {"__typename": "PythonError", "message": "No module\nat all"}}


class Killed(BaseException):
    """The program was killed, or the power was cut."""


class Host:
    """A host with four units; what the program calls does what the real thing would, to files and dictionaries."""

    def __init__(self, root: Path, program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the host below ``root``, where the platform runs in version 1."""
        self.root, self.program = root, program
        self.units, self.config, self.programs = root / "units", root / "config", root / "programs"
        self.data, self.runtime = root / "data", root / "run"
        for folder in (
            *(self.units, self.config / "runs", self.programs, self.runtime),
            *(self.data / "warehouse", self.data / "deployments"),
        ):
            folder.mkdir(parents=True)
        (self.config / "runs" / "runs.json").touch()
        (self.data / "warehouse" / "warehouse.duckdb").write_text("tables of old")
        (self.data / "postgres/17/base").mkdir(parents=True)
        (self.programs / "upgrade").write_text("the program itself")
        self.clusters, self.new_postgres, self.lost = {"17": dict(OLD)}, "17", ""
        self.active, self.in_progress = set(NAMES), [0]
        self.commands: dict[str, str] = {}
        self.locations: list[dict[str, Any]] = [LOADED]
        self.calls: list[str] = []
        self.helper = ""
        self.fails: dict[str, str] = {}
        self.broken: set[str] = set()
        self.beside: set[str] = set()
        self.shares = False
        self.kill_at, self.count = 0, 0
        self.describe(1)
        real = program.State.write, program.Path.rename, program.remove
        for name in ("units", "config", "programs", "data", "runtime", "root"):
            monkeypatch.setattr(program, name.upper(), getattr(self, name))
        monkeypatch.setattr(program, "run", self.run)
        monkeypatch.setattr(program.State, "write", lambda *args, **values: self.dies() or real[0](*args, **values))
        monkeypatch.setattr(program.Path, "rename", lambda *args: self.dies() or real[1](*args))
        monkeypatch.setattr(program, "remove", lambda *args: self.dies() or real[2](*args))
        monkeypatch.setattr(program.time, "sleep", lambda seconds: None)
        self.state = program.State()

    def describe(self, version: int) -> None:
        """Write units, configuration and programs of a version, as the roles do."""
        for name in NAMES:
            command = SERVE if name == "dagster-code" else ""
            cluster = self.new_postgres if version == 2 else "17"
            options = f'--env "PGDATA=/there/postgres/{cluster}" ' if name == "dagster-postgres" else ""
            text = self.unit(name, f"data-platform/{name}:{version}", command, options)
            (self.units / f"{name}.service").write_text(text)
        (self.config / "dagster.yaml").write_text(f"version: {version}")
        (self.data / "deployments" / "core.json").write_text(f'"image {version}"')
        (self.programs / "container-unit").write_text(f"version {version}")
        (self.root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
        (self.root / "usr/local/bin/data-platform-sql").write_text(f"version {version}")
        added = {
            self.data / "deployments" / "new.json": '"image 2"',
            self.config / "new.yaml": "",
            self.units / "dagster-code-new.service": self.unit("x", "new:2"),
            self.units / "data-platform-new.service": "",
            self.root / "usr/local/bin/data-platform-new": "",
        }
        for file, text in added.items():
            file.write_text(text) if version == 2 else file.unlink(missing_ok=True)

    def unit(self, name: str, image: str, command: str = "", options: str = "") -> str:
        """Give the text of a unit."""
        given = {"user": os.getuid(), "root": self.root, "command": command, "options": options}
        return UNIT.format(name=name, image=image, **given)

    @property
    def databases(self) -> dict[str, str]:
        """What the database server's directory holds."""
        return self.clusters[self.program.cluster().name]

    def dies(self) -> None:
        """Count one thing that is done, and be killed if its time has come."""
        self.count += 1
        if self.count == self.kill_at:
            raise Killed

    def run(self, *words: str, check: bool = True, **options: Any) -> Any:
        """Do what a command would."""
        line = " ".join(words)
        if line.startswith("docker run"):
            assert not self.helper
            self.helper = line  # it outlives a program that is killed
        self.dies()
        if words[0] == "cp":
            if "--reflink=always" in words and not self.shares:
                return subprocess.CompletedProcess(words, 1, "", "")
            return subprocess.run([word for word in words if word != "--reflink=always"], check=True)
        self.calls.append(line)
        code, out = next(((1, text) for start, text in self.fails.items() if start in line), (0, ""))
        if not code:
            code, out = self.does(words, line, **options)
            self.helper = "" if line.startswith("docker run") else self.helper
        if "stdout" in options and not code:
            options["stdout"].write(out.encode())
        if check and code:
            raise self.program.Failure(f"'{line}' failed: {out}")
        return subprocess.CompletedProcess(words, code, out, out if code else "")

    def does(self, words: tuple[str, ...], line: str, stdin: Any = None, **options: Any) -> tuple[int, str]:
        """Give status and output of a command that nothing is wrong with."""
        if words[:2] == ("systemctl", "stop"):
            self.active -= set(words[2:])
        elif words[:2] == ("systemctl", "start"):
            allowed = self.runtime / "data-platform-upgrade"
            may = allowed.read_text().split() if allowed.exists() else []
            refused = set(words[2:]) - set(may) if self.state.journal.exists() else set()
            self.active |= set(words[2:]) - refused
            if "dagster-postgres" in words and not self.program.cluster().exists():
                self.program.cluster().mkdir()
                self.clusters[self.program.cluster().name] = {"dagster": ""}
            broken = set(words[2:]) & self.broken
            self.active -= broken
            return int(bool(refused | broken)), "refused"
        elif words[:2] == ("systemctl", "is-active"):
            return 0, "\n".join("active" if name in self.active else "inactive" for name in words[2:])
        elif line == "docker container ls --format {{.Names}}":
            return 0, "\n".join(sorted(self.active | self.beside))
        elif "container ls" in line:
            number = self.in_progress.pop(0) if len(self.in_progress) > 1 else self.in_progress[0]
            return 0, "id\n" * number
        elif words[:2] == ("docker", "inspect"):
            return 0, "\n".join(self.commands.get(name, "0") for name in words[4:])
        elif words[:2] == ("docker", "exec"):
            name = words[3] if words[2] == "--interactive" else words[2]
            assert options.get("input", "CREATE ROLE dagster;") == "CREATE ROLE dagster;"
            return self.inside(words, stdin) if name in self.active else (1, f"{name} is not running")
        elif line == "docker rm --force --volumes data-platform-upgrade":
            self.helper = ""
        elif line.startswith("docker run") and not (self.runtime / "sockets").exists():
            return 125, "docker: Error response from daemon: invalid mount config: bind source path does not exist\nRun"
        elif line.endswith("instance migrate"):
            self.databases["dagster"] = "migrated " + self.databases["dagster"]
        elif "job execute" in line:
            (self.data / "warehouse" / "warehouse.duckdb").write_text("tables of new")
            (self.data / "warehouse" / "warehouse.duckdb.wal").write_text("more of new")
            self.databases["dagster"] += ", smoke"
        return 0, ""

    def inside(self, words: tuple[str, ...], stdin: Any) -> tuple[int, str]:
        """Give status and output of a command in a container that runs."""
        assert not (self.helper and {"psql", "pg_dump", "pg_restore"} & set(words))
        if "pg_dump" in words:
            return 0, self.databases[words[-1]]
        if "pg_dumpall" in words:
            return 0, "CREATE ROLE postgres;\nCREATE ROLE dagster;\n"
        if words[-1].startswith("--command=SELECT datname"):
            return 0, "\n".join(self.databases)
        if "FROM pg_tables" in words[-1]:
            (database,) = (word.partition("=")[2] for word in words if word.startswith("--dbname="))
            return 0, f"public.runs {len(self.databases[database].split())}"
        if "--create" in words:
            name = Path(stdin.name).stem
            assert name not in self.databases
            self.databases[name] = stdin.read().decode().removesuffix(self.lost)
        elif "pg_restore" in words and "--list" not in words:
            self.databases[words[-1].partition("=")[2]] = stdin.read().decode()
        for statement in words[-1].partition("=")[2].split("; ") if "psql" in words else ():
            name, *rest = statement.replace("IF EXISTS ", "").split()[2:] if " DATABASE " in statement else [""]
            if statement.startswith("DROP"):
                self.databases.pop(name, None)
            elif statement.startswith("CREATE"):
                assert name not in self.databases
                self.databases[name] = ""
            elif statement.startswith("ALTER"):
                assert rest[-1] not in self.databases
                self.databases[rest[-1]] = self.databases.pop(name)
        return 0, json.dumps(self.locations) if "python" in words else ""

    def boots(self) -> None:
        """Come up again after a power cut: what is not allowed to start does not."""
        for path in self.runtime.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.active = set() if self.state.journal.exists() else set(NAMES)

    def do(self, *arguments: str) -> int:
        """Call the program."""
        return self.program.main([*arguments])

    def play(self) -> int:
        """Do what the playbook does; give the status of what failed first, or 0."""
        if status := self.do("begin"):
            return status
        self.describe(2)
        return self.do("finish", *NAMES)

    def files(self) -> dict[str, str]:
        """What the host holds, but for what belongs to upgrades."""
        found = [path for path in self.root.rglob("*") if path.is_file() and self.state.home not in path.parents]
        return {str(path.relative_to(self.root)): path.read_text() for path in found}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host that the program takes for its own."""
    return Host(tmp_path, module_at(ROOT / "roles/upgrade/files/upgrade.py"), monkeypatch)


def test_upgrade_keeps_a_copy_migrates_and_proves_before_the_daemon_starts(
    host: Host, capsys: pytest.CaptureFixture
) -> None:
    assert host.play() == 0
    assert host.databases == {"dagster": "migrated runs of old, smoke"}
    assert (host.state.dump.read_text(), host.active) == ("runs of old", set(NAMES))
    assert (host.state.warehouse / "warehouse.duckdb").read_text() == "tables of old"
    assert not host.state.journal.exists()
    lines = [line for line in host.calls if line.startswith(("systemctl st", "docker run")) or "pg_dump " in line]
    assert [" ".join(line.split()[:3]) for line in lines] == [
        "systemctl stop dagster-daemon",
        "systemctl stop dagster-code",
        "systemctl start dagster-postgres",
        "docker exec dagster-postgres",
        "systemctl stop dagster-code",
        "systemctl start dagster-postgres",
        "docker run --rm",
        "systemctl start dagster-code",
        "docker run --rm",
        "systemctl start dagster-daemon",
    ]
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0].partition(" in ")[0] for line in said] == [
        "Waited until no run was",
        "Stopped the services and kept a copy",
        "Migrated the metadata",
        "Started webserver and code servers",
        "All code locations load: core",
        "Ran the job smoke",
        "Started the daemon",
    ]


def test_what_runs_once_has_all_of_its_unit_but_name_and_port(host: Host) -> None:
    assert host.play() == 0
    migration, run = [line for line in host.calls if line.startswith("docker run")]
    there, user = host.root, os.getuid()
    options = (
        f"docker run --rm --name data-platform-upgrade --network net --user {user}:{user} "
        f"--mount type=bind,source={there}/config,target={there}/config,readonly "
        f"--mount type=bind,source={there}/run/sockets,target={there}/run/sockets --env A=50% of $HOME"
    )
    assert migration == f"{options} data-platform/dagster-webserver:2 dagster instance migrate"
    given = "--working-directory=/here --module-name=core.definitions"
    assert run == f"{options} data-platform/dagster-code:2 dagster job execute --job=smoke {given}"


@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        ("instance migrate", "'dagster instance migrate' failed: permission denied"),
        ("systemctl start dagster-code dagster-webserver", "did not become ready: see 'journalctl -u dagster-code'."),
        ("docker exec dagster-webserver", "The webserver does not answer: see 'journalctl -u dagster-webserver'."),
        ("job execute", "A run of the job smoke failed: permission denied"),
        ("systemctl start dagster-daemon", "did not become ready: see 'journalctl -u dagster-daemon'."),
    ],
)
def test_what_fails_is_one_sentence_and_all_is_as_before(
    fails: str, sentence: str, host: Host, capsys: pytest.CaptureFixture
) -> None:
    before = host.files()
    host.fails[fails] = "a traceback\npermission denied"
    assert host.play() == 1
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    host.fails.clear()
    assert host.do("halt") == 0
    assert host.active == set()
    assert host.do("revert") == 0
    assert "The platform is as it was before" in capsys.readouterr().out
    assert (host.databases, host.files(), host.active) == (OLD, before, set(NAMES))
    assert not host.state.journal.exists()


def test_location_that_was_broken_before_is_no_failure_and_another_is(
    host: Host, capsys: pytest.CaptureFixture
) -> None:
    host.locations = [BROKEN, LOADED]
    assert host.play() == 0
    host.describe(1)
    host.locations = [LOADED]
    assert host.do("begin") == 0
    host.describe(2)
    host.locations = [BROKEN, LOADED]
    assert host.do("finish", *NAMES) == 1
    assert "The code location sales does not load any more (No module): see" in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["", "job execute"])
def test_code_server_that_did_not_start_before_does_not_start_after(
    fails: str, host: Host, capsys: pytest.CaptureFixture
) -> None:
    sales = host.units / "dagster-code-sales.service"
    sales.write_text(host.unit("dagster-code-sales", "data-platform/sales:1", SALES))
    host.broken, host.locations = {"dagster-code-sales"}, [BROKEN, LOADED]
    host.fails = {fails: "no"} if fails else {}
    assert host.do("begin") == 0
    host.describe(2)
    assert host.do("finish", *NAMES, "dagster-code-sales") == int(bool(fails))
    host.fails.clear()
    assert host.do("revert") == 0
    assert (host.active, host.state.journal.exists()) == (set(NAMES), False)
    assert ("The platform is as it was before" in capsys.readouterr().out) is bool(fails)


def test_runs_are_waited_for_and_too_long_ones_change_nothing(host: Host, capsys: pytest.CaptureFixture) -> None:
    host.in_progress = [2, 1, 0]
    assert host.play() == 0
    host.describe(1)
    before, host.in_progress = host.files(), [1]
    assert host.do("begin", "--patience=-1") == 1
    assert "1 run or command is still in progress" in capsys.readouterr().err
    assert host.active == set(NAMES) - {"dagster-daemon"}
    assert (host.do("halt"), host.active, host.files()) == (0, set(NAMES), before)
    assert not host.state.journal.exists()


def test_full_disk_is_refused_before_anything_is_changed(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage, home = host.program.shutil.disk_usage(host.root), f"{host.data}/upgrade"
    (host.data / "warehouse" / "warehouse.duckdb").write_bytes(b"x" * (3 << 20))
    before, free = host.files(), {home: 100 << 20}
    monkeypatch.setattr(host.program.shutil, "disk_usage", lambda path: usage._replace(free=free[str(path)]))
    assert host.do("begin") == 1
    assert f"{home} has 100 MiB free, and an upgrade needs 518: make room there." in capsys.readouterr().err
    monkeypatch.setattr(host.program, "device", lambda path: path.name)
    free |= {home: 516 << 20, f"{host.data}/warehouse": 514 << 20, f"{host.data}/postgres": 600 << 20}
    assert host.do("begin") == 1
    assert f"{host.data}/warehouse has 514 MiB free, and an upgrade needs 515" in capsys.readouterr().err
    (host.data / "postgres/17/base/table").write_bytes(b"x" * (2 << 20))
    before = host.files()
    free |= {home: 518 << 20, f"{host.data}/warehouse": 516 << 20, f"{host.data}/postgres": 513 << 20}
    assert host.do("begin") == 1
    assert f"{host.data}/postgres has 513 MiB free, and an upgrade needs 514" in capsys.readouterr().err
    assert (host.active, host.files(), host.state.journal.exists()) == (set(NAMES), before, False)


def test_copy_that_shares_its_blocks_takes_no_room(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = host.program.shutil.disk_usage(host.root)._replace(free=513 << 20)
    (host.data / "warehouse" / "warehouse.duckdb").write_bytes(b"x" * (3 << 20))
    monkeypatch.setattr(host.program.shutil, "disk_usage", lambda path: usage)
    assert host.do("begin") == 1
    host.shares = True
    assert host.do("begin") == 0


@pytest.mark.parametrize("command", ["begin", "revert"])
def test_copy_that_was_not_completed_takes_no_room_for_ever(command: str, host: Host) -> None:
    host.state.write(since="", step="saving", broken=[], touched=False, moved="")
    left = [path.with_name(f"{path.name}.new") for path in host.state.copies]
    for path in left:
        path.mkdir()
        (path / "half").touch()
    assert host.do(command) == 0
    assert [path for path in left if path.exists()] == []


def test_warehouse_behind_a_link_is_kept_as_well(host: Host) -> None:
    (host.data / "warehouse").rename(host.root / "large")
    (host.data / "warehouse").symlink_to(host.root / "large")
    failed(host)
    assert (host.root / "large/warehouse.duckdb").read_text() == "tables of new"
    assert host.do("revert") == 0
    assert (host.root / "large/warehouse.duckdb").read_text() == "tables of old"
    assert not (host.root / "large/warehouse.duckdb.wal").exists()
    assert (host.data / "warehouse").is_symlink()


def test_database_elsewhere_needs_its_owner_s_word(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (host.units / "dagster-postgres.service").unlink()
    assert host.do("begin") == 1
    assert "upgrade_external_dumped: true" in capsys.readouterr().err
    assert host.calls == []
    assert host.do("begin", "--dumped-elsewhere") == 0
    assert not host.state.dump.exists()
    host.describe(2)
    (host.units / "dagster-postgres.service").unlink()
    host.fails["systemctl start dagster-daemon"] = "no"
    monkeypatch.setattr(host, "clusters", {"17": dict(OLD)})
    monkeypatch.setattr(type(host), "databases", property(lambda self: self.clusters["17"]))
    assert host.do("finish", *(name for name in NAMES if name != "dagster-postgres")) == 1
    assert host.do("revert") == 0
    assert "server elsewhere may have been migrated: have its owner" in capsys.readouterr().out


def test_nothing_is_reverted_where_nothing_began(host: Host, capsys: pytest.CaptureFixture) -> None:
    before = host.files()
    assert host.do("revert") == host.do("halt") == 0
    assert (capsys.readouterr().out, host.files(), host.active) == ("Nothing was changed.\n", before, set(NAMES))
    assert host.do("finish", *NAMES) == 1


def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: Callable[[Host], Any]) -> int:
    """How many things an attempt does on a new host."""
    with monkeypatch.context() as patch:
        host = Host(tmp_path / "counted", module_at(ROOT / "roles/upgrade/files/upgrade.py"), patch)
        attempt(host)
        return host.count


def each_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: Callable[[Host], Any]) -> Any:
    """Give a new host for each thing that an attempt does, on which it was killed before it."""
    for number in range(1, steps(tmp_path, monkeypatch, attempt) + 1):
        with monkeypatch.context() as patch:
            host = Host(tmp_path / str(number), module_at(ROOT / "roles/upgrade/files/upgrade.py"), patch)
            host.kill_at = number
            with pytest.raises(Killed):
                attempt(host)
            host.kill_at = 0
            yield host


def moved(host: Host) -> int:
    """Upgrade to another major version of PostgreSQL, too."""
    host.new_postgres, host.clusters["17"]["reports"] = "18", "sums"
    return host.play()


def test_postgresql_is_moved_with_all_databases_and_the_old_directory_stays(
    host: Host, capsys: pytest.CaptureFixture
) -> None:
    assert moved(host) == 0
    assert host.clusters["17"] == {**OLD, "reports": "sums"}
    assert host.clusters["18"] == {"dagster": "migrated runs of old, smoke", "reports": "sums"}
    postgres = host.data / "postgres"
    said = f"Moved PostgreSQL from {postgres}/17, which stays as it was, to {postgres}/18: 4 rows in both ("
    assert said in capsys.readouterr().out


def test_move_that_loses_rows_is_reverted(host: Host, capsys: pytest.CaptureFixture) -> None:
    before, host.lost = host.files(), " of old"
    assert moved(host) == 1
    assert (
        "The database dagster does not hold what it held before: public.runs 1, public.runs 3."
        in capsys.readouterr().err
    )
    assert host.do("revert") == 0
    assert (host.databases, host.files(), host.active) == ({**OLD, "reports": "sums"}, before, set(NAMES))
    assert not (host.data / "postgres/18").exists()


def test_move_to_a_directory_that_is_there_is_refused_and_leaves_it(host: Host, capsys: pytest.CaptureFixture) -> None:
    (host.data / "postgres/18").mkdir()
    assert moved(host) == 1
    assert "postgres/18, which PostgreSQL is to have its data in, is there already" in capsys.readouterr().err
    assert host.do("revert") == 0
    assert (host.data / "postgres/18").exists()
    assert host.active == set(NAMES)


def test_move_killed_anywhere_is_finished_by_the_next_or_reverted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for again in (moved, lambda host: host.do("revert")):
        for host in each_kill(tmp_path / again.__name__, monkeypatch, moved):
            if not host.state.journal.exists():
                continue
            host.boots()
            assert again(host) == 0
            assert host.clusters["17"] == {**OLD, "reports": "sums"}
            assert host.databases == host.clusters["18" if again is moved else "17"]
            assert (host.data / "postgres/18").exists() == (again is moved)
            assert host.databases["reports"] == "sums"
            assert host.active == set(NAMES)


@pytest.mark.parametrize("boots", [False, True], ids=["killed", "power cut"])
def test_upgrade_killed_anywhere_is_finished_by_the_next(
    boots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in each_kill(tmp_path, monkeypatch, Host.play):
        unfinished = host.state.journal.exists()
        host.boots() if boots else host.do("halt")
        if unfinished:
            assert host.active == set(), host.kill_at
        if not unfinished and host.databases != OLD:  # it was killed after its end
            continue
        assert host.play() == 0, host.count
        assert f"{(host.runtime / 'sockets').stat().st_mode & 0o777:o}" == "700"
        assert host.databases == {"dagster": "migrated runs of old, smoke"}
        assert host.state.dump.read_text() == "runs of old"
        assert (host.active, host.state.journal.exists()) == (set(NAMES), False)


def test_upgrade_killed_anywhere_can_be_reverted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in each_kill(tmp_path, monkeypatch, Host.play):
        if not host.state.journal.exists():
            continue
        host.do("halt")
        assert host.do("revert") == 0
        assert (host.databases, host.active) == (OLD, set(NAMES))
        assert (host.data / "warehouse" / "warehouse.duckdb").read_text() == "tables of old"
        assert not (host.data / "warehouse" / "warehouse.duckdb.wal").exists()
        assert (host.config / "dagster.yaml").read_text() == "version: 1"
        assert not (host.config / "new.yaml").exists()
        assert ":1" in (host.units / "dagster-code.service").read_text()


def failed(host: Host) -> None:
    host.fails["systemctl start dagster-daemon"] = "no"
    assert host.play() == 1
    host.fails.clear()
    host.do("halt")


@pytest.mark.parametrize("again", ["revert", "play"])
def test_revert_killed_anywhere_is_finished_by_the_next(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(host: Host) -> None:
        kill_at, host.kill_at = host.kill_at, 0
        failed(host)
        host.count, host.kill_at = 0, kill_at
        host.do("revert")

    for host in each_kill(tmp_path, monkeypatch, attempt):
        unfinished = host.state.journal.exists()
        host.boots()
        assert host.active == (set() if unfinished else set(NAMES))
        if again == "revert":
            assert host.do("revert") == 0
            assert (host.databases, host.active) == (OLD, set(NAMES))
            assert (host.programs / "container-unit").read_text() == "version 1"
        else:
            assert host.play() == 0
            assert host.databases == {"dagster": "migrated runs of old, smoke"}
            assert (host.config / "new.yaml").exists()


def test_what_services_write_after_a_revert_is_not_undone_by_the_next_upgrade(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed(host)

    def dies(state: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(host.program.State, "end", dies)
        host.do("revert")
    assert host.active == set(NAMES)
    host.databases["dagster"] = "runs of new"
    (host.data / "warehouse" / "warehouse.duckdb").write_text("tables of new")
    assert host.play() == 0
    assert host.databases == {"dagster": "migrated runs of new, smoke"}
    assert (host.state.warehouse / "warehouse.duckdb").read_text() == "tables of new"


def test_runs_that_the_new_daemon_began_end_before_the_data_are_brought_back(host: Host) -> None:
    failed(host)
    host.in_progress = [2]
    assert host.do("revert") == 0
    removed, restored = (
        next(number for number, line in enumerate(host.calls) if start in line)
        for start in ("docker rm --force --volumes id id", "pg_restore --username=postgres --exit-on-error")
    )
    assert removed < restored


def test_what_was_broken_before_is_known_after_a_kill(host: Host) -> None:
    host.locations = [BROKEN, LOADED]
    host.fails["pg_dump"] = "no"
    assert host.do("begin") == 1
    host.fails.clear()
    host.do("halt")
    assert "dagster-webserver" not in host.active
    assert host.play() == 0


def test_records_of_the_code_are_kept_as_they_were_before_this_change(host: Host) -> None:
    (host.data / "deployments" / "lock").write_text('{"records": {"core": {"image": "before"}}}')
    (host.data / "deployments" / "new.json").write_text('{"image": "after"}')
    failed(host)
    assert host.do("revert") == 0
    assert json.loads((host.data / "deployments" / "core.json").read_text()) == {"image": "before"}
    assert not (host.data / "deployments" / "new.json").exists()


def test_runs_that_are_processes_of_services_are_counted_in_the_database(host: Host) -> None:
    (host.config / "runs" / "runs.json").unlink()
    host.locations = 3
    assert host.program.in_progress() == 3
    host.beside = {"dagster-code.0123456789ab", "others"}
    host.commands = {"dagster-code": "1", "dagster-code.0123456789ab": "1", "dagster-postgres": "8", "others": "8"}
    assert host.program.in_progress() == 5
    host.active.remove("dagster-webserver")
    with pytest.raises(host.program.Failure, match="dagster-webserver does not say whether runs are in progress"):
        host.program.in_progress()
    host.active.clear()
    host.beside.clear()
    assert host.program.in_progress() == 0


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "Traceback\na.b.ProgrammingError: (psycopg2.X) denied\n(Background on this)",
            "a.b.ProgrammingError: (psycopg2.X) denied",
        ),
        (
            'pg_restore: error: no query: ERROR:  extension "x" is not available\nHINT:  None.\nCommand was: CREATE',
            'pg_restore: error: no query: ERROR:  extension "x" is not available',
        ),
        (
            "docker: Error response from daemon: no such path.\n\nRun",
            "docker: Error response from daemon: no such path.",
        ),
        ("first\nlast\n\n", "last"),
        ("", "it says nothing"),
    ],
)
def test_reason_is_the_line_that_names_an_exception(output: str, reason: str, host: Host) -> None:
    assert host.program.reason(output) == reason


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program of the units, on a host where an upgrade is not finished."""
    program = module_at(ROOT / "roles/service/files/service.py")
    monkeypatch.setattr(program, "UPGRADE", tmp_path / "unfinished")
    monkeypatch.setattr(program, "RUNTIME", tmp_path)
    (tmp_path / "unfinished").write_text('{"since": "2026-01-31 12:00:00 +0000", "step": "migrating"}')
    return program


def test_no_unit_starts_while_an_upgrade_is_not_finished(service: ModuleType, tmp_path: Path) -> None:
    unit = SimpleNamespace(name="dagster-webserver")
    with pytest.raises(service.Failure) as refused:
        service.refuse_while_upgrading(unit)
    assert str(refused.value) == (
        "An upgrade that began at 2026-01-31 12:00:00 +0000 is not finished, so dagster-webserver does not start: "
        "run the playbook of that upgrade again."
    )
    (tmp_path / "data-platform-upgrade").write_text("dagster-postgres\ndagster-webserver")
    service.refuse_while_upgrading(unit)
    (tmp_path / "data-platform-upgrade").write_text("dagster-postgres\ndagster-webserver-2")
    with pytest.raises(service.Failure):
        service.refuse_while_upgrading(unit)
    (tmp_path / "unfinished").unlink()
    service.refuse_while_upgrading(unit)
