"""The landing folder: the CSV and Parquet files that people drop become rows of `raw.<dataset>`.

| folder                           | what is there                                                         |
|----------------------------------|-----------------------------------------------------------------------|
| `<landing>/<dataset>/`           | files that wait                                                       |
| `<landing>/landed/<dataset>/`    | files whose rows are in the warehouse                                 |
| `<landing>/quarantine/<dataset>/`| files that cannot be loaded, each with the reason in `….reason.txt`   |
| `<landing>/quarantine/no-dataset/`| the same of files that were put into the landing folder itself       |

A file is one transaction: its rows and its line in the ledger `landing.files`, which knows files by their content. It
is moved after that, so that what a crash leaves behind is known when it is met again. Dropping the table
`raw.<dataset>` makes its dataset new again.

No file and no name is trusted: a file is opened once, following no link, and all that reads it uses that handle.
"""

import hashlib
import os
import re
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import duckdb

from data_platform.loading import (
    CsvFile,
    Keyed,
    Loaded,
    ParquetFile,
    RefusedError,
    columns_of,
    first_line,
    identifier,
    load,
)

LANDED = "landed"
QUARANTINE = "quarantine"
DATASET = re.compile(r"[a-z][a-z0-9_]{0,62}")
UNFINISHED = (".part", ".tmp", ".filepart")
NO_DATASET = "no-dataset"  # of files in the landing folder itself; no dataset can be named so
QUIET_SECONDS = 10.0
THREADS = 4  # each has buffers beside what memory_limit counts: with 16, a file of 1 GB takes 300 MB more
REASON_SUFFIX = ".reason.txt"
NAME_BYTES = 255 - len(REASON_SUFFIX)

LEDGER = """
create schema if not exists raw;
create schema if not exists landing;
create table if not exists landing.files (
    dataset varchar, sha256 varchar, name varchar, bytes bigint, rows bigint, landed_at timestamptz, run varchar,
    primary key (dataset, sha256)
)
"""


class UnfinishedError(Exception):
    """A file is not the one any more that was seen."""


@dataclass(frozen=True)
class Entry:
    """A file as it was seen: in which folder (empty for the landing folder itself), and its state."""

    folder: str
    name: str
    inode: int
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @property
    def path(self) -> str:
        """Path below the landing folder, fit to be shown."""
        return shown(os.path.join(self.folder, self.name))

    def check(self, found: os.stat_result) -> None:
        """Check that a file is this one, and that nobody wrote to it since.

        Raises:
            UnfinishedError: It is not.
        """
        now = (found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns)
        if now != (self.inode, self.mode, self.size, self.mtime_ns):
            raise UnfinishedError(self.path)


