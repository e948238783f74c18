#!/usr/bin/python3
"""Removes old images of the platform: standard library only.

    retention.py [--check] [--build-cache SIZE] IMAGE…

Each IMAGE is the one that services now run with, of its repository data-platform/NAME. It is tagged current there, and
the one before it previous. All other images data-platform/… go, except those that a container, running or stopped, or
an unfinished run names; the container of a run that has ended goes with its image. If something was tagged or removed,
so do untagged images of the platform, and the build cache beyond SIZE. Prints a line for each thing done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

LABEL = "data-platform.refresh"
"""Label of the base image, which all that are built on it inherit."""


RUNS = "/usr/local/lib/data-platform/unfinished-runs"
"""Prints a line for each unfinished run: its ID, its status, the images that it names."""


class Failure(Exception):
    """Something is wrong; the text is one sentence for the operator."""


def run(*command: str) -> str:
    """Run ``command`` and give its output.

    Raises:
        Failure: It failed.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise Failure(f"'{' '.join(command[:3])}' failed: {' '.join(reason)}")
    return result.stdout


def images() -> dict[str, str]:
    """IDs of the platform's images by reference."""
    form = "{{.Repository}}:{{.Tag}} {{.ID}}"
    listed = run("docker", "image", "ls", "--no-trunc", "--filter", "reference=data-platform/*", "--format", form)
    found = dict(line.split(" ") for line in listed.splitlines())
    return {reference: found[reference] for reference in sorted(found) if not reference.endswith(":<none>")}


def containers() -> tuple[set[str], dict[str, str]]:
    """What the host's containers name as their images, references or IDs, and the same of ended runs, by container."""
    form = '{{.ID}} {{.Image}} {{.State}} {{.Label "dagster/run_id"}}'
    listed = run("docker", "container", "ls", "--all", "--no-trunc", "--format", form)
    words = [line.split(" ") for line in listed.splitlines()]
    ended = {id_: image for id_, image, state, of_run in words if of_run and state in ("exited", "dead")}
    return {image for id_, image, *_ in words if id_ not in ended}, ended


def in_unfinished_runs() -> set[str]:
    """References of the images that unfinished runs name.

    Raises:
        Failure: The metadata database does not answer.
    """
    try:
        return {image for line in run(RUNS).splitlines() for image in line.split()[2:]}
    except Failure as failure:
        raise Failure(
            "No image was removed, because the metadata database does not say which ones queued runs need: "
            f"see 'journalctl -u dagster-postgres -u dagster-daemon', and run the playbook again ({failure})."
        ) from failure


def rotate(found: dict[str, str], wanted: list[str]) -> list[tuple[str, str]]:
    """Tags that have to be set, each an image's ID and its new reference; ``found`` is brought to what it then is.

    Args:
        found: IDs by reference.
        wanted: References of the images of now.
    """
    tags = []
    for reference in wanted:
        current, previous = (f"{reference.rpartition(':')[0]}:{name}" for name in ("current", "previous"))
        if found.get(current) != found[reference]:
            moved = {previous: found[current]} if current in found else {}
            moved[current] = found[reference]
            tags += [(image, tag) for tag, image in moved.items()]
            found.update(moved)
    return tags


def excess(found: dict[str, str], wanted: list[str], named: set[str]) -> list[str]:
    """References of the images that are none of now, none before, and not ``named``.

    A service that is not among those of now, but is there, keeps the image before its own as well.

    Args:
        found: IDs by reference.
        wanted: References of the images of now.
        named: References or IDs of the images that something needs.
    """
    tagged = {reference: f"{reference.rpartition(':')[0]}:" for reference in (*wanted, *named) if reference in found}
    now = [repository for name, repository in tagged.items() if found[name] == found.get(f"{repository}current")]
    previous = [f"{repository}previous" for repository in now]
    needed = named | {found[reference] for reference in (*wanted, *previous, *named) if reference in found}
    return [reference for reference, image in found.items() if image not in needed]


def retain(wanted: list[str], build_cache: str, check: bool) -> list[str]:
    """Tag the images of now and before, and remove all that nothing needs.

    Args:
        wanted: References of the images of now.
        build_cache: Size that the build cache may have, as Docker takes it.
        check: Only say what would be done.

    Returns:
        What was done, a line for each image concerned.

    Raises:
        Failure: An image of now is missing, or what needs the others cannot be told; then nothing was removed.
    """
    found = images()
    missing = [reference for reference in wanted if reference not in found]
    if missing and not check:
        raise Failure(f"No image was removed, because {', '.join(missing)} is not here: run the playbook again.")
    found.update({reference: f"{reference} to come" for reference in missing})
    tags = rotate(found, wanted)
    if not check:
        for image, tag in tags:
            run("docker", "image", "tag", image, tag)
    old = excess(found, wanted, set())
    if old:
        named, ended = containers()
        old = excess(found, wanted, named | in_unfinished_runs())
        done = [id_ for id_, image in ended.items() if image in {*old, *(found[reference] for reference in old)}]
        if done and not check:
            run("docker", "container", "rm", "--volumes", *done)
    if old and not check:
        run("docker", "image", "rm", *old)
    if (tags or old) and not check:
        run("docker", "image", "prune", "--force", "--filter", f"label={LABEL}")
        run("docker", "builder", "prune", "--force", "--keep-storage", build_cache)
    return [f"tagged {tag}" for _, tag in tags] + [f"removed {reference}" for reference in old]


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status."""
    parser = argparse.ArgumentParser(prog="retention.py", description="Removes old images of the platform.")
    parser.add_argument("--check", action="store_true", help="only say what would be done")
    parser.add_argument("--build-cache", default="4GB", metavar="SIZE", help="build cache that may stay (default: 4GB)")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image that services now run with")
    options = parser.parse_args(arguments)
    try:
        for line in retain(options.images, options.build_cache, options.check):
            print(line)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
