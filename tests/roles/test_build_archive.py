"""What an image is built from arrives as it is, whoever packed it."""

import base64
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleLookupError
from conftest import ROOT, module_at

program = module_at(ROOT / "roles/images/lookup_plugins/build_archive.py")


@pytest.fixture
def image(tmp_path: Path) -> dict[str, Any]:
    """An image of code with a lock of its own."""
    for name, mode in {"code/a.py": 0o600, "code/deep/run.sh": 0o700, "lock": 0o640, "Dockerfile": 0o600}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name}: \x00 é\n".encode())
        path.chmod(mode)
    (tmp_path / "code/link.py").symlink_to("a.py")
    files = ["a.py", "deep/run.sh", "link.py"]
    return {
        "context": {"path": str(tmp_path / "code"), "files": files},
        "folder": "source/",
        "lock": str(tmp_path / "lock"),
        "dockerfile": str(tmp_path / "Dockerfile"),
    }


def unpacked(image: dict[str, Any]) -> dict[str, tuple[str, int, int, bytes]]:
    """Give type, mode, owner and content of what is packed, by name."""
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(program.build_archive(image)))) as archive:
        return {
            member.name: (
                "directory" if member.isdir() else "file" if member.isfile() else "other",
                member.mode,
                member.uid,
                archive.extractfile(member).read() if member.isfile() else b"",
            )
            for member in archive
        }


def test_all_is_packed_for_root_and_readable(image: dict[str, Any], tmp_path: Path) -> None:
    text = {name: (tmp_path / name).read_bytes() for name in ("code/a.py", "code/deep/run.sh", "lock", "Dockerfile")}
    assert unpacked(image) == {
        "context": ("directory", 0o755, 0, b""),
        "context/source/a.py": ("file", 0o644, 0, text["code/a.py"]),
        "context/source/deep/run.sh": ("file", 0o755, 0, text["code/deep/run.sh"]),
        "context/source/link.py": ("file", 0o644, 0, text["code/a.py"]),
        "context/requirements.txt": ("file", 0o644, 0, text["lock"]),
        "Dockerfile": ("file", 0o644, 0, text["Dockerfile"]),
    }


def test_image_of_the_project_has_neither_folder_nor_lock(image: dict[str, Any]) -> None:
    assert set(unpacked({name: image[name] for name in ("context", "dockerfile")} | {"lock": ""})) == {
        *("context", "context/a.py", "context/deep/run.sh", "context/link.py", "Dockerfile")
    }


def test_source_that_holds_data_is_refused(image: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "MOST", 10)
    with pytest.raises(AnsibleLookupError, match="is packed 0 MiB: keep data out of the source of an image"):
        program.build_archive(image)
