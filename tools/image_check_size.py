"""How large an image is, its parts, and what torch with all that it requires takes for itself.

Bytes are those of files, hard links counted once; an engine's layers are smaller, compressed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MOST_BESIDE_TORCH = 750_000_000
"""Bytes that the image may have besides torch's closure, which is 4.8 GB with CUDA."""
PREFIX = Path("opt/klein")


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Bytes of a whole image and of what pip installed in it.

    *torch_closure* is torch with all that it requires as pip installs them, *torch_left* what is
    left of that here; *packages* has what is left of each distribution, the largest first.
    """

    total: int
    installed: int
    torch_closure: int
    torch_left: int
    packages: tuple[tuple[str, int], ...]

    @property
    def times_torch(self) -> float:
        """Return the image in multiples of torch's closure."""
        return self.total / self.torch_closure

    @property
    def beside_torch(self) -> int:
        """Return the bytes of all but torch's closure."""
        return self.total - self.torch_left


def measure(root: Path) -> ImageSize:
    """Measure the image whose files lie below *root*."""
    found = packages_in(root)
    of_torch = closure("torch", found)
    sizes = {name: _bytes(_present(each)) for name, each in found.items()}
    return ImageSize(
        total=_bytes(_files(root)),
        installed=_bytes(_files(root / PREFIX)),
        torch_closure=sum(_recorded(found[name]) for name in of_torch),
        torch_left=sum(sizes[name] for name in of_torch),
        packages=tuple(sorted(sizes.items(), key=lambda entry: entry[1], reverse=True)),
    )


def packages_in(root: Path) -> dict[str, Distribution]:
    """Return the Python packages of the image below *root*, by their normalised names."""
    (site,) = (root / PREFIX / "lib").glob("python3*/site-packages")
    found = distributions(path=[str(site)])
    return {str(canonicalize_name(each.metadata["Name"])): each for each in found}


def closure(name: str, found: dict[str, Distribution]) -> set[str]:
    """Return *name* and what it requires on this system, directly or not, of those *found*."""
    reached: set[str] = set()
    waiting = [name]
    # No extra is asked for.
    environment = {str(key): str(value) for key, value in default_environment().items()}
    environment |= {"extra": ""}
    while waiting:
        each = canonicalize_name(waiting.pop())
        if each in reached or each not in found:
            continue
        reached.add(each)
        for line in found[each].requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate(environment):
                waiting.append(wanted.name)
    return reached


def table(size: ImageSize, *, most: int = 12) -> list[str]:
    """Return lines of megabytes: the whole, its parts, and the *most* largest packages."""
    lines = [
        f"{size.total / 1e6:8.0f} MB  image: {size.times_torch:.2f} times torch's closure",
        f"{size.torch_closure / 1e6:8.0f} MB  torch and what it requires, as pip installs them",
        f"{size.beside_torch / 1e6:8.0f} MB  everything else",
        f"{(size.total - size.installed) / 1e6:8.0f} MB  Debian, Python, compiler",
        f"{size.installed / 1e6:8.0f} MB  /{PREFIX}, of which",
    ]
    return [*lines, *(f"{of / 1e6:8.0f} MB    {name}" for name, of in size.packages[:most])]


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if not path.is_symlink() and path.is_file())


def _present(distribution: Distribution) -> Iterable[Path]:
    listed = (Path(str(each.locate())) for each in distribution.files or ())
    return (path for path in listed if path.is_file() and not path.is_symlink())


def _recorded(distribution: Distribution) -> int:
    """Return the bytes that RECORD lists; it gives none for compiled bytecode."""
    return sum(each.size or 0 for each in distribution.files or ())


def _bytes(paths: Iterable[Path]) -> int:
    seen: set[tuple[int, int]] = set()
    total = 0
    for path in paths:
        status = path.stat()
        if (key := (status.st_dev, status.st_ino)) not in seen:
            seen.add(key)
            total += status.st_size
    return total
