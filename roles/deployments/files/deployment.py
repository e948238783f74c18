#!/usr/bin/python3
"""Changes of this host's data platform, one at a time and on record: standard library only.

    deployment begin WHAT [--check] --by WHO --host HOST --process PROCESS [--alive PROCESS…] [--shared IMAGE]
                     [--known LOCATION…] [--code LOCATION=IMAGE=REVISION…]
                                     take the lock, and print its token; the host must run this image of Dagster, and
                                     have these locations already; write down the code that each location is to serve,
                                     and print a line for each whose code is another one
    deployment finish [--failed] TOKEN
                                     once the UI shows what was shipped: a line in the log, and the lock is free
    deployment rollback --by WHO --host HOST --process PROCESS [--alive PROCESS…]
                                     put back the code that served before the last change of code
    deployment status                what runs, and the last changes

What a location serves stands in LOCATION.json, each change in log.jsonl, the change in progress in lock, and what
described the code before the last change of code in before: a JSON object each. A lock is stale when the host has been
booted since, when its time is over, or when the process on the controller that took it is not alive any more, which
only that controller can tell.
"""

from __future__ import annotations

import argparse
import configparser
import fcntl
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STATE = Path("/var/lib/data-platform/deployments")
UNITS = Path("/etc/systemd/system")
BOOT = Path("/proc/sys/kernel/random/boot_id")
RUNS = Path("/etc/data-platform/runs/runs.json")
"""What the launcher makes the containers of runs of, by location; missing where runs have none."""
PROGRAM = "/usr/local/lib/data-platform/deployment"
CONTAINER_UNIT = "/usr/local/lib/data-platform/container-unit"
WEBSERVER = "dagster-webserver"

UNKNOWN = "-"
"""Process of a play whose controller cannot tell its processes."""

LEASE = 2 * 3600
"""Seconds after which a lock counts no more."""

PATIENCE = 30
"""Seconds until the UI must show code that is served."""

KEPT = 1000
"""Lines of the log that are kept."""

SHOWN = 10
"""Lines of the log that status shows."""

SHARED = "data-platform.shared"
"""Label of an image of code: the shared image that it was built on."""


class Failure(Exception):
    """Something is wrong; the text is one sentence for the operator."""


def run(*command: str, check: bool = True) -> str:
    """Run ``command`` and give its output.

    Raises:
        Failure: It failed, and ``check`` is set.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        if check:
            raise Failure(f"{command[0]} is not installed: run playbooks/site.yml.") from error
        return ""
    if check and result.returncode:
        raise Failure((result.stderr.strip() or result.stdout.strip()) or f"'{' '.join(command[:3])}' failed.")
    return result.stdout


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is missing, or a crash left no object in it."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(file: Path, content: str) -> None:
    """Replace a file as a whole, so that it survives a crash as it was or as it is to be."""
    new = file.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as handle:
        handle.write(content)
        os.fchmod(handle.fileno(), 0o644)
        handle.flush()
        os.fsync(handle.fileno())
    new.replace(file)


def image_in(unit: str) -> str:
    """Image of the container that a unit's text describes; empty if it describes none."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    parser.read_string(unit)
    return parser["X-Container"]["Image"] if parser.has_section("X-Container") else ""


def described() -> dict[Path, str]:
    """Images of the units that run containers, by the units' files."""
    images = {file: image_in(file.read_text()) for file in sorted(UNITS.glob("dagster-*.service"))}
    return {file: image for file, image in images.items() if image}


def location_of(image: str) -> str | None:
    """Name of the location whose code an image holds, or None if it is no such image."""
    repository = image.rpartition(":")[0]
    return repository.removeprefix("data-platform/code-") if repository.startswith("data-platform/code-") else None


def serving() -> dict[str, str]:
    """Image of each location's running container, by the location's name."""
    listed = run("docker", "container", "ls", "--format", "{{.Names}} {{.Image}}", check=False)
    units = {file.stem for file in described()}
    images = [image for name, image in map(str.split, listed.splitlines()) if name in units]
    return {name: image for image in images if (name := location_of(image))}


def records() -> dict[str, dict[str, Any]]:
    """What was written down of each location, by its name."""
    return {file.stem: read(file) for file in sorted(STATE.glob("*.json"))}


