"""`stream: true`: server-sent events as the official SDK parses them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging

import pytest
from PIL import Image

from app.api.app import create_app
from app.api.disconnect import until_disconnected
from app.api.sse import EventStream
from app.errors import Kind, KleinError, OutOfMemory
from app.request_context import RequestContext, current_request
from app.settings import Settings
from tests.api.conftest import error_of
from tests.api.pictures import photo
from tests.api.sockets import listening, until

ROUTE = "/v1/images/generations"


def parse(text: str) -> list[tuple[str, dict]]:
    """Read events strictly: two lines and a blank one each, comments aside."""
    assert text.endswith("\n\n")
    events = []
    for block in text[:-2].split("\n\n"):
        if all(line.startswith(": ") for line in block.split("\n")):
            continue
        name, data = block.split("\n")

        assert name.startswith("event: ")
        assert data.startswith("data: ")

        events.append((name[7:], json.loads(data[6:])))
    return events


async def stream(client, **body) -> list[tuple[str, dict]]:
    """Ask for a stream and read it to its end."""
    response = await client.post(ROUTE, json={"prompt": "a", "stream": True, **body})

    assert response.status_code == 200

    return parse(response.text)


async def test_previews_come_before_the_picture(client):
    """Type and event agree, indexes count from 0, every field of OpenAI's events is there."""
    events = await stream(client, partial_images=2, seed=42, size="512x256")
    plain = await client.post(ROUTE, json={"prompt": "a", "seed": 42, "size": "512x256"})
    kinds = ["partial_image", "partial_image", "completed"]

    assert [f"image_generation.{kind}" for kind in kinds] == [name for name, _ in events]
    for name, data in events:
        assert name == data["type"]
        assert isinstance(data["created_at"], int)
        assert (data["size"], data["quality"]) == ("512x256", "auto")
        assert (data["background"], data["output_format"]) == ("opaque", "png")
        assert Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).format == "PNG"
    assert [data["partial_image_index"] for _, data in events[:2]] == [0, 1]
    assert events[-1][1]["b64_json"] == plain.json()["data"][0]["b64_json"]
    assert events[-1][1]["seed"] == 42
    assert events[-1][1]["usage"] == {
        "input_tokens": 12,
        "output_tokens": 512,
        "total_tokens": 524,
        "input_tokens_details": {"text_tokens": 12, "image_tokens": 0},
    }


async def test_comments_tell_what_openai_has_no_event_for(client):
    """Place in the queue, steps, and seconds by stage just before the picture; SDKs skip them."""
    body = {"prompt": "a", "stream": True, "partial_images": 1, "num_inference_steps": 2}
    text = (await client.post(ROUTE, json=body)).text
    comments = [line[2:] for line in text.splitlines() if line.startswith(": ")]
    words = [comment.partition(" ")[0] for comment in comments]

    assert comments[:3] == ["queued 0", "denoise 1/2", "denoise 2/2"]
    assert words[3:] in (["timing"], ["timing", "peak"])
    assert ", total;dur=" in comments[3]
    assert text.index(": timing") > text.index("event: image_generation.partial_image")


async def test_n_images_share_a_stream_whose_events_are_indexed(client):
    """Each with the seed and the bytes that it has alone, previews of its own, and its usage."""
    several = {"n": 3, "indexed": True, "seed": 5, "partial_images": 1, "size": "64x64"}
    events = await stream(client, **several)
    alone = await stream(client, seed=6, partial_images=1, size="64x64")
    done = {
        data["image_index"]: data for name, data in events if name == "image_generation.completed"
    }
    own = [data for _, data in events if data["image_index"] == 1]

    assert {index: data["seed"] for index, data in done.items()} == {0: 5, 1: 6, 2: 7}
    assert [data["type"] for data in own] == [name for name, _ in alone]
    for data, (_, expected) in zip(own, alone, strict=True):
        assert data | expected == data
        assert data.keys() - expected.keys() == {"image_index"}
    assert all("image_index" not in data for _, data in alone)


