"""The program that the units call, with stand-ins for docker, systemctl and journalctl; Molecule has the real ones."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, STAND_IN, module_at

UNIT = """[Unit]
Description=Something
[Service]
ExecStart={tools}/docker run \\
    --env "NAME=a: b = c $$HOME 5%%" \\
    --name {name} \\
    --label-file /run/{name}/labels \\
    --publish 127.0.0.1:1:1 \\
    some/image:1 "serve"
ExecStop={tools}/docker stop --time 30 {name}
[X-Container]
Image=some/image:1
Network=net
Config={config}
Reload={reload}
User={user}
Data={data}
Ready=ask "--me" "this"
{more}"""
SEAMLESS = """Drain="drain"
Rehearsal="rehearse" "--it"
"""
BRIDGE = "com.docker.network.bridge.name"
IMAGES = '["some/image:1"] sha256:aaa\n'
NAMES = ["dagster-a", "dagster-b", "dagster-c"]
USER = 4321


class Machine:
    """A host with three units, whose tools answer what they are told and write down what they are asked.

    The first unit reads a part of its configuration again when it is reloaded.
    """

    def __init__(self, root: Path, program: ModuleType) -> None:
        """Make the host below ``root``, where all is as it should be."""
        self.tools, self.units, self.program = root / "bin", root / "units", program
        self.config, self.workspace, self.runtime = root / "config", root / "workspace", root / "run"
        self.state = root / "state"
        for folder in (self.tools, self.units, self.config, self.workspace, *(self.runtime / name for name in NAMES)):
            folder.mkdir(parents=True)
        for tool in ("docker", "systemctl", "systemd-run", "journalctl"):
            (self.tools / tool).write_text(STAND_IN)
            (self.tools / tool).chmod(0o755)
        (self.config / "dagster.yaml").write_text("telemetry: no")
        (self.workspace / "workspace.yaml").write_text("load_from: []")
        for name in NAMES:
            self.add(name, self.workspace if name == "dagster-a" else "")
        (self.units / "dagster-other.service").write_text("[Service]\nExecStart=/bin/true\n")
        self.answers: dict[str, tuple[int, str, str]] = {}
        self.answer("docker image inspect", IMAGES)
        self.answer("systemctl show", "NRestarts=0\nNeedDaemonReload=no\nExecMainStartTimestampMonotonic=500000\n")
        self.answer("docker network inspect", "net\n")
        self.answer("systemctl is-active", "active\n" * 3)
        self.answer("systemctl is-enabled", "enabled\n" * 3)
        self.containers({name: ("true", self.made_of(name)) for name in NAMES})
        self.reloaded.write_text(self.program.digest("", self.workspace))

    def add(self, name: str, reload: Path | str = "", more: str = "") -> Path:
        """Put a unit on the host."""
        file = self.units / f"{name}.service"
        data = f"{self.state}/own {self.state}/disk {self.state}/shared"
        file.write_text(
            UNIT.format(tools=self.tools, name=name, config=self.config, reload=reload, user=USER, data=data, more=more)
        )
        return file

    @property
    def reloaded(self) -> Path:
        """Where it stands what the first unit has read again last."""
        return self.runtime / "dagster-a" / "reloaded"

    def converge(self, *options: str) -> int:
        """Bring the host to the three units; give the exit status."""
        return self.program.main(["converge", *options, *NAMES])

    def answer(self, start: str, out: str = "", code: int = 0, err: str = "") -> None:
        """Say what calls that start like this give; the longest start counts."""
        self.answers[start] = (code, out, err)
        (self.tools / "answers").write_text(json.dumps(self.answers))

    def containers(self, states: dict[str, tuple[str, str]]) -> None:
        """Say which containers there are: whether they run, and what they are made of."""
        lines = [f"/{name} {running} {label}\n" for name, (running, label) in states.items()]
        self.answer("docker container inspect", "".join(lines), int(len(states) < len(NAMES)))

    def unit(self, name: str = "dagster-a") -> object:
        """Give a unit as the program reads it."""
        return self.program.Unit(self.units / f"{name}.service")

    def made_of(self, name: str = "dagster-a") -> str:
        """Give what a unit's container should be made of."""
        return self.unit(name).made_of("sha256:aaa")

    def calls(self, *starts: str) -> list[str]:
        """Give the calls that start like one of these."""
        written = self.tools / "calls"
        return [
            line for line in (written.read_text() if written.exists() else "").splitlines() if line.startswith(starts)
        ]

    def changes(self) -> list[str]:
        """Give the calls that change something."""
        looks = (
            "docker container inspect",
            "docker container ls",
            "docker image inspect",
            "docker network inspect",
            "docker exec",
        )
        asks = ("docker version", "systemctl is-", "systemctl show", "journalctl")
        return [call for call in self.calls("") if not call.startswith((*looks, *asks))]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A host that the program takes for its own."""
    program = module_at(ROOT / "roles/service/files/service.py")
    machine = Machine(tmp_path, program)
    monkeypatch.setenv("PATH", os.pathsep.join([str(machine.tools), os.environ["PATH"]]))
    monkeypatch.setattr(program, "UNITS", machine.units)
    monkeypatch.setattr(program, "RUNTIME", machine.runtime)
    monkeypatch.setattr(program, "JOURNAL", tmp_path / "journal.conf")
    return machine


def test_unit_says_what_its_container_is(machine: Machine) -> None:
    unit = machine.unit()
    assert (unit.name, unit.image, unit.network) == ("dagster-a", "some/image:1", "net")
    assert (unit.config, unit.reload) == ([machine.config], [machine.workspace])
    assert (unit.user, [path.name for path in unit.data]) == (USER, ["own", "disk", "shared"])
    assert machine.unit("dagster-b").reload == []


@pytest.mark.parametrize("text", [None, "", "[Service]\nExecStart=/bin/true\n", "no section\n"])
def test_file_that_describes_no_container_is_named(
    text: str | None, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    file = machine.units / "dagster-new.service"
    if text is not None:
        file.write_text(text)
    assert machine.program.main(["prepare", "dagster-new"]) == 1
    assert f"{file} does not describe a container" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["unit", "content", "new file", "nested file", "renamed file", "image"])
def test_what_a_container_is_made_of(change: str, machine: Machine) -> None:
    before = machine.made_of()
    known = machine.config / "dagster.yaml"
    assert machine.made_of() == before
    if change == "unit":
        file = machine.units / "dagster-a.service"
        file.write_text(file.read_text() + "# a comment\n")
    elif change == "content":
        known.write_text("telemetry: yes")
    elif change == "new file":
        (machine.config / "more.yaml").touch()
    elif change == "nested file":
        (machine.config / "deep").mkdir()
        (machine.config / "deep" / "more.yaml").touch()
    elif change == "renamed file":
        known.rename(machine.config / "other.yaml")
    after = machine.unit().made_of("sha256:bbb" if change == "image" else "sha256:aaa")
    assert after != before


def test_times_of_the_configuration_do_not_count(machine: Machine) -> None:
    before = machine.made_of()
    os.utime(machine.config / "dagster.yaml", (0, 0))
    assert machine.made_of() == before


def test_what_a_container_reads_again_is_not_what_it_is_made_of(machine: Machine) -> None:
    before = machine.made_of()
    (machine.workspace / "workspace.yaml").write_text("load_from: [x]")
    assert machine.made_of() == before


def test_prepare_clears_the_way_and_writes_down_what_is_started(machine: Machine) -> None:
    machine.answer("docker network inspect", code=1)
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    assert machine.changes() == [
        "docker rm --force --volumes dagster-a",
        f"docker network create --opt {BRIDGE}=net net",
    ]
    assert (machine.runtime / "dagster-a" / "labels").read_text().splitlines() == [
        f"data-platform.made-of={machine.made_of()}",
    ]


def test_prepare_makes_the_directories_that_the_container_writes_to(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = {machine.state / "own": 0, machine.state / "disk": 0, machine.state / "shared": 77}
    for name in ("disk", "shared"):
        (machine.state / name).mkdir(parents=True, mode=0o755)
    monkeypatch.setattr(machine.program, "owner", owners.get)
    monkeypatch.setattr(machine.program.os, "chown", lambda path, user, group: owners.update({path: (user, group)}))
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    assert {path.name: owner for path, owner in owners.items()} == {
        "own": (USER, USER),
        "disk": (USER, USER),
        "shared": 77,
    }
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in owners}
    assert modes == {"own": "0o700", "disk": "0o755", "shared": "0o755"}


def test_prepare_writes_down_what_need_not_be_read_again(machine: Machine) -> None:
    (machine.workspace / "workspace.yaml").write_text("load_from: [x]")
    machine.reloaded.unlink()
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    assert machine.converge() == 0
    assert machine.calls("systemctl reload") == []


def test_prepare_does_not_say_that_an_outdated_unit_is_the_one_on_disk(machine: Machine) -> None:
    machine.answer("systemctl show", "NRestarts=0\nNeedDaemonReload=yes\n")
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    assert machine.made_of() not in (machine.runtime / "dagster-a" / "labels").read_text()


def test_each_failure_makes_the_next_start_wait_longer_until_all_was_well_for_a_while(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(machine.program.time, "sleep", waits.append)
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    machine.answer("systemctl show", "NRestarts=5\nNeedDaemonReload=no\n")
    for _ in range(6):
        assert machine.program.main(["prepare", "dagster-a"]) == 0
    assert waits == [0, 0, 2, 6, 14, 30, 30]
    tries = machine.runtime / "dagster-a" / "tries"
    os.utime(tries, (tries.stat().st_mtime - 30,) * 2)
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    machine.answer("systemctl show", "NRestarts=0\nNeedDaemonReload=no\n")
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    assert waits[-2:] == [0, 0]


def test_journal_reads_its_size_once_it_changed(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.program.JOURNAL.write_text("[Journal]\n")
    assert machine.converge("--check") == 0
    assert machine.changes() == []
    assert machine.converge() == 0
    assert machine.changes() == ["systemctl restart systemd-journald"]
    assert capsys.readouterr().out.splitlines() == ["restarted systemd-journald"] * 2
    booted = time.time() - time.monotonic()
    os.utime(machine.program.JOURNAL, (booted + 0.4,) * 2)
    assert machine.converge() == 0
    assert capsys.readouterr().out == ""
    os.utime(machine.program.JOURNAL, (booted + 0.6,) * 2)
    assert machine.converge("--check") == 0
    assert capsys.readouterr().out == "restarted systemd-journald\n"


def test_slice_that_changed_is_read_again(machine: Machine) -> None:
    machine.answer("systemctl show --property=NeedDaemonReload dagster.slice", "NeedDaemonReload=yes\n")
    assert machine.converge() == 0
    assert machine.changes() == ["systemctl daemon-reload"]


def test_prepare_leaves_the_network_that_is_there(machine: Machine) -> None:
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    assert machine.calls("docker network create") == []


def test_prepare_names_the_bridge_of_a_network_that_has_another(machine: Machine) -> None:
    machine.answer("docker network inspect", "\n")
    machine.answer("docker network rm", code=1, err="network net has active endpoints")
    machine.answer("docker network create", code=1, err="network with name net already exists")
    assert machine.program.main(["prepare", "dagster-a"]) == 0
    assert machine.changes()[1:] == ["docker network rm net", f"docker network create --opt {BRIDGE}=net net"]


def test_all_units_stop_for_a_network_whose_bridge_has_another_name(machine: Machine) -> None:
    machine.answer("docker network inspect", "\n")
    assert machine.converge() == 0
    names = " ".join(NAMES)
    assert [call for call in machine.changes() if "reload" not in call] == [
        f"systemctl stop {names}",
        f"systemctl restart {names}",
    ]


def test_prepare_takes_the_network_that_another_unit_was_faster_to_make(machine: Machine) -> None:
    machine.answer("docker network inspect", code=1)
    machine.answer("docker network create", code=1, err="network with name net already exists")
    assert machine.program.main(["prepare", "dagster-a"]) == 0


@pytest.mark.parametrize(
    ("command", "answer", "sentence"),
    [
        (
            "docker image inspect",
            "",
            "dagster-a needs the image some/image:1, which is not on this host: run the playbook again.",
        ),
        (
            "docker image inspect",
            '["some/image:10"] sha256:aaa\n',
            "dagster-a needs the image some/image:1, which is not",
        ),
        ("docker network create", "", "The network net cannot be made: no driver"),
    ],
)
def test_prepare_says_what_is_missing(
    command: str, answer: str, sentence: str, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    machine.answer("docker network inspect", code=1)
    machine.answer(command, answer, code=1, err="no driver")
    assert machine.program.main(["prepare", "dagster-a"]) == 1
    assert sentence in capsys.readouterr().err


def test_prepare_does_not_blame_the_image_when_docker_is_down(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.answer("docker", code=1, err="Cannot connect to the Docker daemon")
    machine.answer("docker image inspect", code=1)
    assert machine.program.main(["prepare", "dagster-a"]) == 1
    said = capsys.readouterr().err
    assert "Cannot connect to the Docker daemon" in said
    assert "needs the image" not in said


def test_ready_asks_again_until_the_answer_is_yes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINPID", str(os.getpid()))
    machine.answer("docker exec", code=1)
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        machine.answer("docker exec", code=int(len(pauses) < 3))

    monkeypatch.setattr(machine.program.time, "sleep", pause)
    assert machine.program.main(["ready", "dagster-a"]) == 0
    assert machine.calls("docker exec") == ["docker exec dagster-a ask --me this"] * 4
    assert 0 < min(pauses) == max(pauses) <= 1


def test_ready_asks_a_slow_host_less_often(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINPID", str(os.getpid()))
    machine.answer("docker exec", code=1)
    clock, pauses = iter(range(0, 1000, 5)), []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        machine.answer("docker exec", code=int(len(pauses) < 2))

    monkeypatch.setattr(machine.program.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(machine.program.time, "sleep", pause)
    assert machine.program.main(["ready", "dagster-a"]) == 0
    assert pauses == [5, 5]


def test_ready_gives_up_when_the_main_process_is_gone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    monkeypatch.setenv("MAINPID", str(process.pid))
    machine.answer("docker exec", code=1)
    monkeypatch.setattr(machine.program.time, "sleep", lambda seconds: pytest.fail("it waits for a dead process"))
    assert machine.program.main(["ready", "dagster-a"]) == 1
    assert "dagster-a ended before it was ready: see 'journalctl -u dagster-a'." in capsys.readouterr().err


def test_converge_says_and_does_nothing_when_all_is_right(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    assert machine.converge() == 0
    assert (capsys.readouterr().out, machine.changes()) == ("", [])


@pytest.mark.parametrize(
    "reason", ["other label", "no label", "stopped", "no container", "inactive", "failed", "other image"]
)
def test_converge_restarts_just_the_unit_that_is_stale(
    reason: str, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    states = {name: ("true", machine.made_of(name)) for name in NAMES}
    if reason in ("inactive", "failed"):
        machine.answer("systemctl is-active", f"active\n{reason}\nactive\n", code=3)
    elif reason == "other image":
        unit = machine.units / "dagster-b.service"
        unit.write_text(unit.read_text().replace("some/image:1", "some/image:2"))
        machine.answer("docker image inspect", IMAGES + '["some/image:2","some/other:2"] sha256:aaa\n')
    else:
        label = states.pop("dagster-b")[1]
        state = {"other label": ("true", "0000"), "no label": ("true", ""), "stopped": ("false", label)}.get(reason)
        machine.containers(states | ({"dagster-b": state} if state else {}))
    assert machine.converge() == 0
    assert machine.changes() == ["systemctl daemon-reload", "systemctl restart dagster-b"]
    assert capsys.readouterr().out == "restarted dagster-b\n"


def test_converge_restarts_all_that_read_a_changed_file(machine: Machine) -> None:
    (machine.config / "dagster.yaml").write_text("telemetry: yes")
    assert machine.converge() == 0
    assert machine.calls("systemctl restart") == ["systemctl restart dagster-a dagster-b dagster-c"]


def test_converge_enables_what_is_disabled(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.answer("systemctl is-enabled", "enabled\ndisabled\nenabled\n", code=1)
    assert machine.converge() == 0
    assert machine.changes() == ["systemctl daemon-reload", "systemctl enable --quiet dagster-b"]
    assert capsys.readouterr().out == "enabled dagster-b\n"


def test_converge_starts_a_blank_host(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.containers({})
    machine.answer("systemctl is-active", "inactive\n" * 3, code=3)
    machine.answer("systemctl is-enabled", "disabled\n" * 3, code=1)
    assert machine.converge() == 0
    assert machine.changes()[-1] == f"systemctl restart {' '.join(NAMES)}"
    assert f"systemctl enable --quiet {' '.join(NAMES)}" in machine.changes()
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_check_says_what_it_would_do_and_does_nothing(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.containers({"dagster-a": ("true", "0000"), "dagster-b": ("true", machine.made_of("dagster-b"))})
    machine.answer("systemctl is-enabled", "enabled\ndisabled\nenabled\n", code=1)
    assert machine.converge("--check") == 0
    assert capsys.readouterr().out.splitlines() == ["restarted dagster-a", "restarted dagster-c", "enabled dagster-b"]
    assert machine.changes() == []


def test_failed_restart_shows_the_journal_of_what_failed(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.containers({"dagster-c": ("true", machine.made_of("dagster-c"))})
    machine.answer("systemctl restart", code=1, err="Job failed")
    machine.answer("systemctl is-active dagster-a dagster-b", "active\nfailed\n", code=3)
    machine.answer("systemctl is-active dagster-a dagster-b dagster-c", "active\nactive\nactive\n")
    machine.answer("journalctl", "could not bind\n")
    assert machine.converge() == 1
    assert "dagster-b did not become ready; the last lines of the journal:\ncould not bind" in capsys.readouterr().err
    assert [call.split("--unit=")[1:] for call in machine.calls("journalctl")] == [["dagster-b"]]


def test_failed_restart_that_has_mended_itself_names_a_unit(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.containers({name: ("true", machine.made_of(name)) for name in NAMES[1:]})
    machine.answer("systemctl restart", code=1, err="Job failed")
    assert machine.converge() == 0 or capsys.readouterr().err.startswith("dagster-a ")
    assert [call for call in machine.calls("journalctl") if "--unit=" not in call] == []


@pytest.mark.parametrize("change", ["content", "new file", "nothing written down"])
def test_converge_reloads_what_only_has_to_read_again(
    change: str, machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    if change == "content":
        (machine.workspace / "workspace.yaml").write_text("load_from: [x]")
    elif change == "new file":
        (machine.workspace / "more.yaml").touch()
    else:
        machine.reloaded.unlink()
    assert machine.converge() == 0
    assert machine.changes() == ["systemctl reload dagster-a"]
    assert capsys.readouterr().out == "reloaded dagster-a\n"


def test_converge_reloads_once(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    (machine.workspace / "workspace.yaml").write_text("load_from: [x]")
    assert machine.program.main(["reloaded", "dagster-a"]) == 0
    assert machine.converge() == 0
    assert (capsys.readouterr().out, machine.changes()) == ("", [])


def test_what_restarts_is_not_reloaded(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    (machine.workspace / "workspace.yaml").write_text("load_from: [x]")
    machine.containers({name: ("true", machine.made_of(name)) for name in NAMES[1:]})
    assert machine.converge() == 0
    assert machine.changes() == ["systemctl daemon-reload", "systemctl restart dagster-a"]
    assert capsys.readouterr().out == "restarted dagster-a\n"


def test_failed_reload_is_tried_again(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    (machine.workspace / "workspace.yaml").write_text("load_from: [x]")
    machine.answer("systemctl reload", code=1, err="Job failed")
    for _ in range(2):
        assert machine.converge() == 1
        assert capsys.readouterr().err == "'systemctl reload dagster-a' failed: Job failed\n"
    machine.answer("systemctl reload")
    assert machine.converge() == 0
    assert machine.changes() == ["systemctl reload dagster-a"] * 3


def test_converge_removes_what_is_no_longer_wanted(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    others = [machine.units / "dagster-other.service", machine.add("postgres-x")]
    gone = [machine.add("dagster-x"), machine.add("dagster-y", machine.workspace)]
    assert machine.converge() == 0
    assert machine.changes() == [
        "systemctl disable --now --quiet dagster-x dagster-y",
        "systemctl reset-failed dagster-x dagster-y",
        "systemctl daemon-reload",
    ]
    assert capsys.readouterr().out.splitlines() == ["removed dagster-x", "removed dagster-y"]
    assert not any(file.exists() for file in gone)
    assert all(file.exists() for file in others)
    assert machine.converge() == 0
    assert capsys.readouterr().out == ""


def test_webserver_reads_again_before_a_location_goes(machine: Machine) -> None:
    machine.add("dagster-x")
    (machine.workspace / "workspace.yaml").write_text("load_from: []\n")
    assert machine.converge() == 0
    assert machine.changes()[:2] == ["systemctl reload dagster-a", "systemctl disable --now --quiet dagster-x"]


def test_unit_that_does_not_stop_stays(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    file = machine.add("dagster-x")
    machine.answer("systemctl disable", code=1, err="Job failed")
    assert machine.converge() == 1
    assert capsys.readouterr().err == "'systemctl disable --now --quiet dagster-x' failed: Job failed\n"
    assert file.exists()


class Killed(BaseException):
    """What ends the program wherever it is."""


def kill_after(survived: int, machine: Machine, patched: pytest.MonkeyPatch) -> None:
    """Kill the program once it has changed the host so many times."""
    run, steps = machine.program.run, []
    changes = [("systemctl", "disable"), ("systemctl", "daemon-reload"), ("docker", "network", "rm")]

    def until_killed(does: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            if does is run and not any(arguments[: len(change)] == change for change in changes):
                return does(*arguments, **options)
            if len(steps) == survived:
                raise Killed
            steps.append(arguments)
            return does(*arguments, **options)

        return step

    patched.setattr(machine.program, "run", until_killed(run))
    patched.setattr(Path, "unlink", until_killed(Path.unlink))


@pytest.mark.parametrize("survived", range(4))
def test_removal_that_was_killed_is_finished(
    survived: int, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    files = [machine.add("dagster-x"), machine.add("dagster-y")]
    with monkeypatch.context() as patched:
        kill_after(survived, machine, patched)
        with pytest.raises(Killed):
            machine.converge()
    left = [file.stem for file in files if file.exists()]
    assert len(left) == 2 - max(0, min(survived - 1, 2))
    assert machine.converge() == 0
    assert capsys.readouterr().out.splitlines() == [f"removed {name}" for name in left]
    assert not any(file.exists() for file in files)
    stopped = {name for call in machine.calls("systemctl disable --now") for name in call.split()[4:]}
    assert stopped == {"dagster-x", "dagster-y"}


def test_check_only_says_what_it_would_reload_and_remove(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    file = machine.add("dagster-x")
    (machine.workspace / "workspace.yaml").write_text("load_from: [x]")
    written = machine.reloaded.read_text()
    assert machine.converge("--check") == 0
    assert capsys.readouterr().out.splitlines() == ["reloaded dagster-a", "removed dagster-x"]
    assert (machine.changes(), file.exists(), machine.reloaded.read_text()) == ([], True, written)


def test_converge_to_no_units_at_all_is_refused(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        machine.program.main(["converge"])
    assert "required: units" in capsys.readouterr().err
    assert machine.changes() == []


def test_remove_leaves_nothing_of_the_units(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    assert machine.program.main(["remove"]) == 0
    assert machine.changes() == [
        f"systemctl disable --now --quiet {' '.join(NAMES)}",
        f"systemctl reset-failed {' '.join(NAMES)}",
        "docker network rm net",
        "systemctl daemon-reload",
    ]
    assert capsys.readouterr().out.splitlines() == [f"removed {name}" for name in NAMES]
    assert [file.name for file in machine.units.iterdir()] == ["dagster-other.service"]
    assert machine.program.main(["remove"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("survived", range(6))
def test_whole_removal_that_was_killed_is_finished(
    survived: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        kill_after(survived, machine, patched)
        with pytest.raises(Killed):
            machine.program.main(["remove"])
    assert machine.program.main(["remove"]) == 0
    assert [file.name for file in machine.units.iterdir()] == ["dagster-other.service"]
    assert "docker network rm net" in machine.calls("docker network rm")


def test_network_that_is_gone_is_no_reason_to_stop(machine: Machine) -> None:
    machine.answer("docker network inspect", code=1)
    assert machine.program.main(["remove"]) == 0
    assert machine.calls("docker network rm") == []


def test_network_that_others_use_is_named(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.answer("docker network rm", code=1, err="network net has active endpoints")
    assert machine.program.main(["remove"]) == 1
    assert capsys.readouterr().err == "'docker network rm net' failed: network net has active endpoints\n"


def test_check_only_says_what_it_would_take_off(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    assert machine.program.main(["remove", "--check"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"removed {name}" for name in NAMES]
    assert machine.changes() == []
    assert len(list(machine.units.iterdir())) == 4


@pytest.fixture
def seamless(machine: Machine) -> Machine:
    """A host whose first unit's container can be replaced while it serves."""
    machine.add("dagster-a", more=SEAMLESS)
    machine.answer("docker container inspect --format {{.Id}} dagster-a", "0123456789abcdef\n")
    machine.answer("docker container inspect --format {{.State.Running}} dagster-a", "true\n")
    machine.containers({name: ("true", "old" if name == "dagster-a" else machine.made_of(name)) for name in NAMES})
    return machine


