"""The check that Ansible makes before it puts a configuration in place; tests/roles feeds it the rendered ones."""

from pathlib import Path

import pytest
from data_platform_runtime import check_config

RUNS = "concurrency: {runs: {max_concurrent_runs: %s}}\n"
SERVER = "load_from: [{grpc_server: {host: a, port: %s}}]\n"
REFUSED = "Dagster does not accept this configuration: "


@pytest.mark.parametrize("text", [RUNS % 4, SERVER % 4000])
def test_good_file_is_accepted_in_silence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "some.yaml").write_text(text)
    assert check_config.main([str(tmp_path / "some.yaml")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [(RUNS % "many", "max_concurrent_runs"), (SERVER % "many", "port"), ("a: b: c", ""), ("[1, 2]", "")],
)
def test_bad_file_is_refused_with_dagsters_reason(
    text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "some.yaml").write_text(text)
    assert check_config.main([str(tmp_path / "some.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(REFUSED)
    assert reason in said


def test_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert check_config.main([str(tmp_path / "missing.yaml")]) == 1
    assert capsys.readouterr().err.startswith(REFUSED)
