"""What the official `openai` SDK is promised, from one prompt to edits, streams and errors.

Each runs on fakes in this process, (marker slow) against a live service with the scripted engine,
and (marker full) against one with a tiny random klein checkpoint: klein's ids and limits, two
steps, four where it streams. What needs a script of faults, or a limit of its own, is in
`test_openai_sdk_live.py`.
"""

from __future__ import annotations

import asyncio
import io
import time

import httpx
import pytest
from openai import BadRequestError, NotFoundError
from openai.types import ImagesResponse
from PIL import Image

from tests.api.pictures import data_url, encode, mask, photo, rotated_photo
from tests.api.targets import LIFETIME_S, MAX_BODY, Target, on_fakes, on_server, picture
from tests.support.timing import TIMED

SCRIPTED = pytest.param("scripted", marks=pytest.mark.slow)
KLEIN = pytest.param("klein", marks=[pytest.mark.full, pytest.mark.torch])
SMALL = "64x64"


@pytest.fixture(params=["fakes", SCRIPTED, KLEIN])
async def target(request):
    """One service after the other."""
    if request.param == "fakes":
        running = on_fakes()
    else:
        server = request.getfixturevalue(f"live_{request.param}")
        running = on_server(server, paints=request.param == "klein", quick={"steps": 2})
    async with running as target:
        yield target


async def make(target: Target, **fields) -> ImagesResponse:
    """Make small pictures of "a"."""
    fields.setdefault("size", SMALL)
    extra = target.extra(**fields.pop("extra_body", {}))
    return await target.c.images.generate(prompt="a", extra_body=extra, **fields)


async def edit(target: Target, image, **fields) -> ImagesResponse:
    """Edit with little effort."""
    extra = target.extra(**fields.pop("extra_body", {}))
    return await target.c.images.edit(image=image, prompt="a", extra_body=extra, **fields)


async def refusal(call) -> BadRequestError:
    """Await *call*, which must be refused with 400 and all that a client needs."""
    with pytest.raises(BadRequestError) as caught:
        await call
    error = caught.value

    assert set(error.body) == {"message", "type", "param", "code"}
    assert error.type == "invalid_request_error"
    assert error.request_id

    return error


async def test_a_prompt_is_enough(target):
    """One PNG of 1024x1024; time, seed and request id are there."""
    result = await target.c.images.generate(prompt="a", extra_body=target.extra())
    (item,) = result.data

    assert picture(item).size == (1024, 1024)
    assert picture(item).format == "PNG"
    assert isinstance(result.created, int)
    assert isinstance(item.seed, int)
    assert result._request_id


async def test_strict_clients_find_nothing_to_complain_of(target):
    """Even with a word of quality that its own type does not know."""
    await target.s.images.generate(prompt="a", quality="hd", size=SMALL, extra_body=target.extra())
    await target.s.images.edit(image=photo(64, 64), prompt="a", extra_body=target.extra())


async def test_n_pictures_count_their_seeds_up(target):
    """Three different ones; the second equals a single one with its seed."""
    three = await make(target, n=3, extra_body={"seed": 5})
    single = await make(target, extra_body={"seed": 6})

    assert [item.seed for item in three.data] == [5, 6, 7]
    assert len({item.b64_json for item in three.data}) == 3
    assert three.data[1].b64_json == single.data[0].b64_json


async def test_a_seed_decides_the_bytes(target):
    """The same twice, 0 is a seed, and three without one differ."""
    same = [(await make(target, extra_body={"seed": 0})).data[0].b64_json for _ in range(2)]
    other = (await make(target, extra_body={"seed": 1})).data[0].b64_json
    unseeded = await asyncio.gather(*(make(target) for _ in range(3)))

    assert same[0] == same[1] != other
    assert len({result.data[0].seed for result in unseeded}) == 3


@pytest.mark.parametrize("size", ["256x256", "512x512", "1536x1024", "1024x1792", "768x1344"])
async def test_sizes_are_made_to_the_pixel(target, size):
    """As asked for, as answered, as decoded."""
    result = await make(target, size=size)

    assert result.size == size == "{}x{}".format(*picture(result.data[0]).size)


