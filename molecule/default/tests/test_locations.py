"""A project that knows nothing of this platform is served beside core from its git repository, and taken off again."""

import hashlib
import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, STATUS, Platform

# What projects out there are like: a package below src, requirements in pyproject.toml, a dbt project with a package
# beside it, a database and a token that the environment names, a step that writes below the project's own directory.
PROJECT = {
    "pyproject.toml": """
[project]
name = "shop"
version = "1"
requires-python = ">=3.11,<3.15"
dependencies = ["dagster", "dagster-dbt", "inflection>=0.5"]
""",
    "src/shop/__init__.py": "",
    "src/shop/definitions.py": """
import hashlib
import os
from pathlib import Path

import dagster as dg
import duckdb
import inflection
from dagster_dbt import DbtCliResource, DbtProject, dbt_assets

TOP = Path(__file__).parents[2]
TOKEN = os.environ["SHOP_TOKEN"]
project = DbtProject(project_dir=TOP / "warehouse")
project.prepare_if_dev()


@dbt_assets(manifest=project.manifest_path)
def models(context: dg.AssetExecutionContext, dbt: DbtCliResource):
    yield from dbt.cli(["build"], context=context).stream()


@dg.asset(deps=["orders"])
def report() -> None:
    (TOP / "output").mkdir(exist_ok=True)
    (TOP / "output" / "seen").write_text(hashlib.sha256(TOKEN.encode()).hexdigest())
    with duckdb.connect(os.environ["SHOP_DUCKDB"]) as connection:
        seen = [(TOP / "output" / "seen").read_text(), inflection.pluralize("order")]
        connection.execute("create or replace table report as select ? as token, ? as word", seen)


defs = dg.Definitions(assets=[models, report], resources={"dbt": DbtCliResource(project_dir=project)})
""",
    "warehouse/dbt_project.yml": "name: shop\nprofile: shop\n",
    "warehouse/profiles.yml": """
shop:
  target: dev
  outputs: {dev: {type: duckdb, path: "{{ env_var('SHOP_DUCKDB') }}"}}
""",
    "warehouse/packages.yml": "packages: [{local: ../money}]\n",
    "warehouse/seeds/raw_orders.csv": "id,cents\n1,1050\n2,700\n",
    "warehouse/models/orders.sql": "select id, {{ money.in_full('cents') }} as amount from {{ ref('raw_orders') }}\n",
    "warehouse/models/orders.yml": "models: [{name: orders, columns: [{name: id, data_tests: [unique, not_null]}]}]\n",
    "money/dbt_project.yml": "name: money\n",
    "money/macros/in_full.sql": "{% macro in_full(column) %}{{ column }} / 100.0{% endmacro %}\n",
}
# A package that no public index has, in an index of its own: a directory that a web server lists.
INDEX = """
import zipfile
from pathlib import Path
folder = Path("/tmp/index/simple/shop-words")
folder.mkdir(parents=True)
metadata = "shop_words-1.0.dist-info"
with zipfile.ZipFile(folder / "shop_words-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("shop_words.py", "WORD = 'private'\\n")
    wheel.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\\nName: shop-words\\nVersion: 1.0\\n")
    wheel.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    wheel.writestr(f"{metadata}/RECORD", "")
"""
WORDS = "import dagster as dg\nfrom shop_words import WORD\n\ndefs = dg.Definitions(assets=[dg.AssetSpec(WORD)])\n"
DUCKDB = "/var/lib/data-platform/warehouse/shop.duckdb"
CORE = {
    "name": "core",
    "source": "code/data-platform",
    "directory": "core/orchestration/dagster",
    "module": "data_platform.definitions",
    "dbt_project": "core/processing/dbt",
}
STATE = """
docker container ls --all --no-trunc --format '{{.Names}} {{.ID}}' | grep -v data-platform-run- | sort
docker image ls --no-trunc --format '{{.Repository}} {{.ID}}' | sort
cd /etc; find data-platform docker systemd/system -type f | sort | xargs sha256sum
"""
CHECKS = """
{ assetNodes { assetKey { path } assetChecksOrError { ... on AssetChecks { checks {
    name executionForLatestMaterialization { status } } } } } }
"""


class Shop(NamedTuple):
    """The project under test, served."""

    location: dict[str, Any]
    """How the inventory describes it."""
    token: str
    """Its secret."""
    before: dict[str, str]
    """The containers that ran before, names and IDs."""


def containers(host: Any) -> dict[str, str]:
    """Give the IDs of the containers by their names, but for those of runs."""
    listed = host.check_output("docker container ls --all --no-trunc --format '{{.Names}} {{.ID}}'")
    return dict(line.split() for line in listed.splitlines() if not line.startswith("data-platform-run-"))


