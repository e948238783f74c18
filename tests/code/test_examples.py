"""The example code location loads and materialises on its own."""

import sys
from pathlib import Path

import dagster as dg


def test_examples(code: Path, warehouse_path: Path, instance: dg.DagsterInstance, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [str(code), *sys.path])
    from examples.definitions import defs

    job = defs.resolve_job_def("examples")
    assert all(node.pool == "duckdb" for node in job.all_node_defs)
    result = job.execute_in_process(instance=instance)
    assert result.success
    assert [check.passed for check in result.get_asset_check_evaluations()] == [True]
