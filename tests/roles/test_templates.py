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
SECRETS = {"API_TOKEN": AWKWARD, "EMPTY": "", "MANY_LINES": "open\nsesame\n"}
FACTS: dict[str, Any] = {f"images_{name}": f"data-platform/{name}:0123456789ab" for name in ("dagster", "postgres")}
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20
FACTS["images_code"] = {name: f"data-platform/code-{name}:0123456789ab" for name in ("core", "sales", "examples")}
HOSTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overridden": {
        "dagster_code_locations": [
            {"name": "core", "source": "here", "module": "core", "env": {"HOME": "/elsewhere"}},
            {
                "name": "sales",
                "source": "https://git.example.com/sales.git",
                "revision": "v1",
                "module": "sales.definitions",
                "directory": "src",
                "secrets": SECRETS,
                "writable": True,
                "limits": {"memory": "2g", "cpus": 1.5, "pids": 512},
            },
        ],
        "dagster_examples": True,
        "dagster_config": {"run_monitoring": {"poll_interval_seconds": 5}, "telemetry": {"enabled": True}},
        "dagster_dequeue_interval": "2.5",
        "dagster_max_concurrent_runs": "7",
        "dagster_max_retries": "0",
        "dagster_max_runtime": "3600",
        "dagster_metadata_url": "postgresql://me@db.example.com:6432/other?sslmode=require",
        "postgres_passfile": "/etc/data-platform/secrets/other",
        "dagster_pools": {"duckdb": 1, "warehouse": 2},
        "dagster_run_isolation": "process",
        "dagster_run_stop_timeout": "40",
        "dagster_tick_retention_days": "3",
        "dagster_webserver_bind": "0.0.0.0",
        "dagster_webserver_port": "8080",
        "dagster_webserver_without_login": True,
        "dagster_workspace": {"load_from": [{"python_module": "somewhere.definitions"}]},
        "code_location_limits": {"pids": 1000},
        "code_location_stop_timeout": "90",
        "dagster_daemon_limits": {"memory": "700m"},
        "dagster_webserver_limits": {"pids": 99},
        "postgres_limits": {"memory": "3g"},
        "postgres_settings": {"max_connections": 50},
    },
    "external": {
        "postgres_external": {
            **{"host": "db.example.com", "port": 6432, "database": "other", "user": "me", "password": "a:b\\c"},
            "options": {"sslmode": "require"},
        },
    },
    "awkward": {
        "dagster_code_servers": ["yes", "1", "a: b, {c} #d"],
        "dagster_sockets": "/run",
        "dagster_code_locations": [
            {
                "name": "core",
                "source": "here",
                "module": "core",
                "directory": "with space/100%",
                "env": {"AWKWARD": AWKWARD, "EMPTY": "", "YES": "yes"},
            },
        ],
        "dagster_metadata_url": "postgresql://me@%2Frun%2Fsocket/a%20b?application_name='$x'",
        "postgres_settings": {"log_line_prefix": "%m [%p] %q$USER ", "search_path": '"$user", public'},
    },
}
OVERRIDDEN = {
    ("concurrency", "runs", "max_concurrent_runs"): 7,
    ("run_retries", "max_retries"): 0,
    ("run_monitoring", "max_runtime_seconds"): 3600,
    ("run_monitoring", "poll_interval_seconds"): 5,
    ("run_monitoring", "enabled"): True,
    ("retention", "sensor", "purge_after_days"): 3,
    ("telemetry", "enabled"): True,
    ("storage", "postgres", "postgres_url"): "postgresql://me@db.example.com:6432/other?sslmode=require",
}
UNITS = {host: {"dagster-code", "dagster-daemon", "dagster-postgres", "dagster-webserver"} for host in HOSTS}
UNITS["overridden"] |= {"dagster-code-sales", "dagster-code-examples"}
UNITS["external"] -= {"dagster-postgres"}
LOOKED_INTO = {
    "/etc/data-platform/runs",
    "/var/lib/data-platform/deployments",
    *(f"/run/data-platform-engine/{name}" for name in ("daemon", "webserver")),
}
WRITTEN = AWKWARD.replace("{{'{{'}}", "{{")
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
        for role in ("service", "postgres", "runs", "dagster", "tools", "code_location")
        for file in role_files(role, "defaults", "vars")
    ]
    variables = {name: value for file in files for name, value in load(file).items()}
    connection = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    lock = {"code_location_shared_lock": str(ROOT / "roles/images/files/dagster/requirements.txt")}
    return {
        "all": {
            "hosts": HOSTS,
            "vars": {
                **load(ROOT / "roles/images/defaults/main.yml"),
                **variables,
                **FACTS,
                **wiring(),
                **connection,
                **lock,
            },
        }
    }