def git(repository: Path, *arguments: str) -> str:
    """Run git in ``repository``; give its output."""
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com", "-C", str(repository), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def inventory(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of the inventory of the host under test, because locks are written beside it."""
    copy = tmp_path_factory.mktemp("inventory")
    shutil.copytree(pytestconfig.getoption("ansible_inventory"), copy, dirs_exist_ok=True)
    return str(copy)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project in git; the controller's checkouts of it go at the end."""
    repository = tmp_path_factory.mktemp("shop")
    for name, content in PROJECT.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(content.removeprefix("\n"))
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message=All of it")
    yield repository
    for name in ("shop", "norevision"):
        for checkout in (ROOT / ".cache/code").glob(f"{name}-*"):
            shutil.rmtree(checkout)


@pytest.fixture(scope="module")
def describe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Give the option that makes a play serve core and further locations."""
    folder = tmp_path_factory.mktemp("variables")

    def write(*locations: dict[str, Any], examples: bool = False) -> str:
        file = folder / "locations.json"
        file.write_text(json.dumps({"dagster_code_locations": [CORE, *locations], "dagster_examples": examples}))
        return f"--extra-vars=@{file}"

    return write


@pytest.fixture(scope="module")
def shop(host: Any, play: Callable[..., int], repository: Path, describe: Callable[..., str]) -> Shop:
    """The project, locked and served beside core and the examples."""
    token = secrets.token_hex(16)
    location = {
        "name": "shop",
        "source": str(repository),
        "revision": git(repository, "rev-parse", "HEAD"),
        "directory": "src",
        "module": "shop.definitions",
        "dbt_project": "warehouse",
        "requirements": ["pyproject.toml"],
        "env": {"SHOP_DUCKDB": DUCKDB},
        "secrets": {"SHOP_TOKEN": token},
        "writable": True,
        "limits": {"memory": "1g"},
    }
    before = containers(host)
    play(describe(location), playbook="playbooks/lock.yml")
    assert play(describe(location, examples=True)) > 0
    return Shop(location, token, before)


@pytest.fixture(scope="module")
def run(platform: Platform, shop: Shop) -> str:
    """A run that materialised all of the project."""
    run = platform.launch("__ASSET_JOB", location="shop")
    assert platform.finished(run) == "SUCCESS"
    return run


def test_location_is_served_and_nothing_else_restarts(host: Any, platform: Platform, shop: Shop) -> None:
    served = str({name: "RepositoryLocation" for name in ("core", "examples", "shop")})
    platform.wait(lambda: str(dict(sorted(platform.locations().items()))), {served}, 10)
    after = containers(host)
    assert after.items() >= shop.before.items()
    assert after.keys() - shop.before.keys() == {"dagster-code-examples", "dagster-code-shop"}


def test_its_assets_materialise_and_their_checks_pass(platform: Platform, run: str) -> None:
    assert platform.duckdb("select sum(amount) from orders", DUCKDB) == [[17.5]]
    nodes = platform.graphql(CHECKS)["assetNodes"]
    (checks,) = (node["assetChecksOrError"]["checks"] for node in nodes if node["assetKey"]["path"] == ["orders"])
    assert [check["executionForLatestMaterialization"]["status"] for check in checks] == ["SUCCEEDED"] * 2


def test_its_run_sees_the_secret_and_nobody_else_does(host: Any, platform: Platform, shop: Shop, run: str) -> None:
    digest = hashlib.sha256(shop.token.encode()).hexdigest()
    assert platform.duckdb("select token, word from report", DUCKDB) == [[digest, "orders"]]
    places = {
        "docker inspect": "docker inspect dagster-code-shop $(docker image ls --quiet | sort -u)",
        "docker history": "docker image ls --quiet | sort -u | xargs -n 1 docker history --no-trunc",
        "journal": "journalctl --output=cat --no-pager",
        "processes": "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '",
        "metadata": "docker exec dagster-postgres pg_dump --username=postgres dagster",
    }
    assert [place for place, command in places.items() if shop.token in host.run(command).stdout] == []
    held = host.run("grep --recursive --files-with-matches %s /etc /var/lib/data-platform", shop.token)
    assert held.stdout.split() == ["/etc/data-platform/secrets/code/shop.json"]
    file = host.file("/etc/data-platform/secrets/code/shop.json")
    assert (file.mode, file.uid) == (0o400, 10001)


def test_its_limits_are_in_force(host: Any, shop: Shop) -> None:
    limits = json.loads(host.check_output("docker inspect --format '{{json .HostConfig}}' dagster-code-shop"))
    assert (limits["Memory"], limits["MemorySwap"]) == (1024**3, 1024**3)


def test_its_requirements_are_in_its_image_alone(host: Any, shop: Shop, inventory: str) -> None:
    locked = re.search(r"^inflection==(\S+)", Path(inventory, "locks/shop.txt").read_text(), re.MULTILINE)
    program = "from importlib.metadata import version; print(version('inflection'))"
    assert locked and host.check_output("docker exec dagster-code-shop python -c %s", program) == locked[1]
    assert host.run("docker exec dagster-code python -c %s", program).rc != 0


def test_bad_locations_are_named_at_once_before_anything_changes(
    host: Any, shop: Shop, play: Callable[..., int], describe: Callable[..., str], inventory: str
) -> None:
    twin = {"name": "twin", "source": "code/data-platform/examples", "module": "definitions"}
    lock = Path(inventory, "locks/shop.txt").read_text()
    Path(inventory, "locks/stale.txt").write_text(lock)
    Path(inventory, "locks/twisted.txt").write_text(
        re.sub(r"^dagster==\S+", "dagster==1.10.0", lock, flags=re.MULTILINE)
    )
    bad = describe(
        shop.location,
        twin,
        twin,
        {"name": "nowhere", "source": "/nowhere/to/be/found", "module": "definitions"},
        {**shop.location, "name": "norevision", "revision": "0" * 40},
        {**shop.location, "name": "stale", "requirements": ["inflection"]},
        {**shop.location, "name": "twisted"},
        examples=True,
    )
    before = host.check_output("bash -c %s", STATE)
    with pytest.raises(AssertionError) as refused:
        play(bad)
    said = " ".join(str(refused.value).split())
    for sentence in (
        "2 code locations are named twin: give each a name of its own.",
        "The code location nowhere has no source: there is no directory /nowhere/to/be/found.",
        f"The code location norevision cannot be fetched from {shop.location['source']} at {'0' * 40}, git says:",
        f"{inventory}/locks/stale.txt is older than its requirements: run playbooks/lock.yml with this inventory.",
        "The code location twisted is locked to dagster 1.10.0, and the shared image has",
        "changed=0",
    ):
        assert sentence in said
    assert host.check_output("bash -c %s", STATE) == before


def test_requirements_that_conflict_with_the_shared_image_are_not_locked(
    shop: Shop, play: Callable[..., int], describe: Callable[..., str], inventory: str
) -> None:
    conflict = {**shop.location, "name": "conflict", "source": str(ROOT / "code"), "revision": "", "dbt_project": ""}
    conflict |= {"directory": ".", "requirements": ["dagster==1.10.*"]}
    with pytest.raises(AssertionError, match=r"(?s)location conflict cannot be locked.*dagster==1\.10.*changed=0"):
        play(describe(conflict), playbook="playbooks/lock.yml")
    assert not Path(inventory, "locks/conflict.txt").exists()


@pytest.fixture
def index(host: Any) -> Iterator[str]:
    """The address of a package index, on the host."""
    host.check_output("python3 -c %s", INDEX)
    host.check_output("systemd-run --unit=index python3 -m http.server 8000 --directory /tmp/index")
    yield f"http://{host.check_output('hostname --ip-address').split()[0]}:8000/simple"
    host.check_output("systemctl stop index && rm -r /tmp/index")


def test_requirements_come_from_the_package_index(
    host: Any, shop: Shop, play: Callable[..., int], describe: Callable[..., str], index: str, tmp_path: Path
) -> None:
    (tmp_path / "words.py").write_text(WORDS)
    words = {"name": "words", "source": str(tmp_path), "module": "words", "requirements": ["shop-words"]}
    given = (describe(words), f"--extra-vars=images_package_index={index}")
    play(*given, playbook="playbooks/lock.yml")
    assert play(*given) > 0
    program = "import shop_words; print(shop_words.WORD)"
    assert host.check_output("docker exec dagster-code-words python -c %s", program) == "private"


def test_location_that_is_taken_off_leaves_its_history(
    host: Any, platform: Platform, shop: Shop, run: str, play: Callable[..., int]
) -> None:
    assert play() > 0
    assert containers(host) == shop.before
    assert platform.locations() == {"core": "RepositoryLocation"}
    assert host.check_output("docker image ls --quiet data-platform/code-shop") == ""
    assert host.run("systemctl list-unit-files --no-legend 'dagster-code-*'").stdout == ""
    assert not host.file("/etc/data-platform/secrets/code/shop.json").exists
    assert platform.graphql(STATUS, run=run)["runOrError"]["status"] == "SUCCESS"
    host.check_output("rm %s", DUCKDB)