async def test_width_and_height_are_a_size(target):
    """As extension fields."""
    result = await target.c.images.generate(
        prompt="a", extra_body=target.extra(width=192, height=336)
    )

    assert result.size == "192x336" == "{}x{}".format(*picture(result.data[0]).size)


@pytest.mark.parametrize(
    "size", ["1000x1000", "1920x1080", "0x0", "1024", "1024X1024", "4096x4096", "2048x512"]
)
async def test_other_sizes_are_refused(target, size):
    """By the name of the field; nothing is queued."""
    before = target.count_accepted()
    error = await refusal(make(target, size=size))

    assert error.param == "size"
    assert target.count_accepted() == before


async def test_formats_are_what_they_are_called(target):
    """In the bytes too; quality costs bytes; PNG has none to give up."""
    for name, magic in (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")):
        result = await make(target, output_format=name)

        assert (result.output_format, picture(result.data[0]).format) == (name, magic)
    sizes = [
        len((await make(target, output_format="jpeg", output_compression=q)).data[0].b64_json)
        for q in (20, 90)
    ]

    assert sizes[0] < sizes[1]
    assert (await refusal(make(target, output_compression=50))).param == "output_compression"


async def test_backgrounds_are_opaque(target):
    """Transparent is refused, auto means opaque."""
    assert (await refusal(make(target, background="transparent"))).param == "background"
    assert (await make(target, background="auto")).background == "opaque"


async def test_what_is_ignored_changes_nothing(target):
    """Each accepted, and the same bytes for the same seed."""
    plain = (await make(target, extra_body={"seed": 1})).data[0].b64_json
    for extra in (
        *({"quality": quality} for quality in ("standard", "hd", "auto", "low", "max")),
        {"style": "vivid"},
        {"moderation": "low"},
        {"user": "u"},
        {"safety_identifier": "s"},
        {"complexity": "high"},
    ):
        result = await make(target, extra_body={"seed": 1, **extra})

        assert plain == result.data[0].b64_json, extra


@pytest.mark.parametrize(
    "sent",
    [
        {"svg": {}},
        {"frame_count": 2},
        {"output_format": "gif"},
        {"negative_prompt": "x"},
        {"guidance_scale": 4},
        {"num_steps": 4},
    ],
    ids=str,
)
async def test_what_cannot_be_done_is_refused(target, sent):
    """By the name of the field."""
    (name,) = sent

    assert (await refusal(make(target, extra_body=sent))).param == name


async def test_none_is_absent_and_text_is_no_number(target):
    """Every optional argument as None; `"2"` is no n."""
    names = ("background", "model", "moderation", "n", "output_compression", "output_format")
    names += ("partial_images", "quality", "response_format", "stream", "style", "user")
    await make(target, **dict.fromkeys(names))

    assert (await refusal(make(target, extra_body={"n": "2"}))).code == "invalid_type"


@TIMED
async def test_models_have_several_names(target, is_timed: bool):
    """Those of the served one; any other is refused at once, with 400 rather than 404."""
    names = ("flux.2-klein-4b", "black-forest-labs/FLUX.2-klein-4B", "gpt-image-1", None)
    for name in names:
        assert (await make(target, model=name)).model == "flux.2-klein-4b"
    seconds = []
    for _ in range(25 if is_timed else 1):
        started = time.perf_counter()
        error = await refusal(make(target, model="invalid-model"))
        seconds.append(time.perf_counter() - started)

        assert (error.code, error.param) == ("model_not_found", "model")
    assert not is_timed or min(seconds) < 0.05


async def test_a_link_leads_to_the_picture_for_a_while(target):
    """Without a key; after its time a 404 as JSON."""
    result = await make(target, response_format="url")
    url = result.data[0].url
    fetched = await target.http.get(url)

    assert fetched.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(fetched.content)).size == (64, 64)

    await asyncio.sleep(LIFETIME_S)
    gone = await target.http.get(url)

    assert gone.status_code == 404
    assert gone.json()["error"]["code"]