async def test_comments_of_an_indexed_stream_begin_with_the_index(client):
    """Of all that is not an event; one image may be indexed too."""
    body = {"prompt": "a", "stream": True, "num_inference_steps": 1, "indexed": True}
    texts = [(await client.post(ROUTE, json={**body, "n": n})).text for n in (1, 2)]
    comments = [
        [line.split()[1:3] for line in text.splitlines() if line.startswith(": ")] for text in texts
    ]

    assert comments[0][:3] == [["0", "queued"], ["0", "denoise"], ["0", "timing"]]
    assert comments[1][:2] == [["0", "queued"], ["1", "queued"]]
    assert {index for index, _ in comments[1]} == {"0", "1"}


async def test_only_a_stream_is_indexed(client):
    """Elsewhere the list has its order; several images in a stream need it, and are told so."""
    for body, param in (({"indexed": True}, "indexed"), ({"stream": True, "n": 2}, "n")):
        error = error_of(await client.post(ROUTE, json={"prompt": "a", **body}))

        assert error["param"] == param
        assert "indexed" in str(error["message"])


@pytest.mark.parametrize("partials", [None, 0])
async def test_without_previews_only_the_picture_comes(client, partials):
    """Exactly one event."""
    events = await stream(client, partial_images=partials)

    assert [name for name, _ in events] == ["image_generation.completed"]


async def test_there_are_fewer_previews_than_steps(client, service):
    """After the last step there is the picture itself."""
    events = await stream(client, partial_images=3, num_inference_steps=2)

    assert len(events) == 2
    assert service.specs[0].previews == 1


@pytest.mark.parametrize(("asked", "echoed"), [("high", "high"), ("auto", "auto"), ("hd", "auto")])
async def test_quality_is_a_word_the_sdk_knows(client, asked, echoed):
    """Its strict mode fails on `standard` and `hd`."""
    events = await stream(client, quality=asked)

    assert echoed == events[-1][1]["quality"]


async def test_a_cut_prompt_is_reported_at_the_end(client, service):
    """Headers are long gone by then."""
    service.script.warnings = ("prompt cut to 512 tokens",)

    assert (await stream(client))[-1][1]["warnings"] == ["prompt cut to 512 tokens"]


async def test_nothing_is_put_on_the_wire_that_breaks_a_parser(client):
    """No ids, no retry, no [DONE], no event without data; and nobody keeps it on the way."""
    response = await client.post(ROUTE, json={"prompt": "a", "stream": True, "partial_images": 1})
    starts = {line.partition(":")[0] for line in response.text.splitlines() if line}

    assert starts == {"event", "data", ""}  # a comment starts with the colon
    assert "[DONE]" not in response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutOfMemory("There was no room."), ("server_error", "out_of_memory", "oom")),
        (
            KleinError("Too late.", kind=Kind.DEADLINE),
            ("server_error", "deadline_exceeded", "deadline"),
        ),
        (KleinError("It died.", kind=Kind.FATAL), ("server_error", "generation_failed", "error")),
        (RuntimeError("secret 0x7f"), ("server_error", "internal_error", "error")),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_after_the_start_is_an_event(client, service, runtime, error, expected):
    """In the one form that the SDK raises; then the stream is closed."""
    service.script.error = error
    service.script.previews_before_error = 1
    events = await stream(client, partial_images=2)
    name, data = events[-1]
    type_, code, outcome = expected

    assert [name for name, _ in events] == ["image_generation.partial_image", "error"]
    assert name == data["type"]
    assert (data["error"]["type"], data["error"]["code"]) == (type_, code)
    assert set(data["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in str(data)
    assert runtime.metrics.finished == [(ROUTE, outcome)]


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"n": 2}, "n"),
        ({"response_format": "url"}, "response_format"),
        ({"partial_images": 4}, "partial_images"),
        ({"size": "1000x1000"}, "size"),
    ],
    ids=str,
)
async def test_mistakes_are_plain_errors_before_the_stream(client, service, sent, param):
    """A client that reads 200 has been accepted."""
    response = await client.post(ROUTE, json={"prompt": "a", "stream": True, **sent})

    assert response.status_code == 400
    assert param == error_of(response)["param"]
    assert not service.tickets


