"""Assets in the order data flows: `ingest` loads raw tables, `dbt` transforms them, `report` shows the outcome."""
