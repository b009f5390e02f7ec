"""No body holds up the event loop: each is read in bounded steps, and nothing in it is chosen by
its sender. The lag itself is measured in `test_frozen.py`.
"""

from __future__ import annotations

import json
import random
import time

import pytest
from fastapi import Request

from app.api.config import ApiConfig
from app.api.native.request import table
from app.api.openai import fields as openai_fields
from app.api.schema import json_scanner
from app.api.schema.json_scanner import LongText, Scanner
from app.api.schema.multipart import Part, read_parts
from app.api.schema.table import FieldTable, shorten
from app.engine.models.registry import find_spec
from app.errors import InvalidRequest, KleinError
from app.limits import Limits
from tests.api.conftest import error_of
from tests.api.pictures import data_url, photo
from tests.support.timing import TIMED

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
JSON = {"content-type": "application/json"}
SERVED = find_spec("flux.2-klein-4b")
LIMITS = Limits.of(SERVED, 4_194_304, 4)
CONFIG = ApiConfig(True, True, False, False, None, 15.0)


def form(*parts: bytes, ending: bytes = b"--B--\r\n") -> bytes:
    """Join parts, each with its headers, to a form with the boundary B."""
    return b"".join(b"--B\r\n" + part + b"\r\n" for part in parts) + ending


def text_part(name: bytes, value: bytes, headers: bytes = b"") -> bytes:
    """Write one text of a form."""
    return b'Content-Disposition: form-data; name="' + name + b'"\r\n' + headers + b"\r\n" + value


def file_part(data: bytes) -> bytes:
    """Write a picture of a form."""
    return b'Content-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + data


async def post_form(client, body: bytes, parameters: str = ""):
    """Send a form, with more parameters of its content type."""
    headers = {"content-type": f"multipart/form-data; boundary=B{parameters}"}
    return await client.post(EDITS, content=body, headers=headers)


@pytest.mark.parametrize(
    "codec", ["punycode", "idna", "utf-7", "utf-16", "rot13", "undefined", "x"]
)
async def test_no_client_chooses_a_codec(client, service, codec):
    """Neither by the form's type, nor by a part's, nor by a field: texts are UTF-8."""
    prompt = "ein Bär ".encode() + b"a-b" * 3000
    declared = b"Content-Type: text/plain; charset=" + codec.encode() + b"\r\n"
    body = form(text_part(b"prompt", prompt, declared), file_part(photo()))
    response = await post_form(client, body, f"; charset={codec}")
    named = await post_form(
        client, form(text_part(b"_charset_", codec.encode()), text_part(b"prompt", b"a"))
    )

    assert response.status_code == 200, response.text
    assert service.specs[0].prompt == prompt.decode()
    assert error_of(named)["code"] == "unknown_parameter"


@pytest.mark.parametrize("value", [b"\xff", "é".encode("latin-1"), b"\xed\xa0\x80"])
async def test_a_text_that_is_no_utf_8_is_refused(client, service, value):
    """It is not guessed what was meant."""
    response = await post_form(client, form(text_part(b"prompt", value), file_part(photo())))

    assert error_of(response)["code"] == "invalid_multipart"
    assert "UTF-8" in error_of(response)["message"]


async def test_a_file_name_in_another_codec_is_not_decoded(client, service):
    """RFC 7578 forbids the form with a star; the part keeps its name, and is a text."""
    part = b"Content-Disposition: form-data; name=prompt; filename*=punycode''" + b"a" * 3000
    body = form(part + b"\r\n\r\nhello", file_part(photo()))
    response = await post_form(client, body)

    assert response.status_code == 200
    assert service.specs[0].prompt == "hello"


@pytest.mark.parametrize(
    "body",
    [
        form(*[text_part(b"a", b"b")] * 65),
        form(*[file_part(b"x")] * 65),
        form(text_part(b"a" * 1025, b"b")),
        form(text_part(b"prompt", b"a" * 128_001)),
        form(*[text_part(b"%d" % i, b"a" * 100_000) for i in range(6)]),
        form(b"a: b\r\n" * 20),
        form(b"a: " + b"b" * 5000),
        form(file_part(b"\r\n--BX" * 2000)),
        b"--B" + b" " * 40_000,
    ],
    ids=[
        "texts",
        "files",
        "name",
        "text",
        "all texts",
        "headers",
        "header",
        "boundaries",
        "padding",
    ],
)
async def test_what_a_form_may_hold_is_counted(client, service, body):
    """Parts, names, texts, headers, and what looks like a boundary."""
    response = await post_form(client, body)

    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_multipart")
    assert not service.tickets


