"""Save images of this machine's engine for another one, less the layers that it has: standard library only.

    python3 save_images.py ARCHIVE IMAGE… < LAYERS

ARCHIVE is what ``docker load`` reads, compressed. Each line of LAYERS is what the other engine says of an image of its
own when it is asked for ``{{json .RootFS.Layers}}``: it takes from the archive only the layers that it has not got.
"""

from __future__ import annotations

import json
import posixpath
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any


def shared(layers: list[str], others: list[list[str]]) -> int:
    """How many of ``layers`` one of the ``others`` begins with as well.

    Args:
        layers: Digests of an image's layers, lowest first.
        others: The same of other images.
    """
    count = 0
    for other in others:
        same = 0
        for mine, theirs in zip(layers, other, strict=False):
            if mine != theirs:
                break
            same += 1
        count = max(count, same)
    return count


def left_out(archive: tarfile.TarFile, others: list[list[str]]) -> set[str]:
    """Names of the files in ``archive`` with layers that the other engine has.

    Args:
        archive: What ``docker save`` wrote.
        others: Digests of the layers of each image of the other engine.
    """

    def content(name: str) -> Any:
        file = archive.extractfile(name)
        assert file
        return json.load(file)

    layers, wanted = set(), set()
    for image in content("manifest.json"):
        count = shared(content(image["Config"])["rootfs"]["diff_ids"], others)
        layers.update(image["Layers"])
        wanted.update(image["Layers"][count:])
    # Docker before 25 writes equal layers once, and links to them.
    for name in list(wanted):
        member = archive.getmember(name)
        if member.issym():
            wanted.add(posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)))
    return layers - wanted


def save(path: Path, images: list[str], others: list[list[str]]) -> None:
    """Save ``images`` without what the other engine has.

    Args:
        path: File to write, in a directory that is made if it is missing.
        images: References.
        others: Digests of the layers of each image of the other engine.

    Raises:
        subprocess.CalledProcessError: Docker could not save them.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.whole")
    subprocess.run(["docker", "save", "--output", whole, *images], check=True)
    with tarfile.open(whole) as archive, tarfile.open(path, "w:gz", compresslevel=1) as result:
        dispensable = left_out(archive, others)
        for member in archive:
            if member.name not in dispensable:
                result.addfile(member, archive.extractfile(member) if member.isfile() else None)
    whole.unlink()


if __name__ == "__main__":
    save(Path(sys.argv[1]), sys.argv[2:], [json.loads(line) for line in sys.stdin if line.strip()])
