"""The program that keeps lock and log of changes, with a stand-in for docker; Molecule has the real one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, STAND_IN, module_at

UNIT = """[Service]
ExecStart=/usr/bin/docker run --name {name} {image} serve
[X-Container]
Image={image}
"""
ME = ["--by", "me@here", "--host", "here", "--process", "7.1", "--alive", "7.1", "8.1"]
OLD, NEW, OTHER = ("data-platform/code-sales:old", "data-platform/code-sales:new", "data-platform/code-core:one")


class Host:
    """A host with a webserver and two locations."""

    def __init__(self, root: Path, program: ModuleType) -> None:
        """Make the host below ``root``."""
        self.program, self.tools, self.units, self.state = program, root / "bin", root / "units", root / "state"
        self.runs = root / "runs.json"
        self.describes(sales="old", core="one")
        for folder in (self.tools, self.units):
            folder.mkdir()
        for tool in ("docker", "systemctl", "container-unit"):
            (self.tools / tool).write_text(STAND_IN)
            (self.tools / tool).chmod(0o755)
        self.answers: dict[str, tuple[int, str, str]] = {}
        self.add("dagster-webserver", "data-platform/dagster:shared")
        self.add("dagster-daemon", "data-platform/dagster:shared")
        self.add("dagster-code-sales", OLD)
        self.add("dagster-code", OTHER)
        self.answer("docker image inspect", "data-platform/dagster:shared\n")
        self.serves(OLD)

    def add(self, name: str, image: str, module: str = "serve") -> None:
        """Put a unit on the host."""
        (self.units / f"{name}.service").write_text(UNIT.format(name=name, image=image).replace("serve", module))

    def describes(self, **runs: str) -> None:
        """Say what is described of the runs of locations."""
        self.runs.write_text(json.dumps({name: {"env": value} for name, value in runs.items()}))

    def described(self) -> dict[str, str]:
        """Give what is described of the runs of locations."""
        return {name: entry["env"] for name, entry in json.loads(self.runs.read_text()).items()}

    def unit(self, name: str = "dagster-code-sales") -> str:
        """Give the text of a unit."""
        return (self.units / f"{name}.service").read_text()

    def answer(self, start: str, out: str = "", code: int = 0, err: str = "") -> None:
        """Say what calls that start like this give; the longest start counts."""
        self.answers[start] = (code, out, err)
        (self.tools / "answers").write_text(json.dumps(self.answers))

    def serves(self, image: str) -> None:
        """Say which code of the location sales is served."""
        beside = f"dagster-code-sales.0123456789ab {OLD}\ndata-platform-run-1 {OLD}\n"
        listed = f"dagster-code-sales {image}\ndagster-code {OTHER}\ndagster-webserver x\n{beside}"
        self.answer("docker container ls", listed)

    def run(self, *arguments: str) -> int:
        """Call the program; give its exit status."""
        return self.program.main([*arguments])

    def calls(self, start: str) -> list[str]:
        """Give the calls that start like this."""
        written = self.tools / "calls"
        return [line for line in written.read_text().splitlines() if line.startswith(start)] if written.exists() else []

    def log(self) -> list[dict[str, Any]]:
        """Give the log."""
        return self.program.logged()

    def file(self, name: str) -> dict[str, Any]:
        """Give what a file of the state holds."""
        return self.program.read(self.state / name)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host that the program takes for its own."""
    program = module_at(ROOT / "roles/deployments/files/deployment.py")
    host = Host(tmp_path, program)
    (tmp_path / "boot").write_text("first\n")
    monkeypatch.setenv("PATH", os.pathsep.join([str(host.tools), os.environ["PATH"]]))
    monkeypatch.setattr(program, "STATE", host.state)
    monkeypatch.setattr(program, "UNITS", host.units)
    monkeypatch.setattr(program, "BOOT", tmp_path / "boot")
    monkeypatch.setattr(program, "RUNS", host.runs)
    monkeypatch.setattr(program, "CONTAINER_UNIT", str(host.tools / "container-unit"))
    monkeypatch.setattr(program, "PATIENCE", 0.2)
    return host


