"""A registered model as data: its specification, its architecture and its published files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
class Rates:
    """Working memory in bytes."""

    token: int
    """Per token of the transformer's sequence."""
    pixel: int
    """Per pixel of a whole decode."""
    encoded_pixel: int
    """Per pixel of a reference that is encoded."""
    tiles: int
    """Of a tiled decode at any size, besides the output itself."""
    text: int
    """Of the text encoder, besides its weights."""
    margin: int
    """Fragmentation of the allocator, and memory that CUDA graphs keep."""


@dataclass(frozen=True, slots=True)
class Matmul:
    """One linear layer of the blocks, [inputs] -> [outputs], that each step runs *count* times."""

    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a model's networks, and those that were measured with them.

    Sizes that a checkpoint states itself are read from it; those here are what it does not state
    (which layers are read, what a token covers), and what must be known without a checkpoint.
    """

    heads: int
    """Of the transformer, as the following five."""
    head_size: int
    mlp_width: int
    double_blocks: int
    single_blocks: int
    timestep_channels: int
    text_layers: tuple[int, ...]
    """Text encoder layers, counted from 1, whose outputs are the prompt embeddings; layers above
    the last are unused."""
    text_width: int
    text_mlp_width: int
    text_query_width: int
    text_key_width: int
    prompt_tokens: int
    """Tokens that a prompt is padded to, at most."""
    latent_channels: int
    latent_side: int
    """Side in pixels of the square that one latent of the VAE covers."""
    token_side: int
    """Side in pixels of the square that one token of the transformer covers."""
    decoder_widths: tuple[int, ...]
    """Channels of the VAE decoder's levels, from the latents to the pixels."""
    decoder_blocks: int
    """Residual blocks of each level."""
    reference_pixels: int
    """Larger references are scaled down to so many pixels."""
    reference_time: int
    """References have the time ids of its multiples."""
    scheduler: Mapping[str, int | float | bool | str]
    """The scheduler's config, for checkpoints without one."""
    exact_pixels: int
    """Larger images are decoded in tiles: the VAE's attention scores grow with the square."""
    large_tile: int
    """The longest side, in latents, of the tiles of larger images where a plan decodes whole: the
    largest that take less memory than an image of the default size."""
    graph_tokens: int
    """Up to so many tokens, prompt included, a pass is bound by kernel launches, not by kernels."""
    graph_pixels: int
    """The same of a decode, in pixels: previews, mostly. Graphs keep the memory of a decode."""
    with_kernels: Rates
    without_kernels: Rates
    working_bytes: int
    """Working memory of an image at the default size in bf16, eager, decoded without tiles."""
    small_bytes: int
    """A checkpoint with fewer bytes of weights is of test or demo size."""

    @property
    def width(self) -> int:
        """The transformer's hidden size."""
        return self.heads * self.head_size

    @property
    def token_pixels(self) -> int:
        """The pixels that one token covers."""
        return self.token_side**2

    @property
    def reference_tokens(self) -> int:
        """The most tokens that a reference takes."""
        return self.reference_pixels // self.token_pixels

    @property
    def widest_matmul(self) -> tuple[int, int, int]:
        """The rows, inputs and outputs of the widest matmul, for an image as large as a reference.

        It is the single blocks' first: query, key, value, and the MLP's gate and values.
        """
        return self.step_tokens, self.width, 3 * self.width + 2 * self.mlp_width

    @property
    def step_tokens(self) -> int:
        """The tokens of a step, for an image as large as a reference."""
        return self.reference_tokens + self.prompt_tokens

    @property
    def matmuls(self) -> tuple[Matmul, ...]:
        """The blocks' linear layers over all tokens of a step, a double block's two streams as one.

        The single blocks' two, then the double blocks': query, key and value; out; up; down.
        """
        width, mlp = self.width, self.mlp_width
        single, double = self.single_blocks, self.double_blocks
        return (
            Matmul(width, 3 * width + 2 * mlp, single),
            Matmul(width + mlp, width, single),
            Matmul(width, 3 * width, double),
            Matmul(width, width, double),
            Matmul(width, 2 * mlp, double),
            Matmul(mlp, width, double),
        )


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A registered model: its specification, its architecture, and its files."""

    spec: ModelSpec
    architecture: Architecture
    shared: tuple[RemoteFile, ...] = ()
    """Text encoder, VAE, tokenizer and configs, needed at every precision."""
    transformers: Mapping[str, RemoteFile] = field(default_factory=dict)
    """The transformer's file by the dtype of its blocks' weights; empty for an embedded model."""
    folder: Path | None = None
    """Where an embedded model's files lie, so that nothing is downloaded; None for any other."""

    @property
    def is_embedded(self) -> bool:
        """Whether the weights are on this machine already, so that nothing is downloaded."""
        return self.folder is not None

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
        return next(
            (file.revision for file in self.files if file.repository == self.spec.hub_id),
            EMBEDDED_REVISION,
        )
