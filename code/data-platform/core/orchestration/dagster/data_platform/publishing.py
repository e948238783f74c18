"""The published warehouse: read-only snapshots for readers, who never wait and never keep a run waiting.

| file in the directory        | what it is                                                                   |
|------------------------------|------------------------------------------------------------------------------|
| `warehouse.duckdb`           | a link to the newest snapshot, which takes the old one's place in one step   |
| `warehouse-<time>.duckdb`    | a snapshot, complete and never written again; the last few are kept          |
| `state.json`                 | what the newest snapshot is of, so that an unchanged warehouse is not copied |
"""

import fcntl
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from data_platform.resources import Warehouse

LINK = "warehouse.duckdb"
STATE = "state.json"
UNFINISHED = ".part"
KEPT_FREE = 1024  # MiB of the disk that a snapshot leaves to the platform
CLONE = 0x40049409  # FICLONE of linux/fs.h: both files share their blocks, where the file system can


class NoRoomError(RuntimeError):
    """The disk is too full for a snapshot."""


@dataclass(frozen=True)
class Snapshot:
    """A published copy of the warehouse, and what it is a copy of.

    Attributes:
        name: Name of the file.
        state: The warehouse's, as `state_of` gives it.
        at: When it was taken, ISO 8601 in UTC.
        bytes: Its size.
    """

    name: str
    state: str
    at: str
    bytes: int


def state_of(warehouse: Path) -> str:
    """Return what changes whenever the warehouse does, without opening it; an empty string if there is none."""
    found = []
    for path in (warehouse, warehouse.with_name(f"{warehouse.name}.wal")):
        with suppress(FileNotFoundError):
            known = path.stat()
            found.append(f"{known.st_ino}:{known.st_size}:{known.st_mtime_ns}")
    return " ".join(found)


def newest(directory: Path) -> Snapshot | None:
    """Return the newest snapshot of a directory, None if there is none."""
    try:
        snapshot = Snapshot(**json.loads((directory / STATE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return snapshot if (directory / LINK).exists() else None


def publish(warehouse: Warehouse, directory: Path, kept: int) -> Snapshot:
    """Publish what the warehouse holds now, and remove the oldest snapshots; give the new one.

    The warehouse is held for as long as the copying takes, which is why this is for a step of its pool.

    Args:
        warehouse: The warehouse.
        directory: Where snapshots are.
        kept: How many snapshots stay, the new one among them.

    Raises:
        NoRoomError: The disk is too full; what was published stays.
        WarehouseError: The warehouse cannot be opened.
    """
    source = Path(warehouse.path)
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f"*{UNFINISHED}"):
        left.unlink()
    name = f"warehouse-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.duckdb"
    unfinished = directory / f"{name}{UNFINISHED}"
    with warehouse.connect() as connection:
        connection.execute("checkpoint")
        at, state = datetime.now(UTC).isoformat(timespec="seconds"), state_of(source)
        try:
            copy(source, unfinished)
        except BaseException:
            unfinished.unlink(missing_ok=True)  # half a copy must not keep a full disk full
            raise
    snapshot = Snapshot(name, state, at, unfinished.stat().st_size)
    unfinished.rename(directory / name)
    link = directory / f"{LINK}{UNFINISHED}"
    link.symlink_to(name)
    link.replace(directory / LINK)
    note = directory / f"{STATE}{UNFINISHED}"
    note.write_text(json.dumps(vars(snapshot)))
    note.replace(directory / STATE)
    for old in sorted(directory.glob("warehouse-*.duckdb"))[:-kept]:
        old.unlink()
    return snapshot


def copy(source: Path, target: Path) -> None:
    """Copy a file for a directory's group to read, sharing its blocks where the file system can.

    Raises:
        NoRoomError: The disk has none for it.
    """
    with source.open("rb") as reader, target.open("xb") as writer:
        os.fchmod(writer.fileno(), 0o640)
        try:
            fcntl.ioctl(writer, CLONE, reader.fileno())
        except OSError:  # this file system cannot do that
            need, free = source.stat().st_size >> 20, shutil.disk_usage(target.parent).free >> 20
            if free - need < KEPT_FREE:
                raise NoRoomError(
                    f"A snapshot of {source} needs {need} MiB, but the disk of {target.parent} has {free} MiB free, of "
                    f"which {KEPT_FREE} are for the platform: make room there, or publish less (tools_snapshots)."
                ) from None
            shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
