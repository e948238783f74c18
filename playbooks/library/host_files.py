#!/usr/bin/python
"""Module ``host_files``: files and directories of the host, all that a role has in one call."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: host_files
short_description: Files and directories of the host, many at once
description:
  - Does what C(copy) with C(content) and C(file) with C(state=directory) do, for a list, in one round trip.
  - A file is replaced as a whole, and readable by nobody but its owner until it has its mode.
options:
  files:
    description: Files and directories, in the order in which they are made.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where it is. Directories above a directory are made, with the mode C(0755).
        type: path
        required: true
      content:
        description: What is in the file. Without it, this is a directory.
        type: str
      force:
        description: Whether a file that is there gets this content; its owner and mode are set in any case.
        type: bool
        default: true
      join:
        description: Whether members of a JSON object that is there stay if the content has none of their names.
        type: bool
        default: false
      returned:
        description: Whether what is then in the file is returned, in C(contents) by path; C(no_log) hides a secret.
        type: bool
        default: false
      validate:
        description:
          - Command that accepts the content, with C(%s) for a file that holds it; not run in check mode.
          - What it says of content that it accepts is returned as C(said), a list of lines.
        type: str
      mode:
        description: Mode; C(0644) for a file and C(0755) for a directory if it is left out.
        type: raw
      owner:
        description: User, by name or ID.
        type: str
        default: "0"
      group:
        description: Group, by name or ID; the owner's ID if it is left out.
        type: str
  ask:
    description:
      - Commands for the shell, run when all is in place, in check mode too. They are to change nothing.
      - The lines that they print are returned as C(answer), whatever their exit status is.
    type: str
"""

OPTIONS = {
    "path": {"type": "path", "required": True},
    "content": {"type": "str"},
    "force": {"type": "bool", "default": True},
    "join": {"type": "bool", "default": False},
    "returned": {"type": "bool", "default": False},
    "validate": {"type": "str"},
    "mode": {"type": "raw"},
    "owner": {"type": "str", "default": "0"},
    "group": {"type": "str"},
}


def write(module: AnsibleModule, path: Path, content: str, validate: str | None) -> list[str]:
    """Replace a file by one with this content, or end the module with what the command ``validate`` says against it.

    Returns:
        What the command says of content that it accepts, line by line.
    """
    said = ""
    handle, name = tempfile.mkstemp(dir=module.tmpdir)
    with open(handle, "w", encoding="utf-8") as file:
        file.write(content)
    if validate:
        code, said, err = module.run_command(validate.replace("%s", name))
        if code:
            module.fail_json(msg=f"The new content of {path} is refused: {(err or said).strip()}")
    module.atomic_move(name, str(path))
    return said.splitlines()


def joined(before: str, content: str) -> str:
    """Give content with the members of a JSON object that it has none of, as C(to_nice_json) writes it."""
    there, given = json.loads(before or "{}"), json.loads(content)
    return content if there.keys() <= given.keys() else json.dumps(there | given, indent=4, sort_keys=True) + "\n"


def lay_down(module: AnsibleModule, file: dict[str, Any], said: list[str]) -> list[dict[str, Any]]:
    """Make a file or directory what it is to be, or only look in check mode.

    Args:
        module: This module.
        file: One of its C(files).
        said: Lines that were said of content which was accepted; more are added.

    Returns:
        What is different, as Ansible shows it; empty if nothing is.
    """
    path, content = Path(file["path"]), file["content"]
    there, differences = path.exists(), []
    if content is None and not there:
        differences.append({"before": {"state": "absent"}, "after": {"state": "directory"}})
        if not module.check_mode:
            for directory in reversed([one for one in (path, *path.parents) if not one.exists()]):
                directory.mkdir()
                directory.chmod(0o755)
    elif content is not None and (file["force"] or not there):
        before = path.read_text(encoding="utf-8", errors="replace") if there else ""
        content = joined(before, content) if file["join"] else content
        if before != content or not there:
            differences.append({"before": before, "after": content})
            if not module.check_mode:
                said += write(module, path, content, file["validate"])
    if there or not module.check_mode:
        attributes: dict[str, Any] = {}
        wanted = {
            "mode": file["mode"] or ("0755" if content is None else "0644"),
            "owner": file["owner"],
            "group": file["group"] or file["owner"],
        }
        if module.set_fs_attributes_if_different(
            module.load_file_common_arguments(wanted, path=str(path)), False, attributes
        ):
            differences.append(attributes)
    return [{"before_header": str(path), "after_header": str(path), **difference} for difference in differences]


def main() -> None:
    """Entry point for Ansible."""
    options = {
        "files": {"type": "list", "elements": "dict", "required": True, "options": OPTIONS},
        "ask": {"type": "str"},
    }
    module = AnsibleModule(options, supports_check_mode=True)
    os.umask(0o077)
    said: list[str] = []
    differences = [difference for file in module.params["files"] for difference in lay_down(module, file, said)]
    returned = [Path(file["path"]) for file in module.params["files"] if file["returned"]]
    contents = {str(path): path.read_text(encoding="utf-8") for path in returned if path.exists()}
    ask = module.params["ask"]
    answer = module.run_command(["/bin/sh", "-c", ask])[1].splitlines() if ask else []
    module.exit_json(changed=bool(differences), diff=differences, said=said, contents=contents, answer=answer)


if __name__ == "__main__":
    main()