@dataclass(frozen=True)
class Waiting:
    """What waits: files to be taken, in this order, and by path what cannot be, with the reason."""

    files: list[Entry]
    stuck: dict[str, str]

    @property
    def digest(self) -> str:
        """The same as long as the same waits in the same state."""
        return hashlib.sha256(repr((self.files, sorted(self.stuck.items()))).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    Attributes:
        dataset: Name of its folder.
        path: Path below the landing folder, fit to be shown.
        state: Its rows are in the table; its content was landed before; it is in quarantine; or it waits on, since
            something else than the file is wrong.
        loaded: What it brought.
        line: Line that the reason is about, counted from 1, where there are lines.
        reason: Why it was refused, or what went wrong.
    """

    dataset: str
    path: str
    state: Literal["landed", "duplicate", "refused", "failed"]
    loaded: Loaded = Loaded(0)
    line: int | None = None
    reason: str = ""

    @property
    def message(self) -> str:
        """Where and why."""
        return f"{self.path}{f', line {self.line}' if self.line else ''}: {self.reason}"


def shown(path: str) -> str:
    """Return a path with everything escaped that is not printable, such as line breaks and invalid bytes."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def scan(root: Path, quiet: float = QUIET_SECONDS) -> Waiting:
    """Return what waits in a landing folder; cheap, since it reads directories only.

    What was written, renamed or made less than `quiet` seconds ago is left out: somebody may be copying it. That time
    is the kernel's own (ctime): copying programs set the modification time back, but nobody can do so with this one.
    The names that they use until they are done are left out too: dotfiles and those ending in `UNFINISHED`.
    """
    latest = time.time_ns() - int(quiet * 1e9)
    files: list[Entry] = []
    stuck: dict[str, str] = {}
    folders = [""]
    for folder in folders:
        with suppress(FileNotFoundError), os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower().endswith(UNFINISHED):
                    continue
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if not stat.S_ISDIR(found.st_mode):
                        if found.st_ctime_ns <= latest:
                            state = (found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
                            files.append(Entry(folder, entry.name, *state))
                    elif folder:
                        stuck[shown(f"{folder}/{entry.name}")] = "folders inside that of a dataset are not looked into"
                    elif not os.access(entry, os.R_OK | os.W_OK | os.X_OK):
                        stuck[shown(entry.name)] = "the platform may not use this folder: its owner must chmod g+rwx it"
                    elif entry.name not in (LANDED, QUARANTINE):
                        folders.append(entry.name)
    return Waiting(sorted(files, key=lambda file: (file.folder, file.mtime_ns, file.name)), stuck)


def land(
    connection: duckdb.DuckDBPyConnection,
    root: Path,
    waiting: Waiting,
    run: str,
    keyed: Mapping[str, Keyed],
    taken: Collection[str],
) -> Iterator[Outcome]:
    """Land files one by one.

    Args:
        connection: The warehouse.
        root: The landing folder.
        waiting: What to land.
        run: Name of the run, for the ledger.
        keyed: Datasets whose rows replace those with their key, by name.
        taken: Datasets whose tables belong to somebody else.

    Yields:
        What became of each file; nothing for one that is gone, or that somebody writes to again.
    """
    connection.execute(
        "set TimeZone = 'UTC'; set preserve_insertion_order = false; set enable_external_file_cache = false;"
        f"set threads = {min(os.cpu_count() or 1, THREADS)}"
    )
    connection.execute(LEDGER)
    for entry in waiting.files:
        try:
            with directory(root, entry.folder) as source:
                outcome = land_file(
                    connection, root, source, entry, run, keyed.get(entry.folder), entry.folder in taken
                )
        except UnfinishedError:
            continue
        except (duckdb.Error, OSError) as error:
            if not os.path.lexists(root / entry.folder / entry.name):
                continue
            outcome = Outcome(entry.folder, entry.path, "failed", reason=first_line(error))
        yield outcome


def land_file(
    connection: duckdb.DuckDBPyConnection,
    root: Path,
    source: int,
    entry: Entry,
    run: str,
    keyed: Keyed | None,
    taken: bool,
) -> Outcome:
    """Land a file of the directory `source` and move it to where it belongs then.

    Raises:
        UnfinishedError: Somebody writes to it again; it stays.
        duckdb.Error, OSError: Something else than the file is wrong; it stays.
    """
    try:
        check_name(entry, taken)
        with opened(source, entry) as handle:
            outcome = load_once(connection, entry, handle, run, keyed)
    except RefusedError as refused:
        entry.check(os.stat(entry.name, dir_fd=source, follow_symlinks=False))
        outcome = Outcome(entry.folder, entry.path, "refused", line=refused.line, reason=str(refused))
        move(root, QUARANTINE, source, entry, f"{outcome.message}\n")
        return outcome
    move(root, LANDED, source, entry)
    return outcome


def check_name(entry: Entry, taken: bool) -> None:
    """Check what can be said of a file that was not opened yet.

    Raises:
        RefusedError: It is not a file, or there cannot be such a dataset.
    """
    if not entry.folder:
        raise RefusedError("belongs into a folder with the name of its dataset, not into the landing folder itself")
    if not DATASET.fullmatch(entry.folder):
        raise RefusedError("a dataset's name has lower-case letters, digits and _, and begins with a letter")
    if taken:
        raise RefusedError(f"the table raw.{entry.folder} belongs to another asset: choose another name for the folder")
    if not stat.S_ISREG(entry.mode):
        raise RefusedError("a symbolic link, not a file" if stat.S_ISLNK(entry.mode) else "not a file")
    if not entry.name.lower().endswith((".csv", ".parquet")):
        raise RefusedError("the name ends neither in .csv nor in .parquet")
    if not entry.size:
        raise RefusedError("empty")


@contextmanager
def directory(root: Path, *parts: str, make: bool = False) -> Iterator[int]:
    """Give a handle on a directory below `root`, following no link; with `make`, missing ones are made."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in filter(None, parts):
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o770, dir_fd=handle)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


@contextmanager
def opened(source: int, entry: Entry) -> Iterator[int]:
    """Give a handle on a file of the directory `source`.

    Raises:
        RefusedError: The platform may not read it.
        UnfinishedError: It is not the one any more that was seen.
    """
    try:
        handle = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source)
    except PermissionError as error:
        mode = stat.filemode(entry.mode)
        raise RefusedError(f"the platform may not read it ({mode}): chmod a+r it and drop it again") from error
    try:
        entry.check(os.fstat(handle))
        yield handle
    finally:
        os.close(handle)


def load_once(
    connection: duckdb.DuckDBPyConnection, entry: Entry, handle: int, run: str, keyed: Keyed | None
) -> Outcome:
    """Load an open file, unless the same content was loaded before.

    Raises:
        RefusedError: It cannot be loaded.
        UnfinishedError: Somebody wrote to it meanwhile; nothing of it was loaded.
        duckdb.Error: Something else than the file is wrong.
    """
    dataset, path = entry.folder, f"/proc/self/fd/{handle}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    landed, same = connection.execute(
        "select count(*), count(*) filter (sha256 = ?) from landing.files where dataset = ?", [digest, dataset]
    ).fetchone()
    present = columns_of(connection, "raw", dataset)
    if landed and not present:
        connection.execute("delete from landing.files where dataset = ?", [dataset])
        if keyed:
            connection.execute(f"drop table if exists landing.{identifier(dataset)}")
    elif same:
        entry.check(os.fstat(handle))
        return Outcome(dataset, entry.path, "duplicate")
    elif present and not landed and not keyed:
        raise RefusedError(f"the table raw.{dataset} was not made here: choose another name for the folder")

    def note(rows: int) -> None:
        entry.check(os.fstat(handle))
        connection.execute(
            "insert into landing.files values (?, ?, ?, ?, ?, now(), ?)",
            [dataset, digest, shown(entry.name), entry.size, rows, run],
        )

    is_csv = entry.name.lower().endswith(".csv")
    file = CsvFile(path, keyed.null if keyed else "") if is_csv else ParquetFile(connection, path)
    return Outcome(dataset, entry.path, "landed", load(connection, dataset, file, present, keyed, note))


def move(root: Path, where: str, source: int, entry: Entry, reason: str | None = None) -> None:
    """Move a file of the directory `source` to its dataset's folder in `where`, with a reason beside it if given one.

    Nothing is replaced there: where the name is taken, the time of day is put into it.
    """
    with directory(root, where, entry.folder or NO_DATASET, make=True) as target:
        name = free_name(target, entry.name)
        if reason:
            handle = os.open(name + REASON_SUFFIX, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o660, dir_fd=target)
            with open(handle, "w", encoding="utf-8") as file:
                file.write(reason)
        os.rename(entry.name, name, src_dir_fd=source, dst_dir_fd=target)
        try:
            entry.check(os.stat(name, dir_fd=target, follow_symlinks=False))
        except UnfinishedError:  # another file took its place a moment ago, and waits for the next run
            os.rename(name, free_name(source, entry.name), src_dir_fd=target, dst_dir_fd=source)


def free_name(target: int, name: str) -> str:
    """Return a name that neither a file nor a reason has in a directory, and that is short enough for both."""
    if len(os.fsencode(name)) <= NAME_BYTES and not any(exists(target, one) for one in (name, name + REASON_SUFFIX)):
        return name
    stem, suffix = os.path.splitext(name)
    end = os.fsencode(f".{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}{suffix[:16]}")
    return os.fsdecode(os.fsencode(stem)[: NAME_BYTES - len(end)] + end)


def exists(target: int, name: str) -> bool:
    """Say whether a directory has an entry of this name."""
    try:
        os.stat(name, dir_fd=target, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
