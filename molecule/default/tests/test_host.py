"""What the host holds: units, ports, files, images."""

import json
import socket
from typing import Any

import pytest
from conftest import PORT, ROOT, SERVICES

SECRETS = "/etc/data-platform/secrets"


def inspect(host: Any, name: str) -> dict[str, Any]:
    """Give what Docker says of a container."""
    return json.loads(host.check_output("docker inspect %s", name))[0]


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_up_and_comes_back_after_a_boot(host: Any, name: str) -> None:
    service = host.service(name)
    assert service.is_running, host.run("journalctl --unit=%s --lines=30", name).stdout
    assert service.is_enabled
    assert service.systemd_properties["Slice"] == "dagster.slice"
    assert name in host.check_output("systemctl show docker --property=Wants")


def test_no_unit_of_the_host_has_failed(host: Any) -> None:
    assert host.check_output("systemctl --failed --plain --no-legend") == ""


def test_only_the_ui_listens_and_only_on_the_loopback(host: Any) -> None:
    listening = {
        line.split()[3] for line in host.check_output("ss --tcp --listening --numeric --no-header").splitlines()
    }
    assert {address for address in listening if address.rsplit(":", 1)[1] in ("5432", str(PORT))} == {
        f"127.0.0.1:{PORT}"
    }


def test_code_servers_listen_on_sockets_that_runs_do_not_see_and_on_no_port(host: Any) -> None:
    table = host.check_output("docker exec dagster-code sh -c 'cat /proc/net/tcp*'").splitlines()
    assert "local_address" in table[0]
    listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    # Docker's own resolver listens there, on 127.0.0.11.
    assert [address for address in listening if not address.startswith("0B00007F:")] == []
    sockets = host.check_output("ls /run/data-platform-code/core").split()
    assert "current.sock" in sockets
    assert "data-platform-code" not in host.file("/etc/data-platform/runs/runs.json").content_string
    assert oct(host.file("/run/data-platform-code/core").mode) == oct(0o700)


@pytest.mark.parametrize("port", [PORT, 5432])
def test_no_port_answers_other_machines(host: Any, port: int) -> None:
    address = host.check_output("hostname --ip-address").split()[0]
    with pytest.raises(OSError):
        socket.create_connection((address, port), timeout=2)


@pytest.mark.parametrize(
    ("path", "mode", "uid"),
    [
        (SECRETS, 0o711, 0),
        (f"{SECRETS}/postgres", 0o400, 10002),
        (f"{SECRETS}/pgpass", 0o400, 10001),
        ("/etc/data-platform/dagster/dagster.yaml", 0o644, 0),
        ("/etc/data-platform/workspace/workspace.yaml", 0o644, 0),
        ("/var/lib/data-platform/postgres", 0o700, 10002),
        ("/var/lib/data-platform/warehouse", 0o700, 10001),
        ("/var/lib/data-platform/compute-logs", 0o700, 10001),
        ("/etc/systemd/system/dagster-webserver.service", 0o644, 0),
    ],
)
def test_files_have_their_owners_and_modes(host: Any, path: str, mode: int, uid: int) -> None:
    file = host.file(path)
    assert (oct(file.mode), file.uid) == (oct(mode), uid)


def test_the_password_is_nowhere_but_in_its_files(host: Any) -> None:
    password = host.file(f"{SECRETS}/postgres").content_string
    assert len(password) >= 32
    everything = {
        "processes": host.check_output("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"),
        "docker inspect": host.check_output(f"docker inspect {' '.join(SERVICES)}"),
        "docker history": host.check_output(
            "docker image ls --quiet | sort -u | xargs -n 1 docker history --no-trunc --format '{{.CreatedBy}}'"
        ),
        "journal": host.check_output("journalctl --output=cat --no-pager"),
        "configuration": host.check_output("cat /etc/data-platform/*/*.yaml /etc/systemd/system/*.service"),
    }
    assert [place for place, text in everything.items() if password in text] == []
    readable = host.run(
        "find / -xdev -type f -perm /044 -newer /etc/data-platform -size -1M "
        "-exec grep --files-with-matches --fixed-strings -- %s {} +",
        password,
    )
    assert readable.stdout == ""


def test_images_hold_what_the_lock_says(host: Any) -> None:
    lock = ROOT / "roles/images/files/dagster/requirements.txt"
    locked = dict(line.split()[0].split("==") for line in lock.read_text().splitlines() if line[:1].isalpha())
    names = ["dagster", "dagster-webserver", "dagster-postgres", "dagster-dbt", "dbt-core", "dbt-duckdb", "duckdb"]
    program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    for service in ("dagster-webserver", "dagster-code"):
        image = inspect(host, service)["Config"]["Image"]
        versions = host.check_output(f"docker run --rm --pull never {image} python -c %s {' '.join(names)}", program)
        assert dict(zip(names, versions.split(), strict=True)) == {name: locked[name] for name in names}
    assert host.check_output("docker exec dagster-code dbt --version").count("duckdb: 1.11.1") == 1


def test_images_are_those_of_the_platform_and_compiled(host: Any) -> None:
    listed = host.check_output("docker image ls --filter reference=data-platform/* --format '{{.Repository}}'").split()
    assert set(listed) == {f"data-platform/{name}" for name in ("base", "code-core", "dagster", "postgres")}
    missing = host.check_output(
        "docker exec dagster-webserver sh -c 'cd /opt/dagster/lib/python3*/site-packages/dagster "
        '&& find . -name "*.py" | wc -l && find . -name "*.pyc" | wc -l\''
    ).split()
    assert missing[0] == missing[1]
