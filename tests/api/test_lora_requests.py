"""Adapters in requests: every way to name them, what is refused, and what the answers say."""

from __future__ import annotations

import json
from itertools import product

import pytest
from openai import AsyncOpenAI

from app.domain import Lora
from app.engine.adapters.directory import Adapter, Listing
from app.service.adapters import Adapters
from tests.api.conftest import error_of
from tests.api.pictures import photo

ROUTES = ("/generate", "/v1/images/generations")
A, B, C = ("outlined", "a" * 64), ("night-style", "b" * 64), ("x-1", "c" * 64)


@pytest.fixture(autouse=True)
def adapters(service) -> Adapters:
    """Three adapters, of which the one of rank 100 takes part by default, at 0.5."""
    service.adapters = Adapters([(B[0], 0.5)])
    service.adapters.replace(
        Listing(
            tuple(
                Adapter(
                    name, sha256, 1000, rank, 1_700_000_000, preview=False, path=f"/loras/{name}"
                )
                for (name, sha256), rank in ((B, 100), (A, 32), (C, 16))
            ),
            (),
            is_whole=True,
        )
    )
    return service.adapters


def used(service) -> list[tuple[str, float, str]]:
    """What the last request was submitted with."""
    return [(each.name, each.scale, each.sha256) for each in service.specs[-1].loras]


async def ask(client, route: str, **body):
    return await client.post(route, json={"prompt": "a red circle", **body})


@pytest.mark.parametrize("route", ROUTES)
async def test_a_list_of_names_and_scales(client, service, route) -> None:
    """In order; without a scale it is 1; the default takes no part."""
    loras = [{"name": "x-1", "scale": -0.25}, {"name": "outlined"}]

    response = await ask(client, route, loras=loras)

    assert response.status_code == 200
    assert used(service) == [(C[0], -0.25, C[1]), (A[0], 1.0, A[1])]


@pytest.mark.parametrize("route", ROUTES)
async def test_without_the_field_the_default_takes_part_and_an_empty_list_is_none(
    client, service, route
) -> None:
    """KLEIN_LORAS; `null` is absent."""
    seen = []
    for body in ({}, {"loras": None}, {"loras": []}):
        assert (await ask(client, route, **body)).status_code == 200
        seen.append(used(service))

    assert seen == [[(B[0], 0.5, B[1])]] * 2 + [[]]


async def test_an_adapter_is_a_model(client, service) -> None:
    """Any OpenAI client can choose it; the default takes no part then."""
    response = await ask(client, "/v1/images/generations", model="outlined")

    assert response.status_code == 200
    assert used(service) == [(A[0], 1.0, A[1])]
    assert response.json()["loras"] == [{"name": A[0], "scale": 1.0, "sha256": A[1]}]


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        ({"loras": [{"name": "outlines"}]}, "loras[0].name", "model_not_found", "`outlined`"),
        (
            {"loras": [{"name": "outlined"}, {"name": "zzz"}]},
            "loras[1].name",
            "model_not_found",
            "GET /v1/loras",
        ),
        ({"loras": [{"name": "outlined", "scale": 2.1}]}, "loras[0].scale", None, "-2 and 2"),
        (
            {"loras": [{"name": "outlined", "scale": "x"}]},
            "loras[0].scale",
            "invalid_type",
            "number",
        ),
        ({"loras": [{"name": "outlined", "scale": True}]}, "loras[0].scale", "invalid_type", ""),
        ({"loras": [{"name": "outlined", "scale": "1"}]}, "loras[0].scale", "invalid_type", ""),
        ({"loras": [{"name": "outlined", "scale": 10**400}]}, "loras[0].scale", None, "number"),
        ({"loras": [{"scale": 1}]}, "loras[0].name", "missing_required_parameter", ""),
        ({"loras": [{"name": 7}]}, "loras[0].name", "invalid_type", ""),
        ({"loras": [{"name": "outlined", "x": 1}]}, "loras[0]", "unknown_parameter", ""),
        ({"loras": ["outlined"]}, "loras[0]", "invalid_type", "object"),
        ({"loras": "outlined"}, "loras", "invalid_type", "list"),
        ({"loras": [{"name": "outlined"}] * 2}, "loras", "invalid_value", "twice"),
        ({"loras": [{"name": "outlined"}] * 5}, "loras", "array_above_max_length", "most is 4"),
        (
            {"loras": [{"name": "outlined"}, {"name": "night-style"}]},
            "loras",
            "invalid_value",
            "rank 132 together; the most is 128",
        ),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
