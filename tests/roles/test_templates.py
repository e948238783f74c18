"""What the roles write for several inventories, rendered by Ansible and read by other parsers than the roles'."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import ROLES, ROOT, load, module_at, options, role_files, role_tasks, strings, wiring

AWKWARD = """50% of $HOME, "quoted" 'too' \\ %h $$ %% ; # -- {{'{{'}} é"""
FACTS = {f"images_{name}": f"data-platform/{name}:0123456789ab" for name in ("dagster", "postgres", "code_location")}
HOSTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overridden": {
        "dagster_code_servers": [
            {"name": "one", "host": "a", "port": 4001},
            {"name": "two", "host": "b", "port": "4002"},
        ],
        "dagster_config": {"run_monitoring": {"poll_interval_seconds": 5}, "telemetry": {"enabled": True}},
        "dagster_dequeue_interval": "3",
        "dagster_max_concurrent_runs": "7",
        "dagster_max_retries": "0",
        "dagster_max_runtime": "3600",
        "dagster_metadata_url": "postgresql://me@db.example.com:6432/other?sslmode=require",
        "postgres_passfile": "/etc/data-platform/secrets/other",
        "dagster_pool_limit": "2",
        "dagster_tick_retention_days": "3",
        "dagster_webserver_bind": "0.0.0.0",
        "dagster_webserver_port": "8080",
        "dagster_webserver_without_login": True,
        "dagster_workspace": {"load_from": [{"python_module": "somewhere.definitions"}]},
        "code_location_stop_timeout": "90",
        "postgres_settings": {"max_connections": 50},
    },
    "awkward": {
        "dagster_code_servers": [
            {"name": "yes", "host": "1", "port": 4000},
            {"name": "a: b, {c} #d", "host": "e", "port": 4000},
        ],
        "dagster_metadata_url": "postgresql://me@%2Frun%2Fsocket/a%20b?application_name='$x'",
        "code_location_environment": {"AWKWARD": AWKWARD, "EMPTY": "", "YES": "yes"},
        "code_location_directory": "/opt/with space/100%",
        "postgres_settings": {"log_line_prefix": "%m [%p] %q$USER ", "search_path": '"$user", public'},
    },
}
OVERRIDDEN = {
    ("run_coordinator", "config", "dequeue_interval_seconds"): 3,
    ("concurrency", "runs", "max_concurrent_runs"): 7,
    ("concurrency", "pools", "default_limit"): 2,
    ("run_retries", "max_retries"): 0,
    ("run_monitoring", "max_runtime_seconds"): 3600,
    ("run_monitoring", "poll_interval_seconds"): 5,
    ("run_monitoring", "enabled"): True,
    ("retention", "sensor", "purge_after_days"): 3,
    ("telemetry", "enabled"): True,
    ("storage", "postgres", "postgres_url"): "postgresql://me@db.example.com:6432/other?sslmode=require",
}
UNITS = ["dagster-code", "dagster-daemon", "dagster-postgres", "dagster-webserver"]
CHECK = """
import json, pathlib, sys
from data_platform_runtime.check_config import check
reasons = {}
for name in sys.argv[1:]:
    try:
        check(pathlib.Path(name))
    except Exception as error:
        reasons[name] = f"{type(error).__name__}: {error}"
print(json.dumps(reasons))
"""
NOT_HERE = re.compile(r"Command /usr/\S+ is not executable: No such file or directory")


def inventory() -> dict[str, Any]:
    """Hosts with what a run of the playbook gives them: defaults, the roles' own variables, the wiring, the host's."""
    files = [
        file
        for role in ("service", "postgres", "dagster", "code_location")
        for file in role_files(role, "defaults", "vars")
    ]
    variables = {name: value for file in files for name, value in load(file).items()}
    connection = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    return {
        "all": {
            "hosts": HOSTS,
            "vars": {**load(ROOT / "roles/images/defaults/main.yml"), **variables, **FACTS, **wiring(), **connection},
        }
    }


def render(source: Path, target: str, **task: Any) -> dict[str, Any]:
    return {
        "ansible.builtin.template": {
            "src": str(source),
            "dest": f"{{{{ playbook_dir }}}}/{{{{ inventory_hostname }}}}/{target}",
        },
        **task,
    }


