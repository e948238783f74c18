"""The platform's own code location: ingests flight data, transforms it with dbt and reports on it."""

import importlib
import sys
import warnings

import dagster as dg

warnings.filterwarnings("ignore", message=".*backfill_policy.* is currently in beta", category=dg.BetaWarning)

# dagster_dbt loads all of dbt for the names of a few types, and has its own of these where dbt is missing. That is a
# third of the time in which a run starts, and dbt is a process of its own anyway.
sys.modules["dbt"] = None
importlib.import_module("dagster_dbt")
del sys.modules["dbt"]
