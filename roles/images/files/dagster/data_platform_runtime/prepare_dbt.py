"""Install the packages of a dbt project and parse it, when the image of a code location is built.

Run as ``python -m data_platform_runtime.prepare_dbt``: the variable ``DBT_PROJECT`` names the project's directory
(empty means that there is none), ``DBT_ENVIRONMENT`` its environment at run time as a JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGES = ("packages.yml", "dependencies.yml")


def commands(project: Path) -> list[list[str]]:
    """What dbt is to do for the project in the directory ``project``."""
    where = ["--project-dir", str(project)]
    if (project / "profiles.yml").exists():
        where += ["--profiles-dir", str(project)]
    dbt = ["dbt", "--quiet", "--log-path", "/tmp"]
    deps = [[*dbt, "deps", *where]] if any((project / name).exists() for name in PACKAGES) else []
    return [*deps, [*dbt, "parse", *where]]


def main() -> int:
    """Prepare the project; give the exit status."""
    project = os.environ.get("DBT_PROJECT")
    if not project:
        return 0
    environment = {key: str(value) for key, value in json.loads(os.environ.get("DBT_ENVIRONMENT") or "{}").items()}
    for command in commands(Path(project)):
        done = subprocess.run(command, env={**os.environ, **environment}, check=False)
        if done.returncode:
            print(f"dbt {command[4]} failed in {project}: correct the project as dbt says above.", file=sys.stderr)
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
