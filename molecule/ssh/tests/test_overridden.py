"""Every documented variable, overridden in an inventory over inventories/example, is what the host shows."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Platform

LANDING = "/var/lib/data-platform/landing"
SERVICES = ["dagster-postgres", "dagster-code", "dagster-code-examples", "dagster-daemon", "dagster-webserver"]
OVERRIDDEN = yaml.safe_load((ROOT / "molecule/ssh/inventory/group_vars/data_platform/overridden.yml").read_text())
SETTINGS = """
import json, os
from dagster import DagsterInstance
with DagsterInstance.get() as instance:
    print(json.dumps({
        "dagster_config": {"schedules": {"num_workers": instance.get_settings("schedules")["num_workers"]}},
        "dagster_dequeue_interval": float(os.environ["DATA_PLATFORM_DEQUEUE_INTERVAL"]),
        "dagster_max_concurrent_runs": instance.get_concurrency_config().run_queue_config.max_concurrent_runs,
        "dagster_max_retries": instance.run_retries_max_retries,
        "dagster_max_runtime": instance.run_monitoring_max_runtime_seconds,
        "dagster_pools": {pool.name: pool.limit for pool in instance.event_log_storage.get_pool_limits()},
        "dagster_run_stop_timeout": instance.run_launcher.container_kwargs["stop_timeout"],
        "dagster_tick_retention_days": instance.get_settings("retention")["sensor"]["purge_after_days"],
    }))
"""


def inspect(host: Any, name: str) -> dict[str, Any]:
    """Give what Docker says of a container."""
    return json.loads(host.check_output("docker inspect %s", name))[0]


def test_services_run_and_restart_on_an_older_debian(host: Any, platform: Platform) -> None:
    assert host.file("/etc/debian_version").content_string.startswith("12")
    host.check_output("systemctl restart 'dagster-*'")
    assert host.check_output("systemctl is-active " + " ".join(SERVICES)).split() == ["active"] * len(SERVICES)
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"


def test_postgresql_is_of_the_version_asked_for(platform: Platform) -> None:
    assert platform.postgres("show server_version_num")[0].startswith(str(OVERRIDDEN["images_postgres_version"]))
    assert platform.postgres("show data_directory") == ["/var/lib/data-platform/postgres/15"]


def test_dagster_runs_with_its_settings(host: Any) -> None:
    shown = json.loads(host.check_output("docker exec dagster-daemon python -c %s", SETTINGS))
    assert shown == {name: OVERRIDDEN[name] for name in shown}


def test_code_locations_are_served(platform: Platform) -> None:
    assert platform.locations() == dict.fromkeys(["core", "examples", "again"], "RepositoryLocation")


def test_code_has_its_environment_secrets_and_limits(host: Any) -> None:
    (core,) = OVERRIDDEN["dagster_code_locations"]
    environment = host.check_output("cat /proc/%s/environ | tr '\\0' '\\n'", processes(host)).splitlines()
    for name, value in core["env"].items():
        assert f"{name}={value}" in environment
    with_secrets = "docker exec dagster-code python -m data_platform_runtime.with_secrets"
    for name, value in core["secrets"].items():
        assert host.check_output(f"{with_secrets} /etc/data-platform/secrets/code/core.json printenv %s", name) == value
    limits = inspect(host, "dagster-code")["HostConfig"]
    assert (limits["Memory"], limits["MemorySwap"], limits["NanoCpus"], limits["PidsLimit"]) == (
        2 * 1024**3,
        2 * 1024**3,
        1_500_000_000,
        500,
    )
    assert host.check_output("systemctl show --property=TimeoutStopUSec --value dagster-code") == "1min"


@pytest.mark.parametrize(
    ("name", "mebibytes", "cpus", "pids"),
    [
        ("dagster-postgres", 300, 0, 250),
        ("dagster-webserver", 450, 1.5, 512),
        ("dagster-daemon", 400, 0, 300),
        ("dagster-code-examples", 1024, 1, 1000),
    ],
)
def test_services_have_their_limits(host: Any, name: str, mebibytes: int, cpus: float, pids: int) -> None:
    limits = inspect(host, name)["HostConfig"]
    assert (limits["Memory"], limits["MemorySwap"], limits["NanoCpus"], limits["PidsLimit"]) == (
        mebibytes * 2**20,
        mebibytes * 2**20,
        cpus * 10**9,
        pids,
    )


@pytest.mark.parametrize(
    ("job", "location", "mebibytes", "cpus", "pids"),
    [("smoke", "core", 1100, 1.5, 400), ("examples", "examples", 900, 0, 300)],
)
def test_runs_have_their_limits(
    host: Any, platform: Platform, job: str, location: str, mebibytes: int, cpus: float, pids: int
) -> None:
    run = platform.launch(job, location=location)
    assert platform.finished(run) == "SUCCESS"
    container = inspect(host, f"data-platform-run-{run}")
    limits = container["HostConfig"]
    assert (limits["Memory"], limits["MemorySwap"], limits["NanoCpus"], limits["PidsLimit"]) == (
        mebibytes * 2**20,
        mebibytes * 2**20,
        cpus * 10**9,
        pids,
    )
    assert container["Config"]["User"] == "20001:20001"
    assert list(container["NetworkSettings"]["Networks"]) == [OVERRIDDEN["service_network"]]
    assert f"DATA_PLATFORM_DUCKDB_MEMORY={mebibytes // 2}MB" in container["Config"]["Env"]


def test_journal_has_its_size(host: Any) -> None:
    said_by_itself = host.check_output("journalctl --boot --unit=systemd-journald --output=cat")
    assert ", max 200" in said_by_itself.splitlines()[-1]


def processes(host: Any) -> str:
    """Give the process of the code server, below its container's init."""
    init = str(inspect(host, "dagster-code")["State"]["Pid"])
    return host.check_output("pgrep --parent %s", init).split()[0]