def render(source: Path, target: str, **task: Any) -> dict[str, Any]:
    return write(f"{{{{ lookup('ansible.builtin.template', '{source}') }}}}", target, **task)


def write(content: str, target: str, **task: Any) -> dict[str, Any]:
    dest = f"{{{{ playbook_dir }}}}/{{{{ inventory_hostname }}}}/{target}"
    return {"ansible.builtin.copy": {"content": content, "dest": dest}, **task}


def playbook() -> list[dict[str, Any]]:
    """Render all as the roles do: templates, secrets, the units with what each role hands to the shared mechanic."""
    templates = ROOT / "roles" / "dagster" / "templates"
    tasks = [render(templates / f"{name}.j2", name) for name in ("dagster.yaml", "workspace.yaml")]
    unit = ROOT / "roles" / "service" / "templates" / "container.service.j2"
    for include in (task for role in ROLES for task in role_tasks(role) if task.module == "include_role"):
        handed = {
            name: include.content[name] for name in ("vars", "loop", "loop_control", "when") if name in include.content
        }
        tasks.append(render(unit, "{{ service_name }}.service", **handed))
    secrets = "{{ __code_location_secret_files }}"
    tasks.append(write("{{ item.content }}", "secrets-{{ item.path | basename }}", loop=secrets))
    tasks.append(write("{{ service_units | to_json }}", "wanted.json"))
    (passfile,) = [
        file["content"]
        for task in role_tasks("postgres")
        if task.module == "host_files"
        for file in task.arguments["files"]
        if "postgres_passfile" in file["path"]
    ]
    password = {"__postgres_password": {"contents": {"/etc/data-platform/secrets/postgres": "open"}}}
    tasks.append(write(passfile, "passfile", vars=password))
    return [{"hosts": "all", "gather_facts": True, "gather_subset": ["!all", "!min", "hardware"], "tasks": tasks}]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each host, with the files that the roles write there."""
    folder = tmp_path_factory.mktemp("rendered")
    for host in HOSTS:
        (folder / host).mkdir()
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory(), sort_keys=False))
    (folder / "play.yml").write_text(yaml.safe_dump(playbook()))
    command = ["ansible-playbook", "--inventory=hosts.yml", "play.yml"]
    lookups = str(ROOT / "playbooks" / "lookup_plugins")
    environment = {**os.environ, "ANSIBLE_PIPELINING": "true", "ANSIBLE_LOOKUP_PLUGINS": lookups}
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


def environment_of(unit: Path) -> dict[str, str]:
    return dict(value.split("=", 1) for value in values(unit, "--env"))


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
        {"location_name": name, "socket": f"/run/data-platform-code/{name}/current.sock"}
        for name in ("core", "sales", "examples")
    ]
    assert {"python_module": "somewhere.definitions"} in entries


def test_awkward_names_of_code_locations_survive(rendered: Path) -> None:
    servers = [entry["grpc_server"] for entry in load(rendered / "awkward" / "workspace.yaml")["load_from"]]
    asked = HOSTS["awkward"]["dagster_code_servers"]
    assert servers == [{"location_name": name, "socket": f"/run/{name}/current.sock"} for name in asked]


@pytest.mark.parametrize("host", HOSTS)
def test_no_password_is_written(rendered: Path, host: str) -> None:
    for file in rendered.glob(f"{host}/*.yaml"):
        assert [text for text in strings(load(file)) if "://" in text and urlsplit(text).password] == []
        assert re.findall(r"(?i)\b\w*(?:password|secret|token)\w*:", file.read_text()) == []
    for unit in rendered.glob(f"{host}/*.service"):
        given = environment_of(unit)
        secret = [value for name, value in given.items() if re.search("PASS|SECRET|TOKEN", name)]
        assert [value for value in secret if not value.startswith("/etc/data-platform/secrets/")] == []
        assert [value for value in given.values() if "://" in value and urlsplit(value).password] == []


@pytest.mark.parametrize("host", HOSTS)
def test_systemd_understands_the_units(rendered: Path, host: str, tmp_path: Path) -> None:
    (tmp_path / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    units = sorted(rendered.glob(f"{host}/*.service"))
    assert {unit.stem for unit in units} == UNITS[host]
    path = {"SYSTEMD_UNIT_PATH": f"{rendered / host}:{tmp_path}:/usr/lib/systemd/system"}
    command = ["/usr/bin/systemd-analyze", "verify", "--man=no", *units]
    try:
        said = subprocess.run(command, env=path, capture_output=True, text=True, check=False).stderr
    except FileNotFoundError:
        pytest.skip("systemd-analyze is not installed here")
    assert [line for line in said.splitlines() if not NOT_HERE.search(line)] == []


def test_awkward_environment_survives_systemd(rendered: Path) -> None:
    given = HOSTS["awkward"]["dagster_code_locations"][0]["env"] | {"AWKWARD": WRITTEN}
    environment = environment_of(rendered / "awkward" / "dagster-code.service")
    assert environment == environment | given


def test_awkward_commands_survive_systemd(rendered: Path) -> None:
    settings = dict(value.split("=", 1) for value in values(rendered / "awkward" / "dagster-postgres.service", "-c"))
    assert settings == HOSTS["awkward"]["postgres_settings"]
    code = words(rendered / "awkward" / "dagster-code.service", "ExecStart")
    assert "--working-directory=/opt/data-platform/code/with space/100%" in code


def test_variables_reach_the_units(rendered: Path) -> None:
    units = rendered / "overridden"
    assert values(units / "dagster-webserver.service", "--publish") == ["0.0.0.0:8080:3001"]
    assert values(units / "dagster-daemon.service", "--publish") == []
    assert words(units / "dagster-code.service", "ExecStop")[2:4] == ["--time", "90"]
    assert "TimeoutStopSec=105" in (units / "dagster-code.service").read_text()
    assert environment_of(units / "dagster-daemon.service")["PGPASSFILE"] == "/etc/data-platform/secrets/other"


def test_description_of_a_location_reaches_its_unit(rendered: Path) -> None:
    unit = rendered / "overridden" / "dagster-code-sales.service"
    command = words(unit, "ExecStart")
    target = (
        "--secrets=/etc/data-platform/secrets/code/sales.json",
        "--location-name=sales",
        "--working-directory=/opt/data-platform/code/src",
        "--module-name=sales.definitions",
    )
    assert command[command.index("data-platform/code-sales:0123456789ab") + 1 :] == [
        *("python", "-m", "data_platform_runtime.code_servers", "serve", *target),
    ]
    assert words(unit, "Rehearsal") == ["python", "-m", "data_platform_runtime.rehearsal", *target]
    assert environment_of(unit)["DATA_PLATFORM_SOCKETS"] == "/run/data-platform-code/sales"
    limits = {option: values(unit, option) for option in ("--memory", "--memory-swap", "--cpus", "--pids-limit")}
    assert limits == {"--memory": ["2g"], "--memory-swap": ["2g"], "--cpus": ["1.5"], "--pids-limit": ["512"]}
    assert "type=volume,target=/opt/data-platform/code" in values(unit, "--mount")
    assert environment_of(unit)["DAGSTER_CURRENT_IMAGE"] == "data-platform/code-sales:0123456789ab"


def test_location_that_asks_for_little_gets_nothing_more(rendered: Path) -> None:
    unit = rendered / "overridden" / "dagster-code.service"
    assert environment_of(unit)["HOME"] == "/elsewhere"
    assert environment_of(unit.with_stem("dagster-code-sales"))["HOME"] == "/tmp"
    assert re.findall("--secrets|/secrets/code|--cpus|type=volume", unit.read_text()) == []


def test_database_is_reached_where_it_is(rendered: Path) -> None:
    addresses = {
        "plain": "postgresql://dagster@dagster-postgres:5432/dagster",
        "external": "postgresql://me@db.example.com:6432/other?sslmode=require",
    }
    for host, address in addresses.items():
        for unit in ("dagster-webserver", "dagster-daemon", "dagster-code"):
            assert environment_of(rendered / host / f"{unit}.service")["DATA_PLATFORM_METADATA"] == address
        assert yaml.safe_load((rendered / host / "dagster.yaml").read_text())["storage"]["postgres"] == {
            "postgres_url": address
        }
        assert ("dagster-postgres" in (rendered / host / "dagster-daemon.service").read_text()) == (host == "plain")
    assert (rendered / "plain" / "passfile").read_text() == "dagster-postgres:5432:dagster:dagster:open\n"
    assert (rendered / "external" / "passfile").read_text() == "db.example.com:6432:other:me:a\\:b\\\\c\n"


@pytest.mark.parametrize(
    ("host", "name", "memory", "pids"),
    [
        ("plain", "dagster-postgres", f"{min(max(MEMORY // 4, 512), 4096)}m", "512"),
        ("plain", "dagster-webserver", f"{min(max(MEMORY // 8, 512), 2048)}m", "512"),
        ("plain", "dagster-daemon", f"{min(max(MEMORY // 8, 512), 2048)}m", "512"),
        ("plain", "dagster-code", f"{MEMORY // 2}m", "2048"),
        ("overridden", "dagster-postgres", "3g", "512"),
        ("overridden", "dagster-webserver", f"{min(max(MEMORY // 8, 512), 2048)}m", "99"),
        ("overridden", "dagster-daemon", "700m", "512"),
        ("overridden", "dagster-code", f"{MEMORY // 2}m", "1000"),
    ],
)
def test_services_have_limits_of_their_own_or_by_the_host_s_memory(
    rendered: Path, host: str, name: str, memory: str, pids: str
) -> None:
    unit = rendered / host / f"{name}.service"
    limits = {option: values(unit, option) for option in ("--memory", "--memory-swap", "--pids-limit")}
    assert limits == {"--memory": [memory], "--memory-swap": [memory], "--pids-limit": [pids]}


def test_secrets_reach_their_file_and_no_other(rendered: Path) -> None:
    file = rendered / "overridden" / "secrets-sales.json"
    assert json.loads(file.read_text()) == SECRETS | {"API_TOKEN": WRITTEN}
    assert list(rendered.glob("*/secrets-*.json")) == [file]
    others = "".join(path.read_text() for path in rendered.glob("overridden/*") if path != file)
    assert [word for word in ("API_TOKEN", "sesame", "%h") if word in others] == []


@pytest.mark.parametrize("host", HOSTS)
def test_units_that_are_written_are_those_that_are_wanted(rendered: Path, host: str) -> None:
    assert set(load(rendered / host / "wanted.json")) == {unit.stem for unit in rendered.glob(f"{host}/*.service")}


@pytest.mark.parametrize("host", HOSTS)
def test_code_is_served_before_it_is_asked_for(rendered: Path, host: str) -> None:
    before = {unit.stem: words(unit, "Before") for unit in rendered.glob(f"{host}/*.service")}
    code = {name for name in before if name.startswith("dagster-code")}
    assert code
    asking = ["dagster-webserver.service", "dagster-daemon.service"]
    assert before == {name: asking if name in code else [] for name in before}


def test_webserver_and_daemon_are_told_to_read_their_workspace_again(rendered: Path) -> None:
    reloads = {unit.stem for unit in rendered.glob("*/*.service") if "container-unit reloaded" in unit.read_text()}
    asks = {
        "dagster-webserver": ["data_platform_runtime.reload_workspace"],
        "dagster-daemon": ["data_platform_runtime.daemon", "reload"],
    }
    assert reloads == set(asks)
    for name, program in asks.items():
        lines = re.findall(r"^ExecReload=(.*)$", (rendered / "plain" / f"{name}.service").read_text(), re.M)
        assert [shlex.split(line) for line in lines] == [
            ["/usr/bin/docker", "exec", name, "python", "-m", *program],
            ["/usr/local/lib/data-platform/container-unit", "reloaded", name],
        ]


@pytest.mark.parametrize("host", HOSTS)
def test_code_servers_alone_are_replaced_while_they_serve(rendered: Path, host: str) -> None:
    for unit in rendered.glob(f"{host}/*.service"):
        replaced = unit.stem.startswith("dagster-code")
        assert (
            f"ExecReload=/usr/local/lib/data-platform/container-unit replace {unit.stem}" in unit.read_text()
        ) == replaced
        assert ("NotifyAccess=exec" in unit.read_text()) == replaced
        assert ("\nDrain=" in unit.read_text()) == replaced


@pytest.mark.parametrize("host", HOSTS)
def test_program_of_the_units_reads_what_docker_is_told(rendered: Path, host: str) -> None:
    program = module_at(ROOT / "roles/service/files/service.py")
    for file in rendered.glob(f"{host}/*.service"):
        unit = program.Unit(file)
        mounts = [dict(part.partition("=")[::2] for part in value.split(",")) for value in values(file, "--mount")]
        assert unit.image in words(file, "ExecStart")
        assert [unit.network] == values(file, "--network")
        assert [unit.name] == values(file, "--name")
        known = [str(path) for path in unit.config + unit.reload]
        mounted = [mount["source"] for mount in mounts if "readonly" in mount]
        assert known == [path for path in mounted if path not in LOOKED_INTO]
