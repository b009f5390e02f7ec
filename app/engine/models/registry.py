"""The registry of models that can be served: `MODELS`, and lookups in it.

It knows no torch, no network and no folder. A name given by a caller or the operator is a key of
`MODELS` and never becomes a path. Every repository is pinned to a commit, every file to its size
and SHA-256.
"""

from __future__ import annotations

from app.domain import ModelSpec
from app.engine.models.entry import ModelEntry, RemoteFile
from app.engine.models.flux2_klein import KLEIN, KLEIN_BASE
from app.engine.models.shapes import SHAPES
from app.errors import StartupError


def find_model(key: str) -> ModelEntry:
    """Look up the model *key*.

    Raises:
        StartupError: it is not registered; the message names those that are.
    """
    if key in MODELS:
        return MODELS[key]
    if "9b" in key.lower():
        raise StartupError(
            "The 9B variants of FLUX.2 klein are not served, because their licence forbids "
            f"commercial use and they do not fit on a 12 GB card; take {KLEIN.spec.id} instead."
        )
    raise StartupError(
        "This model is not in the catalogue; set KLEIN_MODEL to one of "
        f"{', '.join(MODELS)}, or to the path of a local folder or file."
    )


def find_spec(key: str) -> ModelSpec:
    """Look up the specification of the model *key*; raises as `find_model` does."""
    return find_model(key).spec


def files_for(variant: ModelEntry, kind: str) -> tuple[RemoteFile, ...]:
    """Return the files that *variant* needs with its transformer's file *kind*.

    A weight format names the kind that it is made from (`WeightFormat.file`).

    Raises:
        StartupError: there is no such file.
    """
    if variant.is_embedded:
        return ()
    if kind not in variant.transformers:
        raise StartupError(
            f"{variant.spec.id} has no files for the precision {kind}; "
            f"take one of {', '.join(variant.transformers)}."
        )
    return (*variant.shared, variant.transformers[kind])


MODELS = {variant.spec.id: variant for variant in (KLEIN, KLEIN_BASE, SHAPES)}
"""All models by key, the default first. One more is one more entry."""
