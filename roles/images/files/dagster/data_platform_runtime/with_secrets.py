"""Run a command with secrets in its environment, where ``docker inspect`` does not show them.

Run as ``python -m data_platform_runtime.with_secrets FILE COMMAND…``: FILE holds a JSON object, name by value.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def read(file: Path) -> dict[str, str]:
    """Secrets by name.

    Args:
        file: A JSON object.

    Raises:
        ValueError: The file does not hold a JSON object.
    """
    secrets = json.loads(file.read_text())
    if not isinstance(secrets, dict):
        raise ValueError("it holds no JSON object")
    return {name: str(value) for name, value in secrets.items()}


def refusal(file: Path, error: OSError | ValueError) -> str:
    """Say in a sentence why secrets cannot be read."""
    reason = error.strerror if isinstance(error, OSError) else "it holds no JSON object of names and values"
    return f"The secrets in {file} cannot be read ({reason}): run the playbook again."


def main(arguments: list[str]) -> int:
    """Become the command in ``arguments``; give the exit status if that fails."""
    file, *command = arguments
    try:
        secrets = read(Path(file))
    except (OSError, ValueError) as error:
        print(refusal(Path(file), error), file=sys.stderr)
        return 1
    os.execvpe(command[0], command, {**os.environ, **secrets})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
