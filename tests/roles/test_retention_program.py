"""The program that removes old images, with a stand-in for the engine; Molecule has the real one."""

from collections.abc import Callable
from types import ModuleType

import pytest
from conftest import ROOT, module_at

PROGRAM = ROOT / "roles/retention/files/retention.py"
RUNS = "/usr/local/lib/data-platform/unfinished-runs"
CODE = "data-platform/code"
BASE = "data-platform/base"


class Engine:
    """An engine with images, containers and a database of runs, that answers what the program asks it."""

    def __init__(self, program: ModuleType) -> None:
        """Make an engine with a base and three images of code, each older than the next."""
        self.program = program
        self.images = {f"{BASE}:b1": "sha256:b1"} | {f"{CODE}:c{number}": f"sha256:c{number}" for number in (1, 2, 3)}
        self.containers: list[str] = []
        self.ended: list[str] = []
        self.runs: list[str] | None = []
        self.calls: list[str] = []

    def __call__(self, *command: str) -> str:
        """Do what one command line of docker's says."""
        self.calls.append(" ".join(command))
        if command == (RUNS,):
            if self.runs is None:
                raise self.program.Failure(f"'{RUNS}' failed: connection refused")
            return "".join(f"{number} QUEUED {name} {name}\n" for number, name in enumerate(self.runs))
        match command[1:]:
            case ("image", "ls", *_):
                return "".join(f"{reference} {image}\n" for reference, image in self.images.items())
            case ("container", "ls", *_):
                others = [f"c{number} {name} exited \n" for number, name in enumerate(self.containers)]
                return "".join(others + [f"r{number} {name} exited run\n" for number, name in enumerate(self.ended)])
            case ("container", "rm", "--volumes", *ids):
                self.ended = [name for number, name in enumerate(self.ended) if f"r{number}" not in ids]
            case ("image", "tag", image, reference):
                self.images[reference] = self.images.get(image, image)
            case ("image", "rm", *references):
                for reference in references:
                    del self.images[reference]
            case ("image", "prune", *_) | ("builder", "prune", *_):
                pass
            case _:
                pytest.fail(f"unknown command: {command}")
        return ""

    def changes(self) -> list[str]:
        """Give the calls that change something."""
        return [call for call in self.calls if " ls " not in call and call != RUNS]

    def of(self, repository: str) -> dict[str, str]:
        """Give the IDs of a repository's images by tag, without the digest's name."""
        return {
            reference.rpartition(":")[2]: image.removeprefix("sha256:")
            for reference, image in self.images.items()
            if reference.startswith(f"{repository}:")
        }


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine that the program talks to."""
    program = module_at(PROGRAM)
    engine = Engine(program)
    monkeypatch.setattr(program, "run", engine)
    return engine


@pytest.fixture
def retention(engine: Engine, capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """Run the program with these images; gives what it says it did."""

    def call(*arguments: str) -> list[str]:
        engine.calls.clear()
        assert engine.program.main(list(arguments)) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    return call


def test_images_of_now_and_before_stay(engine: Engine, retention: Callable[..., list[str]]) -> None:
    retention(f"{BASE}:b1", f"{CODE}:c1")
    engine.images |= {f"{CODE}:c2": "sha256:c2"}
    retention(f"{BASE}:b1", f"{CODE}:c2")
    assert engine.of(CODE) == {"c1": "c1", "c2": "c2", "current": "c2", "previous": "c1"}
    engine.images |= {f"{CODE}:c3": "sha256:c3"}
    said = retention(f"{BASE}:b1", f"{CODE}:c3")
    assert engine.of(CODE) == {"c2": "c2", "c3": "c3", "current": "c3", "previous": "c2"}
    assert said == [f"tagged {CODE}:previous", f"tagged {CODE}:current", f"removed {CODE}:c1"]
    assert engine.of(BASE) == {"b1": "b1", "current": "b1"}


def test_going_back_swaps_the_two(engine: Engine, retention: Callable[..., list[str]]) -> None:
    engine.images |= {f"{CODE}:current": "sha256:c3", f"{CODE}:previous": "sha256:c2"}
    retention(f"{BASE}:b1", f"{CODE}:c2")
    assert engine.of(CODE) == {"c2": "c2", "c3": "c3", "current": "c2", "previous": "c3"}


def test_second_time_nothing_is_said_or_done_or_asked(engine: Engine, retention: Callable[..., list[str]]) -> None:
    retention(f"{BASE}:b1", f"{CODE}:c3")
    assert retention(f"{BASE}:b1", f"{CODE}:c3") == []
    assert len(engine.calls) == 1


@pytest.mark.parametrize("name", [f"{CODE}:c1", "sha256:c1"])
def test_images_of_containers_stay(name: str, engine: Engine, retention: Callable[..., list[str]]) -> None:
    engine.containers = [name, f"{CODE}:c3", "somebody/else:1"]
    retention(f"{BASE}:b1", f"{CODE}:c3")
    assert engine.of(CODE) == {"c1": "c1", "c3": "c3", "current": "c3"}


def test_images_of_unfinished_runs_stay(engine: Engine, retention: Callable[..., list[str]]) -> None:
    engine.runs = [f"{CODE}:c2", f"{CODE}:0"]
    retention(f"{BASE}:b1", f"{CODE}:c3")
    assert engine.of(CODE) == {"c2": "c2", "c3": "c3", "current": "c3"}
    engine.runs = []
    assert retention(f"{BASE}:b1", f"{CODE}:c3") == [f"removed {CODE}:c2"]


def test_repository_that_no_service_has_goes(engine: Engine, retention: Callable[..., list[str]]) -> None:
    engine.images |= {f"{CODE}:current": "sha256:c3", f"{CODE}:previous": "sha256:c2"}
    engine.containers = [f"{CODE}:c1"]
    retention(f"{BASE}:b1")
    assert engine.of(CODE) == {"c1": "c1"}


def test_service_that_is_not_of_this_tree_keeps_its_image_and_the_one_before(
    engine: Engine, retention: Callable[..., list[str]]
) -> None:
    engine.images |= {f"{CODE}:current": "sha256:c3", f"{CODE}:previous": "sha256:c2"}
    engine.containers = [f"{CODE}:c3"]
    assert f"removed {CODE}:c1" in retention(f"{BASE}:b1")
    assert engine.of(CODE) == {"c2": "c2", "c3": "c3", "current": "c3", "previous": "c2"}


def test_nothing_is_removed_when_the_database_does_not_answer(engine: Engine, capsys: pytest.CaptureFixture) -> None:
    engine.runs = None
    assert engine.program.main([f"{BASE}:b1", f"{CODE}:c3"]) == 1
    assert set(engine.of(CODE)) == {"c1", "c2", "c3", "current"}
    assert capsys.readouterr().err == (
        "No image was removed, because the metadata database does not say which ones queued runs need: "
        "see 'journalctl -u dagster-postgres -u dagster-daemon', and run the playbook again "
        f"('{RUNS}' failed: connection refused).\n"
    )


def test_missing_image_of_now_is_named(engine: Engine, capsys: pytest.CaptureFixture) -> None:
    assert engine.program.main([f"{BASE}:b1", f"{CODE}:c4"]) == 1
    assert capsys.readouterr().err == (
        f"No image was removed, because {CODE}:c4 is not here: run the playbook again.\n"
    )
    assert engine.changes() == []


def test_check_says_the_same_and_does_nothing(engine: Engine, retention: Callable[..., list[str]]) -> None:
    before = dict(engine.images)
    would = retention("--check", f"{BASE}:b1", f"{CODE}:c3")
    assert (engine.changes(), engine.images) == ([], before)
    assert would == retention(f"{BASE}:b1", f"{CODE}:c3")


def test_check_tells_of_an_image_that_is_yet_to_be_built(engine: Engine, retention: Callable[..., list[str]]) -> None:
    engine.images |= {f"{CODE}:current": "sha256:c3", f"{CODE}:previous": "sha256:c2"}
    said = retention("--check", f"{BASE}:b1", f"{CODE}:c4")
    assert [line for line in said if CODE in line] == [
        f"tagged {CODE}:previous",
        f"tagged {CODE}:current",
        f"removed {CODE}:c1",
        f"removed {CODE}:c2",
    ]


def test_rubbish_goes_only_with_a_change(engine: Engine, retention: Callable[..., list[str]]) -> None:
    retention("--build-cache", "1GB", f"{BASE}:b1", f"{CODE}:c3")
    assert engine.changes()[-2:] == [
        "docker image prune --force --filter label=data-platform.refresh",
        "docker builder prune --force --keep-storage 1GB",
    ]
    retention("--build-cache", "1GB", f"{BASE}:b1", f"{CODE}:c3")
    assert engine.changes() == []


def test_tag_is_set_before_the_one_it_replaces_is_lost(engine: Engine, retention: Callable[..., list[str]]) -> None:
    engine.images |= {f"{CODE}:current": "sha256:c2", f"{CODE}:previous": "sha256:c1"}
    retention(f"{BASE}:b1", f"{CODE}:c3")
    tags = [call for call in engine.changes() if call.startswith("docker image tag sha256:c")]
    assert tags == [f"docker image tag sha256:c2 {CODE}:previous", f"docker image tag sha256:c3 {CODE}:current"]


def test_failing_command_is_named_with_its_reason() -> None:
    program = module_at(PROGRAM)
    with pytest.raises(program.Failure, match=r"^'sh -c echo no >&2; exit 1' failed: no$"):
        program.run("sh", "-c", "echo no >&2; exit 1")


def test_images_without_a_tag_are_left_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    program = module_at(PROGRAM)
    monkeypatch.setattr(program, "run", lambda *_: f"{CODE}:<none> sha256:c0\n{CODE}:c1 sha256:c1\n")
    assert program.images() == {f"{CODE}:c1": "sha256:c1"}


def test_container_of_a_run_that_has_ended_goes_with_its_image(engine: Engine) -> None:
    engine.ended = [f"{CODE}:c1", f"{CODE}:c3"]
    engine.program.retain([f"{BASE}:b1", f"{CODE}:c3"], "4GB", False)
    assert engine.ended == [f"{CODE}:c3"]
    assert "c1" not in engine.of(CODE)
