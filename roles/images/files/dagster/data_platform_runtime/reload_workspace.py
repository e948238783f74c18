"""Make the webserver in this container read workspace.yaml again; nothing restarts.

Run as ``python -m data_platform_runtime.reload_workspace``: exits with 0 once every code location was tried.
"""

from __future__ import annotations

import json
import sys
import urllib.request

TIMEOUT = 60.0
"""Seconds that reloading may take."""

RELOAD = "mutation { reloadWorkspace { __typename ... on PythonError { message } } }"


def reload_workspace(port: int = 3001) -> None:
    """Ask the webserver to read its workspace again.

    Raises:
        RuntimeError: It cannot be reached, or cannot read the workspace.
    """
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql",
        data=json.dumps({"query": RELOAD}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            answer = json.load(response)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the webserver does not answer on port {port}: {error}") from error
    reloaded = (answer.get("data") or {}).get("reloadWorkspace") or {}
    if reloaded.get("__typename") != "Workspace":
        raise RuntimeError(f"the webserver refuses: {reloaded.get('message') or answer}")


def main() -> int:
    """Reload; give the exit status."""
    try:
        reload_workspace()
    except RuntimeError as reason:
        print(f"The workspace was not read again: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
