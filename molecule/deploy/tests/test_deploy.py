"""Code is shipped and taken back while people ask, schedules tick and runs run: nothing is lost, all is on record."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import ROOT, Platform

DEPLOY, ROLLBACK, STATUS = (f"playbooks/{name}.yml" for name in ("deploy", "rollback", "status"))
STATE = "/var/lib/data-platform/deployments"
DEPLOYMENT = "/usr/local/lib/data-platform/deployment"
POLLER = Path(__file__).with_name("poller.py")
OTHERS = ["dagster-postgres", "dagster-daemon", "dagster-webserver", "dagster-code"]

KILLS = [
    *(
        pytest.param(task, 0.0, lost, marks=pytest.mark.slow, id=f"{task}, {lost}")
        for task in (
            "deployments : Take the lock, and write down the code that is to be served",
            "images : Build the last",
            "images : Remove the directory that images are built in",
            "code_location : Bring their secrets",
            "service : Describe the unit",
            "runs : Describe the containers of runs",
            "service : Remove services that are no longer described",
            "retention : Remove old images",
            "deployments : Wait until the UI shows it",
        )
        for lost in (True, False)
    ),
    pytest.param("images : Build the last", 0.5, True, id="in the build"),
    pytest.param("service : Remove services that are no longer described", 2.0, True, id="in the switch"),
]
"""Name of the task, seconds into it, and whether what it runs on the host is killed as well."""
ON_THE_HOST = "^/usr/bin/python3 *$|container-unit (converge|rehearse)|data-platform/deployment [a-z]|docker build"

RUN = "query($run: ID!) { runOrError(runId: $run) { ... on Run { status tags { key value } } } }"
LOCATIONS = "{ workspaceOrError { ... on Workspace { locationEntries { name displayMetadata { key value } } } } }"
JOBS = """
{ repositoryOrError(repositorySelector: {repositoryName: "__repository__", repositoryLocationName: "core"}) {
    ... on Repository { jobs { name } } } }
"""


SLOW = """
@dg.sensor(job=patient)
def slow(context):
    time.sleep(50)
    return dg.SkipReason(VERSION)
defs = dg.Definitions(jobs=[patient, lasting], schedules=[each_minute], sensors=[says, slow])
"""
DRY_RUN = """
mutation { sensorDryRun(selectorData: {
    repositoryLocationName: "workload", repositoryName: "__repository__", sensorName: "slow"}, cursor: null) {
    ... on DryRunInstigationTick { evaluationResult { skipReason error { message } } } } }
"""
UNTIL = f"""
import json, sys, time, urllib.request
body = json.dumps({{"query": {JOBS!r}}}).encode()
headers = {{"Content-Type": "application/json"}}
request = urllib.request.Request(f"http://127.0.0.1:{{sys.argv[1]}}/graphql", body, headers)
while f'"name":"{{sys.argv[2]}}"' not in urllib.request.urlopen(request).read().decode().replace(" ", ""):
    time.sleep(0.1)
print(time.time())
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


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, play: Callable[..., int]) -> Iterator[Tree]:
    """A tree of pipelines; that of the project is shipped again in the end."""
    tree = Tree(tmp_path_factory.mktemp("tree"), play)
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
    with pytest.raises(AssertionError, match=r"There is no code to go back to: none was\s+replaced"):
        play(playbook=ROLLBACK)
    assert (running(host), running(host, "core")) == before


def test_code_is_shipped_and_taken_back_while_all_goes_on(
    host: Any, platform: Platform, play: Callable[..., int], poller: Poller, tree: Tree, ids: Callable[[], Any]
) -> None:
    before, since = ids(), time.time()
    long = patient(platform, 60)
    queue = [patient(platform, 12) for _ in range(10)]
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

    assert {ran(platform, run, 300) for run in [long, *queue]} == {("SUCCESS", "1")}
    assert [ran(platform, run) for run in (second, third, fifth, back)] == [
        ("SUCCESS", version) for version in ("2", "3", "5", "3")
    ]
    assert poller.failures() == []
    assert poller.versions() == ["1", "2", "3", "5", "3"]
    asked = Counter(answer.question for answer in poller.answers())
    assert min(asked.values()) > 100, asked
    assert ids() == before
    assert host.check_output("systemctl is-active dagster-code-workload") == "active"
    seconds, minutes = time.time() - since, platform.ticked(since)
    assert minutes == list(range(minutes[0], minutes[0] + len(minutes)))
    assert len(minutes) >= (seconds - 10) // 60 > 0
    assert platform.postgres("select tick_body from job_ticks where type = 'SCHEDULE' and status = 'FAILURE'") == []
    assert platform.postgres("select run_id from runs where status in ('FAILURE', 'CANCELED')") == []


