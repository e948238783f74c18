"""The base image from a registry that wants a login and has a certificate of its own CA: Debian's docker-registry."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

FOLDER = "/tmp/registry"
BASE = "data-platform/base:pulled"
USER = "puller"
PASSWORD = "a-throw-away-password"
CONFIG = """
version: 0.1
storage: {filesystem: {rootdirectory: /tmp/registry/data}}
http:
  addr: :5443
  tls: {certificate: /tmp/registry/server.crt, key: /tmp/registry/server.key}
auth:
  htpasswd: {realm: test, path: /tmp/registry/htpasswd}
"""
START = """
set -eu
cd /tmp/registry
apt-get update -q
apt-get download -q docker-registry
dpkg-deb --extract docker-registry_*.deb .
new_key="-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
openssl req -x509 $new_key -subj /CN=test-ca -keyout ca.key -out ca.crt
openssl req -x509 -CA ca.crt -CAkey ca.key $new_key -subj /CN=registry -addext "subjectAltName=IP:$1" \\
  -addext basicConstraints=critical,CA:false -keyout server.key -out server.crt
perl -e 'printf "%s:%s\\n", $ARGV[0], crypt($ARGV[1], q($2y$05$abcdefghijklmnopqrstuu))' "$2" "$3" > htpasswd
systemd-run --unit=registry /tmp/registry/usr/bin/docker-registry serve /tmp/registry/config.yml
mkdir -p "/etc/docker/certs.d/$1:5443"
cp ca.crt "/etc/docker/certs.d/$1:5443/"
"""
# A small Debian, and one that is no trixie; neither stays on the host.
PUSH = """
set -eu
login=/tmp/registry/login
echo "$3" | docker --config "$login" login --username "$2" --password-stdin "$1:5443" 2>/dev/null
docker run --name smaller data-platform/base:current \\
  sh -c 'apt-get purge --yes --autoremove -o APT::AutoRemove::RecommendsImportant=false python3 ca-certificates openssl'
docker export smaller | docker import - "$1:5443/team/debian:smaller"
docker rm smaller
echo "FROM $1:5443/team/debian:smaller
RUN sed -i s/trixie/bookworm/ /etc/os-release" | DOCKER_BUILDKIT=1 docker build --tag "$1:5443/team/debian:older" -
for tag in smaller older; do
  docker --config "$login" push "$1:5443/team/debian:$tag"
  docker image inspect --format '{{index .RepoDigests 0}}' "$1:5443/team/debian:$tag" > "/tmp/registry/$tag"
  docker image rm "$1:5443/team/debian:$tag"
done
rm -r "$login" "/etc/docker/certs.d/$1:5443"
"""


class Registry(NamedTuple):
    """What the registry under test has."""

    address: str
    smaller: str
    older: str
    ca: Path

    def variables(self) -> dict[str, str]:
        """Give what an inventory says to pull from it."""
        return {
            "images_registry_image": self.smaller,
            "images_registry_username": USER,
            "images_registry_password": PASSWORD,
            "images_registry_ca": str(self.ca),
        }


@pytest.fixture(scope="module")
def registry(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry on the host, with two images that are not on the host itself."""
    address = host.check_output("hostname --ip-address").split()[0]
    arguments = f"{address} {USER} {PASSWORD}"
    try:
        host.check_output(f"mkdir -p {FOLDER} && echo %s > {FOLDER}/config.yml", CONFIG)
        host.check_output(f"bash -c %s sh {arguments}", START)
        host.check_output(f"bash -c %s sh {arguments}", PUSH)
        ca = tmp_path_factory.mktemp("registry") / "ca.crt"
        ca.write_text(host.file(f"{FOLDER}/ca.crt").content_string)
        smaller, older = (host.file(f"{FOLDER}/{tag}").content_string.strip() for tag in ("smaller", "older"))
        yield Registry(address, smaller, older, ca)
    finally:
        host.run(f"systemctl stop registry; rm -rf {FOLDER} /etc/docker/certs.d; docker rm --force smaller")
        host.run(f"docker image rm {BASE} {address}:5443/team/debian:smaller {address}:5443/team/debian:older")


@pytest.fixture
def pull(play: Callable[..., int], tmp_path: Path) -> Callable[[dict[str, str]], int]:
    """Make the base as the source registry does, with these variables, and nothing that stands on it."""
    task = {
        "name": "Base",
        "ansible.builtin.include_role": {"name": "images", "tasks_from": "registry"},
        "vars": {"images_base": BASE, "images_proxy": "{{ data_platform_proxy | default({}) }}"},
    }
    proxy = "{{ data_platform_proxy | default({}) }}"
    content = {"hosts": "data_platform", "become": True, "gather_facts": False, "environment": proxy, "tasks": [task]}
    (tmp_path / "pull.yml").write_text(yaml.safe_dump([content]))

    def run(variables: dict[str, str]) -> int:
        (tmp_path / "variables.yml").write_text(yaml.safe_dump(variables))
        given = f"--extra-vars=@{tmp_path}/variables.yml"
        return play("-vvv", "--diff", given, playbook=str(tmp_path / "pull.yml"))

    return run


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"images_registry_password": "wrong"}, "does not let puller pull .* correct images_registry_username and"),
        ({"images_registry_username": ""}, "does not let us without a login pull"),
        ({"images_registry_ca": ""}, "signed by no CA that the host trusts: name it in images_registry_ca"),
        (
            {"images_registry_image": "{0.address}:5443/team/debian@sha256:" + 64 * "0"},
            "has no image .*: correct images_r",
        ),
        ({"images_registry_image": "{0.older}"}, "is not Debian trixie, as images_suite says: name one that is"),
    ],
)
def test_image_that_cannot_be_had_is_one_sentence(
    host: Any, registry: Registry, pull: Callable[[dict[str, str]], int], wrong: dict[str, str], sentence: str
) -> None:
    with pytest.raises(AssertionError) as refused:
        pull(registry.variables() | {name: value.format(registry) for name, value in wrong.items()})
    said = " ".join(str(refused.value).split())
    assert re.search(sentence, said), said[-3000:]
    assert PASSWORD not in str(refused.value)
    assert not host.file("/run/data-platform-registry").exists
    assert registry.address not in host.check_output("docker image ls")


def test_base_is_pulled_and_given_what_it_lacks(
    host: Any, registry: Registry, pull: Callable[[dict[str, str]], int]
) -> None:
    assert registry.smaller.split("@")[1] not in host.check_output("docker image ls --digests")
    assert pull(registry.variables()) > 0
    inside = "python3 --version && command -v useradd && grep --count BEGIN /etc/ssl/certs/ca-certificates.crt"
    assert host.check_output(f"docker run --rm --network none {BASE} sh -c %s", inside)
    assert registry.address not in host.check_output("docker image ls")
    places = "/root /run /etc /var/lib/data-platform /var/log"
    assert host.run(f"grep --recursive --files-with-matches {PASSWORD} {places}").stdout == ""
    assert PASSWORD not in host.check_output(f"docker history --no-trunc {BASE} && journalctl --output=cat --no-pager")
    assert not host.file("/run/data-platform-registry").exists


def test_engine_is_not_exchanged_under_the_platform(play: Callable[..., int]) -> None:
    with pytest.raises(AssertionError, match=r"(?s)say\s+docker_packages_from: debian.*changed=0"):
        play("--extra-vars=docker_packages_from=docker")
