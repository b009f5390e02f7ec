"""`POST /v1/images/edits`: what clients really send, as a form or as JSON."""

from __future__ import annotations

import asyncio
import json
import re
import tracemalloc

import pytest

from app.domain import RawImage
from app.engine.models.registry import find_spec
from app.errors import Kind
from tests.api.conftest import error_of
from tests.api.pictures import black_and_white_mask, data_url, mask, photo, rotated_photo
from tests.api.sockets import until

ROUTE = "/v1/images/edits"


async def post(client, files, **fields):
    """Send a form: texts first, then *files* as (name, bytes)."""
    parts = [(name, (None, str(value))) for name, value in {"prompt": "a", **fields}.items()]
    parts += [(name, ("upload", data, "application/octet-stream")) for name, data in files]
    return await client.post(ROUTE, files=parts)


async def post_json(client, **body):
    """Send the JSON form."""
    return await client.post(ROUTE, json={"prompt": "a", **body})


@pytest.mark.parametrize(
    "names",
    [
        ("image", "image"),
        ("image[]", "image[]"),
        ("image[0]", "image[1]"),
        ("image", "image[]"),
        ("image[5]", "image"),
    ],
)
async def test_every_way_to_name_pictures_is_one_list(client, service, names):
    """Merged in the order of arrival, whatever the client's habit."""
    first, second = photo(128, 64), photo(64, 128)
    response = await post(client, [(names[0], first), (names[1], second)], seed=3)
    (spec,) = service.specs

    assert response.status_code == 200
    assert [(image.width, image.height) for image in spec.references] == [(128, 64), (64, 128)]
    assert (spec.width, spec.height) == (128, 64)
    assert response.json()["data"][0]["seed"] == 3