async def test_what_does_not_fit_is_refused_by_name(
    serve, service, route, body, param, code, words
) -> None:
    """With 400, never 404; nothing is queued."""
    response = await ask(await serve(), route, **body)

    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert error["code"] == (code or "invalid_value")
    assert words in error["message"]
    assert not service.specs


async def test_scale_0_counts_no_rank(client, service) -> None:
    """It takes no part."""
    loras = [{"name": "outlined"}, {"name": "night-style", "scale": 0}]

    assert (await ask(client, "/generate", loras=loras)).status_code == 200
    assert [scale for _, scale, _ in used(service)] == [1.0, 0.0]


async def test_an_adapter_as_model_goes_alone(client) -> None:
    """What `loras` would mean beside it cannot be known."""
    response = await ask(
        client, "/v1/images/generations", model="outlined", loras=[{"name": "night-style"}]
    )

    assert response.status_code == 400
    assert error_of(response)["param"] == "loras"


async def test_an_empty_list_beside_an_adapter_as_model_adds_none(client, service) -> None:
    """In JSON and in a form: the adapter takes part alone, as without the field."""
    sent = {"prompt": "a", "model": "outlined"}
    answers = [
        await ask(client, "/v1/images/generations", model="outlined", loras=[]),
        await client.post(
            "/v1/images/edits", data={**sent, "loras": "[]"}, files={"image": photo()}
        ),
    ]

    assert [each.status_code for each in answers] == [200, 200]
    for spec in service.specs:
        assert [(each.name, each.scale) for each in spec.loras] == [(A[0], 1.0)]


async def test_an_adapter_of_too_high_a_rank_is_refused_as_the_model(client, adapters) -> None:
    """With the field that was sent."""
    adapters.replace(Listing((Adapter("big", "d" * 64, 1, 200, 0, False, "/loras/big"),), ()))
    response = await ask(client, "/v1/images/generations", model="big")

    assert response.status_code == 400
    assert error_of(response)["param"] == "model"
    assert "rank 200" in error_of(response)["message"]
    assert "128" in error_of(response)["message"]


async def test_an_unknown_model_names_adapters_like_it(client, adapters, monkeypatch) -> None:
    """At most three, in the sentence for a model that is not served; looked for once."""
    near, sought = adapters.near, []
    monkeypatch.setattr(adapters, "near", lambda name: sought.append(name) or near(name))
    response = await ask(client, "/v1/images/generations", model="outlinet")

    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        "model",
        "model_not_found",
    )
    assert "`outlined`" in error["message"]
    assert sought == ["outlinet"]


FORMS = {
    "parts": [("loras[][name]", "outlined"), ("loras[][scale]", "0.8"), ("loras[][name]", "x-1")],
    "numbered": [
        ("loras[0][name]", "outlined"),
        ("loras[0][scale]", "0.8"),
        ("loras[1][name]", "x-1"),
    ],
    "numbered, names first": [
        ("loras[0][name]", "outlined"),
        ("loras[1][name]", "x-1"),
        ("loras[0][scale]", "0.8"),
    ],
    "names first": [
        ("loras[][name]", "outlined"),
        ("loras[][name]", "x-1"),
        ("loras[][scale]", "0.8"),
        ("loras[][scale]", ""),
    ],
    "scale first": [
        ("loras[][scale]", "0.8"),
        ("loras[][name]", "outlined"),
        ("loras[][scale]", "1"),
        ("loras[][name]", "x-1"),
    ],
    "text": [("loras", "outlined:0.8, x-1")],
    "JSON": [("loras", json.dumps([{"name": "outlined", "scale": 0.8}, {"name": "x-1"}]))],
}


async def post_form(client, fields):
    parts = [("prompt", (None, "a red circle")), ("image", ("a.png", photo(), "image/png"))]
    parts += [(name, (None, text)) for name, text in fields]
    return await client.post("/v1/images/edits", files=parts)


