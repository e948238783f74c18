"""Code is shipped and taken back while people ask, schedules tick and runs run: nothing is lost, all is on record."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, Platform

DEPLOY, ROLLBACK, STATUS = (f"playbooks/{name}.yml" for name in ("deploy", "rollback", "status"))
STATE = "/var/lib/data-platform/deployments"
DEPLOYMENT = "/usr/local/lib/data-platform/deployment"
POLLER = Path(__file__).with_name("poller.py")
OTHERS = ["dagster-postgres", "dagster-daemon", "dagster-webserver", "dagster-code"]

RUN = "query($run: ID!) { runOrError(runId: $run) { ... on Run { status tags { key value } } } }"
LOCATIONS = "{ workspaceOrError { ... on Workspace { locationEntries { name displayMetadata { key value } } } } }"
JOBS = """
{ repositoryOrError(repositorySelector: {repositoryName: "__repository__", repositoryLocationName: "core"}) {
    ... on Repository { jobs { name } } } }
"""


class Answer(NamedTuple):
    """What the poller was answered."""

    at: float
    question: str
    well: bool
    said: str


class Poller:
    """Asks all the while."""

    def __init__(self, host: Any, port: int) -> None:
        """Start to ask."""
        self.host, self.file = host, f"/tmp/answers-{time.monotonic_ns()}"
        content = POLLER.read_text()
        host.check_output("python3 -c %s", f"open('/tmp/poller.py', 'w').write({content!r})")
        self.pid = host.check_output(
            "sh -c %s", f"setsid python3 /tmp/poller.py {port} {self.file} > /dev/null 2>&1 & echo $!"
        )

    def answers(self) -> list[Answer]:
        """Give what was answered so far."""
        return [Answer(*json.loads(line)) for line in self.host.check_output("cat %s", self.file).splitlines()]

    def failures(self) -> list[Answer]:
        """Give the answers that were none."""
        return [answer for answer in self.answers() if not answer.well]

    def versions(self) -> list[str]:
        """Give the versions that the code server said it has, each time that it was another one."""
        said = [answer.said for answer in self.answers() if answer.question == "dry run"]
        return [version for version, _ in groupby(said)]

    def stop(self) -> None:
        """Ask no more."""
        self.host.run("kill %s", self.pid)


@pytest.fixture
def poller(host: Any, platform: Platform) -> Iterator[Poller]:
    """A poller for the time of a test."""
    poller = Poller(host, platform.port)
    yield poller
    poller.stop()


class Tree:
    """A tree of pipelines that is edited and shipped."""

    def __init__(self, directory: Path, play: Callable[..., int]) -> None:
        """Have the workload's code in ``directory``."""
        self.directory, self.play = directory / "workload", play
        shutil.copytree(ROOT / "molecule/deploy/workload", self.directory)

    def edit(self, version: str, more: str = "") -> None:
        """Change the code."""
        text = (ROOT / "molecule/deploy/workload/workload.py").read_text()
        text = text.replace('VERSION = "1"', f'VERSION = "{version}"')
        (self.directory / "workload.py").write_text(f"{text}\n{more}\n")

    def ship(self, version: str = "", more: str = "", playbook: str = DEPLOY) -> float:
        """Change the code and ship it; give the seconds that took."""
        if version:
            self.edit(version, more)
        started = time.monotonic()
        self.play(f"--extra-vars=workload_source={self.directory}", playbook=playbook)
        return time.monotonic() - started


@pytest.fixture
def tree(tmp_path: Path, play: Callable[..., int]) -> Iterator[Tree]:
    """A tree of pipelines; that of the project is shipped again in the end."""
    tree = Tree(tmp_path, play)
    yield tree
    play(playbook=DEPLOY)


@pytest.fixture
def ids(host: Any) -> Callable[[], dict[str, str]]:
    """Give the containers of the services that no deployment may touch."""
    return lambda: {name: host.check_output("docker inspect --format '{{.Id}}' %s", name) for name in OTHERS}


@pytest.fixture
def log(host: Any) -> Callable[[], list[dict[str, Any]]]:
    """Give the log of the host."""
    return lambda: [json.loads(line) for line in host.check_output(f"cat {STATE}/log.jsonl").splitlines()]


