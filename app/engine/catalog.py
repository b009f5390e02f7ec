"""The variants that can be served: names, defaults, limits, and the files they are made of.

Pure data and lookups; it knows no torch, no network and no folder. A name that a caller or the
operator gives is a key of `CATALOG` and never becomes a path. Every repository is pinned to a
commit, every file to its size and SHA-256, so what is served is what was looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from app.domain import ModelCard
from app.errors import StartupError

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
class Entry:
    """A variant: its card, and the files that it needs at any precision and at one of them."""

    card: ModelCard
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
        found = (file.revision for file in self.files if file.repository == self.card.hub_id)
        return next(found, EMBEDDED_REVISION)


def entry(key: str) -> Entry:
    """Look up the variant called *key*.

    Raises:
        StartupError: there is none; the message names those that exist.
    """
    if key in CATALOG:
        return CATALOG[key]
    if "9b" in key.lower():
        raise StartupError(
            "The 9B variants of FLUX.2 klein are not served, because their licence forbids "
            f"commercial use and they do not fit on a 12 GB card; take {_KLEIN_KEY} instead."
        )
    raise StartupError(
        "This model is not in the catalogue; set KLEIN_MODEL to one of "
        f"{', '.join(CATALOG)}, or to the path of a local folder or file."
    )


def card(key: str) -> ModelCard:
    """Look up what is known of the variant *key* before it is loaded; raises like `entry`."""
    return entry(key).card


def files_for(variant: Entry, precision: str) -> tuple[RemoteFile, ...]:
    """Name the files that *variant* needs at *precision*: `fp8`, `int8`, `bf16` or `fp32`.

    The int8 weights are made of the bf16 file, since two roundings err more than one.
    """
    if variant.is_embedded:
        return ()
    if precision not in variant.transformers:
        raise StartupError(
            f"{variant.card.id} has no files for the precision {precision}; "
            f"take one of {', '.join(variant.transformers)}."
        )
    return (*variant.shared, variant.transformers[precision])


_KLEIN_KEY = "flux.2-klein-4b"
_KLEIN = "black-forest-labs/FLUX.2-klein-4B"
_KLEIN_REVISION = "e7b7dc27f91deacad38e78976d1f2b499d76a294"


def _klein_file(path: str, size_bytes: int, sha256: str) -> RemoteFile:
    return RemoteFile(_KLEIN, _KLEIN_REVISION, path, size_bytes, sha256)


# The repository also holds the transformer a second time, as one file of 7.75 GB: hence a list.
_SHARED_FILES = """
model_index.json 446
  51a76cb1cf3ed37423a1128c79c22faee8e6fbe7f5aaeb737f0a258930dbaac0
scheduler/scheduler_config.json 486
  067afb012cef64553a763447d1efd93daeffcc0123ca7e25b09f8de20b90762e
text_encoder/config.json 1536
  214b4c29a0d975e9fddf9994a5673f22cb2c4c5750352f9227c2c3251ebeab40
text_encoder/generation_config.json 214
  4347b1aeed2b2b78bc059920a0b7f5fec71482e1344952b76d7665d638d71f13
text_encoder/model.safetensors.index.json 32855
  06b3d5319b6d76d1a4a2433419180016cfd54ed62d086a5e6567a809f8c82634
text_encoder/model-00001-of-00002.safetensors 4967215360
  8c0506e7f4936fa7e26183a4fd8da4e2bdbc5990ba64ae441f965d51228f36ea
text_encoder/model-00002-of-00002.safetensors 3077766632
  82f2bd839378541b0557bfabaf37c7d3d637071fdcb73302dedd7cf61162ce07
tokenizer/added_tokens.json 707
  c0284b582e14987fbd3d5a2cb2bd139084371ed9acbae488829a1c900833c680
tokenizer/chat_template.jinja 4168
  a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8
tokenizer/merges.txt 1671853
  8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5
tokenizer/special_tokens_map.json 613
  76862e765266b85aa9459767e33cbaf13970f327a0e88d1c65846c2ddd3a1ecd
tokenizer/tokenizer.json 11422654
  aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4
tokenizer/tokenizer_config.json 5404
  443bfa629eb16387a12edbf92a76f6a6f10b2af3b53d87ba1550adfcf45f7fa0
