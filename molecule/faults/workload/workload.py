"""Runs that take a while, hold memory, write and fail: what faults are inflicted on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import duckdb
import pandas as pd

JOURNAL = Path("/var/lib/data-platform/dagster/journal")
"""Numbers of the transactions that DuckDB acknowledged; outside of the warehouse."""


@dg.op(config_schema={"seconds": dg.Field(float, default_value=1.0)})
def wait(context: dg.OpExecutionContext) -> None:
    """Take a while."""
    time.sleep(context.op_config["seconds"])


@dg.job
def patient() -> None:
    """A run that takes as long as it is told to."""
    wait()


@dg.op(
    pool="duckdb",
    config_schema={"transactions": dg.Field(int, default_value=3), "pause": dg.Field(float, default_value=0.0)},
)
def write(context: dg.OpExecutionContext) -> None:
    """Commit one row after the other to two tables, and journal each commit that was acknowledged."""
    with duckdb.connect(os.environ["DATA_PLATFORM_WAREHOUSE"]) as connection, JOURNAL.open("a") as journal:
        connection.execute("create schema if not exists workload")
        for table in ("left_hand", "right_hand"):
            connection.execute(f"create table if not exists workload.{table} (writer varchar, number integer)")
        for number in range(context.op_config["transactions"]):
            connection.begin()
            connection.execute("insert into workload.left_hand values (?, ?)", [context.run_id, number])
            time.sleep(context.op_config["pause"])
            connection.execute("insert into workload.right_hand values (?, ?)", [context.run_id, number])
            connection.commit()
            journal.write(f"{context.run_id} {number}\n")
            journal.flush()


@dg.job
def writer() -> None:
    """A run that writes to the warehouse."""
    write()


@dg.op(config_schema={"by_a_child": dg.Field(bool, default_value=False)})
def hold(context: dg.OpExecutionContext) -> None:
    """Hold more memory than there is, or let a child do so, as dbt is one."""
    program = "held = [bytes([1]) * 2**20 for _ in range(2**20)]"
    if context.op_config["by_a_child"]:
        subprocess.run([sys.executable, "-c", program], check=True)
    else:
        exec(program)


@dg.job
def greedy() -> None:
    """A run that exceeds its memory limit."""
    hold()


@dg.op
def fail() -> None:
    """Fail as a pipeline does that is wrong."""
    raise ValueError("this pipeline is wrong")


@dg.job
def wrong() -> None:
    """A run that fails by itself."""
    fail()


@dg.asset
def frame() -> pd.DataFrame:
    """A table that the next asset is given."""
    return pd.DataFrame({"number": range(1000)})


@dg.asset
def total(context: dg.AssetExecutionContext, frame: pd.DataFrame) -> dg.MaterializeResult:
    """What that table comes to."""
    return dg.MaterializeResult(metadata={"total": int(frame["number"].sum()), "token": os.environ["TOKEN"][:2]})


minutely = dg.ScheduleDefinition(job=patient, cron_schedule="* * * * *", name="minutely")

defs = dg.Definitions(
    assets=[frame, total],
    jobs=[
        patient,
        writer,
        greedy,
        wrong,
        dg.define_asset_job("make_frame", selection=["frame"]),
        dg.define_asset_job("make_total", selection=["total"]),
    ],
    schedules=[minutely],
    executor=dg.in_process_executor,
)
