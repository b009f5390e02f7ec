"""A registered model as data: its specification and its published files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.domain import ModelSpec

EMBEDDED_REVISION = "embedded"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One published file; *path* is relative, in the repository and in the model's folder."""

    repository: str
    revision: str
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A registered model: its specification, and its files by precision."""

    spec: ModelSpec
    shared: tuple[RemoteFile, ...] = ()
    """Text encoder, VAE, tokenizer and configs, needed at every precision."""
    transformers: Mapping[str, RemoteFile] = field(default_factory=dict)
    """The file of the transformer's weights by precision; empty for an embedded model."""

    @property
    def is_embedded(self) -> bool:
        """Whether the weights are part of the package, so that nothing is downloaded."""
        return not self.transformers

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """Every file of the model, for all precisions."""
        return self.shared + tuple(dict.fromkeys(self.transformers.values()))

    @property
    def repositories(self) -> tuple[str, ...]:
        """The repositories that the files come from."""
        return tuple(dict.fromkeys(file.repository for file in self.files))

    @property
    def revision(self) -> str:
        """The commit of the model's own repository."""
        found = (file.revision for file in self.files if file.repository == self.spec.hub_id)
        return next(found, EMBEDDED_REVISION)