async def parts_of(body: bytes) -> list[Part]:
    """Read a form with the boundary B, as the routes do."""
    headers = [(b"content-type", b"multipart/form-data; boundary=B")]

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    return await read_parts(Request({"type": "http", "headers": headers}, receive), bool)


EDIT = form(
    file_part(b"\x89PNG\r\n\x1a\n--B\r\n-"),
    text_part(b"prompt", b"a"),
    text_part(b"n", b"2"),
    file_part(b"\x89PNG").replace(b'"image"', b'"mask"'),
    ending=b"--B--",
)


@pytest.mark.parametrize("ending", [b"", b"\r\n", b"\r\nan epilogue\r\n--B\r\n", b" \r\n"])
async def test_a_form_ends_with_its_closing_boundary(ending):
    """The line's end may be missing, and an epilogue follow, which is not read."""
    parts = await parts_of(EDIT + ending)

    assert [part.name for part in parts] == ["image", "prompt", "n", "mask"]


async def test_a_form_that_is_cut_short_is_refused_wherever_it_ends():
    """Its last parts may be a mask or a number of pictures: without them another edit is made."""
    for length in range(len(EDIT)):
        with pytest.raises(InvalidRequest) as caught:
            await parts_of(EDIT[:length])
        assert (caught.value.code, caught.value.param) == ("invalid_multipart", None), length


@pytest.mark.parametrize("is_whole", [True, False])
async def test_only_a_whole_form_is_queued(client, service, is_whole):
    """Though every field that is needed has come."""
    body = form(file_part(photo()), text_part(b"prompt", b"a"), text_part(b"n", b"2"))
    response = await post_form(client, body if is_whole else body[: body.index(b"2\r\n--B--")])

    if is_whole:
        assert (response.status_code, len(service.specs)) == (200, 2)
    else:
        assert (response.status_code, error_of(response)["code"]) == (400, "invalid_multipart")
        assert not service.tickets


@pytest.mark.slow
def test_broken_forms_fill_no_log(scripted_service):
    """However many and wherever they break: the parser's own words, which repeat bytes of the form,
    are not written."""
    scripted_service.wait_for("First request")  # its own last line of the start
    before = len(scripted_service.lines)
    for number in range(60):
        body = b"--B\r\n" + b"a" * number + b"\x01: b\r\n\r\n"
        head = {"content-type": "multipart/form-data; boundary=B"}
        assert scripted_service.request("POST", EDITS, body, **head)[0] == 400
    scripted_service.wait_for(EDITS)
    said = [line for line in scripted_service.lines[before:] if "answered" not in line]

    assert said == []


async def test_the_longest_prompt_fits_into_a_form(client, service):
    """Of characters that take four bytes each."""
    body = form(text_part(b"prompt", "🐻".encode() * 32_000), file_part(photo()))

    assert (await post_form(client, body)).status_code == 200
    assert service.specs[0].prompt == "🐻" * 32_000


async def test_a_content_type_is_short(client):
    """What reads it looks for quotes again and again."""
    response = await post_form(client, b"", '; a="' + ";" * 2000)

    assert error_of(response)["code"] == "invalid_multipart"


def _tables() -> list[tuple[str, FieldTable]]:
    return [
        ("generate", table(SERVED, LIMITS, CONFIG)),
        ("generations", openai_fields.table(SERVED, LIMITS, CONFIG, is_edit=False)),
        ("edits", openai_fields.table(SERVED, LIMITS, CONFIG, is_edit=True)),
    ]


@pytest.mark.parametrize(
    ("table", "name"),
    [
        pytest.param(table, field.name, id=f"{route}-{field.name}")
        for route, table in _tables()
        for field in table.fields
        if (route, field.name) != ("generate", "mask")  # a picture, which may be large
    ],
)
@TIMED
def test_every_text_has_a_length(table, name, is_timed: bool):
    """A megabyte is refused in any field, as JSON and as a form, before a character is looked
    at.
    """
    text = "1" * 1_000_000
    before = time.thread_time()
    for value, is_form in ((text, False), (LongText(bytearray(text.encode()), len(text)), False)):
        with pytest.raises(InvalidRequest) as caught:
            table.read({name: value}, is_form=is_form)
        assert caught.value.param == name
    with pytest.raises(InvalidRequest):
        table.read({name: text}, is_form=True)
    assert not is_timed or time.thread_time() - before < 0.5