async def test_files_may_come_before_texts(client, service):
    """Node and n8n do it so."""
    parts = [
        ("image[]", ("../../x", photo(), "text/html")),
        ("prompt", (None, "a")),
        ("model", (None, "gpt-image-1")),
    ]
    response = await client.post(ROUTE, files=parts)

    assert response.status_code == 200
    assert len(service.specs) == 1


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "C:\\x", "", "ü" * 500])
async def test_file_names_and_types_are_never_looked_at(
    client, service, name, tmp_path, monkeypatch
):
    """Bytes decide; nothing is written anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    boundary = b"B"
    body = (
        b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
        b'--B\r\nContent-Disposition: form-data; name="image"; filename="'
        + name.encode()
        + b'"\r\nContent-Type: image/gif\r\n\r\n'
        + photo(1024, 1024, "JPEG", quality=100)
        + b"\r\n--B--\r\n"
    )
    headers = {"content-type": f"multipart/form-data; boundary={boundary.decode()}"}
    response = await client.post(ROUTE, content=body, headers=headers)

    assert response.status_code == 200, response.text
    assert len(service.specs) == 1
    assert list(tmp_path.iterdir()) == []


async def test_a_chunked_form_is_read(client, service):
    """LibreChat sends no Content-Length."""
    request = client.build_request(
        "POST", ROUTE, files=[("image[]", photo()), ("prompt", (None, "a"))]
    )
    body = b"".join(request.stream)

    async def chunks():
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    headers = {"content-type": request.headers["content-type"]}
    response = await client.post(ROUTE, content=chunks(), headers=headers)

    assert response.status_code == 200
    assert len(service.specs) == 1


async def test_texts_of_a_form_get_their_types(client, service):
    """The same fields as in JSON, honoured alike."""
    fields = {
        "n": "2",
        "size": "512x256",
        "seed": "0",
        "num_inference_steps": "6",
        "guidance_scale": "1.0",
        "stream": "False",
        "output_format": "webp",
        "output_compression": "80",
        "quality": "high",
        "input_fidelity": "high",
        "user": "",
    }
    response = await post(client, [("image", photo())], **fields)

    assert response.status_code == 200
    assert [(spec.seed, spec.num_inference_steps) for spec in service.specs] == [(0, 6), (1, 6)]
    assert (service.specs[0].width, service.specs[0].height) == (512, 256)
    assert (response.json()["output_format"], response.json()["quality"]) == ("webp", "high")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": "two"}, "n", "invalid_type"),
        ({"n": "1.5"}, "n", "invalid_type"),
        ({"n": "٣"}, "n", "invalid_type"),
        ({"n": "11"}, "n", "invalid_value"),
        ({"seed": "1e3"}, "seed", "invalid_type"),
        ({"guidance_scale": "nan"}, "guidance_scale", "invalid_type"),
        ({"guidance_scale": "4"}, "guidance_scale", "unsupported_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"prompt": ""}, "prompt", "missing_required_parameter"),
        ({"style": "vivid"}, "style", "unknown_parameter"),
        ({"markup": "x"}, "markup", "unsupported_parameter"),
        ({"images": "x"}, "images", "unknown_parameter"),
        ({"image_1": "x"}, "image_1", "unknown_parameter"),
        ({"mask_image": "x"}, "mask_image", "unknown_parameter"),
        ({"extra[]": "x"}, "extra[]", "unknown_parameter"),
        ({"input_fidelity": "medium"}, "input_fidelity", "invalid_value"),
        ({"background": "transparent"}, "background", "unsupported_value"),
        ({"image": "text"}, "image", "invalid_type"),
        ({"mask": "text"}, "mask", "invalid_type"),
        ({"model": "nope"}, "model", "model_not_found"),
        ({"size": "1000x1000"}, "size", "invalid_value"),
    ],
    ids=str,
)
async def test_what_does_not_fit_is_refused_by_name(client, service, fields, param, code):
    """With the codes of the JSON routes."""
    response = await post(client, [("image", photo())], **fields)

    assert response.status_code == 400
    assert (param, code) == (error_of(response)["param"], error_of(response)["code"])
    assert not service.tickets


@pytest.mark.parametrize(
    ("name", "code", "advice"),
    [
        ("markup", "unsupported_parameter", "only a mask says where to paint"),
        ("images", "unknown_parameter", "go into `image` in a form"),
        ("images[]", "unknown_parameter", "go into `image` in a form"),
        ("image_1", "unknown_parameter", "go into `image` in a form"),
        ("image1", "unknown_parameter", "go into `image` in a form"),
        ("file", "unknown_parameter", "go into `image` in a form"),
        ("init_image", "unknown_parameter", "go into `image` in a form"),
        ("mask_image", "unknown_parameter", "goes into `mask`"),
        ("control", "unknown_parameter", "see /docs"),
        ("prompt", "invalid_type", "text, not a file"),
        ("size", "invalid_type", "text, not a file"),
    ],
)
async def test_a_file_under_another_name_is_told_where_it_belongs(
    client, service, name, code, advice
):
    """With the code that the name has as a text, and not that it should be one."""
    parts = [("prompt", (None, "a"))] if name != "prompt" else []
    files = [("image", ("a.png", photo())), (name, ("b.png", photo()))]
    error = error_of(await client.post(ROUTE, files=[*parts, *files]))

    assert (error["param"], error["code"]) == (name, code)
    assert advice in str(error["message"])
    assert not service.tickets


async def test_advice_is_given_only_where_a_picture_is_meant(client):
    """`image_size` is a size, in a dialect of others."""
    for name in ("image_size", "profile", "masking", "image" + "1" * 60):
        message = error_of(await post(client, [("image", photo())], **{name: "x"}))["message"]
        assert "see /docs" in str(message)


@pytest.mark.parametrize("values", [("80", "80"), ("80", ""), ("", "80"), ("", "")])
async def test_a_text_that_is_repeated_counts_once(client, service, values):
    """async-openai sends output_compression twice; an empty one is absent."""
    twice = [("output_compression", (None, value)) for value in values]
    parts = [("image", photo()), ("prompt", (None, "a")), ("output_format", (None, "webp"))]
    response = await client.post(ROUTE, files=[*parts, *twice])

    assert response.status_code == 200
    assert service.tickets[0].output.compression == (80 if "80" in values else 100)


async def test_two_values_of_a_text_are_refused(client):
    """Neither can be honoured without a guess."""
    twice = [("image", photo()), ("prompt", (None, "a")), ("prompt", (None, "b"))]
    error = error_of(await client.post(ROUTE, files=twice))

    assert (error["param"], error["code"]) == ("prompt", "invalid_value")


async def test_ignored_parts_are_drained_and_not_kept(serve, service):
    """Files and texts that no field takes, with `KLEIN_UNKNOWN_FIELDS=ignore`."""
    client = await serve(unknown_fields="ignore")
    padding = b"A" * 65_536
    head = b'--B\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\n\r\n'
    text = b'--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'

    async def body():
        yield text % (b"prompt", b"a") + text % (b"strength", b"1") + text % (b"strength", b"2")
        yield head % b"control"
        for _ in range(200):
            yield padding
        yield b"\r\n" + head % b"images[]" + photo() + b"\r\n" + text % (b"long", padding * 3)
        yield head % b"image" + photo() + b"\r\n--B--\r\n"

    tracemalloc.start()
    try:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        response = await client.post(ROUTE, content=body(), headers=headers)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert response.status_code == 200, response.text
    assert len(service.specs[0].references) == 1
    assert most_bytes < 5_000_000


async def test_what_is_known_is_never_ignored(serve, service):
    """`KLEIN_UNKNOWN_FIELDS=ignore` is about other names."""
    client = await serve(unknown_fields="ignore")
    picture = ("image", ("a.png", photo()))
    for name, code in (("markup", "unsupported_parameter"), ("size", "invalid_type")):
        files = [picture, ("prompt", (None, "a")), (name, ("b.png", photo()))]
        assert error_of(await client.post(ROUTE, files=files))["code"] == code
    assert not service.tickets


@pytest.mark.parametrize(
    ("count", "code"), [(0, "missing_required_parameter"), (5, "array_above_max_length")]
)
async def test_one_to_four_pictures_are_taken(client, service, count, code):
    """What klein documents; the error names `image`."""
    response = await post(client, [("image[]", photo())] * count)

    assert (error_of(response)["param"], error_of(response)["code"]) == ("image", code)
    assert not service.tickets


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_every_picture_is_a_reference(client, service, count):
    """In its order."""
    response = await post(client, [("image[]", photo(64 * (i + 1), 64)) for i in range(count)])

    assert response.status_code == 200
    assert [64 * (i + 1) for i in range(count)] == [
        image.width for image in service.specs[0].references
    ]


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 600, (992, 592)),
        (128, 128, (128, 128)),
        (3000, 2000, (1248, 832)),
        (1600, 200, (576, 192)),
        (64, 500, (64, 192)),
    ],
)
async def test_auto_takes_the_first_pictures_shape(client, service, width, height, expected):
    """As klein prepares it; beyond 3:1 it is held at that."""
    await post(client, [("image", photo(width, height))], size="auto")
    (spec,) = service.specs

    assert expected == (spec.width, spec.height)


async def test_references_are_at_most_a_megapixel(client, service):
    """What the pipeline would do, done before the picture waits."""
    await post(client, [("image", photo(2000, 2000))], size="512x512")
    (reference,) = service.specs[0].references

    assert (reference.width, reference.height) == (1024, 1024)


async def test_a_turned_photo_is_upright(client, service):
    """EXIF is obeyed before anything else."""
    await post(client, [("image", rotated_photo(128, 64))])

    assert (service.specs[0].width, service.specs[0].height) == (64, 128)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        photo()[:60],
        photo(format="GIF"),
        photo(32, 32),
        photo(640, 64),
        photo(format="BMP"),
        photo(format="TIFF"),
    ],
    ids=["empty", "text", "cut", "gif", "small", "10:1", "bmp", "tiff"],
)
async def test_what_is_no_picture_for_us_is_refused(client, service, data):
    """By bytes; the message has the index, never a decoder's words."""
    response = await post(client, [("image", photo()), ("image", data)])
    error = error_of(response)

    assert response.status_code == 400
    assert (error["param"], error["code"]) == ("image", "invalid_image")
    assert "index 1" in str(error["message"])
    assert not re.search("0x[0-9a-f]{6}", str(error["message"]))
    assert not service.tickets


