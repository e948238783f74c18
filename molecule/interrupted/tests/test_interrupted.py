"""A play that is killed anywhere leaves no trap: the next one gives the same host as a clean installation."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
NAME = "data-platform-interrupted"
INVENTORY = ROOT / "molecule/interrupted/inventory"
SERVICE = "/usr/local/lib/data-platform/container-unit"

STATE = f"""
docker image ls --format '{{{{.Repository}}}}:{{{{.Tag}}}}' | sort
docker container ls --all --format '{{{{.Names}}}} {{{{.Image}}}} {{{{.State}}}}' | sort
docker info --format '{{{{json .Labels}}}}'
docker network ls --format '{{{{.Name}}}}' | sort
systemctl list-unit-files --state=enabled --plain --no-legend | sort
systemctl --failed --plain --no-legend
dpkg-query --show --showformat '${{Package}} ${{db:Status-Abbrev}}\\n' | sort
find /etc/data-platform /etc/docker /usr/local/lib -printf '%p %M %U %G\\n' | sort
find /var/lib/data-platform -maxdepth 1 -printf '%p %M %U %G\\n' | sort
cd /etc; find data-platform docker systemd/system -type f -not -path '*/secrets/*' | sort | xargs sha256sum
find /var/tmp /tmp -name 'data-platform*'
{SERVICE} converge --check
"""

KILLS = [
    ("docker : Install the packages", 2.0, True),
    ("images : Build the root file system", 4.0, True),
    ("images : Import it", 0.3, False),
    ("images : Build the last", 8.0, False),
    ("postgres : Make a password, once", 0.0, False),
    ("dagster : Configure Dagster", 1.0, True),
    ("service : Start every service", 3.0, True),
]
"""Name of the task, seconds into it, and whether what it runs on the host is killed as well (a lost connection);
otherwise Ansible's worker, and what it runs on the host, go on to the end of their task."""


def docker(*arguments: str) -> str:
    """Run the controller's docker client; give its output."""
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout


def start(*arguments: str, playbook: str = "playbooks/site.yml") -> subprocess.Popen[str]:
    """Start a play in a process group of its own."""
    return subprocess.Popen(
        ["ansible-playbook", f"--inventory={INVENTORY}", playbook, *arguments],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(ROOT / "roles")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def play(*arguments: str, playbook: str = "playbooks/site.yml") -> int:
    """Run a play to its end; give how much it changed."""
    process = start(*arguments, playbook=playbook)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return sum(map(int, re.findall(r"changed=(\d+)", output)))


def kill(task: str, seconds: float, lost: bool, *arguments: str) -> None:
    """Start a play, and kill it that many seconds into a task."""
    process = start(*arguments)
    assert process.stdout
    output = ""
    while f"TASK [{task}" not in (line := process.stdout.readline()):
        output += line
        assert line, f"The play ended before '{task}':\n{output}"
    time.sleep(seconds)
    assert process.poll() is None, f"The play ended before it was killed in '{task}'."
    os.kill(process.pid, signal.SIGKILL)
    if lost:
        subprocess.run(["pkill", "-KILL", "-f", f"ansible-playbook --inventory={INVENTORY}"], check=False)
        subprocess.run(["docker", "exec", NAME, "pkill", "-KILL", "-f", "python3|apt-get|mmdebstrap|dpkg"], check=False)
    process.communicate()


def state() -> str:
    """Describe the host, less what is made once and differs everywhere."""
    return docker("exec", NAME, "bash", "-c", STATE)


@pytest.fixture(scope="module")
def clean() -> str:
    """The host as a clean installation leaves it; it is then taken away, and a blank one put in its place."""
    described = state()
    docker("rm", "--force", "--volumes", NAME)
    play(playbook="molecule/create.yml")
    return described


def test_installation_killed_at_many_points_ends_as_a_clean_one(clean: str) -> None:
    for task, seconds, lost in KILLS:
        kill(task, seconds, lost)
    play()
    assert state() == clean
    assert play() == 0


def test_change_killed_before_its_restart_reaches_the_services(host: Any, clean: str) -> None:
    running = {name: docker("exec", NAME, "docker", "inspect", "--format", "{{.Id}}", name) for name in services(host)}
    changed = ["--extra-vars", '{"dagster_config": {"concurrency": {"runs": {"max_concurrent_runs": 7}}}}']
    kill("service : Make a directory", 0.0, True, *changed)
    assert play(*changed) > 0
    after = {name: docker("exec", NAME, "docker", "inspect", "--format", "{{.Id}}", name) for name in services(host)}
    assert {name for name in running if after[name] != running[name]} == set(running) - {"dagster-postgres"}
    assert play(*changed) == 0


def test_engine_settings_killed_before_their_restart_reach_the_engine(host: Any, clean: str) -> None:
    changed = ["--extra-vars", '{"docker_daemon_options": {"log-driver": "local", "debug": true}}']
    kill("docker : Look for the packages", 0.0, True, *changed)
    play(*changed)
    assert host.check_output("docker info --format '{{.Debug}}'") == "true"
    play()
    assert state() == clean


def test_configuration_edited_by_hand_is_put_right_and_reloaded(host: Any, clean: str) -> None:
    host.check_output("sed -i 's/granularity: op/granularity: run/' /etc/data-platform/dagster/dagster.yaml")
    host.check_output("systemctl restart dagster-daemon")
    assert play() > 0
    assert state() == clean


def services(host: Any) -> list[str]:
    """Names of the services on the host."""
    files = host.check_output("ls /etc/systemd/system").split()
    return [name.removesuffix(".service") for name in files if name.startswith("dagster-")]
