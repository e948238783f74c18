"""The containers from outside: docker-bench-security's checks of containers, as docs/hardening.md lists them."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT, SERVICES

PLATFORMS_OWN = (
    "/etc/data-platform/",
    "/run/data-platform-code",
    "/run/data-platform-engine/",
    "/var/lib/data-platform/",
)
Container = dict[str, Any]


@pytest.fixture(scope="module", params=SERVICES)
def name(request: pytest.FixtureRequest) -> str:
    """A service."""
    return request.param


@pytest.fixture(scope="module")
def container(host: Any, name: str) -> Container:
    """What Docker says of its container."""
    return json.loads(host.check_output("docker inspect %s", name))[0]


@pytest.fixture(scope="module")
def process(host: Any, container: Container) -> dict[str, str]:
    """What the kernel says of the service's process, below its container's init."""
    pid = host.check_output("pgrep --parent %s", str(container["State"]["Pid"])).split()[0]
    status = host.file(f"/proc/{pid}/status").content_string
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    fields["mounts"] = host.file(f"/proc/{pid}/mountinfo").content_string
    fields["cgroup"] = host.file(f"/proc/{pid}/cgroup").content_string
    fields["oom_score_adj"] = host.file(f"/proc/{pid}/oom_score_adj").content_string
    for space in ("net", "pid", "ipc", "uts", "user"):
        fields[space] = host.check_output(f"readlink /proc/{pid}/ns/{space}")
        fields[f"host {space}"] = host.check_output(f"readlink /proc/1/ns/{space}")
    return fields


def ports(container: Container) -> dict[str, list[dict[str, str]]]:
    """Ports of the container that the host publishes."""
    return {port: places for port, places in container["NetworkSettings"]["Ports"].items() if places}


def apparmor(host: Any, container: Container, process: dict[str, str]) -> bool:
    on = host.run("cat /sys/module/apparmor/parameters/enabled").stdout.strip() == "Y"
    return not on or container["AppArmorProfile"] == "docker-default"


def only_own_directories(host: Any, container: Container, process: dict[str, str]) -> bool:
    mounts = [mount for mount in container["Mounts"] if mount["Type"] == "bind"]
    configuration = [mount for mount in mounts if mount["Source"].startswith("/etc/")]
    return all(mount["Source"].startswith(PLATFORMS_OWN) for mount in mounts) and not any(
        mount["RW"] for mount in configuration
    )


def no_sshd(host: Any, container: Container, process: dict[str, str]) -> bool:
    return "sshd" not in host.check_output("docker top %s -eo pid,comm", container["Id"]).split()


def needed_ports(host: Any, container: Container, process: dict[str, str]) -> bool:
    return set(ports(container)) == ({"3001/tcp"} if container["Name"] == "/dagster-webserver" else set())


def read_only(host: Any, container: Container, process: dict[str, str]) -> bool:
    (root,) = [line.split() for line in process["mounts"].splitlines() if line.split()[4] == "/"]
    return "ro" in root[5].split(",") and host.run("docker exec %s touch /usr/written", container["Id"]).rc != 0


def limited_memory(host: Any, container: Container, process: dict[str, str]) -> bool:
    total = int(re.search(r"MemTotal:\s+(\d+)", host.file("/proc/meminfo").content_string)[1]) * 1024
    limits = container["HostConfig"]
    return 256 * 2**20 <= limits["Memory"] == limits["MemorySwap"] <= total // 2


def no_privileged_exec(host: Any, container: Container, process: dict[str, str]) -> bool:
    unit = host.check_output("systemctl cat %s", container["Name"].strip("/"))
    calls = re.findall(r"docker exec .*", unit)
    return not [call for call in calls if re.search(r"--privileged|--user|-u ", call)]


def tag_is_a_digest(host: Any, container: Container, process: dict[str, str]) -> bool:
    return re.fullmatch(r"data-platform/[a-z-]+:[0-9a-f]{12}", container["Config"]["Image"]) is not None


PASSED: dict[str, Callable[[Any, Container, dict[str, str]], bool]] = {
    "5.1": apparmor,
    "5.3": lambda host, container, process: (
        int(process["CapEff"], 16) == int(process["CapPrm"], 16) == int(process["CapBnd"], 16) == 0
    ),
    "5.4": lambda host, container, process: not container["HostConfig"]["Privileged"],
    "5.5": only_own_directories,
    "5.6": no_sshd,
    "5.7": lambda host, container, process: all(
        int(place["HostPort"]) >= 1024 for places in ports(container).values() for place in places
    ),
    "5.8": needed_ports,
    "5.9": lambda host, container, process: process["net"] != process["host net"],
    "5.10": limited_memory,
    "5.12": read_only,
    "5.13": lambda host, container, process: all(
        place["HostIp"] == "127.0.0.1" for places in ports(container).values() for place in places
    ),
    "5.15": lambda host, container, process: process["pid"] != process["host pid"],
    "5.16": lambda host, container, process: process["ipc"] != process["host ipc"],
    "5.17": lambda host, container, process: not container["HostConfig"]["Devices"],
    "5.19": lambda host, container, process: " shared:" not in process["mounts"],
    "5.20": lambda host, container, process: process["uts"] != process["host uts"],
    "5.21": lambda host, container, process: process["Seccomp"] == "2",
    "5.22": no_privileged_exec,
    "5.23": no_privileged_exec,
    "5.24": lambda host, container, process: "dagster.slice" in process["cgroup"],
    "5.25": lambda host, container, process: process["NoNewPrivs"] == "1",
    "5.27": tag_is_a_digest,
    "5.28": lambda host, container, process: 0 < container["HostConfig"]["PidsLimit"] <= 2048,
    "5.29": lambda host, container, process: set(container["NetworkSettings"]["Networks"]) == {"data-platform"},
    "5.30": lambda host, container, process: container["HostConfig"]["UsernsMode"] != "host",
    "5.31": lambda host, container, process: "docker.sock" not in process["mounts"],
}


@pytest.mark.parametrize("check", PASSED)
def test_container_passes(host: Any, container: Container, process: dict[str, str], check: str) -> None:
    assert PASSED[check](host, container, process)


def test_documentation_lists_what_is_asserted_and_why_the_rest_is_not() -> None:
    rows = re.findall(
        r"^\| (5\.\d+) \|.*\| (passed|waived: .+)[^|]* \|$", (ROOT / "docs/hardening.md").read_text(), re.M
    )
    assert [check for check, _ in rows] == [f"5.{number}" for number in range(1, 32)]
    assert {check for check, verdict in rows if verdict == "passed"} == set(PASSED)


def test_service_is_no_root_and_its_place_in_the_row_is_known(name: str, process: dict[str, str]) -> None:
    assert "0" not in process["Uid"].split()
    scores = {"dagster-postgres": 50, "dagster-code": 300}
    assert int(process["oom_score_adj"]) == scores.get(name, 100)


def test_more_memory_than_allowed_ends_what_asks_for_it_and_nothing_else(host: Any) -> None:
    before = host.check_output(f"docker inspect --format '{{{{.Id}}}}' {' '.join(SERVICES)}")
    greedy = "import json; held = [bytes([1]) * 2**20 for _ in range(2**20)]"
    killed = host.run("docker exec dagster-daemon python -c %s", greedy)
    assert killed.rc == 137, killed.stderr
    assert host.check_output(f"docker inspect --format '{{{{.Id}}}}' {' '.join(SERVICES)}") == before
    assert host.check_output(f"systemctl is-active {' '.join(SERVICES)}").split() == ["active"] * len(SERVICES)


def test_scratch_is_no_disk_and_no_executable_of_root(host: Any, name: str) -> None:
    mount = host.check_output("docker exec %s sh -c 'grep \" /tmp \" /proc/mounts'", name).split()
    assert mount[2] == "tmpfs"
    assert {"rw", "nosuid", "nodev"} <= set(mount[3].split(","))
