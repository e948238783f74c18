"""Metadata on a PostgreSQL server that is there already."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Platform

PASSWORD = "se:same\\"
EXTERNAL = {"host": "elsewhere", "port": 6000, "database": "keeper", "user": "keeper", "password": PASSWORD}
OPTIONS = {"options": {"application_name": "from afar"}}
SERVER = """
install --mode=444 /dev/stdin /var/tmp/elsewhere
docker run --detach --name elsewhere --network data-platform --tmpfs /tmp:mode=1777 --env DATABASE=keeper \\
    --env PASSWORD_FILE=/elsewhere --env PGDATA=/tmp/data --volume /var/tmp/elsewhere:/elsewhere:ro \\
    "$(docker inspect --format '{{.Config.Image}}' dagster-postgres)" start-postgres -c port=6000
"""
RUNS = "SELECT count(*) FROM runs WHERE pipeline_name = 'smoke'"
ASK = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'from afar'; {RUNS}"


@pytest.fixture
def server(host: Any, play: Callable[..., int]) -> Iterator[None]:
    """A server that is not the platform's; afterwards all is as before."""
    host.check_output("printf %%s %s | (cat > /var/tmp/password; sh -c %s < /var/tmp/password)", PASSWORD, SERVER)
    yield
    play()
    host.check_output("docker rm --force --volumes elsewhere")


@pytest.mark.slow
def test_external_database_takes_the_place_of_our_own(
    host: Any, platform: Platform, play: Callable[..., int], server: None
) -> None:
    before = platform.postgres(RUNS)
    variables = json.dumps({"postgres_external": EXTERNAL | OPTIONS})
    assert play("--extra-vars", variables) > 0
    assert play("--extra-vars", variables) == 0
    assert host.check_output("docker ps --quiet --all --filter name=dagster-postgres") == ""
    assert not host.file("/etc/systemd/system/dagster-postgres.service").exists
    units = host.check_output("systemctl list-units --all --plain --no-legend 'dagster-*'").splitlines()
    assert {unit.split()[0] for unit in units} == {
        f"dagster-{name}.service" for name in ("code", "daemon", "webserver")
    }
    host.check_output("systemctl restart 'dagster-*'")
    assert platform.finished(platform.launch("smoke")) == "SUCCESS"
    asked = "docker exec elsewhere psql --port=6000 --username=postgres --dbname=keeper -tA --command=%s"
    connections, runs = map(int, host.check_output(asked, ASK).split())
    assert (connections > 0, runs) == (True, 1)
    assert PASSWORD not in host.check_output("docker inspect dagster-webserver dagster-daemon dagster-code")
    assert play() > 0
    assert platform.postgres(RUNS) == before
