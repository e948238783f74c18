"""Dagster's webserver, whose pooled connections to the database are tried before they are used.

Run as ``python -m data_platform_runtime.webserver ARGUMENT…`` instead of ``dagster-webserver``.
"""

from __future__ import annotations

if __name__ == "__main__":
    from dagster_webserver.cli import main

    from data_platform_runtime import connections

    connections.attempt()
    main()