async def test_a_mask_goes_with_the_first_picture(client, service):
    """The picture under it comes at the size of the result, the others as references."""
    response = await post(
        client,
        [("image", photo(128, 128)), ("image", photo(64, 64)), ("mask", mask(128, 128))],
        size="256x256",
    )
    (spec,) = service.specs

    assert response.status_code == 200
    assert [(each.width, each.height) for each in spec.references] == [(256, 256), (64, 64)]
    assert (spec.mask.width, spec.mask.height) == (128, 128)
    assert (spec.mask.weights[0], spec.mask.weights[-1]) == (255, 0)


async def test_a_mask_keeps_the_size_of_the_picture(client, service):
    """`auto` is the first picture's shape, rounded as its preparation rounds."""
    files = [("image", photo(1000, 600)), ("mask[]", mask(1000, 600))]
    response = await post(client, files)
    (spec,) = service.specs

    assert response.json()["size"] == "992x592"
    assert (spec.references[0].width, spec.references[0].height) == (992, 592)


@pytest.mark.parametrize(
    "data",
    [
        photo(),
        mask(64, 64),
        mask(box=(0, 0, 0, 0)),
        photo(format="JPEG"),
        b"hello",
        mask()[:50],
    ],
    ids=["no alpha", "other size", "opaque", "jpeg", "text", "cut"],
)
async def test_a_mask_that_says_nothing_is_refused(client, service, data):
    """`invalid_mask`, by the name of its field."""
    response = await post(client, [("image", photo()), ("mask", data)])

    assert response.status_code == 400
    assert (error_of(response)["param"], error_of(response)["code"]) == ("mask", "invalid_mask")
    assert not service.tickets