def test_what_the_code_before_was_asked_it_answers(platform: Platform, tree: Tree) -> None:
    tree.ship("asked", SLOW)
    with ThreadPoolExecutor() as beside:
        answer = beside.submit(platform.graphql, DRY_RUN)
        time.sleep(2)
        tree.ship("next")
        assert not answer.done()
        assert ran(platform, patient(platform, 0)) == ("SUCCESS", "next")
        evaluated = answer.result()["sensorDryRun"]["evaluationResult"]
    assert (evaluated["skipReason"], evaluated["error"]) == ("asked", None)


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
    said = " ".join(capsys.readouterr().out.split())
    assert f"dagster-code: active, data-platform/code-core:{running(host, 'core')}, built " in said
    assert re.search(rf"workload: {running(host)}.*, deployed .* by \S+@\S+", said)
    assert re.search(r"rollback by \S+@\S+: ok, [\d.]+ s workload \w{12} -> \w{12}", said)
    assert re.search(r"deploy by \S+@\S+: failed, [\d.]+ s", said)


def test_code_that_is_served_already_is_not_shipped_again(
    host: Any, play: Callable[..., int], capsys: pytest.CaptureFixture, log: Callable[[], list[Any]]
) -> None:
    play(playbook=DEPLOY)
    services = " ".join([*OTHERS, "dagster-code-workload"])
    state = f"docker inspect --format '{{{{.Id}}}}' {services}; ls -l --time-style=full-iso /etc/systemd/system {STATE}"
    before = host.check_output(f"{state} | grep -v log.jsonl")
    capsys.readouterr()
    assert play(playbook=DEPLOY) == 0
    assert "All code that the host is to serve was served already." in capsys.readouterr().out
    assert host.check_output(f"{state} | grep -v log.jsonl") == before
    assert (log()[-1]["what"], log()[-1]["code"]) == ("deploy", {})