@pytest.mark.parametrize("form", FORMS)
async def test_forms_name_them_in_parts_or_in_one_text(client, service, form) -> None:
    """Always the same two adapters."""
    response = await post_form(client, FORMS[form])

    assert response.status_code == 200, response.text
    assert [(name, scale) for name, scale, _ in used(service)] == [("outlined", 0.8), ("x-1", 1.0)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([("loras[][name]", "outlined")] * 5, "most is 4"),
        ([("loras", "outlined"), ("loras[][name]", "outlined")], "only one of the two"),
        ([("loras", "[{")], "no valid JSON"),
        ([("loras", "[" * 1500)], "no valid JSON"),
        ([("loras", "a," * 1200)], "2,000"),
        ([("loras", "outlined:0.8:3")], "scale"),
        ([("loras[][scale]", "0.8")], "name"),
        ([("loras[][scale]", "0.8")] * 5, "most is 4"),
        (
            [("loras[][name]", "outlined"), ("loras[][name]", "x-1"), ("loras[][scale]", "0.8")],
            "a scale for each",
        ),
        ([("loras[0][name]", "outlined"), ("loras[0][name]", "x-1")], "more than once"),
        ([("loras[][width]", "0.8")], "loras[][width] is not a field"),
        ([("loras", '{"name": "outlined"}')], "list"),
    ],
)
async def test_a_form_that_cannot_be_read_is_refused(client, service, fields, words) -> None:
    """With a sentence, before any picture is decoded."""
    response = await post_form(client, fields)

    assert response.status_code == 400
    assert words in error_of(response)["message"]
    assert not service.specs


async def test_a_file_is_no_name(serve, service) -> None:
    """Also where unknown fields are ignored: the default must not take its place."""
    client = await serve(unknown_fields="ignore")
    parts = [("prompt", (None, "a")), ("image", ("a.png", photo(), "image/png"))]
    response = await client.post(
        "/v1/images/edits", files=[*parts, ("loras[][name]", ("a.txt", b"outlined"))]
    )

    assert response.status_code == 400
    assert "text, not a file" in error_of(response)["message"]
    assert not service.specs


async def test_an_empty_list_in_a_form_is_none(client, service) -> None:
    """An empty text is absent, as in every form; `[]` is none."""
    seen = []
    for text in ("", "[]"):
        assert (await post_form(client, [("loras", text)])).status_code == 200
        seen.append(len(used(service)))

    assert seen == [1, 0]


@pytest.mark.parametrize(
    ("route", "more"), [*((route, {}) for route in ROUTES), (ROUTES[1], {"stream": True})]
)
async def test_the_recipe_is_in_the_headers(serve, route, more) -> None:
    """Names, scales and the files' hashes, in the order of the request; pages may read it."""
    page = "http://localhost:3000"
    client = await serve(allowed_origins=(page,))
    body = {"prompt": "a", "loras": [{"name": "outlined", "scale": 0.8}], **more}
    response = await client.post(route, json=body, headers={"origin": page})

    assert response.headers["x-klein-loras"] == f"outlined:0.8@{A[1]}"
    assert "x-klein-loras" in response.headers["access-control-expose-headers"]
    assert "x-klein-loras" not in (await ask(client, route, loras=[])).headers


async def test_automatic1111s_answer_has_it_too(client) -> None:
    """Its hashes stand without scales, and adapters by default not even in the prompt."""
    response = await client.post("/sdapi/v1/txt2img", json={"prompt": "a fox"})

    assert response.headers["x-klein-loras"] == f"night-style:0.5@{B[1]}"


async def test_the_document_has_the_recipe(client) -> None:
    """Each key of an answer with adapters is described."""
    document = (await client.get("/openapi.json")).json()
    reply = document["paths"]["/v1/images/generations"]["post"]["responses"]["200"]
    described = reply["content"]["application/json"]["schema"]["properties"]
    answer = (await ask(client, "/v1/images/generations", model="outlined")).json()

    assert answer.keys() <= described.keys()
    assert answer["loras"][0].keys() == described["loras"]["items"]["properties"].keys()


async def test_openais_edits_name_several(serve) -> None:
    """Its package sends all names of a list, and then all scales."""
    client = await serve()
    openai = AsyncOpenAI(
        base_url="http://127.0.0.1/v1", api_key="none", max_retries=0, http_client=client
    )
    loras = [{"name": "outlined", "scale": 0.8}, {"name": "x-1", "scale": 0.5}]

    made = await openai.images.edit(image=photo(), prompt="a", extra_body={"loras": loras})

    assert [(each["name"], each["scale"]) for each in made.loras] == [
        ("outlined", 0.8),
        ("x-1", 0.5),
    ]


