"""A changed pipeline reaches the platform, and touches nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SERVICES, Platform

JOBS = """
{ repositoryOrError(repositorySelector: {repositoryName: "__repository__", repositoryLocationName: "core"}) {
    ... on Repository { jobs { name } } } }
"""


def core_at(code: Path) -> str:
    """Give the variables that make the location core of another tree."""
    (core,) = yaml.safe_load((ROOT / "roles/dagster/defaults/main.yml").read_text())["dagster_code_locations"]
    return json.dumps({"dagster_code_locations": [core | {"source": str(code)}]})


def jobs(platform: Platform) -> set[str]:
    """Give the names of the jobs that the UI shows."""
    return {job["name"] for job in platform.graphql(JOBS)["repositoryOrError"]["jobs"]}


def shown(platform: Platform, job: str) -> str:
    """Say whether the UI shows a job."""
    return "shown" if job in jobs(platform) else "missing"


def test_changed_pipeline_is_served_alone_and_a_broken_one_says_why_it_is_not(
    host: Any, platform: Platform, play: Callable[..., int], tmp_path: Path
) -> None:
    code = tmp_path / "code"
    shutil.copytree(ROOT / "code/data-platform", code, ignore=shutil.ignore_patterns("target", "__pycache__"))
    definitions = code / "core/orchestration/dagster/data_platform/jobs.py"
    definitions.write_text(
        definitions.read_text().replace("def smoke()", "def smoke_renamed()") + "\nsmoke = smoke_renamed\n"
    )
    state = "docker inspect --format '{{.Name}} {{.Id}} {{.Image}}' " + " ".join(SERVICES)
    before = host.check_output(state).splitlines()

    assert play("--extra-vars", core_at(code)) > 0
    assert platform.wait(lambda: shown(platform, "smoke_renamed"), {"shown"}, 15) == "shown"
    after = host.check_output(state).splitlines()
    assert [line.split()[0] for line, old in zip(after, before, strict=True) if line != old] == ["/dagster-code"]

    definitions.write_text("import nowhere_to_be_found\n")
    with pytest.raises(AssertionError, match="(?s)is refused.*No module named 'nowhere_to_be_found'"):
        play("--extra-vars", core_at(code))

    play()
    assert platform.wait(lambda: shown(platform, "smoke"), {"shown"}, 15) == "shown"
    after = host.check_output(state).splitlines()
    assert [line.split()[0] for line, old in zip(after, before, strict=True) if line != old] == ["/dagster-code"]


def test_configuration_that_dagster_refuses_never_reaches_it(host: Any, play: Callable[..., int]) -> None:
    before = host.check_output("sha256sum /etc/data-platform/dagster/dagster.yaml")
    with pytest.raises(AssertionError, match="(?s)Dagster does not accept this configuration.*no_such_key"):
        play("--extra-vars", '{"dagster_config": {"no_such_key": 1}}')
    assert host.check_output("sha256sum /etc/data-platform/dagster/dagster.yaml") == before


def test_open_ui_without_a_word_on_the_missing_login_is_refused_before_any_change(play: Callable[..., int]) -> None:
    with pytest.raises(AssertionError, match="(?s)dagster_webserver_without_login: true.*changed=0"):
        play("--extra-vars=dagster_webserver_bind=0.0.0.0")


def test_check_mode_tells_and_changes_nothing(host: Any, play: Callable[..., int], tmp_path: Path) -> None:
    code = tmp_path / "code"
    shutil.copytree(ROOT / "code/data-platform", code, ignore=shutil.ignore_patterns("target", "__pycache__"))
    (code / "added.py").touch()
    state = "sha256sum /etc/systemd/system/dagster-*; docker ps --quiet | sort; docker image ls --quiet | sort"
    before = host.check_output(state)
    assert play("--check", "--diff", "--extra-vars", core_at(code)) > 0
    assert host.check_output(state) == before


def test_bad_start_on_an_installed_host_changes_nothing(host: Any, play: Callable[..., int]) -> None:
    image = host.check_output("docker inspect --format '{{.Image}}' dagster-webserver")
    host.check_output(f"docker run --detach --rm --name other --publish 127.0.0.1:3002:80 {image} sleep infinity")
    state = (
        "docker ps --all --no-trunc --format '{{.ID}} {{.Names}} {{.State}}'; docker image ls --no-trunc --quiet; "
        "dpkg-query --show; find /etc /usr -printf '%p %T@ %m %U\\n'"
    )
    before = host.check_output(state)
    try:
        with pytest.raises(AssertionError, match="(?s)write dagster_max_retries.*container other listens.*changed=0"):
            play("--extra-vars=dagster_max_retry=1", "--extra-vars=dagster_webserver_port=3002")
        assert host.check_output(state) == before
    finally:
        host.check_output("docker kill other")


FOREIGN_ENGINE = """
set -e
mv /etc/docker/daemon.json /etc/docker/daemon.json.kept
echo '{}' > /etc/docker/daemon.json
mkdir -p /tmp/foreign/DEBIAN
printf 'Package: containerd.io\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: none\n' \\
  > /tmp/foreign/DEBIAN/control
dpkg-deb --build /tmp/foreign >/dev/null
dpkg --install /tmp/foreign.deb
"""


def test_an_engine_that_is_not_ours_is_left_alone(host: Any, play: Callable[..., int]) -> None:
    host.check_output("bash -c %s", FOREIGN_ENGINE)
    try:
        with pytest.raises(AssertionError, match=r"(?s)containerd.io.*daemon\.json.*changed=0"):
            play()
        assert host.file("/etc/docker/daemon.json").content_string == "{}\n"
    finally:
        host.check_output(
            "dpkg --purge containerd.io && rm -r /tmp/foreign /tmp/foreign.deb "
            "&& mv /etc/docker/daemon.json.kept /etc/docker/daemon.json"
        )
