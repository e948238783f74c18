"""Lookup plugin ``build_archive``: all that an image is built from, packed."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: build_archive
short_description: All that an image is built from, packed
description:
  - For each image given, gives a gzipped tar archive in base64, with its C(Dockerfile) and its C(context).
  - What is packed belongs to root, and everybody may read it.
options:
  _terms:
    description:
      - Images, dictionaries with C(dockerfile) (a path), C(context) (as the lookup build_context gives it), and where
        they have them C(folder) (the place of the files in the context) and C(lock) (a path, there requirements.txt).
    required: true
"""

MOST = 256 << 20
"""Bytes that an archive may have: it passes through the memory of Ansible and of the host."""


def build_archive(image: dict[str, Any]) -> str:
    """Pack what an image is built from.

    Args:
        image: The image.

    Returns:
        The archive, in base64.

    Raises:
        AnsibleLookupError: It is too large.
    """
    top, folder = Path(image["context"]["path"]), image.get("folder", "")
    files = {f"context/{folder}{name}": top / name for name in image["context"]["files"]}
    if image.get("lock"):
        files["context/requirements.txt"] = Path(image["lock"])
    files["Dockerfile"] = Path(image["dockerfile"])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, dereference=True) as archive:
        context = tarfile.TarInfo("context")
        context.type, context.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(context)
        for name, path in files.items():
            member = archive.gettarinfo(path, name)
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.mode & 0o100 else 0o644
            with path.open("rb") as content:
                archive.addfile(member, content)
    if buffer.tell() > MOST:
        raise AnsibleLookupError(
            f"What is in {top} is packed {buffer.tell() >> 20} MiB: keep data out of the source of an image."
        )
    return base64.b64encode(buffer.getvalue()).decode()


class LookupModule(LookupBase):
    """Entry point for Ansible."""

    def run(self, terms: list[dict[str, Any]], variables: dict | None = None, **kwargs: object) -> list[str]:
        """Pack each image in ``terms``."""
        return [build_archive(term) for term in terms]