tokenizer/vocab.json 2776833
  ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910
transformer/config.json 541
  09733c74a3da6d17dd0a0472a091a8950c7c6935889c32c16cc800ede05029de
vae/config.json 821
  0d6dfb69ae95a5e2ac9836284bbb63d8b38ce67b25ba2dff380752b2a10ab948
vae/diffusion_pytorch_model.safetensors 168120878
  ca70d2202afe6415bdbcb8793ba8cd99fd159cfe6192381504d6c4d3036e0f04
"""

_SHARED = tuple(
    _klein_file(path, int(size_bytes), sha256)
    for path, size_bytes, sha256 in zip(*[iter(_SHARED_FILES.split())] * 3, strict=True)
)

_BF16 = _klein_file(
    "transformer/diffusion_pytorch_model.safetensors",
    7_751_109_744,
    "9f29f9edcfdae452a653ffb51a534ca4decd389952c225724ff3b94042612a6e",
)

_FP8 = RemoteFile(
    "black-forest-labs/FLUX.2-klein-4b-fp8",
    "5b4408e59397a4a37ccb46afe426d8ed86379441",
    "flux-2-klein-4b-fp8.safetensors",
    4_070_624_520,
    "97ed34fe0567e436200f2faee3939b88f2b5d99f8af2a4dc16532c4245c0ccb6",
)

_BASE = RemoteFile(
    "black-forest-labs/FLUX.2-klein-base-4B",
    "a3b4f4849157f664bdbc776fd7453c2783562f4d",
    "flux-2-klein-base-4b.safetensors",
    7_751_105_712,
    "9c5fed22b76baea749d88fc2abe3ad53245e7b21a0d353a762665eea00043b92",
)

_KLEIN_ENTRY = Entry(
    card=ModelCard(
        id=_KLEIN_KEY,
        title="FLUX.2 [klein] 4B",
        hub_id=_KLEIN,
        owned_by="black-forest-labs",
        created=1_768_435_200,
        licence="Apache-2.0",
        default_width=1024,
        default_height=1024,
        default_steps=4,
        max_steps=50,
        default_guidance=1.0,
        max_guidance=1.0,
        min_side=64,
        max_side=4096,
        max_pixels=4_194_304,
        max_references=4,
        max_sequence_length=512,
    ),
    shared=_SHARED,
    transformers=MappingProxyType({"fp8": _FP8, "int8": _BF16, "bf16": _BF16, "fp32": _BF16}),
)

_BASE_ENTRY = Entry(
    card=replace(
        _KLEIN_ENTRY.card,
        id="flux.2-klein-base-4b",
        title="FLUX.2 [klein] Base 4B",
        hub_id=_BASE.repository,
        default_steps=50,
        max_steps=100,
        default_guidance=4.0,
        max_guidance=20.0,
        note=(
            "Only the transformer is the base variant's own; text encoder, VAE and tokenizer are "
            "those of FLUX.2-klein-4B, whose equality has not been established."
        ),
    ),
    shared=_SHARED,
    transformers=MappingProxyType(dict.fromkeys(("fp8", "int8", "bf16", "fp32"), _BASE)),
)

_SHAPES_ENTRY = Entry(
    card=ModelCard(
        id="shapes",
        title="shapes, the embedded demo model",
        hub_id=None,
        owned_by="klein-server",
        created=1_795_305_600,
        licence="Apache-2.0",
        default_width=256,
        default_height=256,
        default_steps=4,
        max_steps=50,
        default_guidance=1.0,
        max_guidance=1.0,
        min_side=128,
        max_side=512,
        max_pixels=262_144,
        max_references=4,
        max_sequence_length=64,
        note=(
            "It draws coloured shapes only: one or two of circle, square, triangle, diamond, star, "
            "cross, heart and ring, with colour, size, place and background, such as 'a red circle "
            "on a blue background'."
        ),
    ),
)

CATALOG: Mapping[str, Entry] = MappingProxyType(
    {variant.card.id: variant for variant in (_KLEIN_ENTRY, _BASE_ENTRY, _SHAPES_ENTRY)}
)
"""All variants by key, the default first."""
