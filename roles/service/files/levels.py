#!/usr/bin/python3
"""Runs a command and gives each line that it prints its own level in the journal: standard library only.

    with-levels COMMAND…

What the command prints, on either stream, is passed on without colours and with the prefix <N> of sd-daemon(3), which
systemd takes for the line's priority. A line that does not say its level belongs to the record before it. Ends with the
command's exit status.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from types import FrameType

CRITICAL, ERROR, WARNING, NOTICE, INFO, DEBUG = range(2, 8)

COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
PYTHON = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*(?: [+-]\d{4})? - \S+ - ([A-Z]+) - ")
ROOT_LOGGER = re.compile(rb"([A-Z]+):[\w.]+:")
POSTGRES = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ \S+ \[\d+\] (?:.{0,80}? )??([A-Z]+)\d?:  ")
GRPC = re.compile(rb"([IWEF])\d{4} \d\d:\d\d:\d\d")
PYTHON_WARNING = re.compile(rb"\S+:\d+: \w*Warning: ")
FAILURE = re.compile(rb"Traceback \(most recent call last\):|docker: |Usage: |Error: |python\d?: ")
EXPECTED = re.compile(
    rb"terminating connection due to administrator command|the database system is (?:starting up|shutting down)"
)

PYTHON_LEVELS = {b"DEBUG": DEBUG, b"INFO": INFO, b"WARNING": WARNING, b"ERROR": ERROR, b"CRITICAL": CRITICAL}
POSTGRES_LEVELS = {  # as PostgreSQL's documentation gives them for syslog
    **{b"DEBUG": DEBUG, b"INFO": INFO, b"LOG": INFO, b"NOTICE": NOTICE, b"WARNING": NOTICE, b"ERROR": WARNING},
    **{b"FATAL": ERROR, b"PANIC": CRITICAL},
}
GRPC_LEVELS = {b"I": INFO, b"W": WARNING, b"E": WARNING, b"F": CRITICAL}


def level(line: bytes, before: int) -> int:
    """Priority of a line, as syslog(3) numbers them.

    Args:
        line: The line, without colours.
        before: Priority of the line before it.
    """
    if found := PYTHON.match(line) or ROOT_LOGGER.match(line):
        return PYTHON_LEVELS.get(found[1], before)
    if found := POSTGRES.match(line):
        return NOTICE if EXPECTED.search(line) else POSTGRES_LEVELS.get(found[1], before)
    if found := GRPC.match(line):
        return GRPC_LEVELS[found[1]]
    if PYTHON_WARNING.match(line):
        return WARNING
    return min(before, ERROR) if FAILURE.match(line) else before


def with_levels(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Give each line without colours and with its priority.

    Args:
        lines: What the command prints, in lines.
    """
    before = INFO
    for line in lines:
        plain = COLOUR.sub(b"", line).rstrip(b"\r\n")
        before = level(plain, before)
        yield b"<%d>%s\n" % (before, plain)


def leave_it_to_the_command(number: int, frame: FrameType | None) -> None:
    """Go on until the command ends; the signal reaches it as well."""


def main(command: list[str]) -> int:
    """Run ``command``; give its exit status."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave_it_to_the_command)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in with_levels(process.stdout):
            os.write(sys.stdout.fileno(), line)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
