"""What the lookup makes of the code locations that an inventory describes, and what it says is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load, module_at

plugin = module_at(ROOT / "playbooks/lookup_plugins/code_locations.py")

SHARED = "pandas==2.2.3 \\\n    --hash=sha256:00\nruamel-yaml==0.18.6 \\\n    --hash=sha256:11\n"
OPTIONS = ["revision", "directory", "dbt_project", "requirements", "env", "secrets", "writable", "limits"]
RELOCK = "run playbooks/lock.yml with this inventory."


class Controller:
    """A project with one source, and what is around it."""

    def __init__(self, root: Path) -> None:
        """Make it below ``root``."""
        self.root, self.source = root, root / "project" / "here"
        (self.source / "dbt").mkdir(parents=True)
        (self.source / "requirements.in").write_text("polars\n")
        (root / "locks").mkdir()
        (root / "shared.txt").write_text(SHARED)
        self.places = plugin.Places(root / "project", root / "cache", root / "locks", root / "shared.txt")

    def resolve(self, **location: Any) -> dict[str, Any]:
        """Resolve one location."""
        given = {"name": "sales", "source": "here", "module": "definitions", **location}
        return plugin.code_locations([given], self.places)[0]

    def problems(self, **location: Any) -> list[str]:
        """Give all that is wrong with one location."""
        resolved = self.resolve(**location)
        return resolved["problems"] + resolved["lock_problems"]

    def lock(self, text: str, **location: Any) -> Path:
        """Write a location's lock, as playbooks/lock.yml would."""
        resolved = self.resolve(**location)
        file = Path(resolved["lock"])
        file.write_text(f"# Made by playbooks/lock.yml\n# {resolved['requirements']['hash']}\n{text}")
        return file


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    """A controller where nothing is wrong."""
    return Controller(tmp_path)


def test_what_a_location_leaves_out(controller: Controller) -> None:
    assert controller.resolve() == {
        "name": "sales",
        "host": "dagster-code-sales",
        "path": str(controller.source),
        "git": {},
        "directory": ".",
        "module": "definitions",
        "dbt_project": "",
        "dbt_source": "",
        "requirements": {"files": [], "lines": [], "hash": ""},
        "lock": "",
        "env": {},
        "secrets": [],
        "writable": False,
        "limits": {},
        "run_limits": {},
        "problems": [],
        "lock_problems": [],
    }


def test_what_a_location_says_is_kept(controller: Controller) -> None:
    said = {
        "directory": "dbt",
        "dbt_project": "dbt",
        "module": "a.b",
        "env": {"STAGE": "production"},
        "writable": True,
        "limits": {"memory": "2g"},
    }
    resolved = controller.resolve(**said)
    assert {name: resolved[name] for name in said} == said
    assert resolved["problems"] == []


@pytest.mark.parametrize(
    ("files", "source"),
    [
        ({"profiles.yml": ""}, "dbt"),
        ({"profiles.yml": "", "packages.yml": "packages: [{package: dbt-labs/dbt_utils, version: 1.3.3}]"}, "dbt"),
        ({"profiles.yml": "", "packages.yml": "packages: [{local: ../macros}]"}, ""),
        ({"profiles.yml": "", "dependencies.yml": "packages:\n  - local: ../macros"}, ""),
        ({}, ""),
    ],
)
def test_dbt_is_given_the_whole_source_where_its_project_reads_beside_itself(
    files: dict[str, str], source: str, controller: Controller
) -> None:
    for name, content in files.items():
        (controller.source / "dbt" / name).write_text(content)
    assert controller.resolve(dbt_project="dbt")["dbt_source"] == source


@pytest.mark.parametrize("option", OPTIONS)
def test_empty_option_is_one_that_is_left_out(option: str, controller: Controller) -> None:
    assert controller.resolve(**{option: None}) == controller.resolve()


@pytest.mark.parametrize(
    ("name", "host"), [("core", "dagster-code"), ("x", "dagster-code-x"), ("core-2", "dagster-code-core-2")]
)
def test_host_is_named_after_the_location(name: str, host: str, controller: Controller) -> None:
    assert controller.resolve(name=name)["host"] == host


