"""What a registered model consists of: its specification and its published files. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.domain import ModelSpec

EMBEDDED_REVISION = "embedded"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One published file: *path* is its place in the repository and in the folder built of it."""

    repository: str
    revision: str
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A variant: its card, and the files that it needs at any precision and at one of them."""

    spec: ModelSpec
    shared: tuple[RemoteFile, ...] = ()
    """Text encoder, VAE, tokenizer and configs: wanted whatever the precision."""
    transformers: Mapping[str, RemoteFile] = field(default_factory=dict)
    """The transformer's weights by precision."""

    @property
    def is_embedded(self) -> bool:
        """Whether the weights come with the package, so that there is nothing to download."""
        return not self.transformers

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """Every file of the variant, at whatever precision."""
        return self.shared + tuple(dict.fromkeys(self.transformers.values()))

    @property
    def repositories(self) -> tuple[str, ...]:
        """The repositories that the files come from."""
        return tuple(dict.fromkeys(file.repository for file in self.files))

    @property
    def revision(self) -> str:
        """The commit of the variant's own repository."""
        found = (file.revision for file in self.files if file.repository == self.spec.hub_id)
        return next(found, EMBEDDED_REVISION)