WHITE_WARNING = "mask has no transparency: white was repainted, and black kept"


async def test_a_black_and_white_mask_is_taken_with_a_warning(client, service):
    """In the body, the header and the stream's last event; white is repainted."""
    painted = black_and_white_mask()
    files = [("image", photo()), ("mask", painted)]
    plain = await post(client, files)
    streamed = await post(client, files, stream="true")
    native = await client.post(
        "/generate",
        json={"prompt": "a", "images": [data_url(photo())], "mask": data_url(painted)},
    )

    assert plain.json()["warnings"] == [WHITE_WARNING]
    for response in (plain, streamed, native):
        assert response.headers["x-klein-warnings"] == WHITE_WARNING
    assert f'"warnings": ["{WHITE_WARNING}"]' in streamed.text
    assert len(service.specs) == 3
    for spec in service.specs:
        assert spec.mask.weights[:128] == bytes([255] * 64 + [0] * 64)


async def test_a_transparent_mask_has_no_warning(client):
    """It is OpenAI's own."""
    response = await post(client, [("image", photo()), ("mask", mask())])

    assert "warnings" not in response.json()
    assert "x-klein-warnings" not in response.headers


async def test_the_operator_may_want_alpha_only(serve, service):
    """`KLEIN_MASK=alpha` refuses what has no transparency, on both routes."""
    client = await serve(mask="alpha")
    painted = black_and_white_mask()
    form = await post(client, [("image", photo()), ("mask", painted)])
    native = await client.post(
        "/generate",
        json={"prompt": "a", "images": [data_url(photo())], "mask": data_url(painted)},
    )

    assert error_of(form)["code"] == error_of(native)["code"] == "invalid_mask"
    assert not service.tickets