def playbook() -> list[dict[str, Any]]:
    """Render each template as the roles do, the units with what each role hands to the shared mechanic."""
    templates = ROOT / "roles" / "dagster" / "templates"
    tasks = [render(templates / f"{name}.j2", name) for name in ("dagster.yaml", "workspace.yaml")]
    unit = ROOT / "roles" / "service" / "templates" / "container.service.j2"
    for include in (task for role in ROLES for task in role_tasks(role) if task.module == "include_role"):
        handed = {name: include.content[name] for name in ("vars", "loop", "loop_control") if name in include.content}
        tasks.append(render(unit, "{{ service_name }}.service", **handed))
    return [{"hosts": "all", "gather_facts": False, "tasks": tasks}]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each host, with the files that the roles write there."""
    folder = tmp_path_factory.mktemp("rendered")
    for host in HOSTS:
        (folder / host).mkdir()
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory()))
    (folder / "play.yml").write_text(yaml.safe_dump(playbook()))
    command = ["ansible-playbook", "--inventory=hosts.yml", "play.yml"]
    environment = {**os.environ, "ANSIBLE_PIPELINING": "true"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def refusals(*files: Path) -> dict[str, str]:
    """What Dagster itself says of those of the files that it does not accept."""
    command = [ROOT / ".venv-code/bin/python", "-c", CHECK, *files]
    result = subprocess.run(
        command,
        cwd=ROOT / "roles/images/files/dagster",
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def at(content: Any, path: tuple[str, ...]) -> Any:
    return at(content[path[0]], path[1:]) if path else content


def words(unit: Path, key: str) -> list[str]:
    """The words of a command line as systemd hands them to the program."""
    line = re.search(rf"^{key}=(.*)$", unit.read_text().replace("\\\n", " "), re.MULTILINE)[1]
    unknown = re.findall(r"(?:^|[^%])(?:%%)*%(?!%)\S?|(?:^|[^$])(?:\$\$)*\$(?!\$)\S?", line)
    assert unknown == [], "systemd would put something else in their place"
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]


def values(unit: Path, option: str) -> list[str]:
    command = words(unit, "ExecStart")
    return [value for name, value in zip(command, command[1:], strict=False) if name == option]


def test_the_overridden_host_overrides_all_that_is_not_wired() -> None:
    assert set(options("dagster")) - set(HOSTS["overridden"]) - set(wiring()) == set()


def test_dagster_accepts_all_that_is_rendered(rendered: Path) -> None:
    files = [*rendered.glob("*/dagster.yaml"), *rendered.glob("*/workspace.yaml")]
    assert len(files) == 2 * len(HOSTS)
    assert refusals(*files) == {}


def test_dagster_refuses_what_is_wrong(rendered: Path, tmp_path: Path) -> None:
    wrong = {
        "an unknown key": ("dagster", (), {"no_such_key": 1}),
        "an unknown key of a part": ("dagster", ("run_coordinator", "config"), {"no_such_key": 1}),
        "a class that is not there": ("dagster", ("run_launcher",), {"class": "NoSuchLauncher"}),
        "a module that is not there": ("dagster", ("run_launcher",), {"module": "no_such_module"}),
        "a text for a number": ("dagster", ("concurrency", "runs"), {"max_concurrent_runs": "many"}),
        "a text for a part's number": ("dagster", ("run_coordinator", "config"), {"dequeue_interval_seconds": "many"}),
        "a second storage": ("dagster", ("storage",), {"sqlite": {"base_dir": "/tmp"}}),
        "an unknown key of the workspace": ("workspace", (), {"no_such_key": 1}),
        "no locations": ("workspace", (), {"load_from": None}),
        "an unknown kind of location": ("workspace", (), {"load_from": [{"no_such_kind": {"host": "a"}}]}),
        "a text for a port": ("workspace", (), {"load_from": [{"grpc_server": {"host": "a", "port": "many"}}]}),
    }
    files = {name: tmp_path / f"{name}.yaml" for name in wrong}
    for name, (kind, path, change) in wrong.items():
        content = load(rendered / "plain" / f"{kind}.yaml")
        at(content, path).update(change)
        files[name].write_text(yaml.safe_dump(content))
    reasons = refusals(*files.values())
    assert [name for name, file in files.items() if str(file) not in reasons] == []


def test_variables_reach_dagster_with_their_types(rendered: Path) -> None:
    content = load(rendered / "overridden" / "dagster.yaml")
    assert {path: at(content, path) for path in OVERRIDDEN} == OVERRIDDEN


def test_code_locations_reach_the_workspace(rendered: Path) -> None:
    entries = load(rendered / "overridden" / "workspace.yaml")["load_from"]
    servers = [entry["grpc_server"] for entry in entries if "grpc_server" in entry]
    assert servers == [
        {"location_name": "one", "host": "a", "port": 4001},
        {"location_name": "two", "host": "b", "port": 4002},
    ]
    assert {"python_module": "somewhere.definitions"} in entries


def test_awkward_names_of_code_locations_survive(rendered: Path) -> None:
    servers = [entry["grpc_server"] for entry in load(rendered / "awkward" / "workspace.yaml")["load_from"]]
    asked = HOSTS["awkward"]["dagster_code_servers"]
    assert servers == [{"location_name": s["name"], "host": s["host"], "port": s["port"]} for s in asked]


@pytest.mark.parametrize("host", HOSTS)
def test_no_password_is_written(rendered: Path, host: str) -> None:
    for file in rendered.glob(f"{host}/*.yaml"):
        assert [text for text in strings(load(file)) if "://" in text and urlsplit(text).password] == []
        assert re.findall(r"(?i)\b\w*(?:password|secret|token)\w*:", file.read_text()) == []
    for unit in rendered.glob(f"{host}/*.service"):
        given = dict(value.split("=", 1) for value in values(unit, "--env"))
        secret = [value for name, value in given.items() if re.search("PASS|SECRET|TOKEN", name)]
        assert [value for value in secret if not value.startswith("/etc/data-platform/secrets/")] == []
        assert [value for value in given.values() if "://" in value and urlsplit(value).password] == []


@pytest.mark.parametrize("host", HOSTS)
def test_systemd_understands_the_units(rendered: Path, host: str, tmp_path: Path) -> None:
    (tmp_path / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    units = sorted(rendered.glob(f"{host}/*.service"))
    assert len(units) == len(UNITS)
    path = {"SYSTEMD_UNIT_PATH": f"{rendered / host}:{tmp_path}:/usr/lib/systemd/system"}
    command = ["/usr/bin/systemd-analyze", "verify", "--man=no", *units]
    try:
        said = subprocess.run(command, env=path, capture_output=True, text=True, check=False).stderr
    except FileNotFoundError:
        pytest.skip("systemd-analyze is not installed here")
    assert [line for line in said.splitlines() if not NOT_HERE.search(line)] == []


def test_awkward_environment_survives_systemd(rendered: Path) -> None:
    given = HOSTS["awkward"]["code_location_environment"] | {"AWKWARD": AWKWARD.replace("{{'{{'}}", "{{")}
    environment = dict(value.split("=", 1) for value in values(rendered / "awkward" / "dagster-code.service", "--env"))
    assert environment == environment | given


def test_awkward_commands_survive_systemd(rendered: Path) -> None:
    settings = dict(value.split("=", 1) for value in values(rendered / "awkward" / "dagster-postgres.service", "-c"))
    assert settings == HOSTS["awkward"]["postgres_settings"]
    code = words(rendered / "awkward" / "dagster-code.service", "ExecStart")
    assert "--working-directory=/opt/with space/100%" in code


def test_variables_reach_the_units(rendered: Path) -> None:
    units = rendered / "overridden"
    assert values(units / "dagster-webserver.service", "--publish") == ["0.0.0.0:8080:3001"]
    assert values(units / "dagster-daemon.service", "--publish") == []
    assert words(units / "dagster-code.service", "ExecStop")[2:4] == ["--time", "90"]
    assert "TimeoutStopSec=105" in (units / "dagster-code.service").read_text()
    environment = dict(value.split("=", 1) for value in values(units / "dagster-daemon.service", "--env"))
    assert environment["PGPASSFILE"] == "/etc/data-platform/secrets/other"


@pytest.mark.parametrize("host", HOSTS)
def test_program_of_the_units_reads_what_docker_is_told(rendered: Path, host: str) -> None:
    program = module_at(ROOT / "roles/service/files/service.py")
    for file in rendered.glob(f"{host}/*.service"):
        unit = program.Unit(file)
        mounts = [dict(part.partition("=")[::2] for part in value.split(",")) for value in values(file, "--mount")]
        assert unit.image in words(file, "ExecStart")
        assert [unit.network] == values(file, "--network")
        assert [unit.name] == values(file, "--name")
        assert [str(path) for path in unit.config] == [mount["source"] for mount in mounts if "readonly" in mount]