def test_converge_replaces_what_can_be_replaced_while_it_serves(
    seamless: Machine, capsys: pytest.CaptureFixture
) -> None:
    assert seamless.converge() == 0
    assert seamless.changes() == ["systemctl daemon-reload", "systemctl reload dagster-a"]
    assert capsys.readouterr().out == "replaced dagster-a\n"


def test_converge_restarts_it_with_the_others_if_more_differs_than_that(seamless: Machine) -> None:
    (seamless.config / "dagster.yaml").write_text("telemetry: yes")
    assert seamless.converge() == 0
    assert seamless.calls("systemctl re") == ["systemctl restart dagster-a dagster-b dagster-c"]


@pytest.mark.parametrize("state", ["stopped", "missing", "inactive"])
def test_converge_starts_what_does_not_serve(state: str, seamless: Machine) -> None:
    states = {name: ("true", seamless.made_of(name)) for name in NAMES[1:]}
    if state == "inactive":
        seamless.answer("systemctl is-active", "inactive\nactive\nactive\n", code=3)
        states["dagster-a"] = ("true", "old")
    elif state == "stopped":
        states["dagster-a"] = ("false", "old")
    seamless.containers(states)
    assert seamless.converge() == 0
    assert seamless.calls("systemctl re") == ["systemctl restart dagster-a"]