async def test_two_masks_are_refused(client):
    """Only the first picture is repainted."""
    files = [("image", photo()), ("mask", mask()), ("mask[]", mask())]

    assert error_of(await post(client, files))["param"] == "mask"


@pytest.mark.parametrize(("size", "status"), [("256x256", 200), ("256x128", 400), ("512x496", 400)])
async def test_a_mask_fixes_the_shape(client, size, status):
    """Two per cent are forgiven, more would move what is kept."""
    response = await post(client, [("image", photo(512, 512)), ("mask", mask(512, 512))], size=size)

    assert status == response.status_code
    if status == 400:
        assert error_of(response)["param"] == "size"


async def test_what_will_not_fit_is_refused_before_it_waits(client, service):
    """References cost memory; the plan says how many pixels are left beside them."""
    service.plan_pixels = (4_194_304, 65_536)
    response = await post(client, [("image", photo())], size="512x512")

    assert response.status_code == 400
    assert error_of(response)["param"] == "size"


async def test_json_is_the_same_edit(client, service):
    """Data URLs instead of files, with every type that is taken."""
    await post(client, [("image", photo()), ("image", photo(64, 64)), ("mask", mask())], seed=1)
    response = await post_json(
        client,
        images=[{"image_url": data_url(photo())}, {"image_url": data_url(photo(64, 64), "jpg")}],
        mask={"image_url": data_url(mask()), "file_id": None},
        seed=1,
    )

    assert response.status_code == 200
    assert service.specs[0] == service.specs[1]


