"""The program behind data-platform-sql and -dagster, with a stand-in for docker; Molecule has the real thing."""

import json
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, module_at

AT = "2026-11-26T03:40:00+00:00"
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
SERVED = [
    "python",
    "-m",
    "code_servers",
    "serve",
    "--location-name=core",
    "--working-directory=/code/a b",
    "--module-name=core.defs",
]
SECRET = [*SERVED[:4], "--secrets=/secret", "--location-name=shop", *SERVED[5:]]


class Machine:
    """A host with a published warehouse, whose docker answers what it is told and writes down what it is asked."""

    def __init__(self, root: Path, program: ModuleType) -> None:
        """Make the host below ``root``."""
        self.tools, self.program = root / "bin", program
        self.warehouse, self.published = root / "warehouse" / "warehouse.duckdb", root / "published"
        for folder in (self.tools, self.warehouse.parent, self.published):
            folder.mkdir()
        (self.tools / "docker").write_text(DOCKER)
        (self.tools / "docker").chmod(0o755)
        self.answers: dict[str, tuple[int, str, str]] = {}
        self.answer("")
        self.configuration = root / "tools.json"
        places = {"warehouse": str(self.warehouse), "published": str(self.published)}
        settings = {"group": "data-platform", "image": "some/image:1", "memory": 1000, **places}
        self.configuration.write_text(json.dumps(settings))
        self.warehouse.write_bytes(b"one")
        self.publish()

    def publish(self) -> None:
        """Publish the warehouse as its pipeline does."""
        found = self.warehouse.stat()
        (self.published / "warehouse-1.duckdb").write_bytes(self.warehouse.read_bytes())
        (self.published / "warehouse.duckdb").unlink(missing_ok=True)
        (self.published / "warehouse.duckdb").symlink_to("warehouse-1.duckdb")
        self.note(at=AT, state=f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}")

    def note(self, **snapshot: object) -> None:
        """Write down of which state of the warehouse the snapshot is."""
        (self.published / "state.json").write_text(json.dumps(snapshot))

    def answer(self, part: str, code: int = 0, out: str = "", err: str = "") -> None:
        """Say what docker gives if its arguments hold ``part``; the longest counts. A negative code is a signal."""
        self.answers[part] = (code, out, err)
        (self.tools / "answers").write_text(json.dumps(self.answers))

    def calls(self, *words: str) -> list[list[str]]:
        """Give the calls of docker that hold all these words."""
        written = self.tools / "calls"
        calls = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
        return [call for call in calls if set(words) <= set(call)]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A host that the program takes for its own, and for root's."""
    program = module_at(ROOT / "roles/tools/files/tools.py")
    machine = Machine(tmp_path, program)
    monkeypatch.setenv("PATH", os.pathsep.join([str(machine.tools), os.environ["PATH"]]))
    monkeypatch.setattr(program, "CONFIGURATION", machine.configuration)
    monkeypatch.setattr(program.os, "geteuid", lambda: 0)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    return machine


SNAPSHOT_IS_OLD = f"This is the warehouse of {AT}; what was written since is published once the runs have ended.\n"


@pytest.mark.parametrize("journal", [False, True])
def test_person_is_told_that_the_warehouse_has_changed_since(
    journal: bool, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    assert machine.program.main("data-platform-sql", []) == 0
    assert capsys.readouterr().err == ""
    (Path(f"{machine.warehouse}.wal") if journal else machine.warehouse).write_bytes(b"more")
    assert machine.program.main("data-platform-sql", []) == 0
    assert capsys.readouterr().err == SNAPSHOT_IS_OLD


def test_root_believes_and_follows_nothing_that_a_pipeline_put_there(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    note = machine.published / "state.json"
    for spoilt in ("", "[]", "{", '{"at": 1}', "x" * 100_000):
        note.write_text(spoilt)
        assert machine.program.main("data-platform-sql", []) == 0
    machine.note(at="\x1b[2J2026", state="other")
    assert machine.program.main("data-platform-sql", []) == 0
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"at": AT, "state": "other"}))
    note.unlink()
    note.symlink_to(secret)
    assert machine.program.main("data-platform-sql", []) == 0
    note.unlink()
    os.mkfifo(note)
    assert machine.program.main("data-platform-sql", []) == 0
    assert capsys.readouterr().err == SNAPSHOT_IS_OLD.replace(AT, "22026")


def test_nothing_published_yet_is_said(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    (machine.published / "warehouse.duckdb").unlink()
    assert machine.program.main("data-platform-sql", []) == 1
    assert capsys.readouterr().err.startswith("Nothing is published yet: the first snapshot")
    assert machine.calls() == []


def test_prompt_is_contained_and_given_its_arguments_as_they_are(machine: Machine) -> None:
    machine.answer("-readonly", 3)
    assert machine.program.main("data-platform-sql", ["-csv", "select '$HOME'; --x"]) == 3
    (call,) = machine.calls("-readonly")
    assert call[call.index("some/image:1") + 1 :][:2] == ["sh", "-c"]
    assert call[-3:] == ["/published/warehouse.duckdb", "-csv", "select '$HOME'; --x"]
    contained = {
        "--rm",
        "--read-only",
        "--network=none",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        f"--user=65534:{machine.published.stat().st_gid}",
        "--memory=1000m",
        "--memory-swap=1000m",
        "--log-driver=none",
    }
    assert contained <= set(call)
    assert [word for word in call if "--mount" in word or "--volume" in word] == [
        f"--mount=type=bind,source={machine.published},target=/published,readonly"
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
    assert command[:7] == ["python", "-m", "data_platform_runtime.with_secrets", "/secret", "dagster", "asset", "list"]
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
