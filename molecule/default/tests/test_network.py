"""A neighbour on the host's segment, which routes what it likes to the host, reaches no port of the containers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Platform

TABLE = "inet data-platform"
NEIGHBOUR = """
set -e
ip netns add neighbour
ip link add neighbour type veth peer name eth0 netns neighbour
ip addr add 198.51.100.1/24 dev neighbour
ip link set neighbour up
ip netns exec neighbour sh -ec '
  ip addr add 198.51.100.2/24 dev eth0
  ip link set eth0 up
  echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
  ip route add 127.0.0.0/8 via 198.51.100.1
  ip route add default via 198.51.100.1
'
"""
"""The loopback of a new namespace is down and has no address, so 127.0.0.0/8 is nobody's but the host's there."""
PORTS = [
    ("127.0.0.1", "dagster-webserver", 3001),
    ("itself", "dagster-webserver", 3001),
    ("itself", "dagster-postgres", 5432),
]


@pytest.fixture(scope="module")
def reaches(host: Any, platform: Platform) -> Iterator[Callable[[str, str, int], bool]]:
    """Tell whether a neighbour reaches a port of a container, by an address of the host's or by the container's own."""

    def attempt(address: str, container: str, port: int) -> bool:
        if address == "itself":
            form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
            address = host.check_output("docker inspect --format %s %s", form, container)
        else:
            port = platform.port
        program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2)"
        tried = host.run("ip netns exec neighbour python3 -c %s %s %s", program, address, str(port))
        assert tried.rc == 0 or "timed out" in tried.stderr, tried.stderr
        return tried.rc == 0

    host.check_output("bash -c %s", NEIGHBOUR)
    try:
        yield attempt
    finally:
        host.check_output("ip link delete neighbour; ip netns delete neighbour")


@pytest.fixture
def open_host(host: Any) -> Iterator[None]:
    """The host without the table, and with docker's own rules alone."""
    policy = host.check_output("iptables --list-rules FORWARD").splitlines()[0].split()[-1]
    host.check_output(f"nft delete table {TABLE} && iptables --policy FORWARD ACCEPT")
    try:
        yield
    finally:
        host.check_output(f"systemctl restart data-platform-firewall && iptables --policy FORWARD {policy}")


@pytest.mark.parametrize(("address", "container", "port"), PORTS)
def test_neighbour_reaches_nothing(
    reaches: Callable[[str, str, int], bool], address: str, container: str, port: int
) -> None:
    assert not reaches(address, container, port)


@pytest.mark.parametrize(("address", "container", "port"), PORTS)
def test_it_would_without_the_table(
    reaches: Callable[[str, str, int], bool], open_host: None, address: str, container: str, port: int
) -> None:
    assert reaches(address, container, port)


def test_published_ports_of_others_answer(host: Any, reaches: Callable[[str, str, int], bool]) -> None:
    image = host.check_output("docker inspect --format '{{.Config.Image}}' dagster-webserver")
    serve = "python -m http.server 8000"
    host.check_output(f"docker run --detach --name other --publish 198.51.100.1:8100:8000 {image} {serve}")
    try:
        asked = (
            "ip netns exec neighbour curl --silent --fail --retry 20 --retry-connrefused --retry-delay 1 --max-time 30"
        )
        own = host.check_output("docker inspect --format '{{.NetworkSettings.IPAddress}}' other")
        host.check_output(f"{asked} http://198.51.100.1:8100/")
        assert reaches("itself", "other", 8000), f"{own} is on a bridge that is not the platform's"
    finally:
        host.check_output("docker rm --force other")


def test_play_loads_rules_that_are_gone(host: Any, play: Callable[..., int]) -> None:
    before = host.check_output(f"nft list table {TABLE}")
    host.check_output(f"nft delete table {TABLE}")
    assert play("--check", "--diff") > 0
    assert host.run(f"nft list table {TABLE}").rc != 0
    assert play() > 0
    assert host.check_output(f"nft list table {TABLE}") == before
    assert play() == 0


def test_rules_are_there_before_the_engine_and_survive_other_tables(host: Any) -> None:
    shown = host.check_output("systemctl show data-platform-firewall --property=Before --property=UnitFileState")
    assert "docker.service" in shown
    assert "UnitFileState=enabled" in shown
    before = host.check_output(f"nft list table {TABLE}")
    host.check_output("systemctl reload data-platform-firewall")
    assert host.check_output(f"nft list table {TABLE}") == before
    assert not host.file("/etc/nftables.conf").contains("data-platform")