@pytest.mark.parametrize(
    ("images", "param", "code"),
    [
        (None, "images", "missing_required_parameter"),
        ([], "images", "missing_required_parameter"),
        ("x", "images", "invalid_type"),
        (["x"], "images[0]", "invalid_type"),
        ([{}], "images[0]", "invalid_value"),
        ([{"image_url": "x", "file_id": "y"}], "images[0]", "invalid_value"),
        ([{"image_url": "x", "detail": "high"}], "images[0]", "invalid_value"),
        ([{"image_url": 7}], "images[0].image_url", "invalid_type"),
        ([{"file_id": "f"}], "images[0].file_id", "unsupported_value"),
        ([{"image_url": "data:image/gif;base64,AAAA"}], "images[0].image_url", "unsupported_value"),
        ([{"image_url": "data:image/png,AAAA"}], "images[0].image_url", "unsupported_value"),
        ([{"image_url": "data:image/png;base64,@@"}], "images[0].image_url", "invalid_image"),
        ([{"image_url": "data:image/png;base64,AAAA"}], "images[0].image_url", "invalid_image"),
        (
            [{"image_url": data_url(photo(*size))} for size in ((800, 100), (801, 100))],
            "images[1].image_url",
            "invalid_image",
        ),
        (
            [{"image_url": "data:image/png;base64," + "A" * 20_971_520}],
            "images[0].image_url",
            "string_above_max_length",
        ),
        ([{"image_url": data_url(photo())}] * 5, "images", "array_above_max_length"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_json_pictures_are_refused_by_place(client, service, images, param, code):
    """The param is the path to what is wrong."""
    response = await post_json(client, images=images)

    assert response.status_code == 400
    assert (param, code) == (error_of(response)["param"], error_of(response)["code"])
    assert not service.tickets


@pytest.mark.parametrize(
    "url", ["data:image/gif;base64,AAAA", "DATA:image/png,AAAA", "data:;base64,AAAA", "data:"]
)
async def test_a_data_url_of_another_type_is_told_which_are_read(client, url):
    """It is one already, so that it must be one is no advice."""
    edit = error_of(await post_json(client, images=[{"image_url": url}]))
    native = error_of(await client.post("/generate", json={"prompt": "a", "images": [url]}))

    for error in (edit, native):
        assert error["code"] == "unsupported_value"
        assert "only PNG, JPEG and WebP are read" in str(error["message"])
        assert "fetched" not in str(error["message"])


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x.png",
        "https://example.com/x.png",
        "http://169.254.169.254/latest",
        "http://[::]/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://ok\\@evil.example/x",
        "file:///etc/passwd",
        "gopher://x",
        "//example.com/x",
        "DATA:text/html;base64,AAAA",
    ],
)
async def test_nothing_is_ever_fetched(client, service, url, monkeypatch):
    """Refused by its form; no socket is opened, no name is looked up."""

    def trap(*arguments, **named):
        raise AssertionError("something tried to connect")

    monkeypatch.setattr("socket.socket.connect", trap)
    monkeypatch.setattr("socket.getaddrinfo", trap)
    response = await post_json(client, images=[{"image_url": url}])
    masked = await post_json(
        client, images=[{"image_url": data_url(photo())}], mask={"image_url": url}
    )

    assert response.status_code == masked.status_code == 400
    assert error_of(response)["param"] == "images[0].image_url"
    assert error_of(masked)["param"] == "mask.image_url"


async def test_json_has_no_image(client):
    """The message says what there is instead."""
    error = error_of(await post_json(client, image="x", images=[{"image_url": data_url(photo())}]))

    assert (error["param"], error["code"]) == ("image", "unknown_parameter")
    assert "images" in str(error["message"])


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("application/x-www-form-urlencoded", 400, "invalid_multipart"),
        ("text/plain", 415, "unsupported_media_type"),
        ("", 415, "unsupported_media_type"),
        ("multipart/mixed", 415, "unsupported_media_type"),
    ],
)
async def test_other_types_are_refused(client, kind, status, code):
    """What `curl -d` sends is a form, but not the one that can hold pictures."""
    response = await client.post(ROUTE, content=b"prompt=a", headers={"content-type": kind})

    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert "must be multipart/form-data or application/json" in str(error_of(response)["message"])
    assert "-F image=@picture.png" in str(error_of(response)["message"])


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--B--"),
        ("multipart/form-data; boundary=", b"--B--"),
        ("multipart/form-data; boundary=B", b"nothing of the kind"),
        ("multipart/form-data; boundary=B", b"--B\r\nX: y\r\n\r\na\r\n--B--\r\n"),
        ("multipart/form-data; boundary=B; charset=rot13", b"--B\r\n\r\n"),
        (
            "multipart/form-data; boundary=B",
            b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + b"a" * 1_100_000,
        ),
        (
            "multipart/form-data; boundary=B",
            b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\na\r\n' * 100 + b"--B--\r\n",
        ),
        (
            "multipart/form-data; boundary=B",
            b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\na\r\n' * 100
            + b"--B--\r\n",
        ),
    ],
    ids=["none", "blank", "other", "nameless", "charset", "long", "fields", "files"],
)
async def test_a_broken_form_is_said_to_be_broken(client, service, content_type, body):
    """Never a crash, never `detail`."""
    response = await client.post(ROUTE, content=body, headers={"content-type": content_type})

    assert response.status_code == 400
    assert error_of(response)["code"] in {"invalid_multipart", "missing_required_parameter"}
    assert not service.tickets


async def test_a_closed_service_refuses_before_it_reads(client, service):
    """Nobody uploads 60 MB to be told to come again."""
    service.closed_by = Kind.QUEUE_FULL
    pulled = []

    async def body():
        pulled.append(1)
        yield b"x"

    headers = {"content-type": "multipart/form-data; boundary=B"}
    response = await client.post(ROUTE, content=body(), headers=headers)

    assert response.status_code == 503
    assert not pulled