def ran(platform: Platform, run: str, seconds: int = 180) -> tuple[str, str]:
    """Give how a run ended, and the version of the code that it ran."""
    platform.finished(run, seconds)
    shown = platform.graphql(RUN, run=run)["runOrError"]
    return shown["status"], {tag["key"]: tag["value"] for tag in shown["tags"]}.get("version", "")


def patient(platform: Platform, seconds: float) -> str:
    """Launch a run that takes so long; give its ID."""
    return platform.launch("patient", location="workload", config={"wait": {"seconds": seconds}})


def running(host: Any, location: str = "workload") -> str:
    """Give the version of a location's code that is served."""
    unit = "dagster-code" if location == "core" else f"dagster-code-{location}"
    return host.check_output("docker inspect --format '{{.Config.Image}}' %s", unit).rpartition(":")[2]


def test_first_installation_has_nothing_to_go_back_to(host: Any, play: Callable[..., int]) -> None:
    before = running(host), running(host, "core")
    with pytest.raises(AssertionError, match="There is no code to go back to: none was replaced on this host yet"):
        play(playbook=ROLLBACK)
    assert (running(host), running(host, "core")) == before


def test_code_is_shipped_and_taken_back_while_all_goes_on(
    host: Any, platform: Platform, play: Callable[..., int], poller: Poller, tree: Tree, ids: Callable[[], Any]
) -> None:
    before = ids()
    long = patient(platform, 60)
    queue = [patient(platform, 3) for _ in range(10)]
    shipped = {"2": tree.ship("2")}
    second = patient(platform, 1)
    shipped["3"] = tree.ship("3", "time.sleep(10)")
    third = patient(platform, 1)
    with pytest.raises(AssertionError, match="(?s)ZeroDivisionError: division by zero.*The deploy failed after"):
        tree.ship("4", "1 / 0")
    tree.ship("5")
    fifth = patient(platform, 1)
    started = time.monotonic()
    play(playbook=ROLLBACK)
    shipped["back"] = time.monotonic() - started
    back = patient(platform, 1)
    print({name: round(seconds, 1) for name, seconds in shipped.items()})

    assert {ran(platform, run) for run in [long, *queue]} == {("SUCCESS", "1")}
    assert [ran(platform, run) for run in (second, third, fifth, back)] == [
        ("SUCCESS", version) for version in ("2", "3", "5", "3")
    ]
    assert poller.failures() == []
    assert poller.versions() == ["1", "2", "3", "5", "3"]
    asked = Counter(answer.question for answer in poller.answers())
    assert min(asked.values()) > 100, asked
    assert ids() == before
    assert host.check_output("systemctl is-active dagster-code-workload") == "active"


def test_no_tick_of_a_schedule_was_lost_or_came_twice(platform: Platform) -> None:
    ticked = platform.postgres(
        "select extract(epoch from value::timestamptz)::int / 60 from run_tags "
        "where key = '.dagster/scheduled_execution_time' order by 1"
    )
    assert len(ticked) > 2
    assert [int(minute) - int(ticked[0]) for minute in ticked] == list(range(len(ticked)))
    failed = platform.postgres("select status, tick_body from job_ticks where type = 'SCHEDULE' and status = 'FAILURE'")
    assert failed == []


def test_what_was_replaced_ends_once_it_is_asked_no_more(host: Any, platform: Platform) -> None:
    def beside() -> str:
        names = host.check_output("docker container ls --all --format '{{.Names}}'").splitlines()
        return "there" if [name for name in names if re.match(r"dagster-code[\w-]*\.", name)] else "gone"

    assert platform.wait(beside, {"gone"}, 120) == "gone"
    sockets = host.check_output("ls /run/data-platform-code/workload").split()
    assert len(sockets) == 2, sockets