def test_converge_says_that_the_old_container_serves_on_when_it_cannot_be_replaced(
    seamless: Machine, capsys: pytest.CaptureFixture
) -> None:
    seamless.answer("systemctl reload", code=1)
    seamless.answer("journalctl", "ModuleNotFoundError\n")
    assert seamless.converge() == 1
    said = capsys.readouterr().err
    assert "dagster-a could not be replaced, and the containers before still serve" in said
    assert "ModuleNotFoundError" in said


def test_converge_touches_no_other_unit_when_asked_for_one_alone(
    machine: Machine, capsys: pytest.CaptureFixture
) -> None:
    (machine.config / "dagster.yaml").write_text("telemetry: yes")
    machine.program.JOURNAL.write_text("[Journal]\n")
    machine.answer("systemctl show --property=NeedDaemonReload dagster.slice", "NeedDaemonReload=yes\n")
    machine.answer("systemctl is-active", "active\n")
    machine.answer("systemctl is-enabled", "enabled\n")
    assert machine.program.main(["converge", "--only", "dagster-b"]) == 0
    assert machine.changes() == ["systemctl daemon-reload", "systemctl restart dagster-b"]
    assert capsys.readouterr().out == "restarted dagster-b\n"


class Systemd:
    """What systemd is told of the main process."""

    def __init__(self, path: Path) -> None:
        """Listen at ``path``."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)

    def told(self) -> list[str]:
        """Give what it was told."""
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(100).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    """A systemd that listens."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return Systemd(tmp_path / "notify")