@pytest.mark.parametrize("kind", ["form", "json"])
async def test_uploads_are_let_go_of_before_the_picture_waits(client, service, kind):
    """A queue full of edits holds what the model reads of them, not what was sent."""
    service.script.release = asyncio.Event()
    padding = b"A" * 65_536
    if kind == "form":
        content_type = "multipart/form-data; boundary=B"
        head = b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
        head += b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        parts = [head + photo(), *[padding] * 200, b"\r\n--B--\r\n"]
    else:
        content_type = "application/json"
        url = data_url(photo() + b"\0" * (3 - len(photo()) % 3)).encode()
        parts = [b'{"prompt": "a", "images": [{"image_url": "' + url, *[padding] * 200, b'"}]}']

    async def body():
        for part in parts:
            yield part

    tracemalloc.start()
    try:
        headers = {"content-type": content_type}
        waiting = asyncio.create_task(client.post(ROUTE, content=body(), headers=headers))
        async with asyncio.timeout(10):
            await service.asked.wait()
        # The decoding thread lets go a moment after it has told its result.
        await until(lambda: tracemalloc.get_traced_memory()[0] < 3_000_000)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    service.script.release.set()

    assert (await waiting).status_code == 200
    assert most_bytes > 13_000_000


async def test_n_is_counted_before_pictures_are_decoded(client, service):
    """A request that has no room is not worth the decoding."""
    service.capacity = 2
    response = await post(client, [("image", b"no picture at all")], n=3)

    assert error_of(response)["param"] == "n"


async def test_the_demo_model_keeps_within_its_own_limits(client, service):
    """`auto` of a large picture is brought to what it can make."""
    service.model = find_spec("shapes")
    await post(client, [("image", photo(1000, 500))])

    assert (service.specs[0].width, service.specs[0].height) == (512, 256)


async def test_usage_counts_the_pictures_that_went_in(client):
    """One token per 16x16 pixels of each reference."""
    body = (await post(client, [("image", photo(128, 64)), ("image", photo(64, 64))])).json()

    assert body["usage"]["input_tokens_details"] == {"text_tokens": 12, "image_tokens": 32 + 16}
    assert body["usage"]["input_tokens"] == 12 + 48


async def test_generate_takes_pictures_and_a_mask_too(client, service):
    """Base64, plain or as a data URL, in its JSON."""
    plain = data_url(photo()).partition(",")[2]
    body = {"prompt": "a", "images": [plain, data_url(photo(64, 64))], "mask": data_url(mask())}
    response = await client.post("/generate", json=body)
    (spec,) = service.specs

    assert response.status_code == 200
    assert response.content.startswith(b"\x89PNG")
    assert (spec.width, spec.height, len(spec.references)) == (128, 128, 2)
    assert isinstance(spec.references[0], RawImage)
    assert spec.mask is not None


@pytest.mark.parametrize(
    ("sent", "param", "code"),
    [
        ({"images": "x"}, "images", "invalid_type"),
        ({"images": [7]}, "images[0]", "invalid_type"),
        ({"images": ["@"]}, "images[0]", "invalid_image"),
        ({"images": ["AAAA"]}, "images[0]", "invalid_image"),
        ({"images": ["http://x/y.png"]}, "images[0]", "unsupported_value"),
        ({"images": [data_url(photo())] * 5}, "images", "array_above_max_length"),
        ({"mask": data_url(mask())}, "images", "missing_required_parameter"),
        ({"images": [data_url(photo())], "mask": data_url(photo())}, "mask", "invalid_mask"),
        ({"images": [data_url(photo())], "width": 128}, "height", "missing_required_parameter"),
        (
            {"images": [data_url(photo())], "mask": data_url(mask()), "width": 64, "height": 128},
            "width",
            "invalid_value",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_generate_refuses_pictures_by_place(client, service, sent, param, code):
    """As the edits do."""
    response = await client.post(
        "/generate",
        content=json.dumps({"prompt": "a", **sent}),
        headers={"content-type": "application/json"},
    )

    assert response.status_code == 400
    assert (param, code) == (error_of(response)["param"], error_of(response)["code"])
    assert not service.tickets