async def test_the_recipe_is_in_the_last_event_of_a_stream(client) -> None:
    """As in the plain answer."""
    response = await ask(
        client, "/v1/images/generations", stream=True, loras=[{"name": "outlined"}]
    )

    (last,) = (
        line for line in response.text.splitlines() if "completed" in line and "data" in line
    )
    assert json.loads(last.removeprefix("data: "))["loras"][0]["sha256"] == A[1]


@pytest.mark.parametrize(
    ("prompt", "kept", "loras"),
    [
        ("a fox <lora:outlined:0.8>", "a fox", [("outlined", 0.8)]),
        ("<lora:outlined>a fox", "a fox", [("outlined", 1.0)]),
        ("a <lora:outlined:1:0.5>fox", "a fox", [("outlined", 0.5)]),
        ("a fox <lyco:x:1>", "a fox <lyco:x:1>", [("night-style", 0.5)]),
        ("a fox <lora:outlined:0>", "a fox", [("outlined", 0.0)]),
    ],
)
async def test_automatic1111s_prompts_name_them(client, service, prompt, kept, loras) -> None:
    """The prompt is drawn without them; the answer shows it as it was sent, with hashes."""
    response = await client.post("/sdapi/v1/txt2img", json={"prompt": prompt})

    assert response.status_code == 200, response.text
    assert service.specs[-1].prompt == kept
    assert [(name, scale) for name, scale, _ in used(service)] == loras
    info = json.loads(response.json()["info"])
    assert info["prompt"] == prompt
    name, sha256 = next(each for each in (A, B) if each[0] == loras[0][0])
    hashes = f"{name}: {sha256[:12]}"
    assert f'Lora hashes: "{hashes}"' in info["infotexts"][0]
    assert info["extra_generation_params"] == {"Lora hashes": hashes}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a fox <lora:outlines:1>", "`outlined`"),
        ("a fox <lora:outlined:x>", "<lora:name:0.8>"),
        ("a fox <lora:>", "<lora:name:0.8>"),
        (f"a fox <lora:{'x' * 400}>", "no adapter"),
        ("<lora:outlined:1><lora:outlined:1>a fox", "prompt names outlined twice"),
        ("<lora:outlined:1><lora:night-style:1>a fox", "prompt has adapters of rank 132"),
        ("a fox <lora:outlined:1:1:1>", "<lora:name:0.8>"),
        ("a fox <lora:outlined:3>", "-2 and 2"),
        ("<lora:outlined:1>", "prompt is blank"),
        ("a" + "<lora:outlined:1>" * 5, "more than 4"),
    ],
)
async def test_automatic1111s_form_of_errors(client, service, prompt, words) -> None:
    """What is refused is refused in that dialect's words."""
    response = await client.post("/sdapi/v1/txt2img", json={"prompt": prompt})

    assert response.status_code == 400
    assert words in response.json()["errors"]
    assert not service.specs


async def test_automatic1111s_list(client) -> None:
    """Names, and no path of this machine."""
    response = await client.get("/sdapi/v1/loras")

    names = ["night-style", "outlined", "x-1"]
    assert response.json() == [
        {"name": name, "alias": name, "path": "", "metadata": {}} for name in names
    ]
    assert "/loras/" not in response.text
    assert (await client.post("/sdapi/v1/refresh-loras")).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
async def test_other_dialects_leave_the_prompt_alone(client, service, route) -> None:
    """Its text is the model's."""
    await ask(client, route, prompt="a fox <lora:outlined:0.8>", loras=[])

    assert service.specs[-1].prompt == "a fox <lora:outlined:0.8>"
    assert not service.specs[-1].loras


def test_any_text_of_a_form_is_read_or_refused() -> None:
    """No text that a client may send fails otherwise."""
    from app.api.schema.loras import _parse
    from app.errors import InvalidRequest

    faults = set()
    for each in product('[{:,a0"', repeat=4):
        try:
            _parse("".join(each))
        except InvalidRequest as error:
            faults.add(error.param)

    assert faults == {"loras"}


def test_limits_judge_specs_of_every_way_in() -> None:
    """Commands and the service ask the same rules."""
    from app.engine.models.registry import find_spec
    from app.errors import InvalidRequest
    from app.limits import Limits

    limits = Limits.of(find_spec("shapes"), 10**6, max_lora_rank=32)
    limits.check_loras([Lora("a", 1.0, "", "", 32), Lora("b", 0.0, "", "", 32)])
    with pytest.raises(InvalidRequest, match="rank 33 together; the most is 32"):
        limits.check_loras([Lora("a", 1.0, "", "", 32), Lora("b", 0.1, "", "", 1)])
