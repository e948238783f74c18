"""A bad host or inventory is refused with a sentence for each problem, all at once, and nothing on the host differs."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[3]
INVENTORY = ROOT / "molecule/refused/inventory"
NAME = "data-platform-refused"
SECRET = "do-not-show-this"

NOWHERE = "deb http://127.0.0.1:9/apt trixie main"
CONNECTION = r"http://127\.0\.0\.1:9/\S+: Could not connect to 127\.0\.0\.1:9 .* Connection refused\)"

SYSTEM = """
sed -i 's/^VERSION_ID=.*/VERSION_ID="11"/' /etc/os-release
echo 11.11 > /etc/debian_version
"""
SMALL = """
sed 's/^MemTotal:.*/MemTotal: 1048576 kB/' /proc/meminfo > /run/meminfo
mount --bind /run/meminfo /proc/meminfo
mount -t tmpfs -o size=64m tmpfs /var/lib/docker
"""
ENGINE = """
mkdir /etc/docker
echo '{}' > /etc/docker/daemon.json
"""
SOURCES = f"echo '{NOWHERE}' > /etc/apt/sources.list.d/nowhere.list\n"
SQUATTER = """
python3 -c '
import os, signal, socket
server = socket.create_server(("127.0.0.1", 3001))
os.fork() and os._exit(0)
signal.pause()
' > /dev/null 2>&1
"""
INDEX = """
mkdir -p /srv/python/uv
cd /srv
openssl req -x509 -newkey rsa:2048 -noenc -subj /CN=test -addext subjectAltName=IP:127.0.0.1 -keyout key -out cert
python3 -c '
import http.server, os, ssl
server = http.server.HTTPServer(("127.0.0.1", 8443), http.server.SimpleHTTPRequestHandler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("cert", "key")
server.socket = context.wrap_socket(server.socket, server_side=True)
os.fork() and os._exit(0)
server.serve_forever()
' > /dev/null 2>&1
"""
SUDO = """
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends sudo
"""

MISTAKES = f"""\
dagster_max_concurrent_runs: many
dagster_max_retry: 2
data_platform_proxi: {{}}
dagster_metadata_url: postgresql://dagster:{SECRET}@example.com/dagster
dagster_code_locations:
  - name: core
    source: nowhere
    modul: definitions
    env: {{PLAIN: one line, LINES: "{SECRET}\\nsecond line"}}
    secrets: {SECRET}
    limits: {{memory: 2g, pids: many}}
dagster_dequeue_interval: "{{{{ 'o' ~ 'ne' }}}}"
dagster_config: "{{{{ my_config }}}}"
docker_daemon_options:
images_ca_bundle: /etc/hostname
images_apt_sources: ["{NOWHERE}"]
images_package_index: https://user:{SECRET}@{SECRET}@nowhere.invalid/python
landing_members: [daemon, alcie]
preflight_disk: 7000
preflight_memory: 2000
tools_members: [bbo, "--", alcie]
"""
NOT_BOOTED = r"The host's first process is sleep: boot it with systemd\."


class Host(NamedTuple):
    """A host, the commands that make it a bad one, its variables in YAML, and what is then said of it."""

    state: str
    variables: str
    sentences: list[str]


HOSTS = {
    NAME: Host(
        SYSTEM + SMALL + ENGINE + SOURCES + SQUATTER,
        MISTAKES,
        [
            r"Role dagster has no variable dagster_max_retry \(\S+:2\): write dagster_max_retries, or give .*",
            r"The platform has no variable data_platform_proxi \(\S+:3\): write data_platform_proxy, or give .*",
            r"dagster_max_concurrent_runs \(\S+:1\) is a str: make it an int\.",
            r"dagster_code_locations\[0\] \(\S+:6\) has no option modul: write module\.",
            r"dagster_code_locations\[0\] \(\S+:6\) lacks module: add it\.",
            r"dagster_code_locations\[0\]\.secrets \(\S+:10\) is a str: make it a dict\.",
            r"dagster_code_locations\[0\]\.limits\.pids \(\S+:11\) is a str: make it an int\.",
            r"dagster_dequeue_interval \(\S+:12\) is a str: make it a float\.",
            r"dagster_config \(\S+:13\) cannot be resolved: .*'my_config' is undefined\.",
            r"docker_daemon_options has no value: give it a dict, or remove it\.",
            r"dagster_metadata_url holds a password, .*: take it out, and let the libpq password file .* hold it\.",
            r"The env of a code location has a line break in LINES, .*: put such a value into a file\.",
            r"The code location core has no source: there is no directory \S+/nowhere\.",
            r"images_ca_bundle is /etc/hostname, which is no file with certificates .*: correct it\.",
            r"The host runs Debian 11: use Debian 12 or Debian 13\.",
            r"The host has 1024 MiB of memory: give it 2000 \(preflight_memory\)\.",
            r"/var/lib/docker has 64 MiB free: make it 7000 \(preflight_disk\)\.",
            r"/etc/docker/daemon\.json is somebody else's: move its settings to docker_daemon_options, .*",
            r"The UI cannot listen on 127\.0\.0\.1:3001, because python3 \(process \d+\) listens there: free it, or .*",
            r"landing_members names alcie, whom the host does not know: add the user there, or correct the name\.",
            r"tools_members names bbo, --, alcie, whom the host does not know: .*",
            rf"The host's own apt fails \({CONNECTION}\): correct /etc/apt/sources\.list or .*",
            rf"apt cannot use the sources of the images \({CONNECTION}\): correct images_apt_sources or .*",
            r"The host cannot use the package index https://nowhere\.invalid/python \(.+\): correct .*",
        ],
    ),
    f"{NAME}-unbooted": Host(
        INDEX,
        """
        dagster_code_locations: []
        dagster_webserver_bind: 192.0.2.1
        images_apt_sources: a string
        images_ca_bundle: ""
        images_package_index: https://127.0.0.1:8443/python
        """,
        [
            NOT_BOOTED,
            r"dagster_code_locations is empty, and Dagster serves nothing then: name a location, or .*",
            r"images_apt_sources \(\S+\) is a str: make it a list\.",
            r"apt cannot use the sources of the images \(.*\): correct images_apt_sources .*",
            r"dagster_webserver_bind is 192\.0\.2\.1, where others could run code here, .*",
            r"The UI cannot listen on 192\.0\.2\.1:3001, because the host has no such address: .*",
            r"The images would not trust the certificate of the package index https://127\.0\.0\.1:8443/python "
            r"\(self-signed certificate\): put its CA into images_ca_bundle\.",
        ],
    ),
    f"{NAME}-trusting": Host(
        INDEX,
        """
        images_ca_bundle: "{{ inventory_dir }}/cert"
        images_package_index: https://127.0.0.1:8443/python
        """,
        [NOT_BOOTED],
    ),
    f"{NAME}-proxied": Host(
        "",
        """
        data_platform_proxy: {http_proxy: "http://127.0.0.1:9", https_proxy: "http://127.0.0.1:9"}
        images_package_index: http://packages.example.com/python
        images_source: registry
        images_registry_image: registry.example.com/debian:trixie
        images_registry_ca: /etc/hostname
        docker_repository_key: nowhere.asc
        dagster_code_locations:
          - name: core
            source: code/data-platform
            module: data_platform.definitions
            env: {NOTHING: , NUMBER: 1}
            secrets: {LIST: [a], TOKEN: a}
            limits: {memory: 2 GB, cpus: two}
        postgres_external: {host: db.example.com}
        postgres_limits: {memory: 100m}
        dagster_daemon_limits: {memory: 2g, prios: 5}
        """,
        [
            NOT_BOOTED,
            r"The host's own apt fails \(.*Could not connect to 127\.0\.0\.1:9 .*",
            r"The host cannot use the package index http://packages\.example\.com/python \(Connection refused\): .*",
            r"images_registry_image is 'registry\.example\.com/debian:trixie', which names no image by its digest: .*",
            r"images_registry_ca is /etc/hostname, which is no file with certificates .*: correct it\.",
            r"A code location has no plain value for NOTHING and LIST \(env or secrets\): .*",
            r"Docker does not understand limits, memory of core: 2 GB and cpus of core: two: .*",
            r"postgres_external names no server that can be logged in to: give it host and password, or leave it out\.",
            r"No service starts with so little memory, memory of postgres_limits: 100m: give it 256m or more\.",
            r"dagster_daemon_limits \(\S+:17\) has no option prios: write pids\.",
            r"docker_repository_key is nowhere\.asc, which is no file with a key .*: correct it\.",
        ],
    ),
    f"{NAME}-powerless": Host(
        SUDO,
        "ansible_user: nobody",
        [r"The user that Ansible logs in as cannot become root: give it sudo without a password, or log in as root\."],
    ),
    f"{NAME}-pythonless": Host(
        "mv /usr/bin/python3 /usr/bin/python3.away",
        "{dagster_max_retry: 2, images_ca_bundle: nowhere.pem}",
        [
            r"images_ca_bundle is nowhere\.pem, which is no file with certificates .*: correct it\.",
            r"The host has no Python: install python3 there\.",
            r"Role dagster has no variable dagster_max_retry \(\S+:1\): write dagster_max_retries, or give .*",
        ],
    ),
}
EXPECTED = [
    pytest.param(name, sentence, id=f"{name}-{number}")
    for name, host in HOSTS.items()
    for number, sentence in enumerate(host.sentences)
]

# Somebody who is not root, but may read this tree wherever it lies.
UNPRIVILEGED = (
    (
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=+dac_override",
        "--ambient-caps=+dac_override",
    )
    if os.geteuid() == 0
    else ()
)

EVERYTHING = """
dpkg-query --show --showformat '${Package} ${Version} ${db:Status-Abbrev}\\n'
find / /var/lib/docker -xdev -regex '/\\(proc\\|sys\\|run\\|tmp\\|dev\\|var/tmp\\|var/log\\|var/cache\\)' -prune \
    -o -printf '%p %T@ %s %m %U %G\\n' | sort
test ! -d /run/systemd/system || systemctl list-unit-files --plain --no-legend
test ! -d /run/systemd/system || systemctl list-units --all --plain --no-legend --type service | awk '{ print $1, $3 }'
command -v docker || echo no docker
"""


class Refusal(NamedTuple):
    """What the playbook said of each host, line by line; its whole output; and each host before and after."""

    lines: dict[str, list[str]]
    output: str
    before: dict[str, str]
    after: dict[str, str]


def docker(*arguments: str) -> str:
    """Run the controller's docker client; give its output."""
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout


def playbook(
    path: str, inventory: Path, prefix: tuple[str, ...] = (), **environment: str
) -> tuple[dict[str, list[str]], str]:
    """Run a playbook that is to be refused; give what it says of each host, line by line, and its whole output."""
    settings = {
        "no_proxy": f"{os.environ.get('no_proxy', '')},127.0.0.1",
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.json",  # and no other
    }
    command = [*prefix, "ansible-playbook", f"--inventory={inventory}", f"--forks={len(HOSTS)}", path]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **settings, **environment}, capture_output=True, text=True, check=False
    )
    content = json.loads(done.stdout)
    lines = {}
    for task in content["plays"][0]["tasks"]:
        lines |= {name: result["msg"].splitlines() for name, result in task["hosts"].items() if result.get("failed")}
    assert {(stats["changed"], stats["failures"]) for stats in content["stats"].values()} == {(0, 1)}
    return lines, done.stdout + done.stderr


