"""The bill of materials names what is there, in CycloneDX's own form."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import jsonschema
import pytest
from referencing import Registry, Resource

from app import __version__
from tests.support.server import ROOT
from tools import sbom

LOCK = ROOT / "requirements.hashes.lock"


@pytest.fixture(autouse=True)
def _at_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")


def check_schema(text: str) -> None:
    """Hold *text* against the published schema, which the library ships."""
    folder = importlib.resources.files("cyclonedx.schema") / "_res"
    schemas = {
        name: json.loads((folder / f"{name}.SNAPSHOT.schema.json").read_text())
        for name in ("bom-1.6", "spdx", "jsf-0.82", "cryptography-defs")
        if (folder / f"{name}.SNAPSHOT.schema.json").is_file()
    }
    known = [(schema["$id"], Resource.from_contents(schema)) for schema in schemas.values()]
    jsonschema.Draft7Validator(
        schemas["bom-1.6"], registry=Registry().with_resources(known)
    ).validate(json.loads(text))


def image(root: Path) -> Path:
    """Make a folder like an image's, with two of Python's packages and two of Debian's."""
    site = root / "opt/klein/lib/python3.12/site-packages"
    for name, version, fields in (
        ("klein-server", "0.9", "License-Expression: Apache-2.0\nRequires-Dist: torch==2.13.0\n"),
        ("torch", "2.13.0+cpu", "Classifier: License :: OSI Approved :: BSD License\n"),
    ):
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(head + fields)
    dpkg = root / "var/lib/dpkg"
    dpkg.mkdir(parents=True)
    blocks = [
        f"Package: {name}\nStatus: {status}\nArchitecture: amd64\nVersion: {version}\n"
        for name, status, version in (
            ("gcc", "install ok installed", "4:12.2.0-3"),
            ("cpp", "deinstall ok config-files", "4:12.2.0-3"),
        )
    ]
    (dpkg / "status").write_text("\n".join(blocks))
    return root


def test_a_releases_has_what_its_lock_pins() -> None:
    """Each package with its version, below the service."""
    text = sbom.of_lock(LOCK)
    check_schema(text)
    document = json.loads(text)

    purls = {part["purl"] for part in document["components"]}
    assert {"pkg:pypi/torch@2.13.0", "pkg:pypi/starlette@1.10.0"} <= purls
    assert len(purls) == sum("==" in line for line in LOCK.read_text().splitlines())
    assert document["metadata"]["component"]["version"] == __version__


def test_an_images_has_what_lies_in_it(tmp_path: Path) -> None:
    """Python's packages and Debian's, those that were removed left out, and who requires whom."""
    text = sbom.of_image(image(tmp_path))
    check_schema(text)
    document = json.loads(text)

    assert {part["purl"] for part in document["components"]} == {
        "pkg:pypi/torch@2.13.0%2Bcpu",
        "pkg:deb/debian/gcc@4:12.2.0-3?arch=amd64",
    }
    (torch,) = (part for part in document["components"] if part["name"] == "torch")
    assert torch["licenses"] == [{"license": {"name": "BSD License"}}]
    assert document["metadata"]["component"]["type"] == "container"
    assert {"ref": "klein-server", "dependsOn": ["torch"]} in document["dependencies"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """So that two builds can be compared."""
    assert sbom.of_lock(LOCK) == sbom.of_lock(LOCK)
    assert sbom.of_image(image(tmp_path)) == sbom.of_image(tmp_path)