def test_a_deploy_after_a_rollback_says_that_it_ships_the_tree_again(
    tree: Tree, play: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    tree.ship("6")
    play(playbook=ROLLBACK)
    capsys.readouterr()
    for arguments in (["--check"], []):
        play(f"--extra-vars=workload_source={tree.directory}", *arguments, playbook="playbooks/site.yml")
        said = " ".join(capsys.readouterr().out.split())
        assert re.search(r"workload: \w{12} -> \w{12}, although it was rolled back from \w{12} at", said), said


def test_what_is_switched_on_and_not_in_the_code_any_more_is_named(tree: Tree, capsys: pytest.CaptureFixture) -> None:
    tree.ship("7", "defs = dg.Definitions(jobs=[patient], sensors=[says])")
    said = " ".join(capsys.readouterr().out.split())
    assert "each_minute is switched on, and the new code of workload does not have it any more" in said


def test_previous_code_that_is_not_on_the_host_any_more_is_said(
    host: Any, tree: Tree, play: Callable[..., int]
) -> None:
    old = f"data-platform/code-workload:{running(host)}"
    tree.ship("8")
    new = running(host)
    host.check_output("docker image rm --force %s data-platform/code-workload:previous", old)
    with pytest.raises(AssertionError, match=rf"The code before this one,\s+{old},\s+is\s+not\s+on\s+this\s+host"):
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
    host.check_output(f"{DEPLOYMENT} begin upgrade --by somebody@elsewhere --host elsewhere --process 1")
    before = running(host)
    refused = r"(?s)A change of this platform .upgrade. is in progress\s+since.*UTC,\s+by\s+somebody@elsewhere"
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


def core_at(code: Path) -> str:
    """Copy the project's code, and give the variables that make it the location core."""
    shutil.copytree(ROOT / "code/data-platform", code, ignore=shutil.ignore_patterns("target", "__pycache__"))
    (core,) = yaml.safe_load((ROOT / "roles/dagster/defaults/main.yml").read_text())["dagster_code_locations"]
    workload = {"name": "workload", "source": "molecule/deploy/workload", "module": "workload"}
    return json.dumps({"dagster_code_locations": [core | {"source": str(code)}, workload]})


def test_what_dbt_says_of_a_broken_model_is_shown_and_nothing_is_changed(
    host: Any, play: Callable[..., int], tmp_path: Path
) -> None:
    play(playbook=DEPLOY)
    before = host.check_output("sha256sum /etc/systemd/system/dagster-*"), running(host, "core")
    edited = core_at(tmp_path / "code")
    (tmp_path / "code/core/processing/dbt/models/marts/broken.sql").write_text("select * from {{ ref('nowhere') }}\n")
    with pytest.raises(
        AssertionError,
        match="(?s)code-core:.* cannot be built: .*depends on a node named 'nowhere' which was not\\s+found",
    ):
        play("--extra-vars", edited, playbook=DEPLOY)
    assert (host.check_output("sha256sum /etc/systemd/system/dagster-*"), running(host, "core")) == before


def test_new_variables_reach_runs_and_go_back_and_a_command_goes_on(
    host: Any, platform: Platform, play: Callable[..., int], tree: Tree, tmp_path: Path
) -> None:
    def described() -> str:
        return host.check_output("sha256sum /etc/systemd/system/dagster-code* /etc/data-platform/runs/runs.json")

    def lasting() -> str:
        return "".join(
            platform.postgres("select run_id from runs where pipeline_name = 'lasting' and status = 'STARTED'")
        )

    tree.ship("old")
    before, edited = described(), json.loads(core_at(tmp_path / "code"))
    core, workload = edited["dagster_code_locations"]
    core |= {"env": {"NEEDED": "a variable"}, "secrets": {"FIRST": "a secret"}}
    workload["source"] = str(tree.directory)
    with open(tmp_path / "code/core/orchestration/dagster/data_platform/definitions.py", "a") as code:
        code.write('\nimport os\n\nassert os.environ["NEEDED"] + os.environ["FIRST"] == "a variablea secret"\n')
    tree.edit("new")
    with ThreadPoolExecutor() as beside:
        command = beside.submit(host.run, "data-platform-dagster job execute --location workload --job lasting")
        platform.wait(lambda: str(bool(lasting())), {"True"}, 30)
        run = lasting()
        play("--extra-vars", json.dumps(edited), playbook=DEPLOY)
        assert described() != before
        assert platform.finished(platform.launch("smoke")) == "SUCCESS"
        alone = {"dagster_code_locations": [workload | {"secrets": {"SECOND": "another secret"}}]}
        play("--extra-vars", json.dumps(alone), playbook=DEPLOY)
        assert platform.finished(platform.launch("smoke")) == "SUCCESS", "its secret is there, its code goes on serving"
        play(playbook=ROLLBACK)
        assert described() == before
        assert platform.finished(platform.launch("smoke")) == "SUCCESS"
        done = command.result()
    assert done.rc == 0, done.stderr
    assert ran(platform, run) == ("SUCCESS", "old")
    failures = f"select 1 from event_logs where run_id = '{run}' and dagster_event_type = 'PIPELINE_FAILURE'"
    assert platform.postgres(failures) == []


def test_an_edit_is_live_and_taken_back_within_seconds(
    host: Any, platform: Platform, play: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    code = tmp_path / "code"
    edited = core_at(code)
    definitions = code / "core/orchestration/dagster/data_platform/jobs.py"
    original = definitions.read_text()

    def seconds_until(job: str, playbook: str, *arguments: str) -> float:
        """Give the seconds from a play's start until the UI has a job; both have the same clock."""
        with ThreadPoolExecutor() as beside:
            started = time.time()
            seen = beside.submit(host.check_output, "timeout 60 python3 -c %s %s %s", UNTIL, str(platform.port), job)
            play(*arguments, playbook=playbook)
            return float(seen.result()) - started

    live, back = [], []
    for attempt in range(3):
        job = f"edited_{attempt}"
        definitions.write_text(f"{original.replace('def smoke()', f'def {job}()')}\nsmoke = {job}\n")
        play(playbook=DEPLOY)
        capsys.readouterr()
        live.append(seconds_until(job, DEPLOY, "--extra-vars", edited))
        told = capsys.readouterr().out
        back.append(seconds_until("smoke", ROLLBACK))
    print(told[told.rindex("TASKS RECAP") :])
    print(f"Seconds from make deploy to the new definitions in GraphQL: {live}; from make rollback to the old: {back}.")
    assert median(live) <= 12
    assert median(back) <= 6


@pytest.mark.parametrize(("task", "seconds", "lost"), KILLS)
def test_a_deploy_that_is_killed_leaves_a_working_platform_and_the_next_one_succeeds(
    host: Any,
    platform: Platform,
    poller: Poller,
    tree: Tree,
    kill: Callable[..., None],
    ids: Callable[[], Any],
    task: str,
    seconds: float,
    lost: bool,
) -> None:
    before = ids()
    tree.edit(f"{task} {time.monotonic_ns()}")
    arguments = {"playbook": DEPLOY, "on_the_host": ON_THE_HOST}
    kill(task, seconds, lost, f"--extra-vars=workload_source={tree.directory}", **arguments)
    assert ran(platform, patient(platform, 0))[0] == "SUCCESS"
    tree.ship("killed")
    assert ran(platform, patient(platform, 0)) == ("SUCCESS", "killed")
    assert ids() == before
    assert poller.failures() == []
