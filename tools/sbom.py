"""Write a bill of materials (SBOM): CycloneDX 1.6 as JSON, as syft and its readers have it.

    python tools/sbom.py --lock requirements.hashes.lock [--out FILE]
    python tools/sbom.py --root FOLDER [--out FILE]

The first lists what a release installs by its lock. The second lists what lies in an image whose
files are below FOLDER: Python packages with their licences and requirements, Debian's packages by
their version. The same input gives the same bytes where SOURCE_DATE_EPOCH is set.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from app import __version__
from tools.image_check_size import packages_in

NAME = "klein-server"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def of_lock(lock: Path, version: str = __version__) -> str:
    """Return the SBOM of a release *version* that installs what *lock* pins."""
    pinned = {canonicalize_name(name): of for name, of in _PIN.findall(lock.read_text())}
    root = _ours(ComponentType.APPLICATION, version)
    parts = [_python(name, of) for name, of in pinned.items()]
    return _write(root, parts, {root.bom_ref.value or "": set(pinned)})


def of_image(root: Path) -> str:
    """Return the SBOM of the image whose files lie below *root*."""
    found = packages_in(root)
    ours = found.pop(NAME)
    whole = _ours(ComponentType.CONTAINER, ours.version)
    parts = [_python(name, each.version, each) for name, each in found.items()]
    edges = {name: _required(each) & found.keys() for name, each in found.items()}
    parts += _debian(root / "var/lib/dpkg/status")
    return _write(whole, parts, {whole.bom_ref.value or "": _required(ours) & found.keys()} | edges)


def _ours(kind: ComponentType, version: str) -> Component:
    return Component(
        type=kind,
        name=NAME,
        version=version,
        bom_ref=NAME,
        licenses=[LicenseExpression("Apache-2.0")],
        purl=PackageURL("pypi", None, NAME, version),
    )


def _python(name: str, version: str, found: Distribution | None = None) -> Component:
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=name,
        purl=PackageURL("pypi", None, name, version),
        licenses=[] if found is None else list(_licences(found)),
    )


def _licences(found: Distribution) -> Iterator[DisjunctiveLicense]:
    """Yield what a package says of its licence, in its own words and where they are short."""
    words = found.metadata.get_all("License-Expression") or found.metadata.get_all("License")
    told = words[0] if words else ""
    if told and "\n" not in told and len(told) < 100:
        yield DisjunctiveLicense(name=told)
    else:
        for each in found.metadata.get_all("Classifier") or ():
            if each.startswith("License ::"):
                yield DisjunctiveLicense(name=each.rpartition(" :: ")[2])


def _required(found: Distribution) -> set[str]:
    """Return the names that a package requires without extras, whatever the system."""
    wanted = (Requirement(line) for line in found.requires or ())
    return {canonicalize_name(each.name) for each in wanted if "extra" not in str(each.marker)}


def _debian(status: Path) -> Iterator[Component]:
    """Yield Debian's installed packages; none where the image has another system."""
    for block in status.read_text().split("\n\n") if status.is_file() else ():
        fields = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", block, re.MULTILINE))
        if fields.get("Status") != "install ok installed":
            continue
        name, version, arch = fields["Package"], fields["Version"], fields["Architecture"]
        yield Component(
            type=ComponentType.LIBRARY,
            name=name,
            version=version,
            bom_ref=f"deb:{name}:{arch}",
            purl=PackageURL("deb", "debian", name, version, {"arch": arch}),
        )


def _write(root: Component, parts: Iterable[Component], edges: dict[str, set[str]]) -> str:
    """Return *root* and its *parts* as JSON; *edges* has what a component requires by name."""
    parts = sorted(parts, key=lambda part: part.bom_ref.value or "")
    bom = Bom(components=parts)
    bom.metadata.component = root
    now = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    bom.metadata.timestamp = datetime.fromtimestamp(now, UTC)
    purls = " ".join(str(part.purl) for part in (root, *parts))
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, purls)
    by_ref = {part.bom_ref.value: part for part in (root, *parts)}
    for ref, names in edges.items():
        bom.register_dependency(by_ref[ref], [by_ref[name] for name in sorted(names)])
    text = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string()
    document: dict[str, Any] = json.loads(text)
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write the SBOM that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--lock", type=Path, help="what a release installs")
    which.add_argument("--root", type=Path, help="a folder with an image's files")
    parser.add_argument("--out", type=Path, help="a file instead of standard output")
    options = parser.parse_args()
    text = of_lock(options.lock) if options.lock else of_image(options.root)
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