async def test_langchains_wrapper_gets_links(target):
    """What `DallEAPIWrapper.run` does: `dall-e-2`, no response_format, then it joins the urls."""
    result = await target.c.images.generate(
        prompt="a", model="dall-e-2", n=1, size=SMALL, extra_body=target.extra()
    )

    assert "\n".join(item.url for item in result.data).startswith("http://127.0.0.1:")


async def test_an_edit_keeps_the_shape(target):
    """Bare bytes come as an octet-stream called "upload"; 1000x600 becomes 992x592."""
    result = await edit(target, photo(1000, 600))

    assert result.size == "992x592" == "{}x{}".format(*picture(result.data[0]).size)

    await edit(target, [photo(64, 64)])


async def test_one_to_four_pictures(target):
    """Two and four do, five and none do not."""
    one = photo(64, 64)
    for count in (2, 4):
        await edit(target, [one] * count)
    too_many = await refusal(edit(target, [one] * 5))
    none = await refusal(edit(target, []))

    assert too_many.param == "image"
    assert (none.param, none.code) == ("image", "missing_required_parameter")


async def test_every_way_to_send_them_is_the_same(target):
    """Repeated, with brackets, numbered, files first, chunked: the same picture for a seed."""
    texts = [("prompt", (None, "a")), ("seed", (None, "3")), ("steps", (None, "2"))]
    files = [photo(64, 64), photo(128, 64)]
    answers = []
    for names in (("image", "image"), ("image[]", "image[]"), ("image[0]", "image[1]")):
        parts = list(zip(names, files, strict=True))
        answers += [await post(target, form) for form in (texts + parts, parts + texts)]
    answers.append(await post(target, texts + [("image[]", file) for file in files], chunked=True))

    assert {response.status_code for response in answers} == {200}
    assert len({response.json()["data"][0]["b64_json"] for response in answers}) == 1


async def test_a_mask_keeps_what_it_covers(target):
    """Seen where a model paints: the right half is the source's, the left one is not."""
    source = photo(64, 64)
    other = Image.effect_noise((64, 64), 90).convert("RGB")
    result = await edit(target, [source, encode(other)], mask=mask(64, 64), extra_body={"seed": 1})
    before = Image.open(io.BytesIO(source)).convert("RGB")
    after = picture(result.data[0]).convert("RGB")
    left, right = (0, 0, 32, 64), (32, 0, 64, 64)

    if target.paints:
        assert after.crop(right).tobytes() == before.crop(right).tobytes()
        assert after.crop(left).tobytes() != before.crop(left).tobytes()
    assert result.size == "64x64"


@pytest.mark.parametrize(
    "bad",
    [photo(64, 64), mask(128, 128), mask(64, 64, box=(0, 0, 0, 0)), photo(64, 64, "JPEG")],
    ids=["no alpha", "other size", "opaque", "jpeg"],
)
async def test_other_masks_are_refused(target, bad):
    """By the name of the field."""
    assert (await refusal(edit(target, photo(64, 64), mask=bad))).param == "mask"


async def test_a_mask_fixes_the_shape(target):
    """Another ratio would move what is kept."""
    call = edit(target, photo(64, 64), mask=mask(64, 64), size="128x64")

    assert (await refusal(call)).param == "size"


async def test_a_turned_photo_comes_out_upright(target):
    """EXIF is obeyed."""
    assert (await edit(target, rotated_photo(128, 64))).size == "64x128"


@pytest.mark.parametrize(
    "bad",
    [b"hello", photo()[:100], photo(format="GIF"), photo(32, 32), photo(576, 64)],
    ids=["text", "cut", "gif", "small", "9:1"],
)
async def test_what_is_no_picture_is_refused(target, bad):
    """By the name of the field."""
    assert (await refusal(edit(target, bad))).param == "image"


async def test_a_large_body_is_refused_before_its_end(target):
    """413 though no length was given; what would follow is never asked for."""
    form = [("prompt", (None, "a")), ("image", b"x" * (MAX_BODY + 100_000))]
    response = await post(target, form, chunked=True)

    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