def snapshot() -> dict[str, str]:
    """Describe all that a play could change on each host."""
    return {name: docker("exec", name, "bash", "-ec", EVERYTHING) for name in HOSTS}


def test_blank_host_can_be_looked_at_and_stays_as_it_is() -> None:
    before = docker("exec", NAME, "bash", "-ec", EVERYTHING)
    done = subprocess.run(
        ["ansible-playbook", f"--inventory={INVENTORY}", "playbooks/site.yml", "--check", "--diff"],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_FORCE_COLOR": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(docker("exec", NAME, "bash", "-ec", EVERYTHING).splitlines()) ^ set(before.splitlines()) == set()
    added = set(re.findall(r"^\+\+\+ after: (\S+)", done.stdout, re.MULTILINE))
    assert added >= {
        "/etc/docker/daemon.json",
        "/etc/data-platform/dagster/dagster.yaml",
        "/etc/systemd/system/dagster-postgres.service",
        "/etc/systemd/system/dagster-code.service",
    }


@pytest.fixture(scope="module")
def others() -> Iterator[None]:
    """The hosts beside Molecule's: its image, without systemd."""
    image = docker("container", "inspect", "--format", "{{.Image}}", NAME).strip()
    names = [name for name in HOSTS if name != NAME]
    docker("rm", "--force", *names)
    for name in names:
        docker("run", "--detach", "--name", name, image, "sleep", "infinity")
    yield
    docker("rm", "--force", *names)


@pytest.fixture(scope="module")
def refusal(others: None, tmp_path_factory: pytest.TempPathFactory) -> Refusal:
    """What became of one run of site.yml against all of the hosts."""
    inventory = tmp_path_factory.mktemp("inventory")
    shutil.copytree(INVENTORY / "group_vars", inventory / "group_vars")
    group = yaml.safe_load((INVENTORY / "hosts.yml").read_text())
    group["data_platform"]["hosts"] = {name: group["data_platform"]["hosts"][NAME] for name in HOSTS}
    (inventory / "hosts.yml").write_text(yaml.safe_dump(group))
    (inventory / "host_vars").mkdir()
    for name, host in HOSTS.items():
        docker("exec", name, "bash", "-ec", host.state)
        (inventory / "host_vars" / f"{name}.yml").write_text(host.variables)
    (inventory / "cert").write_text(docker("exec", f"{NAME}-trusting", "cat", "/srv/cert"))

    before = snapshot()
    lines, output = playbook("playbooks/site.yml", inventory)
    return Refusal(lines, output, before, snapshot())


@pytest.mark.parametrize(("name", "sentence"), EXPECTED)
def test_problem_is_one_sentence(refusal: Refusal, name: str, sentence: str) -> None:
    found = [line for line in refusal.lines[name] if re.fullmatch(sentence, line)]
    assert len(found) == 1, "\n".join(refusal.lines[name])


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_else_is_a_problem(refusal: Refusal, name: str) -> None:
    *sentences, last = refusal.lines[name]
    assert last == "Nothing was changed."
    assert [line for line in sentences if not any(re.fullmatch(one, line) for one in HOSTS[name].sentences)] == []


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_differs_afterwards(refusal: Refusal, name: str) -> None:
    assert refusal.before[name].count("\n") > 5_000
    assert set(refusal.after[name].splitlines()) ^ set(refusal.before[name].splitlines()) == set()


def test_no_secret_is_shown(refusal: Refusal) -> None:
    assert SECRET not in refusal.output


def test_lab_without_an_engine_and_without_root_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    environment = {
        "DOCKER_HOST": f"unix://{tmp_path}/docker.sock",
        "ANSIBLE_HOME": str(tmp_path),
        "HOME": str(tmp_path),
    }
    lines, _ = playbook(
        "playbooks/lab.yml", INVENTORY, UNPRIVILEGED, ANSIBLE_LOCAL_TEMP=str(tmp_path / "tmp"), **environment
    )
    [sentence] = lines["localhost"]
    assert sentence.startswith("No Docker engine answers this user; start one, or run this command as root, ")
