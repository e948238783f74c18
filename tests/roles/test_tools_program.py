"""The program behind data-platform-sql and -dagster, with a stand-in for docker; Molecule has the real thing."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, module_at

DOCKER = f"""#!{sys.executable} -IS
import json, os, pathlib, signal, sys
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
answers = json.loads((here / "answers").read_text())
line = " ".join(sys.argv[1:])
code, out, err = answers[max((part for part in answers if part in line), key=len)]
sys.stdout.write(out)
sys.stderr.write(err)
sys.stdout.flush()
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
HOLD = """
import fcntl, struct, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
SERVED = ["dagster", "api", "grpc", "--location-name=core", "--working-directory=/code/a b", "--module-name=core.defs"]
SECRET = ["python", "-m", "with_secrets", "/secret", *SERVED[:3], "--location-name=shop", *SERVED[4:]]


class Machine:
    """A host with a warehouse, whose docker answers what it is told and writes down what it is asked."""

    def __init__(self, root: Path, program: ModuleType) -> None:
        """Make the host below ``root``."""
        self.tools, self.program = root / "bin", program
        self.warehouse, self.copies = root / "warehouse" / "warehouse.duckdb", root / "sql"
        for folder in (self.tools, self.warehouse.parent, self.copies):
            folder.mkdir()
        (self.tools / "docker").write_text(DOCKER)
        (self.tools / "docker").chmod(0o755)
        self.answers: dict[str, tuple[int, str, str]] = {}
        self.answer("")
        self.configuration = root / "tools.json"
        settings = {"group": "data-platform", "image": "some/image:1", "memory": 1000, "warehouse": str(self.warehouse)}
        self.configuration.write_text(json.dumps(settings))
        self.write(b"one")

    def answer(self, part: str, code: int = 0, out: str = "", err: str = "") -> None:
        """Say what docker gives if its arguments hold ``part``; the longest counts. A negative code is a signal."""
        self.answers[part] = (code, out, err)
        (self.tools / "answers").write_text(json.dumps(self.answers))

    def calls(self, *words: str) -> list[list[str]]:
        """Give the calls of docker that hold all these words."""
        written = self.tools / "calls"
        calls = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
        return [call for call in calls if set(words) <= set(call)]

    def write(self, header: bytes, journal: bytes | None = None) -> None:
        """Write the warehouse as a checkpoint does, and its journal as a commit does."""
        self.warehouse.write_bytes(header.ljust(self.program.HEADERS, b"\0") + b"blocks")
        if journal is not None:
            Path(f"{self.warehouse}.wal").write_bytes(journal)

    def latest(self) -> dict[str, bytes]:
        """Give the files of the copy that a person is given."""
        with self.program.Copies(self.copies, self.warehouse, "some/image:1", 1000).latest() as copy:
            return {file.name: file.read_bytes() for file in copy.iterdir() if file.name != "state.json"}

    def verifications(self) -> int:
        """Give the number of copies that DuckDB was asked about."""
        return len(self.calls("python"))

    def left(self) -> int:
        """Give the number of copies on the disk."""
        return len(list(self.copies.glob("copy-*")))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A host that the program takes for its own, and for root's."""
    program = module_at(ROOT / "roles/tools/files/tools.py")
    machine = Machine(tmp_path, program)
    monkeypatch.setenv("PATH", os.pathsep.join([str(machine.tools), os.environ["PATH"]]))
    monkeypatch.setattr(program, "CONFIGURATION", machine.configuration)
    monkeypatch.setattr(program, "COPIES", machine.copies)
    monkeypatch.setattr(program, "KEPT_FREE", 0)
    monkeypatch.setattr(program, "SETTLED", 0)
    monkeypatch.setattr(program, "PATIENCE", 0)
    monkeypatch.setattr(program, "PATIENCE_WITH_A_COPY", 0)
    monkeypatch.setattr(program.os, "geteuid", lambda: 0)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    return machine