async def test_lengths_are_told(client):
    """What came, and what may come; also of a text that was cut out of its body."""
    for length in (1_001, 100_000):
        body = {"prompt": "a", "user": "ü" * length}
        error = error_of(await client.post(GENERATIONS, json=body))
        assert (error["param"], error["code"]) == ("user", "string_above_max_length")
        assert error["message"] == f"user has {length:,} characters; the most is 1,000."


async def test_a_prompt_of_the_largest_length_is_taken_however_it_is_written(client, service):
    """Escaped, each character of it takes twelve."""
    prompt = "🐻" * 32_000
    for body in (
        json.dumps({"prompt": prompt}),
        json.dumps({"prompt": prompt}, ensure_ascii=False),
    ):
        response = await client.post(GENERATIONS, content=body.encode(), headers=JSON)
        assert response.status_code == 200
        assert service.specs[-1].prompt == prompt

    response = await client.post(GENERATIONS, json={"prompt": prompt + "a"})

    assert error_of(response)["code"] == "string_above_max_length"


@TIMED
def test_a_name_is_cut_before_it_is_cleaned(is_timed: bool):
    """Ten megabytes of it take no time."""
    before = time.thread_time()

    assert shorten("\0" * 10_000_000) == "?" * 64 + "..."
    assert not is_timed or time.thread_time() - before < 0.05


@pytest.mark.parametrize("route", [GENERATIONS, "/v1/images"])
async def test_json_without_pictures_is_small(client, service, route):
    """Nobody needs two megabytes to say what a picture should show."""
    body = b'{"prompt": "a", "user": "' + b"a" * 2_000_000 + b'"}'
    response = await client.post(route, content=body, headers=JSON)

    assert response.status_code == 413
    assert "2,000,000" in error_of(response)["message"]
    assert not service.tickets


@pytest.mark.parametrize("route", [GENERATIONS, "/generate", EDITS])
@pytest.mark.parametrize(
    ("part", "status", "code"),
    [
        (b"[" + b"{}," * 20_000 + b"{}]", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'""' * 100_000, 400, "invalid_json"),
        (b'{"' + b'a":1,"' * 20_000 + b'b": 1}', 400, "invalid_json"),
        (b"1" * 1_000_000, 400, "invalid_json"),
        (b'"' + b"a" * 100_000 + b"\n" + b'"', 400, "invalid_json"),
        (b'"' + b"a" * 100_000 + b'\\q"', 400, "invalid_json"),
        (b'"' + b"a" * 100_000 + b'\\u12"', 400, "invalid_json"),
        (b'"' + b"a" * 100_000 + b'\xff"', 400, "invalid_json"),
        (b'"' + b"a" * 100_000, 400, "invalid_json"),
    ],
    ids=["objects", "depth", "strings", "names", "digits", "line", "escape", "hex", "utf", "cut"],
)
async def test_json_that_is_costly_to_read_is_refused(client, service, route, part, status, code):
    """By the number of its values, or as no JSON at all."""
    body = b'{"prompt": "a", "x": ' + part + b"}"
    response = await client.post(route, content=body, headers=JSON)

    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert not service.tickets


@pytest.mark.parametrize("route", ["/generate", EDITS])
async def test_beside_its_pictures_a_body_is_small(client, route):
    """Where a long text may come, many short ones may not."""
    body = b'{"prompt": "a", "x": ["' + b'","'.join([b"a" * 60_000] * 34) + b'"]}'
    response = await client.post(route, content=body, headers=JSON)

    assert response.status_code == 413
    assert "beside its pictures" in error_of(response)["message"]