@pytest.mark.parametrize("name", ["a", "a1", "a--b", "yes", "a" * 40])
def test_good_name_is_accepted(name: str, controller: Controller) -> None:
    assert controller.problems(name=name) == []


@pytest.mark.parametrize("name", ["", "A", "1a", "-a", "a-", "a_b", "a b", "a/b", "a.b", "a\n", "é", "a" * 41, 7, None])
def test_name_that_docker_or_systemd_would_not_take_is_refused(name: object, controller: Controller) -> None:
    (problem,) = controller.problems(name=name)
    assert problem.startswith(f"The code location {name} cannot be named so: use lower-case letters")


def test_two_of_one_name_are_refused_once(controller: Controller) -> None:
    location = {"source": "here", "module": "x"}
    resolved = plugin.code_locations(
        [location | {"name": name} for name in ("a", "b", "a", "c", "a")], controller.places
    )
    problems = [problem for location in resolved for problem in location["problems"]]
    assert problems == ["3 code locations are named a: give each a name of its own."]


def test_relative_source_starts_from_the_project(controller: Controller) -> None:
    assert controller.resolve(source="here/dbt")["path"] == str(controller.source / "dbt")
    assert controller.resolve(source=str(controller.root))["path"] == str(controller.root)
    relative = controller.resolve(source="here", revision="main")["git"]
    assert relative == {"repository": str(controller.source), "revision": "main"}


@pytest.mark.parametrize(
    "source",
    [
        "https://git.example.com/sales.git",
        "ssh://git@git.example.com/sales.git",
        "git@git.example.com:sales.git",
        "file:///srv/sales.git",
        "git+ssh://git.example.com/sales.git",
    ],
)
def test_repository_needs_a_revision(source: str, controller: Controller) -> None:
    assert controller.problems(source=source) == [
        f"The code location sales comes from {source} at no revision: say which (revision)."
    ]
    resolved = controller.resolve(source=source, revision="v1")
    assert resolved["git"] == {"repository": source, "revision": "v1"}
    assert resolved["problems"] == []
    assert Path(resolved["path"]).parent == controller.root / "cache"


def test_each_revision_has_a_checkout_of_its_own(controller: Controller) -> None:
    git = {"source": "https://git.example.com/a.git", "revision": "v1"}
    asked = [git, git | {"revision": "v2"}, git | {"source": "https://git.example.com/b.git"}, git | {"name": "other"}]
    assert len({controller.resolve(**location)["path"] for location in asked}) == 4
    assert controller.resolve(**git) == controller.resolve(**git)


def test_missing_source_is_named(controller: Controller) -> None:
    assert controller.problems(source="there", directory="x", dbt_project="y", requirements=["a.in"]) == [
        f"The code location sales has no source: there is no directory {controller.root / 'project' / 'there'}."
    ]


@pytest.mark.parametrize("option", ["directory", "dbt_project"])
def test_missing_directory_is_named(option: str, controller: Controller) -> None:
    assert controller.problems(**{option: "there"}) == [
        f"The code location sales has no directory there in here: correct its {option}."
    ]


def test_repository_is_looked_into_once_it_is_there(controller: Controller) -> None:
    location = {"source": "https://git.example.com/a.git", "revision": "v1", "directory": "src"}
    resolved = controller.resolve(**location, requirements=["a.in", "polars"])
    assert (resolved["problems"], resolved["lock_problems"]) == ([], [])
    Path(resolved["path"]).mkdir(parents=True)
    said = controller.problems(**location, requirements=["a.in", "polars"])
    assert said == [
        "The code location sales has no directory src in https://git.example.com/a.git: correct its directory.",
        f"The code location sales has no file {resolved['path']}/a.in: correct its requirements.",
    ]


def test_secrets_stay_where_they_are(controller: Controller) -> None:
    resolved = controller.resolve(secrets={"TOKEN": "sesame", "API": {"key": "sesame"}})
    assert resolved["secrets"] == ["API", "TOKEN"]
    assert "sesame" not in json.dumps(resolved)