@pytest.fixture
def writer(machine: Machine) -> subprocess.Popen:
    """A process that holds the warehouse as DuckDB does."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, machine.warehouse], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        yield process


def test_copy_is_the_warehouse_and_its_journals(machine: Machine) -> None:
    machine.write(b"one", journal=b"commits")
    Path(f"{machine.warehouse}.wal.checkpoint").write_bytes(b"more")
    expected = {file.name: file.read_bytes() for file in machine.warehouse.parent.iterdir()}
    assert len(expected) == 3
    assert machine.latest() == expected


def test_container_can_read_the_copy_and_nobody_can_write_it(machine: Machine) -> None:
    machine.latest()
    (copy,) = machine.copies.glob("copy-*")
    assert [path.stat().st_mode & 0o777 for path in (copy, copy / "warehouse.duckdb")] == [0o755, 0o444]


@pytest.mark.parametrize("name", ["warehouse.duckdb", "warehouse.duckdb.wal", "warehouse.duckdb.wal.checkpoint"])
@pytest.mark.parametrize("trap", ["link", "pipe", "folder"])
def test_root_follows_nothing_that_a_pipeline_put_there(name: str, trap: str, machine: Machine, tmp_path: Path) -> None:
    machine.write(b"one")
    (tmp_path / "secret").write_bytes(b"of root")
    place = machine.warehouse.parent / name
    place.unlink(missing_ok=True)
    if trap == "link":
        place.symlink_to(tmp_path / "secret")
    elif trap == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(machine.program.Failure, match="a pipeline put something else in its place"):
        machine.latest()
    copied = [file.read_bytes() for file in machine.copies.rglob("*") if file.is_file()]
    assert b"of root" not in copied


def test_unchanged_warehouse_is_neither_copied_nor_verified_again(machine: Machine) -> None:
    assert machine.latest() == machine.latest()
    assert machine.verifications() == 1


@pytest.mark.parametrize("change", ["checkpoint", "commit", "first commit", "journal gone", "another file", "put back"])
def test_changed_warehouse_is_copied_again(change: str, machine: Machine) -> None:
    machine.write(b"one", journal=None if change == "first commit" else b"commits")
    machine.latest()
    if change == "checkpoint":
        machine.write(b"two")
    elif change.endswith("commit"):
        Path(f"{machine.warehouse}.wal").write_bytes(b"more commits")
    elif change == "journal gone":
        Path(f"{machine.warehouse}.wal").unlink()
    elif change == "another file":
        shutil.copy(machine.warehouse, f"{machine.warehouse}.new")
        Path(f"{machine.warehouse}.new").replace(machine.warehouse)
    else:
        machine.write(b"one")
        os.utime(machine.warehouse, (1, 1))
    assert machine.latest() == {file.name: file.read_bytes() for file in machine.warehouse.parent.iterdir()}
    assert machine.verifications() == 2
    assert machine.left() == 1


def test_writer_that_has_committed_nothing_makes_no_copy_necessary(machine: Machine, writer: subprocess.Popen) -> None:
    machine.latest()
    os.utime(machine.warehouse, (1, 1))
    machine.latest()
    assert machine.verifications() == 1


def test_warehouse_is_read_while_a_writer_holds_it_and_never_held(machine: Machine, writer: subprocess.Popen) -> None:
    assert machine.program.in_use(machine.warehouse)
    assert machine.latest()
    writer.communicate()
    assert not machine.program.in_use(machine.warehouse)
    with (
        machine.program.Copies(machine.copies, machine.warehouse, "", 0).latest(),
        machine.warehouse.open("r+b") as file,
    ):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def checkpoint_while_copying(machine: Machine, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    copy_file = machine.program.copy_file
    left = list(range(times))

    def copy(source: Path, target: Path) -> None:
        copy_file(source, target)
        if left:
            machine.write(b"meanwhile %d" % left.pop())

    monkeypatch.setattr(machine.program, "copy_file", copy)


def test_copy_that_a_checkpoint_overtook_is_made_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.program, "PATIENCE", 60)
    checkpoint_while_copying(machine, monkeypatch, 3)
    assert machine.latest()["warehouse.duckdb"].startswith(b"meanwhile 0")
    assert (machine.verifications(), machine.left()) == (1, 1)


def test_copy_that_duckdb_refuses_is_made_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.program, "PATIENCE", 60)
    asked = []

    def run(*command: str) -> subprocess.CompletedProcess:
        asked.append(command)
        return subprocess.CompletedProcess(command, int(len(asked) < 3), "", "Corrupt")

    monkeypatch.setattr(machine.program, "run", run)
    assert machine.latest()
    assert len(asked) >= 3


def test_older_copy_is_given_with_its_age_when_no_new_one_can_be_made(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    old = machine.latest()
    (state,) = machine.copies.glob("copy-*/state.json")
    os.utime(state, (0, 0))
    checkpoint_while_copying(machine, monkeypatch, 10**6)
    machine.write(b"two")
    assert machine.latest() == old
    said = capsys.readouterr().err
    assert said.startswith(
        "The warehouse cannot be copied now (it was checkpointed meanwhile): this is how it was at 19"
    )
    assert machine.left() == 1


def test_without_an_older_copy_the_person_is_told(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.answer("python -c", 1, err="Traceback\nduckdb.IOException: Corrupt file\n")
    assert machine.program.main("data-platform-sql", []) == 1
    assert f"{machine.warehouse} cannot be copied (duckdb.IOException: Corrupt file)" in capsys.readouterr().err


def test_docker_that_does_not_answer_is_named(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.answer("run", 125, err="Cannot connect to the Docker daemon\n")
    assert machine.program.main("data-platform-sql", []) == 1
    assert capsys.readouterr().err == "No container can be started: Cannot connect to the Docker daemon\n"


def test_warehouse_that_is_not_there_yet_is_named(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.warehouse.unlink()
    assert machine.program.main("data-platform-sql", []) == 1
    assert f"There is no warehouse yet: {machine.warehouse} comes with the first run" in capsys.readouterr().err


def fill_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch, room_for: int) -> None:
    """Leave room for a number of copies."""
    gigabyte = 1 << 30
    os.truncate(machine.warehouse, gigabyte)  # sparse

    def disk_usage(_: object) -> shutil._ntuple_diskusage:
        return shutil._ntuple_diskusage(0, 0, gigabyte * (room_for - machine.left() + 1))

    monkeypatch.setattr(machine.program.shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(machine.program.os, "sendfile", lambda *_: 0)
    monkeypatch.setattr(machine.program, "KEPT_FREE", 100)


def test_full_disk_is_refused_with_the_figures(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fill_disk(machine, monkeypatch, room_for=0)
    assert machine.program.main("data-platform-sql", []) == 1
    assert "needs 1024 MiB, but the disk of" in (said := capsys.readouterr().err)
    assert "0 MiB free, of which 100 are for the platform" in said


def test_older_copy_makes_room_for_the_new_one_unless_somebody_reads_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(machine, monkeypatch, room_for=2)
    machine.latest()
    with machine.program.Copies(machine.copies, machine.warehouse, "", 0).latest() as read:
        os.utime(machine.warehouse, (1, 1))
        with pytest.raises(machine.program.NoRoom):
            machine.latest()
        assert (read / "warehouse.duckdb").exists()
    assert machine.latest()
    assert not read.exists()


def test_copy_stays_while_somebody_reads_it(machine: Machine) -> None:
    copies = machine.program.Copies(machine.copies, machine.warehouse, "", 0)
    with copies.latest() as first:
        machine.write(b"two")
        with copies.latest() as second:
            assert first.exists() and second.exists()
        assert first.exists()
    assert (first.exists(), second.exists()) == (False, True)


def test_what_a_crash_left_is_removed_with_its_containers(machine: Machine) -> None:
    machine.latest()
    (machine.copies / "copy-half").mkdir()
    (machine.copies / "copy-half" / "warehouse.duckdb").touch()
    (machine.copies / "next").symlink_to("copy-half")
    machine.answer("label=data-platform.copy=copy-half", out="abc\ndef\n")
    machine.write(b"two")
    machine.latest()
    assert ["rm", "--force", "abc", "def"] in machine.calls("rm")
    assert machine.left() == 1


def test_prompt_is_contained_and_given_its_arguments_as_they_are(machine: Machine) -> None:
    machine.answer("-readonly", 3)
    assert machine.program.main("data-platform-sql", ["-csv", "select '$HOME'; --x"]) == 3
    (call,) = machine.calls("-readonly")
    assert call[call.index("some/image:1") + 1 :][:2] == ["sh", "-c"]
    assert call[-3:] == ["/warehouse/warehouse.duckdb", "-csv", "select '$HOME'; --x"]
    contained = {
        "--rm",
        "--read-only",
        "--network=none",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--user=65534:65534",
        "--memory=1000m",
        "--memory-swap=1000m",
        "--log-driver=none",
    }
    assert contained <= set(call)
    assert [word for word in call if "--mount" in word or "--volume" in word] == [
        f"--mount=type=bind,source={next(machine.copies.glob('copy-*'))},target=/warehouse,readonly"
    ]
    assert machine.calls("rm") == []


def test_container_goes_with_a_client_that_was_killed(machine: Machine) -> None:
    machine.answer("-readonly", -signal.SIGKILL)
    assert machine.program.main("data-platform-sql", []) == 128 + signal.SIGKILL
    assert machine.calls("rm") == [["rm", "--force", f"data-platform-sql-{os.getpid()}"]]


def test_container_goes_with_the_terminal(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(command: list[str]) -> int:
        machine.program.leave(signal.SIGHUP, None)

    monkeypatch.setattr(machine.program.subprocess, "call", hang_up)
    with pytest.raises(SystemExit) as ended:
        machine.program.main("data-platform-sql", [])
    assert ended.value.code == 128 + signal.SIGHUP
    assert machine.calls("rm") == [["rm", "--force", f"data-platform-sql-{os.getpid()}"]]


def serve(machine: Machine, **locations: list[str]) -> None:
    names = [f"dagster-code-{name}" for name in locations]
    machine.answer("container ls", out="\n".join(names))
    lines = [f"{name} {json.dumps(command)}" for name, command in zip(names, locations.values(), strict=True)]
    machine.answer("container inspect --format={{slice", out="\n".join(lines))


def executed(machine: Machine) -> tuple[str, list[str]]:
    """Give the container and the command of the one call of docker exec."""
    (call,) = machine.calls("exec")
    words = [
        word
        for word in call[1:]
        if word not in ("--interactive", "--env=TERM", "--workdir=/etc/data-platform/workspace")
    ]
    return words[0], words[1:]


def test_dagster_runs_beside_the_webserver_where_the_workspace_is(machine: Machine) -> None:
    machine.answer("container inspect", out="true\n")
    machine.answer("exec", 4)
    assert machine.program.main("data-platform-dagster", ["job", "launch", "-j", "a b"]) == 4
    assert executed(machine) == ("dagster-webserver", ["dagster", "job", "launch", "-j", "a b"])
    assert machine.calls("exec", "--workdir=/etc/data-platform/workspace")


def test_what_needs_code_runs_where_it_is_served(machine: Machine) -> None:
    serve(machine, core=SERVED)
    machine.program.main("data-platform-dagster", ["asset", "materialize", "--select", "*"])
    assert executed(machine) == (
        "dagster-code-core",
        [
            "dagster",
            "asset",
            "materialize",
            "--working-directory=/code/a b",
            "--module-name=core.defs",
            "--select",
            "*",
        ],
    )


@pytest.mark.parametrize("words", [["-l", "shop"], ["--location", "shop"], ["--location=shop"]])
def test_one_of_several_code_locations_is_named(words: list[str], machine: Machine) -> None:
    serve(machine, core=SERVED, shop=SECRET)
    machine.program.main("data-platform-dagster", ["asset", "list", *words, "--select", "a"])
    container, command = executed(machine)
    assert container == "dagster-code-shop"
    assert command[:7] == ["python", "-m", "with_secrets", "/secret", "dagster", "asset", "list"]
    assert command[-2:] == ["--select", "a"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "list"], "dagster-webserver is not running: see 'systemctl status dagster-webserver'."),
        (["asset", "list"], "Say which code location, one of core, shop: -l NAME."),
        (["asset", "list", "-l", "none"], "The code location none is not running"),
    ],
)
def test_dagster_that_cannot_run_says_why(
    arguments: list[str], sentence: str, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    machine.answer("container inspect", code=1)
    serve(machine, core=SERVED, shop=SECRET)
    assert machine.program.main("data-platform-dagster", arguments) == 1
    assert sentence in capsys.readouterr().err
    assert machine.calls("exec") == []


@pytest.mark.parametrize(
    "words", ["-m evil", "-mevil", "--module-name=evil", "-d /tmp", "--working-directory /tmp", "-f evil.py"]
)
def test_other_code_than_the_locations_is_refused(words: str, machine: Machine, capsys: pytest.CaptureFixture) -> None:
    serve(machine, core=SERVED)
    assert machine.program.main("data-platform-dagster", ["asset", "list", *words.split()]) == 1
    assert f"{words.split()[0]} names other code than the location's" in capsys.readouterr().err
    assert machine.calls("exec") == []


def test_no_code_location_at_all_is_said(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    assert machine.program.main("data-platform-dagster", ["asset", "list"]) == 1
    assert "No code location is running: see 'systemctl status dagster-code*'." in capsys.readouterr().err


def test_member_becomes_root_through_sudo(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.program.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(machine.program.grp, "getgrnam", lambda name: type("Group", (), {"gr_gid": os.getgid()}))
    started = []

    def execv(*call: object) -> None:
        started.append(call)
        raise SystemExit

    monkeypatch.setattr(machine.program.os, "execv", execv)
    with pytest.raises(SystemExit):
        machine.program.main("data-platform-sql", ["-c", "select 1"])
    program = "/usr/local/bin/data-platform-sql"
    assert started == [("/usr/bin/sudo", ["sudo", "--non-interactive", "--", program, "-c", "select 1"])]


@pytest.mark.parametrize("group", ["no-such-group", "another"])
def test_others_are_told_what_to_do(
    group: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(machine.program.os, "geteuid", lambda: 1000)
    if group == "another":
        monkeypatch.setattr(machine.program.grp, "getgrnam", lambda name: type("Group", (), {"gr_gid": 2**31 - 1}))
    assert machine.program.main("data-platform-sql", []) == 1
    assert "data-platform-sql is for members of the group data-platform: have" in capsys.readouterr().err
    assert machine.calls() == []


def test_configuration_that_is_missing_is_named(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.configuration.unlink()
    assert machine.program.main("data-platform-sql", []) == 1
    assert f"{machine.configuration} cannot be read" in capsys.readouterr().err
