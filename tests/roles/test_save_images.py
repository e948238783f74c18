"""Archives of images leave out the layers that the other engine has, as both of docker's formats write them."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, module_at

program = module_at(ROOT / "roles/images/files/save_images.py")
IMAGES = {
    "code:2": ["base", "dagster", "code-2"],
    "other:1": ["base", "code-2"],
    "twice:1": ["base", "void", "t", "void"],
}
"""Layers of each image, by what they hold, lowest first."""


def write(archive: tarfile.TarFile, name: str, content: object) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def new_format(archive: tarfile.TarFile) -> None:
    """Write the images as Docker 25 and later do: each layer once, under its digest."""
    for layer in sorted({layer for layers in IMAGES.values() for layer in layers}):
        write(archive, f"blobs/sha256/{layer}", layer.encode())
    manifest = []
    for name, layers in IMAGES.items():
        write(archive, f"blobs/sha256/{name}", {"rootfs": {"diff_ids": layers}})
        paths = [f"blobs/sha256/{layer}" for layer in layers]
        manifest.append({"Config": f"blobs/sha256/{name}", "RepoTags": [name], "Layers": paths})
    write(archive, "manifest.json", manifest)


def old_format(archive: tarfile.TarFile) -> None:
    """Write the images as Docker before 25 does: a folder for each layer of an image, with links between equal ones."""
    manifest = []
    first: dict[str, str] = {}
    for name, layers in IMAGES.items():
        paths = []
        for number, layer in enumerate(layers):
            path = f"{'-'.join(layers[: number + 1])}/layer.tar"
            paths.append(path)
            if path in archive.getnames():
                continue
            write(archive, path.replace("layer.tar", "json"), {"id": path})
            if layer in first:
                member = tarfile.TarInfo(path)
                member.type, member.linkname = tarfile.SYMTYPE, f"../{first[layer]}"
                archive.addfile(member)
            else:
                first[layer] = path
                write(archive, path, layer.encode())
        write(archive, f"{name}.json", {"rootfs": {"diff_ids": layers}})
        manifest.append({"Config": f"{name}.json", "RepoTags": [name], "Layers": paths})
    write(archive, "manifest.json", manifest)


@pytest.fixture(params=[new_format, old_format])
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the program saves images; docker is a stand-in that writes the same ones each time."""
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        request.param(archive)
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\n[ "$1 $2" = "save --output" ] && exec cp {tmp_path}/images.tar "$3"\n'
    )
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    return tmp_path / "made" / "saved.tar.gz"


def loaded(saved: Path, there: list[list[str]]) -> dict[str, list[str]]:
    """Load an archive as Docker does: a layer is read from it only if there is none in its place yet."""
    chains = {tuple(layers[: number + 1]) for layers in there for number in range(len(layers))}
    images = {}
    with tarfile.open(saved, "r:gz") as archive:
        for image in json.load(archive.extractfile("manifest.json")):
            digests = json.load(archive.extractfile(image["Config"]))["rootfs"]["diff_ids"]
            content = []
            for number, path in enumerate(image["Layers"]):
                chain = tuple(digests[: number + 1])
                content.append(digests[number] if chain in chains else archive.extractfile(path).read().decode())
                chains.add(chain)
            images[image["RepoTags"][0]] = content
    return images


@pytest.mark.parametrize(
    "there",
    [
        [],
        [["base"]],
        [["base", "dagster"], ["base", "postgres"]],
        [["base", "dagster", "code-1"]],
        [["base", "dagster", "code-2"]],
        [["code-2"], ["dagster"]],
        [["base", "void"]],
        [["base", "void", "t", "void"]],
        list(IMAGES.values()),
    ],
    ids=lambda there: " ".join("+".join(layers) for layers in there) or "nothing",
)
def test_engine_with_these_images_can_load_the_archive(saved: Path, there: list[list[str]]) -> None:
    program.save(saved, list(IMAGES), there)
    assert loaded(saved, there) == IMAGES


def test_what_is_there_is_not_carried(saved: Path) -> None:
    def names() -> list[str]:
        with tarfile.open(saved) as archive:
            return [member.name for member in archive if member.isfile() and "json" not in member.name]

    program.save(saved, list(IMAGES), [])
    everything = names()
    program.save(saved, list(IMAGES), [["base", "dagster"]])
    assert len(everything) - len(names()) == 2
    assert [path.name for path in saved.parent.glob("saved*")] == ["saved.tar.gz"]
