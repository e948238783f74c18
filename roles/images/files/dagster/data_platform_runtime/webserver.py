"""Dagster's webserver, with what this instance adds to it.

Its pooled connections to the database are tried before they are used (``connections``), and it stays with a code server
that was replaced until it has loaded the next one's code (``code_servers``).

Run as ``python -m data_platform_runtime.webserver ARGUMENT…`` instead of ``dagster-webserver``.
"""

from __future__ import annotations

if __name__ == "__main__":
    from dagster_webserver.cli import main

    from data_platform_runtime import code_servers, connections

    code_servers.stay()
    connections.attempt()
    main()