def test_requirements_are_lines_and_files(controller: Controller) -> None:
    (controller.source / "pyproject.toml").touch()
    resolved = controller.resolve(requirements=["polars>=1", "requirements.in", "pyproject.toml", "x[y]==1"])
    assert resolved["requirements"] | {"hash": ""} == {
        "files": [f"{controller.source}/requirements.in", f"{controller.source}/pyproject.toml"],
        "lines": ["polars>=1", "x[y]==1"],
        "hash": "",
    }
    assert resolved["lock"] == str(controller.root / "locks" / "sales.txt")


def test_missing_requirement_file_is_named(controller: Controller) -> None:
    assert controller.problems(requirements=["requirements.in", "a.txt", "b.toml"]) == [
        f"The code location sales has no file {controller.source}/a.txt, {controller.source}/b.toml: "
        "correct its requirements."
    ]


def test_missing_lock_is_named(controller: Controller) -> None:
    resolved = controller.resolve(requirements=["polars"])
    assert resolved["problems"] == []
    assert resolved["lock_problems"] == [
        "The code location sales has requirements, and their lock "
        f"{controller.root}/locks/sales.txt is missing: {RELOCK}"
    ]


def test_lock_of_these_requirements_is_accepted(controller: Controller) -> None:
    asked = {"requirements": ["polars", "requirements.in"]}
    controller.lock("polars==1.0\npandas==2.2.3\n", **asked)
    assert controller.problems(**asked) == []


@pytest.mark.parametrize("change", ["another line", "one line less", "content", "a line that became a file"])
def test_older_lock_is_named(change: str, controller: Controller) -> None:
    asked = ["polars", "requirements.in"]
    controller.lock("polars==1.0\n", requirements=asked)
    if change == "content":
        (controller.source / "requirements.in").write_text("polars>=1\n")
    elif change == "another line":
        asked = ["polars>=1", "requirements.in"]
    elif change == "one line less":
        asked = ["requirements.in"]
    else:
        (controller.source / "polars.in").touch()
        asked = ["polars.in", "requirements.in"]
    (problem,) = controller.problems(requirements=asked)
    assert problem.endswith(f"sales.txt is older than its requirements: {RELOCK}")


def test_lock_counts_wherever_the_source_is(controller: Controller) -> None:
    controller.lock("polars==1.0\n", requirements=["requirements.in"])
    controller.source.rename(controller.root / "elsewhere")
    assert controller.problems(source=str(controller.root / "elsewhere"), requirements=["requirements.in"]) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pandas==2.2.2 \\", "pandas 2.2.2, and the shared image has 2.2.3"),
        ("Ruamel.YAML==0.17 ; python_version > '3'", "ruamel-yaml 0.17, and the shared image has 0.18.6"),
        ("ruamel__yaml==0.17;python_version > '3'", "ruamel-yaml 0.17, and the shared image has 0.18.6"),
    ],
)
def test_lock_that_disagrees_with_the_shared_image_names_the_package(
    line: str, said: str, controller: Controller
) -> None:
    asked = {"requirements": ["polars"]}
    controller.lock(f"polars==1.0\n{line}\n    --hash=sha256:22\n", **asked)
    assert controller.problems(**asked) == [f"The code location sales is locked to {said}: {RELOCK}"]


def test_every_package_that_disagrees_is_named(controller: Controller) -> None:
    asked = {"requirements": ["polars"]}
    controller.lock("pandas==1\nruamel.yaml==1\n", **asked)
    assert len(controller.problems(**asked)) == 2


def test_the_shared_lock_is_read_as_it_is() -> None:
    pins = plugin.pins((ROOT / "roles/images/files/dagster/requirements.txt").read_text())
    assert {"dagster", "dbt-core", "duckdb", "typing-extensions"} <= set(pins)
    assert all(version[0].isdigit() for version in pins.values())


def test_locations_of_the_project_are_there(controller: Controller) -> None:
    locations = load(ROOT / "roles/dagster/defaults/main.yml")["dagster_code_locations"]
    resolved = plugin.code_locations(locations, controller.places._replace(project=ROOT))
    assert [location["problems"] + location["lock_problems"] for location in resolved] == [[]]