def test_a_new_container_takes_over_once_it_is_ready(
    seamless: Machine, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = []
    monkeypatch.setattr(seamless.program, "spawn", lambda command: spawned.append(command) or os.getpid())
    assert seamless.program.main(["replace", "dagster-a"]) == 0
    start, retire = spawned
    assert start[1:] == [
        *("run", "--env", "NAME=a: b = c $HOME 5%", "--name", "dagster-a.next"),
        *("--label-file", "/run/dagster-a/labels", "--publish", "127.0.0.1:1:1", "some/image:1", "serve"),
    ]
    assert seamless.calls("docker exec") == ["docker exec dagster-a.next ask --me this"]
    assert systemd.told() == [f"MAINPID={os.getpid()}"]
    assert seamless.calls("docker rename") == [
        "docker rename dagster-a dagster-a.0123456789ab",
        "docker rename dagster-a.next dagster-a",
    ]
    assert retire[2:] == ["retire", "dagster-a", "dagster-a.0123456789ab"]
    assert (seamless.runtime / "dagster-a" / "labels").read_text() == f"data-platform.made-of={seamless.made_of()}\n"


def test_the_old_container_stays_when_the_new_one_ends(
    seamless: Machine, systemd: Systemd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    monkeypatch.setattr(seamless.program, "spawn", lambda command: process.pid)
    seamless.answer("docker exec", code=1)
    assert seamless.program.main(["replace", "dagster-a"]) == 1
    assert "dagster-a ended before it was ready" in capsys.readouterr().err
    assert systemd.told() == seamless.calls("docker rename") == []
    assert seamless.changes()[-1] == "docker rm --force --volumes dagster-a.next"


def test_nothing_is_replaced_where_nothing_serves(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.answer("docker container inspect", code=1)
    assert machine.program.main(["replace", "dagster-a"]) == 1
    assert "no container that could be replaced: run 'systemctl restart dagster-a'." in capsys.readouterr().err


def test_a_process_that_is_spawned_is_nobody_s_child(machine: Machine, tmp_path: Path) -> None:
    process = machine.program.spawn(
        ["/bin/sh", "-c", f"ps -o ppid= -p $$ > {tmp_path}/parent; mv {tmp_path}/parent {tmp_path}/done"]
    )
    assert process != os.getpid()
    deadline = time.monotonic() + 10
    while not (tmp_path / "done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert int((tmp_path / "done").read_text()) != os.getpid()


def test_a_container_that_was_replaced_ends_once_nobody_asks_it(seamless: Machine) -> None:
    assert seamless.program.main(["retire", "dagster-a", "dagster-a.0123456789ab"]) == 0
    assert seamless.calls("docker") == [
        "docker exec dagster-a.0123456789ab drain",
        "docker stop --time 30 dagster-a.0123456789ab",
        "docker rm --force --volumes dagster-a.0123456789ab",
    ]


def test_a_start_removes_what_a_replacement_left(seamless: Machine) -> None:
    seamless.answer("docker container ls", "dagster-a.next\ndagster-ab\ndagster-a.0123456789ab\ndagster-b\n")
    for command in ("prepare", "clear"):
        assert seamless.program.main([command, "dagster-a"]) == 0
    assert (
        seamless.calls("docker rm")
        == ["docker rm --force --volumes dagster-a dagster-a.next dagster-a.0123456789ab"] * 2
    )


RUN = "--env NAME=a: b = c $HOME 5% --name dagster-a.next --label-file /run/dagster-a/labels --publish 127.0.0.1:1:1"


def test_rehearsal_is_run_in_the_container_that_is_to_replace_the_unit_s(
    seamless: Machine, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    candidate = tmp_path / "candidate"
    candidate.write_text((seamless.units / "dagster-a.service").read_text().replace("some/image:1", "some/image:2"))
    seamless.answer("docker image inspect", '["some/image:2"] sha256:aaa\n')
    seamless.answer("docker exec", "look at this\n")
    assert seamless.program.main(["rehearse", str(candidate)]) == 0
    assert seamless.calls("docker r", "docker exec") == [
        "docker rm --force --volumes dagster-a.next",
        f"docker run --detach {RUN} some/image:2 serve",
        "docker exec dagster-a.next rehearse --it",
    ]
    assert capsys.readouterr().out == "look at this\n"


def test_container_that_was_rehearsed_takes_over(
    seamless: Machine, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = []
    monkeypatch.setattr(seamless.program, "spawn", lambda command: spawned.append(command) or os.getpid())
    inspect = (
        "docker container inspect --format " + '{{.State.Running}} {{index .Config.Labels "data-platform.made-of"}}'
    )
    seamless.answer(f"{inspect} dagster-a.next", f"true {seamless.made_of()}\n")
    assert seamless.program.main(["replace", "dagster-a"]) == 0
    assert spawned[0][1:] == ["attach", "--no-stdin", "dagster-a.next"]
    assert seamless.calls("docker rm") == []
    seamless.answer(f"{inspect} dagster-a.next", "true of-something-else\n")
    assert seamless.program.main(["replace", "dagster-a"]) == 0
    assert spawned[2][1] == "run"
    assert seamless.calls("docker rm") == ["docker rm --force --volumes dagster-a.next"]


def test_rehearsal_that_fails_says_why_and_leaves_nothing(seamless: Machine, capsys: pytest.CaptureFixture) -> None:
    seamless.answer("docker exec", code=1, err="Traceback\nNameError: x\n")
    assert seamless.program.main(["rehearse", str(seamless.units / "dagster-a.service")]) == 1
    assert capsys.readouterr().err == "Traceback\nNameError: x\n"
    assert seamless.changes()[-1] == "docker rm --force --volumes dagster-a.next"


def test_container_that_was_rehearsed_and_never_took_over_goes(machine: Machine, capsys: pytest.CaptureFixture) -> None:
    machine.add("dagster-a", machine.workspace, more=SEAMLESS)
    machine.containers({name: ("true", machine.made_of(name)) for name in NAMES})
    machine.answer("docker container ls", "dagster-a\ndagster-a.next\ndagster-b.next\n")
    assert machine.converge() == 0
    assert machine.changes() == ["docker rm --force --volumes dagster-a.next"]
    assert machine.calls("docker exec dagster-a ") != []
    assert machine.calls("docker exec dagster-b ") == []
    assert capsys.readouterr().out == "removed dagster-a.next\n"


def test_container_that_was_replaced_is_retired_even_if_the_process_that_did_was_killed(
    seamless: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(seamless.program, "PROCESSES", tmp_path / "proc")
    for process, words in {"7": ["retire", "dagster-a", "dagster-a.00000000000a"], "8": ["sleep", "9"]}.items():
        (tmp_path / "proc" / process).mkdir(parents=True)
        (tmp_path / "proc" / process / "cmdline").write_text("".join(f"{word}\0" for word in ["python", "-u", *words]))
    listed = [
        "dagster-a",
        "dagster-a.00000000000a",
        "dagster-a.00000000000b",
        "dagster-a.next.x",
        "dagster-b.00000000000c",
    ]
    seamless.answer("docker container ls", "\n".join(listed))
    assert seamless.program.forget([seamless.unit()]) == []
    program = seamless.program.__file__
    begun = [f"systemd-run --collect --quiet {program} retire dagster-a dagster-a.00000000000b"]
    assert seamless.calls("systemd-run") == begun


def test_rehearsal_that_ended_with_the_service_beside_it_is_run_alone(
    seamless: Machine, capsys: pytest.CaptureFixture
) -> None:
    seamless.answer("docker exec", code=137)
    seamless.answer("docker run --rm", code=1, err="Traceback\nNameError: x\n")
    assert seamless.program.main(["rehearse", str(seamless.units / "dagster-a.service")]) == 1
    assert seamless.calls("docker run")[-1] == f"docker run --rm {RUN} some/image:1 rehearse --it"
    assert capsys.readouterr().err == "Traceback\nNameError: x\n"


@pytest.mark.parametrize("missing", ["network", "requirement"])
def test_nothing_is_rehearsed_without_what_it_needs(missing: str, seamless: Machine) -> None:
    unit = seamless.units / "dagster-a.service"
    after = "After=docker.service dagster-b.service dagster-c.service"
    unit.write_text(unit.read_text().replace("[Service]", f"{after}\n[Service]"))
    if missing == "network":
        seamless.answer("docker network inspect", code=1)
    else:
        seamless.answer("systemctl is-active --quiet dagster-b.service", code=3)
    assert seamless.program.main(["rehearse", str(unit)]) == 0
    assert seamless.calls("docker run") == []


def test_one_that_is_down_does_not_restart_one_that_can_be_replaced(seamless: Machine) -> None:
    seamless.add("dagster-b", more=SEAMLESS)
    states = {"dagster-a": ("true", "old"), "dagster-c": ("true", seamless.made_of("dagster-c"))}
    seamless.containers(states)
    seamless.answer("systemctl is-active", "active\nactivating\nactive\n", code=3)
    assert seamless.converge() == 0
    assert seamless.calls("systemctl re") == ["systemctl restart dagster-b", "systemctl reload dagster-a"]


@pytest.mark.parametrize("unit", ["dagster-a", "dagster-b"])
def test_nothing_is_rehearsed_for_a_unit_that_does_not_run_or_names_no_rehearsal(unit: str, seamless: Machine) -> None:
    seamless.answer("docker container inspect --format {{.State.Running}} dagster-a", code=1)
    assert seamless.program.main(["rehearse", str(seamless.units / f"{unit}.service")]) == 0
    assert seamless.calls("docker run") == []