@contextmanager
def alone() -> Iterator[None]:
    """Look at the lock while nobody else does."""
    STATE.mkdir(parents=True, exist_ok=True)
    with open(STATE / ".guard", "w", encoding="ascii") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def why_stale(lock: dict[str, Any], host: str, alive: list[str]) -> str:
    """Why a lock counts no more; empty if it does.

    Args:
        lock: The lock.
        host: The controller that asks.
        alive: Its processes.
    """
    if lock.get("boot") != BOOT.read_text().strip():
        return "the host has been booted since"
    if lock["host"] == host and lock["process"] != UNKNOWN:
        return "" if lock["process"] in alive else "the play that took it is dead"
    if time.time() - lock["at"] > LEASE:
        return f"it is older than {LEASE // 3600} hours"
    return ""


def refuse(shared: str, known: Iterable[str], host: str, alive: list[str]) -> None:
    """See whether something may be begun.

    Args:
        shared: Image of Dagster that the host must run already; empty means any.
        known: Locations that the host must have already.
        host: The controller that asks.
        alive: Its processes.

    Raises:
        Failure: Somebody else has the lock, or the host lacks a location or runs another Dagster.
    """
    images = described()
    if shared and images.get(UNITS / f"{WEBSERVER}.service") != shared:
        raise Failure(
            f"This tree's code is built on the image {shared}, which the host does not run: run playbooks/site.yml, or "
            "playbooks/upgrade.yml for another version of Dagster. Nothing was changed."
        )
    if new := sorted(set(known) - {location_of(image) for image in images.values()}):
        raise Failure(
            f"The host does not have the code location {new[0]} yet: run playbooks/site.yml. Nothing was changed."
        )
    lock = read(STATE / "lock")
    if lock and not why_stale(lock, host, alive):
        raise Failure(
            f"A change of this platform ({lock['what']}) is in progress since {lock['since']}, by {lock['by']}: "
            f"wait for its end, or, if it is dead, run '{PROGRAM} finish --failed {lock['token']}' on the host. "
            "Nothing was changed."
        )


def begin(
    what: str, by: str, host: str, process: str, alive: list[str], shared: str = "", known: Iterable[str] = ()
) -> str:
    """Take the lock; give its token.

    Args:
        what: What is to be done, in a word.
        by: Who does it, from where.
        host: The controller.
        process: The controller's process that does it.
        alive: Processes of the controller that live.
        shared: Image of Dagster that the host must run already; empty means any.
        known: Locations that the host must have already.

    Raises:
        Failure: It may not be done now.
    """
    with alone():
        refuse(shared, known, host, alive)
        if lock := read(STATE / "lock"):
            log(lock, f"abandoned, {why_stale(lock, host, alive)}", changes(lock))
            restore(lock, failed=True)
        token = secrets.token_hex(8)
        content = {
            **{"token": token, "what": what, "by": by, "host": host, "process": process},
            **{"since": now(), "at": time.time(), "boot": BOOT.read_text().strip()},
            **as_it_is(lock),
        }
        write(STATE / "lock", json.dumps(content))
    return token


def as_it_is(lock: dict[str, Any]) -> dict[str, Any]:
    """What serves, and what describes it: images and records of locations, texts of units, containers of runs.

    What a change in progress wrote is not what served before it. So of a location of which nothing runs, the lock of a
    change that was abandoned knows more, and without one its record does.

    Args:
        lock: The lock of the change that was abandoned; empty if none was.
    """
    written, running = records(), serving()
    there = {file: image for file, image in described().items() if location_of(image)}
    images = {location_of(image): image for image in there.values()}
    down = images.keys() - running.keys()
    units = {name: text for name, text in lock.get("units", {}).items() if location_of(image_in(text)) in down}
    return {
        "serving": images
        | {name: written[name]["image"] for name in down if written.get(name)}
        | {name: image for name, image in lock.get("serving", {}).items() if name in down}
        | running,
        "records": written,
        "units": {file.name: file.read_text() for file in there} | units,
        "runs": read(RUNS) | {name: entry for name, entry in lock.get("runs", {}).items() if name in down},
    }


