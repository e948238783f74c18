"""Load the code of a location as its code server would, before that is put in the place of the one that serves.

Run as ``python -m data_platform_runtime.rehearsal [--secrets=FILE] --location-name=NAME --working-directory=DIRECTORY
--module-name=MODULE``: exits with 1 and what is wrong on standard error; prints a sentence for each thing that is no
reason not to ship, but to look.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from data_platform_runtime import code_servers

CODE = Path("/opt/data-platform/code")
"""Where the code of a location is in its image."""


class Refused(Exception):
    """The code cannot be served; the text says why."""


def load(module: str, directory: str) -> list[Any]:
    """Load all definitions of a module; give its repositories.

    Args:
        module: The module.
        directory: Directory that Python starts in.

    Raises:
        Refused: The module does not load, or what it defines does not fit together.
    """
    from dagster._core.remote_representation.external_data import RepositorySnap
    from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
    from dagster._grpc.server import LoadedRepositories

    os.chdir(directory)
    origin = LoadableTargetOrigin(module_name=module, working_directory=directory)
    try:
        loaded = LoadedRepositories(origin, container_image=None, entry_point=["dagster"], container_context=None)
        repositories = list(loaded.definitions_by_name.values())
        for repository in repositories:
            repository.validate_loadable()
            RepositorySnap.from_def(repository)
    except Exception as error:
        raise Refused(plainly(error)) from error
    return repositories


def plainly(error: BaseException, code: Path = CODE) -> str:
    """What went wrong in code that was loaded, as Python prints it: the first cause, and the lines of that code alone.

    Args:
        error: What loading ended with.
        code: Directory that the code is in.
    """
    while error.__cause__:
        error = error.__cause__
    told = traceback.TracebackException.from_exception(error)
    lines = [frame for frame in told.stack if Path(frame.filename).is_relative_to(code)]
    where = ["Traceback (most recent call last):\n", *traceback.StackSummary.from_list(lines).format()] if lines else []
    return "".join([*where, *told.format_exception_only()]).strip()


def stale_models(project: Path) -> list[str]:
    """Files of a dbt project that its manifest does not describe as they are.

    Args:
        project: Directory with the project, and the manifest in ``target``; none if that is of another program.
    """
    manifest = json.loads((project / "target" / "manifest.json").read_text())
    if not isinstance(manifest, dict) or "dbt_schema_version" not in manifest.get("metadata", {}):
        return []
    described = {
        node["original_file_path"]: node["checksum"]["checksum"]
        for node in manifest["nodes"].values()
        if node["package_name"] == manifest["metadata"]["project_name"]
        and node["resource_type"] in ("model", "snapshot", "analysis")
        and node["checksum"]["name"] == "sha256"
        and node["original_file_path"].endswith(".sql")
    }

    def found(file: str) -> str:
        path = project / file
        return hashlib.sha256(path.read_bytes().decode().strip().encode()).hexdigest() if path.is_file() else "none"

    return sorted(file for file, checksum in described.items() if found(file) != checksum)


def missing(location: str, repositories: list[Any]) -> list[str]:
    """Schedules and sensors of a location that are switched on and that its code does not have any more, by name."""
    from dagster import DagsterInstance
    from dagster._core.scheduler.instigation import InstigatorStatus

    here = {item.name for repository in repositories for item in (*repository.schedule_defs, *repository.sensor_defs)}
    with DagsterInstance.get() as instance:
        states = instance.all_instigator_state()
    return sorted(
        state.instigator_name
        for state in states
        if state.status != InstigatorStatus.STOPPED
        and state.origin.repository_origin.code_location_origin.location_name == location
        and state.instigator_name not in here
    )


def main(arguments: list[str]) -> int:
    """Rehearse; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data_platform_runtime.rehearsal")
    for option in ("--location-name", "--working-directory", "--module-name"):
        parser.add_argument(option, required=True)
    options = parser.parse_args(code_servers.prepare(arguments))
    try:
        repositories = load(options.module_name, options.working_directory)
        for manifest in CODE.glob("**/target/manifest.json"):
            if stale := stale_models(manifest.parents[1]):
                image = os.environ.get("DAGSTER_CURRENT_IMAGE", "")
                raise Refused(
                    f"dbt's manifest in the image {image} is older than {', '.join(stale)}: remove that image from the "
                    "host, and run the playbook again, which builds it."
                )
    except Refused as reason:
        print(reason, file=sys.stderr)
        return 1
    for name in missing(options.location_name, repositories):
        print(
            f"{name} is switched on, and the new code of {options.location_name} does not have it any more: "
            "it runs no longer."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
