"""The output formats, one registry entry each, and the encoding of an image as one of them.

Whatever names a format takes it from `OUTPUT_FORMATS`: the fields and refusals of both APIs, the
OpenAPI document, `/health` for the page, and the suffixes that `klein generate` accepts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from xml.sax.saxutils import escape

from PIL import ExifTags, Image

from app.domain import RawImage
from app.images.uploads import resize, to_pillow

INFOTEXT, RECIPE = "parameters", "klein"
"""The entries of metadata that JPEG and WebP carry, by the names of their chunks in a PNG:
AUTOMATIC1111's text, whose last line has the settings, and a JSON object in ASCII."""

_MAX_TEXT_BYTES = 60_000
"""A JPEG's segment is limited to 64 kB, and so are all of EXIF and all of XMP."""
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:klein="urn:klein-server">'
    "<klein:recipe>{}</klein:recipe></rdf:Description></rdf:RDF></x:xmpmeta>"
)

Encoder = Callable[[RawImage, int, Mapping[str, str], Executor | None], bytes]
"""Takes the image, the quality from 0 to 100, metadata, and threads that may share the work."""


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """One output format: how requests and files name it, and what makes it."""

    name: str
    media_type: str
    suffixes: tuple[str, ...]
    """Of file names, each with its dot."""
    encode: Encoder
    aliases: tuple[str, ...] = ()
    """Further names, in OpenAI's API only."""
    has_quality: bool = True
    """Whether the quality changes anything; a lossless format takes only 100."""


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The file format by its name in `OUTPUT_FORMATS`; *compression* is its quality, 0 to 100."""

    format: str
    compression: int = 100

    @property
    def media_type(self) -> str:
        """The value of `Content-Type`."""
        return OUTPUT_FORMATS[self.format].media_type


def encode(
    image: RawImage,
    output: OutputFormat,
    metadata: Mapping[str, str] | None = None,
    helpers: Executor | None = None,
    size: tuple[int, int] | None = None,
) -> bytes:
    """Encode *image* as *output*, with *metadata* where common viewers look for it.

    It is scaled to *size* first, if that is another than its own.

    A PNG is encoded on the calling thread and those of *helpers*, with one text chunk per entry.
    JPEG and WebP get `INFOTEXT` in EXIF's UserComment and `RECIPE` in XMP; prompts too long for
    either are cut and end in three dots.
    """
    if size not in {None, (image.width, image.height)}:
        image = resize(image, *size)
    return OUTPUT_FORMATS[output.format].encode(image, output.compression, metadata or {}, helpers)


def format_names() -> dict[str, str]:
    """Map each format's name, then each alias, to the format's name."""
    aliases = {alias: each.name for each in OUTPUT_FORMATS.values() for alias in each.aliases}
    return {name: name for name in OUTPUT_FORMATS} | aliases


def list_words(words: Iterable[str], joint: str = "or") -> str:
    """Join *words*, at least one, for a sentence: `png, jpeg or webp`."""
    *first, last = words
    return f"{', '.join(first)} {joint} {last}" if first else last


def _encode_png(
    image: RawImage, quality: int, metadata: Mapping[str, str], helpers: Executor | None
) -> bytes:
    # Imported late: the decoder processes do without numpy and its threads.
    from app.images.png import encode_png

    return encode_png(image, metadata, helpers)


def _encode_jpeg(
    image: RawImage, quality: int, metadata: Mapping[str, str], helpers: Executor | None
) -> bytes:
    # Pillow reads a quality of 0 as "the default".
    subsampling = "4:4:4" if quality >= 90 else "4:2:0"
    return _save(image, "JPEG", metadata, quality=max(1, quality), subsampling=subsampling)


def _encode_webp(
    image: RawImage, quality: int, metadata: Mapping[str, str], helpers: Executor | None
) -> bytes:
    return _save(image, "WEBP", metadata, quality=quality)


def _save(
    image: RawImage, pillow_format: str, metadata: Mapping[str, str], **options: int | str
) -> bytes:
    buffer = io.BytesIO()
    notes: dict[str, bytes] = {}
    if infotext := metadata.get(INFOTEXT):
        notes["exif"] = _encode_exif(infotext)
    if recipe := metadata.get(RECIPE):
        notes["xmp"] = _encode_xmp(recipe)
    to_pillow(image).save(buffer, pillow_format, **notes, **options)
    return buffer.getvalue()


def _encode_exif(infotext: str) -> bytes:
    """Write UserComment as AUTOMATIC1111 does, big-endian, which Pillow's EXIF is too."""
    prompt, newline, settings = infotext.replace("\0", "\ufffd").rpartition("\n")
    limit = len(prompt)
    while len(text := _encode_comment(_cut(prompt, limit) + newline + settings)) > _MAX_TEXT_BYTES:
        limit //= 2
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = text
    return exif.tobytes()


def _encode_comment(text: str) -> bytes:
    # JSON may contain a lone surrogate, which UTF-16 cannot encode: "?" replaces it.
    return b"UNICODE\0" + text.encode("utf-16-be", "replace")


def _encode_xmp(recipe: str) -> bytes:
    limit = len(recipe)
    packet = _XMP.format(escape(recipe))
    while len(packet) > _MAX_TEXT_BYTES:
        limit //= 2
        values = json.loads(recipe)
        texts = {key: _cut(text, limit) for key, text in values.items() if isinstance(text, str)}
        packet = _XMP.format(escape(json.dumps(values | texts)))
    return packet.encode("ascii")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


OUTPUT_FORMATS: dict[str, ImageFormat] = {
    each.name: each
    for each in (
        ImageFormat("png", "image/png", (".png",), _encode_png, has_quality=False),
        ImageFormat("jpeg", "image/jpeg", (".jpg", ".jpeg"), _encode_jpeg, aliases=("jpg",)),
        ImageFormat("webp", "image/webp", (".webp",), _encode_webp),
    )
}