def record(code: list[str], check: bool) -> list[str]:
    """Write down the code that each location serves from now on.

    Args:
        code: LOCATION=IMAGE=REVISION each.
        check: Only say what would be done.

    Returns:
        A line for each location whose code is another one.
    """
    lines, by = [], read(STATE / "lock").get("by", "")
    for item in code:
        name, image, revision = item.split("=", 2)
        file, version = STATE / f"{name}.json", image.rpartition(":")[2]
        before = read(file)
        if before.get("image") == image:
            continue
        said = f"{name}: {before.get('version', 'nothing')} -> {version}"
        if back := before.get("rolled back"):
            said += f", although it was rolled back from {back['from']} at {back['at']}"
        lines.append(said)
        if not check:
            new = {"image": image, "version": version, "revision": revision, "deployed": now(), "by": by}
            write(file, json.dumps(new))
    return lines


def changes(lock: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The locations whose code is another one since the lock was taken: images before and now, and the revision."""
    before, written = lock["serving"], records()
    return {
        name: {"from": before.get(name), "to": image, "revision": written.get(name, {}).get("revision", "")}
        for name, image in serving().items()
        if before.get(name) != image
    }


def restore(lock: dict[str, Any], failed: bool) -> None:
    """Put back records and units as they were when the lock was taken, where what they say since then is not served.

    Args:
        lock: The lock.
        failed: Whether what it was taken for failed. Then what describes runs is put back as well, where the unit is
            as it was.
    """
    served = serving()
    for name, content in records().items():
        if content.get("image") != served.get(name):
            if name in lock["records"]:
                write(STATE / f"{name}.json", json.dumps(lock["records"][name]))
            else:
                (STATE / f"{name}.json").unlink()
    there = {file: image for file, image in described().items() if file.name in lock["units"]}
    changed = {
        file: image
        for file, image in there.items()
        if location_of(image) in served and lock["units"][file.name] != file.read_text()
    }
    looked = [CONTAINER_UNIT, "converge", "--check", "--only", *(file.stem for file in changed)]
    differ = run(*looked, check=False).splitlines() if failed and changed else []
    for file, image in changed.items():
        if served[location_of(image)] != image or {f"replaced {file.stem}", f"restarted {file.stem}"} & {*differ}:
            write(file, lock["units"][file.name])
            run("systemctl", "daemon-reload", check=False)
            run(CONTAINER_UNIT, "forget", file.stem, check=False)
    if failed:
        same = {location_of(image) for file, image in there.items() if lock["units"][file.name] == file.read_text()}
        describe_runs({name: entry for name, entry in lock.get("runs", {}).items() if name in same})


def describe_runs(entries: dict[str, Any]) -> None:
    """Have the runs of these locations described like this, where runs have containers."""
    now_described = read(RUNS)
    wanted = now_described | entries
    if now_described and wanted != now_described:
        write(RUNS, json.dumps(wanted, indent=4, sort_keys=True) + "\n")


def finish(token: str, failed: bool) -> str:
    """Free the lock, and write a line into the log if code changed, or something was asked for that failed.

    Args:
        token: The lock's token; if it is another's lock, nothing is done.
        failed: Whether what was to be done failed.

    Returns:
        What was done, in a sentence.

    Raises:
        Failure: The UI does not show what is served.
    """
    lock = read(STATE / "lock")
    if lock.get("token") != token:
        return ""
    changed = changes(lock)
    restore(lock, failed)
    result = "failed" if failed else "ok"
    try:
        if changed and not failed:
            show({name: item["to"] for name, item in changed.items()})
    except Failure:
        result = "failed"
        raise
    finally:
        seconds = log(lock, result, changed) if changed or failed or lock["what"] != "site" else 0.0
        (STATE / "lock").unlink()
    if failed:
        return f"The {lock['what']} failed after {seconds} s."
    if not changed:
        return "All code that the host is to serve was served already."
    versions = ", ".join(f"{name} {item['to'].rpartition(':')[2]}" for name, item in sorted(changed.items()))
    return f"Served and shown now, {seconds} s after the {lock['what']} began: {versions}."


def show(images: dict[str, str]) -> None:
    """Wait until the UI shows these images of locations, by the locations' names.

    Raises:
        Failure: It does not in time.
    """
    wanted = [f"{name}={image}" for name, image in images.items()]
    command = ["docker", "exec", WEBSERVER, "python", "-m", "data_platform_runtime.ready", "webserver", *wanted]
    deadline = time.monotonic() + PATIENCE
    while (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
        if time.monotonic() > deadline:
            raise Failure(
                f"The code is served, but the UI does not show it after {PATIENCE} s ({done.stderr.strip()}): "
                f"see 'journalctl -u {WEBSERVER}'."
            )
        time.sleep(0.1)


def log(lock: dict[str, Any], result: str, code: dict[str, dict[str, Any]]) -> float:
    """Write a line into the log; give the seconds since the lock was taken.

    If code was replaced, what described it before is kept for the way back.

    Args:
        lock: The lock of what was done.
        result: How it ended.
        code: Images of the locations whose code changed.
    """
    if any(item["from"] for item in code.values()):
        units = {name: text for name, text in lock["units"].items() if location_of(image_in(text)) in code}
        runs = {name: entry for name, entry in lock.get("runs", {}).items() if name in code}
        write(STATE / "before", json.dumps({"units": units, "runs": runs}))
    seconds = round(time.time() - lock["at"], 1)
    line = {"time": now(), "what": lock["what"], "by": lock["by"], "result": result, "seconds": seconds, "code": code}
    write(STATE / "log.jsonl", "".join(f"{json.dumps(item)}\n" for item in [*logged(), line][-KEPT:]))
    return seconds


def logged() -> list[dict[str, Any]]:
    """The log, oldest line first."""
    file = STATE / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rollback(by: str, host: str, process: str, alive: list[str]) -> str:
    """Put back the code that served before the last change of code; give what was done, in a sentence.

    Raises:
        Failure: There is none, or it cannot be served; then the code of now goes on serving.
    """
    token, failed = begin("rollback", by, host, process, alive), True
    try:
        swap(*before_the_last())
        failed = False
    finally:
        said = finish(token, failed)
    return said


def before_the_last() -> tuple[dict[str, str], str]:
    """Images that served before the last change of code, by the images of now; and the time of that change.

    Raises:
        Failure: There is none, one of them is gone, or cannot be served by the Dagster of now.
    """
    changes = [line for line in logged() if any(item["from"] for item in line["code"].values())]
    last = changes[-1] if changes else {"time": "", "code": {}}
    code = {item["to"]: item["from"] for item in last["code"].values() if item["from"]}
    if not code:
        raise Failure("There is no code to go back to: none was replaced on this host yet. Nothing was changed.")
    images = described()
    shared = images.get(UNITS / f"{WEBSERVER}.service")
    for now_served, image in code.items():
        if now_served not in images.values():
            raise Failure(
                f"The last change on record brought {now_served}, which no service runs any more: deploy the tree that "
                "you want. Nothing was changed."
            )
        label = run(
            "docker", "image", "inspect", "--format", f'{{{{index .Config.Labels "{SHARED}"}}}}', image, check=False
        )
        if not label.strip():
            raise Failure(
                f"The code before this one, {image}, is not on this host any more: deploy the tree that you want. "
                "Nothing was changed."
            )
        if label.strip() != shared:
            raise Failure(
                f"The code before this one, {image}, was built for another Dagster image than the one that runs "
                f"({shared}): deploy the tree that you want. Nothing was changed."
            )
    return code, last["time"]


def swap(code: dict[str, str], since: str) -> None:
    """Have units run other images, as they were when they last did, where that was before the last change of code.

    Args:
        code: The images that are to run, by those that do.
        since: When those that run were deployed.

    Raises:
        Failure: They cannot be served; the units are as they were.
    """
    kept = {file: file.read_text() for file, image in described().items() if image in code}
    before, kept_runs, runs = read(STATE / "before"), read(RUNS), {}
    for file, content in kept.items():
        wanted, old = code[image_in(content)], before.get("units", {}).get(file.name, "")
        if image_in(old) == wanted:
            runs |= {name: entry for name, entry in before["runs"].items() if name == location_of(wanted)}
            write(file, old)
        else:
            write(file, content.replace(image_in(content), wanted))
    describe_runs(runs)
    record([f"{location_of(wanted)}={wanted}={revision(wanted)}" for wanted in code.values()], check=False)
    for image, wanted in code.items():
        file = STATE / f"{location_of(wanted)}.json"
        back = {"from": image.rpartition(":")[2], "at": now(), "deployed": since}
        write(file, json.dumps(read(file) | {"rolled back": back}))
    try:
        run(CONTAINER_UNIT, "converge", "--only", *(file.stem for file in kept))
    except Failure:
        for file, content in kept.items():
            write(file, content)
        describe_runs(kept_runs)
        run(CONTAINER_UNIT, "converge", "--only", *(file.stem for file in kept), check=False)
        raise
    for image, wanted in code.items():
        repository = image.rpartition(":")[0]
        run("docker", "image", "tag", image, f"{repository}:previous")
        run("docker", "image", "tag", wanted, f"{repository}:current")


def revision(image: str) -> str:
    """Git revision that an image of code was deployed from when it was last, if it is known."""
    for line in reversed(logged()):
        for item in line["code"].values():
            if item["to"] == image and item.get("revision"):
                return str(item["revision"])
    return ""


def status() -> list[str]:
    """What runs, and the last changes, as lines for a person."""
    form = "{{.Repository}}:{{.Tag}}\t{{.CreatedSince}}"
    listed = run("docker", "image", "ls", "--filter", "reference=data-platform/*", "--format", form)
    age = dict(line.split("\t") for line in listed.splitlines())
    lines = ["Services:"]
    for file, image in described().items():
        state = run("systemctl", "is-active", file.stem, check=False).strip()
        lines.append(f"  {file.stem}: {state}, {image}, built {age.get(image, 'at a time unknown: the image is gone')}")
    lines.append("Code:")
    there = {location_of(image) for image in described().values()}
    for name, content in sorted(records().items()):
        if content and name in there:
            at = f" at {content['revision']}" if content.get("revision") else ""
            lines.append(f"  {name}: {content['version']}{at}, deployed {content['deployed']} by {content['by']}")
            if back := content.get("rolled back"):
                lines.append(f"    rolled back from {back['from']}, which the next deploy ships again")
    if lock := read(STATE / "lock"):
        lines.append(f"In progress: {lock['what']} since {lock['since']}, by {lock['by']}")
    lines.append("Last changes:")
    for line in logged()[-SHOWN:]:
        code = ", ".join(
            f"{name} {(item['from'] or 'nothing').rpartition(':')[2]} -> {item['to'].rpartition(':')[2]}"
            for name, item in sorted(line["code"].items())
        )
        lines.append(
            f"  {line['time']} {line['what']} by {line['by']}: {line['result']}, {line['seconds']} s {code}".rstrip()
        )
    return lines


def main(arguments: list[str]) -> int:
    """Do what ``arguments`` say; give the exit status."""
    parser = argparse.ArgumentParser(prog="deployment", description="Changes of the platform, one at a time.")
    commands = parser.add_subparsers(dest="command", required=True)
    beginning = commands.add_parser("begin")
    beginning.add_argument("what")
    for command in (beginning, commands.add_parser("rollback")):
        for option in ("--by", "--host", "--process"):
            command.add_argument(option, required=True)
        command.add_argument("--alive", nargs="*", default=[])
    beginning.add_argument("--shared", default="")
    beginning.add_argument("--known", nargs="*", default=[])
    beginning.add_argument("--check", action="store_true")
    beginning.add_argument("--code", nargs="*", default=[])
    finishing = commands.add_parser("finish")
    finishing.add_argument("--failed", action="store_true")
    finishing.add_argument("token")
    commands.add_parser("status")
    options = parser.parse_args(arguments)
    try:
        if options.command == "begin":
            if options.check:
                refuse(options.shared, options.known, options.host, options.alive)
            else:
                who = (options.by, options.host, options.process, options.alive)
                print(begin(options.what, *who, options.shared, options.known))
            for line in record(options.code, options.check):
                print(line)
        elif options.command == "finish":
            print(finish(options.token, options.failed))
        elif options.command == "rollback":
            print(rollback(options.by, options.host, options.process, options.alive))
        else:
            print(*status(), sep="\n")
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
