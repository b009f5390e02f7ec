"""Pictures that say how they were made: ours, AUTOMATIC1111's and ComfyUI's."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.browser.conftest import checkerboard

if TYPE_CHECKING:
    from tests.browser.conftest import Visit

pytestmark = pytest.mark.system

PARAMETERS = """a fox 狐, "in" snow: für immer
second line <lora:unknown:0.7>
Negative prompt: Steps and stones
Steps: 6, Sampler: Euler, CFG scale: 1, Seed: 4294967295, Size: 128x64, Model: "a, b", x: 1"""
KLEIN = json.dumps(
    {
        "prompt": "a fox, ours 狐",
        "seed": 5,
        "steps": 3,
        "guidance": 1.0,
        "size": "64x128",
        "model": "m",
    }
)
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            **{"seed": 77, "steps": 9, "cfg": 1, "model": ["4", 0]},
            **{"positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]},
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "m"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 192, "height": 64}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a comfy fox", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["4", 1]}},
}
FLUX = {
    "1": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            **{"noise": ["2", 0], "guider": ["3", 0], "sampler": ["4", 0]},
            **{"sigmas": ["5", 0], "latent_image": ["6", 0]},
        },
    },
    "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 78}},
    "3": {"class_type": "BasicGuider", "inputs": {"model": ["9", 0], "conditioning": ["7", 0]}},
    "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "5": {"class_type": "Flux2Scheduler", "inputs": {"steps": 4, "width": 320, "height": 64}},
    "6": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 320, "height": 64}},
    "7": {"class_type": "FluxGuidance", "inputs": {"guidance": 4, "conditioning": ["8", 0]}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"text": ["10", 0], "clip": ["9", 0]}},
    "9": {"class_type": "UNETLoader", "inputs": {}},
    "10": {"class_type": "PrimitiveString", "inputs": {"value": "a flux fox"}},
}
FOX = 'a fox 狐, "in" snow: für immer\nsecond line'


def png_with(*, is_compressed: bool = False, **texts: str) -> bytes:
    """A PNG with these chunks, tEXt or zTXt; of what latin-1 lacks, iTXt with UTF-8."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text, zip=is_compressed)
    buffer = io.BytesIO()
    checkerboard(64).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def commented(kind: str, *, xmp: str = "") -> bytes:
    """A JPEG or WebP whose EXIF has AUTOMATIC1111's text, as it writes it."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
    buffer = io.BytesIO()
    more = {"xmp": xmp.encode()} if xmp else {}
    checkerboard(64).save(buffer, kind, exif=exif, **more)
    return buffer.getvalue()


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:klein="urn:klein-server">'
    f"<klein:recipe>{KLEIN.replace('&', '&amp;')}</klein:recipe></rdf:Description></x:xmpmeta>"
)
PLAIN = "a lämp\nSteps: 5, Seed: 8, Size: 64x192"
LAMP = ("a lämp", 5, 8, "64 × 192")
COMFY_FOX = ("a comfy fox", 9, 77, "192 × 64")
OURS = ("klein-server", "a fox, ours 狐", 3, 5, "64 × 128")
THEIRS = ("AUTOMATIC1111", FOX, 6, 4294967295, "128 × 64")


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        (png_with(parameters=PARAMETERS, klein=KLEIN), "png", OURS),
        (png_with(parameters=PARAMETERS), "png", THEIRS),
        (png_with(prompt=json.dumps(COMFY)), "png", ("ComfyUI", *COMFY_FOX)),
        (png_with(prompt=json.dumps(FLUX)), "png", ("ComfyUI", "a flux fox", 4, 78, "320 × 64")),
        (png_with(is_compressed=True, parameters=PARAMETERS), "png", THEIRS),
        (png_with(is_compressed=True, parameters=PLAIN), "png", ("AUTOMATIC1111", *LAMP)),
        (png_with(is_compressed=True, prompt=json.dumps(COMFY)), "png", ("ComfyUI", *COMFY_FOX)),
        (commented("JPEG"), "jpeg", THEIRS),
        (commented("WEBP"), "webp", THEIRS),
        (commented("JPEG", xmp=XMP), "jpeg", OURS),
        (commented("WEBP", xmp=XMP), "webp", OURS),
    ],
    ids=[
        "ours",
        "a1111",
        "comfy",
        "flux",
        "itxt",
        "ztxt",
        "ztxt-comfy",
        "jpeg",
        "webp",
        "our-jpeg",
        "our-webp",
    ],
)
def test_a_dropped_picture_offers_its_settings(visit, klein, data, kind, expected) -> None:
    """Beside its use as a picture to work from."""
    here = visit(klein).wait_until_ready()
    drop(here, data, kind)
    here.page.wait_for_selector("#found-dialog[open]")
    source, prompt, steps, seed, size = expected

    assert source in here.page.inner_text("#found-from")
    assert here.page.is_visible("#found-use")

    here.page.click("#found-restore")

    assert here.page.input_value("#prompt") == prompt
    assert here.page.input_value("#steps") == str(steps)
    assert here.page.input_value("#seed") == str(seed)
    assert here.page.inner_text("#settings-summary").startswith(size)
    assert here.page.locator("#references li").count() == 0


def test_it_can_be_worked_from_as_well(visit, klein) -> None:
    """The other button."""
    here = visit(klein).wait_until_ready()
    drop(here, png_with(parameters=PARAMETERS), "png")
    here.page.click("#found-use")
    here.page.wait_for_selector("#references li")

    assert here.page.input_value("#prompt") == ""


def test_our_own_picture_is_read_again(visit, klein) -> None:
    """What the service writes, the page reads."""
    here = visit(klein).wait_until_ready().choose(side=64, seed=12)
    drop(here, here.make("a lamp\non a desk"), "png")
    here.page.click("#found-restore")

    assert here.page.input_value("#prompt") == "a lamp\non a desk"
    assert here.page.input_value("#seed") == "12"


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        b"prompt\0[1",
        b'prompt\0{"1": null, "2": {"class_type": "Sampler", "inputs": {"latent_image": ["2"]}}}',
        b"parameters\0no recipe",
        b"klein\0[]",
        b"klein\0" + b"{" * 5000,
        b"parameters\0" + b"a " * 500_000 + b"\nSteps: " + b"a " * 500_000,
        b"parameters\0" + b"<lora:" * 16_000 + b"\nSteps: 4, " + b"a" * 3_000,
    ],
)
def test_a_picture_without_a_recipe_is_worked_from(visit, klein, chunk) -> None:
    """So is one with a broken recipe, one that goes round in circles, or one without end."""
    here = visit(klein).wait_until_ready()
    head = struct.pack(">I", len(chunk)) + b"tEXt" + chunk + b"\0\0\0\0"
    drop(here, png_with()[:33] + head + png_with()[33:], "png")
    if b"<lora" in chunk:
        here.page.click("#found-use")
    here.page.wait_for_selector("#references li", timeout=3_000)

    assert not here.page.is_visible("#found-dialog")


def chunk_of(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG, with its length and without its sum, which browsers pass over here."""
    return struct.pack(">I", len(data)) + kind + data + b"\0\0\0\0"