def test_ui_listens_where_it_is_told_to(host: Any) -> None:
    address = host.check_output("hostname --ip-address").split()[0]
    assert host.run(f"curl --silent --fail --output /dev/null http://{address}:8080/server_info").rc == 0
    assert not host.socket("tcp://127.0.0.1:3001").is_listening


def test_engine_is_of_docker_s_own_packages_from_the_repository(host: Any) -> None:
    policy = host.check_output("apt-cache policy docker-ce")
    assert f"{OVERRIDDEN['docker_repository']}/debian bookworm/stable" in policy
    installed = host.check_output(
        "dpkg-query --show --showformat '${Package} ${db:Status-Abbrev}\n' 'docker*' 'containerd*'"
    )
    assert sorted(line.split()[0] for line in installed.splitlines() if " ii" in line) == [
        "containerd.io",
        "docker-buildx-plugin",
        "docker-ce",
        "docker-ce-cli",
    ]


def test_engine_runs_with_its_settings(host: Any) -> None:
    assert host.check_output("docker info --format '{{.Debug}} {{.LoggingDriver}}'") == "true local"


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("show max_connections", "150"),
        ("show shared_buffers", "64MB"),
    ],
)
def test_database_runs_with_its_settings(platform: Platform, query: str, shown: str) -> None:
    assert platform.postgres(query) == [shown]


@pytest.mark.parametrize(
    ("path", "uid"),
    [
        ("/etc/data-platform/secrets/postgres", 20002),
        ("/etc/data-platform/secrets/other", 20001),
        ("/var/lib/data-platform/postgres", 20002),
        ("/var/lib/data-platform/warehouse", 20001),
    ],
)
def test_files_belong_to_the_users_of_the_images(host: Any, path: str, uid: int) -> None:
    assert host.file(path).uid == uid


def test_containers_run_as_the_users_of_the_images(host: Any) -> None:
    assert [host.check_output("docker exec %s id --user", name) for name in SERVICES] == ["20002", *["20001"] * 4]
    assert not host.file("/etc/data-platform/secrets/pgpass").exists


def test_containers_share_the_network(host: Any) -> None:
    networks = [list(inspect(host, name)["NetworkSettings"]["Networks"]) for name in SERVICES]
    assert networks == [[OVERRIDDEN["service_network"]]] * len(SERVICES)


def test_images_have_the_sources_and_the_certificates(host: Any) -> None:
    sources = host.check_output("docker exec dagster-code cat /etc/apt/sources.list").splitlines()
    assert [line.split()[2:] for line in sources if line.startswith("deb ")] == [
        ["trixie", "main"],
        ["trixie-security", "main"],
        ["bookworm", "main"],
    ]
    host.check_output("docker exec dagster-code test -s /usr/local/share/ca-certificates/extra.crt")


def test_a_member_drops_a_file_with_scp(host: Any, platform: Platform, tmp_path: Path) -> None:
    assert host.file(LANDING).group == OVERRIDDEN["landing_group"]
    assert OVERRIDDEN["landing_group"] in host.user(OVERRIDDEN["landing_members"][0]).groups
    inventory = yaml.safe_load((ROOT / "molecule/ssh/inventory/ssh.yml").read_text())["data_platform"]["hosts"]
    ((name, variables),) = inventory.items()
    options, member = shlex.split(variables["ansible_ssh_common_args"]), OVERRIDDEN["landing_members"][0]
    file = tmp_path / "orders.csv"
    file.write_text("id,price\n1,2.5\n")
    make = ["ssh", *options, f"{member}@{name}", f"umask 077; mkdir {LANDING}/orders"]
    for command in (make, ["scp", *options, str(file), f"{member}@{name}:{LANDING}/orders"]):
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    platform.wait(lambda: str(host.file(f"{LANDING}/landed/orders/orders.csv").exists), {"True"}, 60)
    status = "select status from runs where pipeline_name = 'land_files'"
    platform.wait(lambda: "".join(platform.postgres(status)), {"SUCCESS"}, 60)
    assert platform.duckdb("from raw.orders") == [[1, 2.5]]


def test_images_were_built_on_the_controller_and_carried_over(host: Any) -> None:
    form = ["--format", "{{.Id}} {{json .Config.Labels}}"]
    for name in SERVICES:
        image = inspect(host, name)["Config"]["Image"]
        built = subprocess.run(["docker", "image", "inspect", *form, image], capture_output=True, text=True, check=True)
        identity, labels = built.stdout.split(maxsplit=1)
        assert inspect(host, name)["Image"] == identity
        assert json.loads(labels)["data-platform.refresh"] == OVERRIDDEN["images_refresh"]
    assert "Build Cache=0B" in host.check_output("docker system df --format '{{.Type}}={{.Size}}'").splitlines()
    assert not host.package("mmdebstrap").is_installed
    assert not host.file("/var/lib/data-platform/build").exists
    assert not Path.home().joinpath(".cache/data-platform/vm.example.com").exists()


def test_members_of_the_group_have_the_tools_with_their_memory(host: Any) -> None:
    assert "admin" in host.group("prompters").members
    query = "select current_setting('memory_limit')"
    shown = host.check_output("runuser --user admin -- data-platform-sql -noheader -list -c %s", query)
    assert shown == "480.0 MiB", "three quarters of what its container has"