@pytest.mark.parametrize("route", ["/generate", EDITS])
async def test_a_long_text_stands_only_where_a_picture_may(client, service, route):
    """Elsewhere it is refused as any value would be, and a long name as an unknown one."""
    long = "a" * 200_000
    for extra, param, code in (
        ({"seed": long}, "seed", "invalid_type"),
        ({"output_format": long}, "output_format", "invalid_value"),
        ({long: 1}, "a" * 64 + "...", "unknown_parameter"),
        ({"images": long}, "images", "invalid_type"),
        ({"prompt": long}, "prompt", "string_above_max_length"),
    ):
        response = await client.post(route, json={"prompt": "a", **extra})
        assert (error_of(response)["param"], error_of(response)["code"]) == (param, code)
    assert not service.tickets


@pytest.mark.parametrize(
    "spelt", [("/", "\\/"), ("+", "\\u002B"), ("=", "\\u003d"), ("A", "\\u0041")], ids=str
)
async def test_base64_is_read_however_a_client_escapes_it(client, service, spelt):
    """PHP escapes the slash, .NET the plus, Gson the equals sign."""
    url = data_url(photo(300, 300, "JPEG", quality=100) + b"\0" * 100_001)
    assert len(url) > json_scanner.LONG
    assert spelt[0] in url
    sent = url.replace("data:image/png;base64,", "@").replace(*spelt)
    sent = sent.replace("@", "data:image/png;base64,")
    body = f'{{"prompt": "a", "images": ["{sent}"]}}'
    response = await client.post("/generate", content=body.encode(), headers=JSON)

    assert response.status_code == 200
    assert (service.specs[0].width, service.specs[0].height) == (288, 288)


def test_what_is_scanned_is_what_json_would_have_read(monkeypatch):
    """Any value, in pieces of any size, with strings cut out from ten characters on."""
    monkeypatch.setattr(json_scanner, "LONG", 10)
    chance = random.Random(0)
    for _ in range(300):
        value = {"a": _random_value(chance, 3)}
        text = json.dumps(
            value, ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, 1])
        )
        body = text.encode("utf-8-sig" if chance.random() < 0.2 else "utf-8")
        scanner = Scanner()
        at = 0
        while at < len(body):
            step = chance.randint(1, 40)
            scanner.feed(body[at : at + step])
            at += step
        assert value == _plain(scanner.finish())


def test_damaged_json_is_refused_as_json_would_have_refused_it(monkeypatch):
    """A byte changed anywhere: both take it, or neither."""
    monkeypatch.setattr(json_scanner, "LONG", 10)
    chance = random.Random(1)
    for _ in range(500):
        data = bytearray(json.dumps({"a": _random_value(chance, 2)}).encode())
        data[chance.randrange(len(data))] = chance.choice(b'"\\{}[],:\n\xff u1')
        try:
            expected = json.loads(bytes(data).decode("utf-8-sig"))
        except ValueError:
            with pytest.raises(KleinError):
                _scan(bytes(data))
        else:
            assert _names_cut(expected) == _names_cut(_plain(_scan(bytes(data))))


def _scan(data: bytes) -> object:
    scanner = Scanner()
    scanner.feed(data)
    return scanner.finish()


def _random_value(chance: random.Random, depth: int) -> object:
    kind = chance.randrange(8 if depth else 5)
    if kind < 3:
        letters = 'aé熊🐻"\\/\n\t\u2028 \x7f'
        return "".join(chance.choice(letters) for _ in range(chance.choice([0, 3, 12, 60])))
    if kind < 5:
        return chance.choice([None, True, False, 0, -1, 1.5, 10**20, 1e-7])
    values = [_random_value(chance, depth - 1) for _ in range(chance.randrange(4))]
    return values if kind < 7 else {f"k{i}": value for i, value in enumerate(values)}


def _plain(value: object) -> object:
    """Make strings of long texts."""
    if isinstance(value, LongText):
        return value.text()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _names_cut(value: object) -> object:
    """Leave out what a long name may lose, its end."""
    if isinstance(value, dict):
        return {name[:10]: _names_cut(item) for name, item in value.items()}
    return [_names_cut(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["guidance_scale", "seed", "stream"])
@TIMED
def test_a_number_in_a_form_is_short(name, is_timed: bool):
    """The pattern's time grows with the square of the length."""
    table = openai_fields.table(SERVED, LIMITS, CONFIG, is_edit=True)
    before = time.thread_time()
    with pytest.raises(InvalidRequest):
        table.read({name: "1" * 1_000_000 + "x"}, is_form=True)
    assert not is_timed or time.thread_time() - before < 0.1