def test_ui_and_status_say_what_runs_since_when(
    host: Any, platform: Platform, play: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    entries = platform.graphql(LOCATIONS)["workspaceOrError"]["locationEntries"]
    shown = {entry["name"]: {pair["key"]: pair["value"] for pair in entry["displayMetadata"]} for entry in entries}
    for name, metadata in shown.items():
        assert metadata["code version"] == running(host, name)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", metadata["deployed"])
    assert re.fullmatch(r"[0-9a-f]{10}(\+changes)?", shown["core"]["revision"])
    capsys.readouterr()
    assert play(playbook=STATUS) == 0
    said = capsys.readouterr().out
    assert f"dagster-code: active, data-platform/code-core:{running(host, 'core')}, built " in said
    assert re.search(rf"workload: {running(host)}.*, deployed .* by \S+@\S+", said)
    assert re.search(r"rollback by \S+@\S+: ok, [\d.]+ s workload \w{12} -> \w{12}", said)
    assert re.search(r"deploy by \S+@\S+: failed, [\d.]+ s", said)


def test_code_that_is_served_already_is_not_shipped_again(
    host: Any, play: Callable[..., int], capsys: pytest.CaptureFixture, log: Callable[[], list[Any]]
) -> None:
    play(playbook=DEPLOY)
    state = "docker ps --no-trunc --quiet | sort; ls -l --time-style=full-iso /etc/systemd/system " + STATE
    before, lines = host.check_output("sh -c %s", f"{state} | grep -v .guard"), log()
    capsys.readouterr()
    assert play(playbook=DEPLOY) == 0
    assert "All code that the host is to serve was served already." in capsys.readouterr().out
    assert host.check_output("sh -c %s", f"{state} | grep -v .guard") == before
    assert log() == lines


def test_a_deploy_after_a_rollback_says_that_it_ships_the_tree_again(
    tree: Tree, play: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    tree.ship("6")
    play(playbook=ROLLBACK)
    capsys.readouterr()
    for arguments in (["--check"], []):
        play(f"--extra-vars=workload_source={tree.directory}", *arguments, playbook="playbooks/site.yml")
        assert re.search(
            r"workload: \w{12} -> \w{12}, although it was rolled\s+back\s+from \w{12} at", capsys.readouterr().out
        )


def test_what_is_switched_on_and_not_in_the_code_any_more_is_named(tree: Tree, capsys: pytest.CaptureFixture) -> None:
    tree.ship("7", "defs = dg.Definitions(jobs=[patient], sensors=[says])")
    assert re.search(
        r"each_minute is switched on, and the new code of workload does not have it\s+any more", capsys.readouterr().out
    )


def test_previous_code_that_is_not_on_the_host_any_more_is_said(
    host: Any, tree: Tree, play: Callable[..., int]
) -> None:
    old = f"data-platform/code-workload:{running(host)}"
    tree.ship("8")
    new = running(host)
    host.check_output("docker image rm %s data-platform/code-workload:previous", old)
    with pytest.raises(AssertionError, match=f"The code before this one, {old}, is not on this host any more"):
        play(playbook=ROLLBACK)
    assert running(host) == new


def test_image_that_was_removed_by_hand_is_built_again(host: Any, platform: Platform, tree: Tree) -> None:
    tree.ship("9")
    image = f"data-platform/code-workload:{running(host)}"
    host.check_output("docker image rm --force %s data-platform/code-workload:current", image)
    tree.ship()
    assert host.run("docker image inspect %s", image).rc == 0
    assert ran(platform, patient(platform, 0)) == ("SUCCESS", "9")


def test_one_at_a_time_and_a_dead_play_is_told_from_one_that_lives(
    host: Any, tree: Tree, play: Callable[..., int], log: Callable[[], list[dict[str, Any]]]
) -> None:
    host.check_output(f"{DEPLOYMENT} begin upgrade --by somebody@elsewhere --host elsewhere --process 1.1 --alive 1.1")
    before = running(host)
    refused = "(?s)A change of this platform .upgrade. is in progress since .* UTC, by somebody@elsewhere.*changed=0"
    for playbook in (DEPLOY, ROLLBACK):
        with pytest.raises(AssertionError, match=refused):
            tree.ship("10", playbook=playbook)
    assert running(host) == before
    lock = json.loads(host.check_output(f"cat {STATE}/lock"))
    lock["boot"] = "another"
    host.check_output("python3 -c %s", f"open('{STATE}/lock', 'w').write({json.dumps(lock)!r})")
    tree.ship("10")
    assert running(host) != before
    assert log()[-2]["result"] == "abandoned, the host has been booted since"
    assert (log()[-1]["what"], log()[-1]["result"]) == ("deploy", "ok")
