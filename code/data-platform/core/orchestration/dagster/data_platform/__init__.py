"""The platform's own code location: ingests flight data, transforms it with dbt and reports on it."""

import warnings

import dagster as dg

warnings.filterwarnings("ignore", message=".*backfill_policy.* is currently in beta", category=dg.BetaWarning)