@pytest.fixture
def begin(host: Host, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Take the lock; gives its token."""

    def take(what: str = "deploy", *code: str) -> str:
        capsys.readouterr()
        assert host.run("begin", what, *ME, "--code", *code) == 0
        return capsys.readouterr().out.splitlines()[0]

    return take


def deploy(host: Host, begin: Callable[..., str], image: str) -> None:
    """Deploy code of the location sales."""
    token = begin("deploy", f"sales={image}=abc", f"core={OTHER}=")
    host.add("dagster-code-sales", image)
    host.serves(image)
    assert host.run("finish", token) == 0


def test_a_deployment_is_on_record(host: Host, begin: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    code = ["--code", f"sales={NEW}=abc", f"core={OTHER}="]
    assert host.run("begin", "deploy", "--check", *ME, *code) == 0
    lines = ["sales: nothing -> new", "core: nothing -> one"]
    assert capsys.readouterr().out.splitlines() == lines
    assert not (host.state / "sales.json").exists()
    assert not (host.state / "lock").exists()
    assert host.run("begin", "deploy", *ME, *code) == 0
    token, *said = capsys.readouterr().out.splitlines()
    assert said == lines
    host.serves(NEW)
    assert host.run("finish", token) == 0
    assert "Served and shown now" in capsys.readouterr().out
    assert host.calls("docker exec") == [
        f"docker exec dagster-webserver python -m data_platform_runtime.ready webserver sales={NEW}"
    ]
    (line,) = host.log()
    assert (line["what"], line["by"], line["result"]) == ("deploy", "me@here", "ok")
    assert line["code"] == {"sales": {"from": OLD, "to": NEW, "revision": "abc"}}
    record = host.file("sales.json")
    assert (record["image"], record["version"], record["revision"], record["by"]) == (NEW, "new", "abc", "me@here")
    assert not (host.state / "lock").exists()
    assert host.run("begin", "deploy", "--check", *ME, "--code", f"sales={NEW}=def") == 0
    assert capsys.readouterr().out == ""
    assert host.file("sales.json") == record


@pytest.mark.parametrize(("what", "lines"), [("site", 0), ("deploy", 1), ("upgrade", 1)])
def test_a_play_that_changes_no_code_says_so(
    what: str, lines: int, host: Host, begin: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    assert host.run("finish", begin(what)) == 0
    assert capsys.readouterr().out == "All code that the host is to serve was served already.\n"
    assert len(host.log()) == lines


def test_what_failed_is_on_record_and_leaves_what_was_written_down(host: Host, begin: Callable[..., str]) -> None:
    deploy(host, begin, OLD)
    before = host.file("sales.json")
    token = begin("deploy", f"sales={NEW}=abc")
    assert host.run("finish", "--failed", token) == 0
    assert host.log()[-1]["result"] == "failed"
    assert host.file("sales.json") == before
    assert not (host.state / "lock").exists()


def test_code_that_the_ui_does_not_show_is_a_failure(
    host: Host, begin: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    token = begin()
    host.serves(NEW)
    host.answer("docker exec", code=1, err="not shown yet: sales")
    assert host.run("finish", token) == 1
    assert "the UI does not show it after 0.2 s (not shown yet: sales): see" in capsys.readouterr().err
    assert host.log()[-1]["result"] == "failed"
    assert not (host.state / "lock").exists()


def test_a_second_one_is_refused(host: Host, begin: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    token = begin()
    for other in ([*ME], ["--by", "you@there", "--host", "there", "--process", "1.1", "--alive", "1.1"]):
        assert host.run("begin", "upgrade", *other) == 1
        said = capsys.readouterr().err
        assert "A change of this platform (deploy) is in progress since " in said
        assert "by me@here: wait for its end" in said
    assert host.run("finish", "another") == 0
    assert (host.state / "lock").exists()
    assert host.run("finish", token) == 0
    begin()


@pytest.mark.parametrize("why", ["booted", "old", "dead", "empty"])
def test_a_lock_that_counts_no_more_is_taken_over_and_on_record(
    why: str, host: Host, begin: Callable[..., str], tmp_path: Path
) -> None:
    deploy(host, begin, OLD)
    written = host.file("sales.json")
    begin("deploy", f"sales={NEW}=abc")
    lock = host.file("lock")
    reasons = {"booted": "the host has been booted since", "old": "it is older than 2 hours"}
    if why == "booted":
        (tmp_path / "boot").write_text("second\n")
    elif why == "old":
        lock |= {"at": lock["at"] - 2 * 3600 - 1, "host": "there"}
        (host.state / "lock").write_text(json.dumps(lock))
    elif why == "dead":
        lock["process"] = "9.1"
        (host.state / "lock").write_text(json.dumps(lock))
    else:
        (host.state / "lock").write_text("")
    begin()
    reason = reasons.get(why, "the play that took it is dead")
    assert [line["result"] for line in host.log()[1:]] == ([] if why == "empty" else [f"abandoned, {reason}"])
    assert why == "empty" or host.file("sales.json") == written


def test_a_location_that_is_new_to_the_host_is_not_deployed(host: Host, capsys: pytest.CaptureFixture) -> None:
    assert host.run("begin", "deploy", *ME, "--known", "core", "sales", "shop") == 1
    assert "The host does not have the code location shop yet: run playbooks/site.yml." in capsys.readouterr().err
    assert not (host.state / "lock").exists()
    assert host.run("begin", "deploy", *ME, "--known", "core", "sales") == 0


def test_code_for_another_dagster_is_not_deployed(host: Host, capsys: pytest.CaptureFixture) -> None:
    assert host.run("begin", "deploy", *ME, "--shared", "data-platform/dagster:newer") == 1
    assert "is built on the image data-platform/dagster:newer, which the host does not run" in capsys.readouterr().err
    assert host.run("begin", "deploy", *ME, "--shared", "data-platform/dagster:shared") == 0


def test_a_process_of_another_controller_is_not_called_dead(host: Host, begin: Callable[..., str]) -> None:
    begin()
    assert host.run("begin", "deploy", "--by", "you", "--host", "there", "--process", "1.1", "--alive", "1.1") == 1


def follow(host: Host) -> None:
    """Have the host serve the code that its unit names once it is told to."""
    run = host.program.run

    def serve(*command: str, **options: object) -> str:
        if command[0] == host.program.CONTAINER_UNIT:
            host.serves(host.program.image_in(host.unit()))
        return run(*command, **options)

    host.program.run = serve


def test_rollback_puts_back_what_was_served_before(
    host: Host, begin: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    deploy(host, begin, NEW)
    host.answer("container-unit", "replaced dagster-code-sales\n")
    capsys.readouterr()
    follow(host)
    assert host.run("rollback", *ME) == 0
    assert "after the rollback began: sales old." in capsys.readouterr().out
    assert (host.units / "dagster-code-sales.service").read_text() == UNIT.format(name="dagster-code-sales", image=OLD)
    assert host.calls("container-unit") == ["container-unit converge --only dagster-code-sales"]
    assert host.calls("docker image tag") == [
        f"docker image tag {NEW} data-platform/code-sales:previous",
        f"docker image tag {OLD} data-platform/code-sales:current",
    ]
    assert host.log()[-1]["code"]["sales"]["to"] == OLD
    assert host.run("begin", "deploy", "--check", *ME, "--code", f"sales={NEW}=abc") == 0
    assert "sales: old -> new, although it was rolled back from new at " in capsys.readouterr().out


def ship(host: Host, begin: Callable[..., str]) -> None:
    """Deploy code of the location sales with another module, whose runs are described otherwise."""
    token = begin("deploy", f"sales={NEW}=abc")
    host.add("dagster-code-sales", NEW, "newer")
    host.describes(sales="new", core="one")
    host.serves(NEW)
    assert host.run("finish", token) == 0


def test_rollback_puts_back_unit_and_runs_as_they_were_and_forward_again(host: Host, begin: Callable[..., str]) -> None:
    old = host.unit()
    ship(host, begin)
    new = host.unit()
    follow(host)
    for unit, described in ((old, "old"), (new, "new"), (old, "old")):
        host.describes(**host.described() | {"core": "changed since"})
        assert host.run("rollback", *ME) == 0
        assert host.unit() == unit
        assert host.described() == {"sales": described, "core": "changed since"}
    assert host.runs.stat().st_mode & 0o777 == 0o644
    assert sorted(host.program.records()) == ["sales"]


def test_rollback_that_fails_puts_unit_and_runs_back(host: Host, begin: Callable[..., str]) -> None:
    ship(host, begin)
    new = host.unit()
    host.answer("container-unit", code=1, err="dagster-code-sales could not be replaced")
    assert host.run("rollback", *ME) == 1
    assert (host.unit(), host.described()) == (new, {"sales": "new", "core": "one"})


@pytest.mark.parametrize("kept", ["", json.dumps({"units": {"dagster-code-sales.service": UNIT}, "runs": {}})])
def test_rollback_without_the_unit_of_then_replaces_the_image(kept: str, host: Host, begin: Callable[..., str]) -> None:
    ship(host, begin)
    (host.state / "before").write_text(kept)
    follow(host)
    assert host.run("rollback", *ME) == 0
    assert host.unit() == UNIT.format(name="dagster-code-sales", image=OLD).replace("serve", "newer")
    assert host.described() == {"sales": "new", "core": "one"}


def test_what_described_the_code_before_is_kept_until_code_changes_again(host: Host, begin: Callable[..., str]) -> None:
    ship(host, begin)
    assert [*host.file("before")["units"]] == ["dagster-code-sales.service"]
    assert host.file("before")["runs"] == {"sales": {"env": "old"}}
    before = host.file("before")
    assert host.run("finish", begin("deploy")) == 0
    assert host.file("before") == before


@pytest.mark.parametrize("killed", [True, False])
def test_what_failed_leaves_runs_described_as_they_were(killed: bool, host: Host, begin: Callable[..., str]) -> None:
    token = begin("deploy", f"sales={NEW}=abc")
    host.add("dagster-code-sales", NEW)
    host.describes(sales="new", core="new", shop="new")
    if killed:
        (host.state / "lock").write_text(json.dumps(host.file("lock") | {"boot": "another"}))
        begin()
    else:
        assert host.run("finish", "--failed", token) == 0
    assert OLD in host.unit()
    assert host.described() == {"sales": "old", "core": "one", "shop": "new"}


def test_what_serves_although_the_rest_failed_keeps_its_description(host: Host, begin: Callable[..., str]) -> None:
    token = begin("deploy", f"sales={NEW}=abc")
    host.add("dagster-code-sales", NEW)
    host.describes(sales="new", core="new")
    host.serves(NEW)
    assert host.run("finish", "--failed", token) == 0
    assert NEW in host.unit()
    assert host.described() == {"sales": "new", "core": "one"}


@pytest.mark.parametrize("served", [True, False])
def test_unit_with_the_same_image_is_put_back_if_the_container_is_not_made_of_it(
    served: bool, host: Host, begin: Callable[..., str]
) -> None:
    token = begin("deploy")
    host.add("dagster-code-sales", OLD, "newer")
    host.describes(sales="new", core="one")
    host.answer("container-unit converge --check", "" if served else "replaced dagster-code-sales\n")
    assert host.run("finish", "--failed", token) == 0
    assert ("newer" in host.unit()) == served
    assert host.described()["sales"] == ("new" if served else "old")


def test_success_leaves_runs_as_they_are_described(host: Host, begin: Callable[..., str]) -> None:
    token = begin("site")
    host.describes(sales="new", core="new")
    assert host.run("finish", token) == 0
    assert host.described() == {"sales": "new", "core": "new"}


def test_where_runs_have_no_containers_nothing_describes_them(host: Host, begin: Callable[..., str]) -> None:
    host.runs.unlink()
    ship_without = begin("deploy", f"sales={NEW}=abc")
    host.add("dagster-code-sales", NEW)
    host.serves(NEW)
    assert host.run("finish", ship_without) == 0
    follow(host)
    assert host.run("rollback", *ME) == 0
    assert OLD in host.unit()
    assert not host.runs.exists()


@pytest.mark.parametrize("freed", [True, False])
def test_change_that_is_finished_by_a_second_play_after_the_first_died_with_all_down(
    freed: bool, host: Host, begin: Callable[..., str]
) -> None:
    deploy(host, begin, OLD)
    old = host.unit()
    token = begin("upgrade", f"sales={NEW}=abc")
    host.add("dagster-code-sales", NEW, "newer")
    host.describes(sales="new", core="one")
    host.answer("docker container ls", "")
    if freed:
        assert host.run("finish", "--failed", token) == 0
    else:
        (host.state / "lock").write_text(json.dumps(host.file("lock") | {"process": "9.1"}))
    for _ in range(2):
        token = begin("upgrade", f"sales={NEW}=abc")
        (host.state / "lock").write_text(json.dumps(host.file("lock") | {"process": "9.1"}))
    host.serves(NEW)
    assert host.run("finish", token) == 0
    assert host.log()[-1]["code"] == {"sales": {"from": OLD, "to": NEW, "revision": "abc"}}
    follow(host)
    assert host.run("rollback", *ME) == 0
    assert OLD in host.unit()
    assert host.log()[-1]["code"]["sales"]["to"] == OLD
    if not freed:
        assert (host.unit(), host.described()["sales"]) == (old, "old")


def test_rollback_of_what_no_service_runs_any_more_says_what_helps(
    host: Host, begin: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    deploy(host, begin, NEW)
    host.add("dagster-code-sales", "data-platform/code-sales:third")
    host.serves("data-platform/code-sales:third")
    assert host.run("rollback", *ME) == 1
    said = capsys.readouterr().err
    assert f"brought {NEW}, which no service runs any more: deploy the tree that you want." in said


@pytest.mark.parametrize(
    ("inspected", "sentence"),
    [
        ((1, "", "No such image"), f"The code before this one, {OLD}, is not on this host any more"),
        ((0, "\n", ""), f"The code before this one, {OLD}, is not on this host any more"),
        ((0, "data-platform/dagster:other\n", ""), "was built for another Dagster image than the one that runs"),
    ],
)
def test_rollback_to_what_cannot_be_served_changes_nothing(
    inspected: tuple[int, str, str],
    sentence: str,
    host: Host,
    begin: Callable[..., str],
    capsys: pytest.CaptureFixture,
) -> None:
    deploy(host, begin, NEW)
    host.answer("docker image inspect", inspected[1], inspected[0], inspected[2])
    assert host.run("rollback", *ME) == 1
    assert sentence in capsys.readouterr().err
    assert NEW in (host.units / "dagster-code-sales.service").read_text()
    assert not (host.state / "lock").exists()
    assert host.log()[-1]["result"] == "failed"


def test_rollback_goes_back_from_what_a_dead_play_had_served(
    host: Host, begin: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    begin("deploy", f"sales={NEW}=abc")
    host.add("dagster-code-sales", NEW)
    host.serves(NEW)
    (tmp_path / "boot").write_text("second\n")
    assert host.run("finish", begin("deploy", f"sales={NEW}=abc")) == 0
    follow(host)
    assert host.run("rollback", *ME) == 0
    assert OLD in (host.units / "dagster-code-sales.service").read_text()


def test_what_did_not_come_to_be_served_leaves_neither_unit_nor_record(host: Host, begin: Callable[..., str]) -> None:
    token = begin("deploy", f"sales={NEW}=abc")
    host.add("dagster-code-sales", NEW)
    assert host.run("finish", "--failed", token) == 0
    assert OLD in (host.units / "dagster-code-sales.service").read_text()
    assert not (host.state / "sales.json").exists()
    assert host.calls("systemctl") == ["systemctl daemon-reload"]
    assert host.calls("container-unit forget") == ["container-unit forget dagster-code-sales"]


def test_code_that_was_down_when_the_lock_was_taken_is_known_from_its_unit(
    host: Host, begin: Callable[..., str]
) -> None:
    host.answer("docker container ls", "")
    token = begin()
    host.serves(NEW)
    assert host.run("finish", token) == 0
    assert host.log()[-1]["code"]["sales"]["from"] == OLD


def test_a_play_that_its_controller_knows_to_live_keeps_the_lock(host: Host, begin: Callable[..., str]) -> None:
    begin()
    lock = host.file("lock")
    for change, code in (({"at": 0.0}, 1), ({"at": 0.0, "process": "-"}, 0)):
        (host.state / "lock").write_text(json.dumps(lock | change))
        assert host.run("begin", "deploy", *ME) == code


def test_looking_is_refused_as_beginning_is(host: Host, capsys: pytest.CaptureFixture) -> None:
    assert host.run("begin", "deploy", "--check", *ME, "--shared", "data-platform/dagster:newer") == 1
    assert "which the host does not run" in capsys.readouterr().err


def test_rollback_without_a_version_before_says_so(host: Host, capsys: pytest.CaptureFixture) -> None:
    assert host.run("rollback", *ME) == 1
    assert "There is no code to go back to: none was replaced on this host yet." in capsys.readouterr().err


def test_rollback_whose_code_does_not_start_leaves_the_units_as_they_were(
    host: Host, begin: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    deploy(host, begin, NEW)
    host.answer("container-unit", code=1, err="dagster-code-sales could not be replaced")
    assert host.run("rollback", *ME) == 1
    assert "dagster-code-sales could not be replaced" in capsys.readouterr().err
    assert NEW in (host.units / "dagster-code-sales.service").read_text()
    assert host.file("sales.json")["image"] == NEW
    assert "rolled back" not in host.file("sales.json")


def test_status_says_what_runs(host: Host, begin: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    for image in (NEW, OLD) * 6:
        deploy(host, begin, image)
    host.answer("docker image ls", f"{OLD}\t3 days ago\n")
    host.answer("systemctl is-active", "active\n")
    capsys.readouterr()
    assert host.run("status") == 0
    said = capsys.readouterr().out.splitlines()
    assert f"  dagster-code-sales: active, {OLD}, built 3 days ago" in said
    for name in ("daemon", "webserver"):
        assert any(line.startswith(f"  dagster-{name}: active, data-platform/dagster:shared, ") for line in said)
    assert f"  dagster-code: active, {OTHER}, built at a time unknown: the image is gone" in said
    assert any(line.startswith("  sales: old at abc, deployed ") and line.endswith(" by me@here") for line in said)
    assert sum(" deploy by me@here: ok, " in line for line in said) == 10
