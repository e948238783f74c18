"""Each run in a container of its own, which this instance alone describes.

Dagster's DockerRunLauncher takes image, mounts and more from what the code location and the run's row in the database
ask for. Here both may only choose among the images of the run's own code location; all else stands in a file of the
host, which is read at each launch, so that a changed code location restarts nothing:

    {"core": {"image": "data-platform/code-core", "container": {…}, "scratch": {"host": "…", "container": "…"}}}

``container`` is what docker-py's ``containers.create`` takes; below the directory ``host`` of ``scratch`` each run gets
a directory of its own, which it sees at the path ``container``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import docker
import requests
from dagster import DagsterRun, Field, StringSource
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher.base import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._core.storage.tags import MAX_RETRIES_TAG
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import ConfigurableClassData, serialize_value
from dagster_docker import DockerRunLauncher
from dagster_docker.container_context import DockerContainerContext
from dagster_docker.docker_run_launcher import DOCKER_CONTAINER_ID_TAG, DOCKER_IMAGE_TAG

SOCKETS = Path("/run/data-platform-code")
"""Directory of the host with one for each code location, in which its code servers listen."""

RUN_LABEL = "dagster/run_id"
UNREACHABLE = (502, 503, 504)
"""HTTP statuses of a proxy that does not reach the engine."""


class EngineUnreachable(DagsterUserCodeUnreachableError):
    """Docker does not answer; a run that was to be launched goes back to the queue, as if its code server did not."""


class ContainerRunLauncher(DockerRunLauncher):
    """Launches each run in a container of its own.

    Args:
        file: File that describes the containers of each code location.
        stop_timeout: Seconds that a run is given to end before it is killed.
        inst_data: What Dagster made this of.
    """

    def __init__(self, file: str, stop_timeout: int, inst_data: ConfigurableClassData | None = None) -> None:
        """Take note of where the containers are described."""
        super().__init__(inst_data=inst_data, container_kwargs={"stop_timeout": stop_timeout})
        self.file = Path(file)

    @classmethod
    def config_type(cls) -> Mapping[str, Any]:
        """What dagster.yaml may set."""
        return {
            "file": Field(StringSource, description="File that describes the containers of each code location."),
            "stop_timeout": Field(int, description="Seconds that a run is given to end before it is killed."),
        }

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        """Make a launcher of what dagster.yaml sets."""
        return cls(inst_data=inst_data, **config_value)

    def get_container_context(self, dagster_run: DagsterRun) -> DockerContainerContext:
        """Give the instance's own settings, whatever the code location or the run ask for."""
        return DockerContainerContext(container_kwargs=self.container_kwargs)

    def described(self, run: DagsterRun) -> dict[str, Any]:
        """Give what the instance says of the containers of a run's code location.

        Raises:
            ValueError: The run names a code location that this instance does not have.
        """
        name = run.remote_job_origin.location_name if run.remote_job_origin else None
        locations = json.loads(self.file.read_text())
        if name not in locations:
            raise ValueError(f"The run names the code location {name}, which this instance does not have.")
        return {"name": name, **locations[name]}

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start a run's container.

        Raises:
            EngineUnreachable: Docker does not answer.
            ValueError: The run may not have what it asks for.
            RuntimeError: Docker does not start the container.
        """
        run = context.dagster_run
        location = self.described(run)
        origin = run.job_code_origin
        image = (origin and origin.repository_origin.container_image) or ""
        if not re.fullmatch(re.escape(location["image"]) + ":[0-9a-f]{12}", image):
            raise ValueError(
                f"The run names the image '{image}', which is none of the code location {location['name']}."
            )
        kwargs = location["container"]
        if scratch := location.get("scratch"):
            source = Path(scratch["host"], run.run_id)
            source.mkdir(mode=0o700, exist_ok=True)
            mount = {"Type": "bind", "Source": str(source), "Target": scratch["container"]}
            kwargs["mounts"] = [*kwargs.get("mounts", []), mount]
        arguments = ExecuteRunArgs(job_origin=origin, run_id=run.run_id, instance_ref=None)
        kwargs["command"] = [*kwargs.get("command", []), run.run_id, serialize_value(arguments)]
        kwargs["labels"] = {**kwargs.get("labels", {}), RUN_LABEL: run.run_id, "dagster/job_name": run.job_name}

        with self.engine() as engine:
            container = create(engine, image, f"data-platform-run-{run.run_id}", kwargs)
            if container.labels.get(RUN_LABEL) != run.run_id:
                raise ValueError(f"The container {container.name} is not this run's: remove it.")
            self._instance.add_run_tags(run.run_id, {DOCKER_CONTAINER_ID_TAG: container.id, DOCKER_IMAGE_TAG: image})
            container.start()
        self._instance.report_engine_event(
            f"Launched the run in the container {container.name} with the image {image}.", run, cls=self.__class__
        )

    @contextmanager
    def engine(self) -> Iterator[docker.DockerClient]:
        """Ask Docker.

        Raises:
            EngineUnreachable: It does not answer.
            RuntimeError: It refuses.
        """
        try:
            client = docker.from_env()
            try:
                yield client
            finally:
                client.close()
        except (requests.ConnectionError, requests.Timeout) as error:
            raise EngineUnreachable(f"Docker does not answer: {error}") from error
        except docker.errors.APIError as error:
            if error.status_code in UNREACHABLE:
                raise EngineUnreachable(f"Docker does not answer: {error}") from error
            raise RuntimeError(f"Docker refuses: {error.explanation or error}") from error
        except docker.errors.DockerException as error:
            raise EngineUnreachable(f"Docker does not answer: {error}") from error

    @property
    def supports_resume_run(self) -> bool:
        """Whether a run can go on in a new container: what died is retried by a new run."""
        return False

    def _get_container(self, run: DagsterRun | None) -> Any:
        """Give a run's container, or None if it has none: the tag in the database may name another's."""
        identifier = run.tags.get(DOCKER_CONTAINER_ID_TAG, "") if run else ""
        if not re.fullmatch("[0-9a-f]{64}", identifier):
            return None
        with self.engine() as engine:
            try:
                container = engine.containers.get(identifier)
            except docker.errors.NotFound:
                return None
        return container if container.labels.get(RUN_LABEL) == run.run_id else None

    def terminate(self, run_id: str) -> bool:
        """Stop a run's container, and see to it that the run has ended then; give whether it had one that ran."""
        run = self._instance.get_run_by_id(run_id)
        if not run or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        container = self._get_container(run)
        runs = container is not None and container.status == "running"
        if runs:
            with self.engine() as engine:
                engine.containers.get(container.id).stop(timeout=self.container_kwargs["stop_timeout"])
        run = self._instance.get_run_by_id(run_id)
        if run and not run.is_finished and (runs or DOCKER_CONTAINER_ID_TAG in run.tags):
            self._instance.report_run_canceled(run)
        return runs

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Tell whether a run's container runs; of one that ended, why.

        A run that was never launched is executed by somebody's command in the container of a code server, and reports
        by itself what becomes of it, unless that container ended with it.

        Raises:
            EngineUnreachable: Docker does not answer, so nothing is known.
        """
        if DOCKER_CONTAINER_ID_TAG not in run.tags:
            record = self._instance.get_run_record_by_id(run.run_id)
            if not record or not record.start_time or listened_at(record.start_time):
                return CheckRunHealthResult(WorkerStatus.RUNNING)
            gone = "The container in which a command executed this run is gone."
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, msg=gone)
        container = self._get_container(run)
        if container is None:
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, msg="The container of this run is gone.")
        state = container.attrs["State"]
        if state["Running"]:
            return CheckRunHealthResult(WorkerStatus.RUNNING)
        if state["OOMKilled"]:
            self._instance.add_run_tags(run.run_id, {MAX_RETRIES_TAG: "0"})
            limit = f"{container.attrs['HostConfig']['Memory'] >> 20}m"
            location = run.remote_job_origin.location_name if run.remote_job_origin else "?"
            return CheckRunHealthResult(WorkerStatus.FAILED, msg=too_much_memory(location, limit))
        ended = f"The container of this run ended with status {state['ExitCode']} before the run did. {state['Error']}"
        return CheckRunHealthResult(WorkerStatus.FAILED, msg=ended.strip())


def listened_at(moment: float) -> bool:
    """Whether a code server that listens did so at a moment, in seconds since the epoch.

    The sockets of dead ones are removed by the next that takes over.
    """
    times = []
    for path in SOCKETS.glob("*/*.sock"):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return min(times, default=moment + 1) <= moment


def too_much_memory(location: str, limit: str) -> str:
    """What to tell of a run that had less memory than it needed.

    Args:
        location: Its code location.
        limit: The memory that it may have, as Docker takes it.
    """
    return (
        f"The kernel killed a process of this run, because the run exceeded its memory limit of {limit}, so it is not "
        f"tried again: raise memory in run_limits of the code location {location}, or let the run need less."
    )


def create(engine: docker.DockerClient, image: str, name: str, kwargs: Mapping[str, Any]) -> Any:
    """Give the container of this name; it is there already if the answer to an earlier request was lost.

    Raises:
        ValueError: The image is not on this host any more.
        docker.errors.APIError: Docker refuses.
    """
    try:
        return engine.containers.create(image=image, name=name, **kwargs)
    except docker.errors.ImageNotFound as error:
        raise ValueError(f"The image {image} is not on this host any more: launch the run again.") from error
    except docker.errors.APIError as error:
        found = re.search('in use by container "?([0-9a-f]{64})', str(error.explanation))
        if error.status_code != requests.codes.conflict or not found:
            raise
        return engine.containers.get(found[1])
