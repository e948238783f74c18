"""What this platform adds to Dagster inside the shared image."""