async def test_json_is_the_same_edit(target):
    """A data URL instead of a file; other addresses and files of OpenAI's are refused."""
    file = photo(64, 64)
    form = await edit(target, file, extra_body={"seed": 2})

    async def send(image: dict) -> ImagesResponse:
        body = {"prompt": "a", "seed": 2, "images": [image], **target.quick}
        return await target.c.post("/images/edits", body=body, cast_to=ImagesResponse)

    json = await send({"image_url": data_url(file)})
    http = await refusal(send({"image_url": "http://127.0.0.1:9/x.png"}))
    file_id = await refusal(send({"file_id": "file-1"}))

    assert form.data[0].b64_json == json.data[0].b64_json
    assert http.param == "images[0].image_url"
    assert file_id.param == "images[0].file_id"


async def test_a_stream_shows_previews_first(target):
    """Strict types; the last picture is the plain answer's; nothing odd on the wire."""
    fields = {"prompt": "a", "size": SMALL, "partial_images": 2}
    stream = await target.s.images.generate(**fields, stream=True, extra_body={"seed": 4})
    events = [event async for event in stream]
    plain = await target.c.images.generate(prompt="a", size=SMALL, extra_body={"seed": 4})
    raw = await target.http.post(
        f"{target.url}/v1/images/generations", json={**fields, "stream": True, "seed": 4}
    )

    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[-1].b64_json == plain.data[0].b64_json
    assert "[DONE]" not in raw.text
    assert not [line for line in raw.text.splitlines() if line.startswith("id:")]
    for block in raw.text.split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n")

            assert f'"type": "{name[7:]}"' in data


async def test_an_indexed_stream_carries_several_pictures(target):
    """Strict types; the SDK goes on after the first `completed`, and shows `image_index`."""
    fields = {"prompt": "a", "size": SMALL, "n": 3}
    stream = await target.s.images.generate(
        **fields, stream=True, extra_body={"seed": 4, "indexed": True}
    )
    events = [event async for event in stream]
    plain = await target.c.images.generate(**fields, extra_body={"seed": 4})
    pictures = {event.image_index: event.b64_json for event in events}

    assert {event.type for event in events} == {"image_generation.completed"}
    assert len(events) == 3
    assert pictures == {index: each.b64_json for index, each in enumerate(plain.data)}


async def test_a_stream_without_previews_is_one_event(target):
    """And an edit's events have names of their own."""
    stream = await target.s.images.generate(
        prompt="a", size=SMALL, stream=True, extra_body=target.extra()
    )

    assert [event.type async for event in stream] == ["image_generation.completed"]

    stream = await target.s.images.edit(
        image=photo(64, 64), prompt="a", stream=True, partial_images=1, extra_body=target.extra()
    )

    assert [event.type async for event in stream] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"stream": True, "n": 2}, "n"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
    ],
    ids=str,
)
async def test_a_stream_that_cannot_be_is_refused_at_the_call(target, sent, param):
    """As a plain error."""
    assert (await refusal(make(target, **sent))).param == param


async def test_models_can_be_listed_and_looked_up(target):
    """The id with a slash travels as %2F."""
    names = [model.id async for model in target.s.models.list()]
    hub = await target.s.models.retrieve("black-forest-labs/FLUX.2-klein-4B")

    assert names == ["flux.2-klein-4b"]
    assert hub.id == "black-forest-labs/FLUX.2-klein-4B"
    with pytest.raises(NotFoundError) as caught:
        await target.s.models.retrieve("nope")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/images/variations", 404, "unknown_url"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
    ],
)
async def test_the_rest_is_an_error_object(target, method, path, status, code):
    """Unknown route, wrong method; and what `curl -d` sends."""
    response = await target.http.request(method, target.url + path)
    urlencoded = await target.http.post(f"{target.url}/v1/images/generations", data={"prompt": "a"})

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert urlencoded.status_code == 415
    assert urlencoded.json()["error"]["code"] == "unsupported_media_type"


async def post(target: Target, form, *, chunked: bool = False) -> httpx.Response:
    """Send a form by hand."""
    url = f"{target.url}/v1/images/edits"
    if not chunked:
        return await target.http.post(url, files=form)
    request = target.http.build_request("POST", url, files=form)
    body = b"".join(request.stream)

    async def chunks():
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    headers = {"content-type": request.headers["content-type"]}
    return await target.http.post(url, content=chunks(), headers=headers)