CHUNKS: dict[str, Callable[[], bytes]] = {
    "bomb": lambda: chunk_of(b"zTXt", b"parameters\0\0" + zlib.compress(b" " * 200_000_000, 9)),
    "bomb-itxt": lambda: chunk_of(
        b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"[" * 100_000_000, 9)
    ),
    "many": lambda: chunk_of(b"zTXt", b"prompt\0\0" + zlib.compress(b" " * 4_000_000, 9)) * 50,
    "cut": lambda: chunk_of(
        b"zTXt", b"parameters\0\0" + zlib.compress(PLAIN.encode("latin-1"))[:-9]
    ),
    "broken": lambda: chunk_of(b"zTXt", b"parameters\0\0no zlib"),
}
"""Made by the test that drops them: compressing takes seconds, which every run would wait for that
only reads this file."""


@pytest.mark.parametrize("make_chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_what_a_chunk_inflates_to_has_a_bound(visit, klein, make_chunks) -> None:
    """Of all chunks of a file together; what is broken is no recipe."""
    here = visit(klein).wait_until_ready()
    drop(here, png_with()[:33] + make_chunks() + png_with()[33:], "png")
    here.page.wait_for_selector("#references li")

    assert not here.page.is_visible("#found-dialog")


def drop(here: Visit, data: bytes, kind: str) -> None:
    """Let a file fall onto the page; its bytes go there as one word, since playwright wraps each
    number of a list by itself."""
    here.page.evaluate(
        """([base64, kind]) => {
            const dataTransfer = new DataTransfer();
            const type = `image/${kind}`;
            const bytes = Uint8Array.from(atob(base64), (it) => it.charCodeAt(0));
            const file = new File([bytes], `found.${kind}`, {type});
            dataTransfer.items.add(file);
            const options = {bubbles: true, cancelable: true, dataTransfer};
            document.body.dispatchEvent(new DragEvent("drop", options));
        }""",
        [base64.b64encode(data).decode(), kind],
    )