async def test_a_full_queue_is_a_plain_error_too(client, service):
    """So that the SDK tries again."""
    service.closed_by = Kind.QUEUE_FULL
    response = await client.post(ROUTE, json={"prompt": "a", "stream": True})

    assert response.status_code == 503


async def test_a_dall_e_name_streams_base64(client):
    """Its default of links holds for plain answers only."""
    events = await stream(client, model="dall-e-3")

    assert "b64_json" in events[-1][1]


async def test_an_edit_has_words_of_its_own(client):
    """`image_edit.*`, with the pictures that went in counted."""
    files = [("image", photo(256, 128)), ("prompt", (None, "a")), ("stream", (None, "true"))]
    files += [("partial_images", (None, "1"))]
    response = await client.post("/v1/images/edits", files=files)
    events = parse(response.text)

    assert [name for name, _ in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert events[-1][1]["usage"]["input_tokens_details"]["image_tokens"] == 16 * 8


async def test_an_edits_stream_is_indexed_as_well(client):
    """From a form, in which all values are texts."""
    form = {"prompt": "a", "n": "2", "seed": "5", "stream": "true", "indexed": "true"}
    files = [("image", photo(64, 64)), *((name, (None, text)) for name, text in form.items())]
    events = parse((await client.post("/v1/images/edits", files=files)).text)

    assert [(name, data["image_index"], data["seed"]) for name, data in events] == [
        ("image_edit.completed", 0, 5),
        ("image_edit.completed", 1, 6),
    ]


async def test_a_waiting_stream_is_kept_alive(serve, service):
    """Headers at once, then comments; it ends as if nothing had been."""
    service.script.release = asyncio.Event()
    app = create_app(Settings.read({}), lambda _: _runtime(service), heartbeat_s=0.02)
    async with listening(app) as port:
        reader, writer = await _ask(port)
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            waited = await reader.readuntil(b": keep-alive\n\n")
            waited += await reader.readuntil(b": keep-alive\n\n")
            service.script.release.set()
            rest = await reader.readuntil(b"\n\n\r\n0\r\n\r\n")
        writer.close()

    assert head.startswith(b"HTTP/1.1 200")
    assert waited.count(b": keep-alive") == 2
    assert b"image_generation.completed" in rest


async def test_a_listener_that_goes_stops_the_job(service, caplog):
    """While it waits; counted as cancelled, logged as 499."""
    caplog.set_level(logging.INFO, logger="app.api.access")
    service.script.release = asyncio.Event()
    runtime = _runtime(service)
    app = create_app(Settings.read({}), lambda _: runtime, heartbeat_s=0.02)
    async with listening(app) as port:
        reader, writer = await _ask(port)
        async with asyncio.timeout(5):
            await reader.readuntil(b": keep-alive\n\n")
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            await service.tickets[0].ended.wait()
        await until(lambda: runtime.metrics.finished)

    assert service.tickets[0].was_cancelled
    assert runtime.metrics.finished == [(ROUTE, "cancelled")]
    assert [record.status for record in caplog.records if hasattr(record, "status")] == [499]


async def test_a_stream_that_never_started_still_lets_go_of_its_job():
    """Even where the client has gone before the first byte."""
    closed = []

    async def messages():
        yield b"never"

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise OSError("the connection is gone")

    scope = {"type": "http"}
    current_request.set(RequestContext("a"))
    answer = EventStream(
        messages(), headers={}, heartbeat_s=1, on_close=lambda: closed.append(True)
    )
    with pytest.raises(OSError, match="gone"):
        await answer(scope, receive, send)

    assert closed == [True]
    assert current_request.get().error is None
    assert await until_disconnected(receive) is None


def _runtime(service):
    from tests.support.fakes import FakeRuntime

    return FakeRuntime(service=service)


async def _ask(port: int):
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    return reader, writer
