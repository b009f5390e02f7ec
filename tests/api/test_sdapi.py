"""AUTOMATIC1111's dialect: what is honoured, mapped and noted, its errors, its keys, its jobs."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import httpx
import pytest
from PIL import Image

from app.api.app import create_app
from app.engine.models.registry import find_spec
from app.errors import OutOfMemory
from app.settings import Settings
from tests.api.conftest import client_of
from tests.api.pictures import data_url, encode, photo
from tests.api.sockets import until
from tests.support.in_process import InProcess

V1 = "/sdapi/v1"
KEYS = ("first-key-1234", "second-key-5678")


def b64(data: bytes) -> str:
    """Write a file as text."""
    return base64.b64encode(data).decode()


def basic(user: str, password: str) -> dict[str, str]:
    """The header of Basic authentication."""
    return {"authorization": f"Basic {b64(f'{user}:{password}'.encode())}"}


def detail_of(response: httpx.Response) -> str:
    """Read the error, which has exactly the four keys of this dialect."""
    error = response.json()

    assert set(error) == {"error", "detail", "body", "errors"}
    assert error["detail"] == error["errors"]

    return error["detail"]


async def txt2img(client, **body):
    """Make pictures; returns the answer and its `info`."""
    response = await client.post(f"{V1}/txt2img", json={"prompt": "a fox", **body})
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer, json.loads(answer["info"])


class TestTxt2img:
    async def test_the_answer_has_what_clients_of_this_dialect_read(self, client):
        """Base64 without a prefix, the parameters, and `info` as a text that holds JSON."""
        answer, info = await txt2img(client, width=512, height=768, seed=7, batch_size=2)

        assert set(answer) == {"images", "parameters", "info"}
        for each in answer["images"]:
            image = Image.open(io.BytesIO(base64.b64decode(each, validate=True)))
            assert (image.format, image.size) == ("PNG", (512, 768))
        assert answer["parameters"] == {
            "prompt": "a fox",
            "width": 512,
            "height": 768,
            "seed": 7,
            "batch_size": 2,
        }
        assert (info["seed"], info["all_seeds"]) == (7, [7, 8])
        assert (info["width"], info["height"]) == (512, 768)
        assert info["all_prompts"] == ["a fox", "a fox"]
        assert info["index_of_first_image"] == 0
        assert info["infotexts"][1].startswith(
            "a fox\nSteps: 4, Sampler: Euler, CFG scale: 1, Seed: 8, Size: 512x768, "
            "Model: flux.2-klein-4b, "
        )

    async def test_steps_and_guidance_are_mapped_and_it_is_said(self, client, service):
        """A distilled model makes its own number, or fewer."""
        _, info = await txt2img(client, steps=20, cfg_scale=7.5, negative_prompt="bad")
        _, fewer = await txt2img(client, steps=2, cfg_scale=1)

        first, second = service.specs
        assert (first.num_inference_steps, first.guidance_scale) == (4, 1.0)
        assert (info["steps"], info["cfg_scale"]) == (4, 1.0)
        assert info["notes"] == [
            "steps is 4 instead of 20, since the model is distilled for it",
            "cfg_scale is 1 instead of 7.5, since the model is distilled for it",
            "not used: negative_prompt",
        ]
        assert second.num_inference_steps == 2
        assert fewer["notes"] == []

    async def test_a_model_with_guidance_takes_both(self, client, service):
        """Up to what it can do."""
        service.model = find_spec("flux.2-klein-base-4b")
        _, info = await txt2img(client, steps=20, cfg_scale=7)
        _, most = await txt2img(client, steps=150, cfg_scale=0)

        first, second = service.specs
        assert (first.num_inference_steps, first.guidance_scale) == (20, 7.0)
        assert info["notes"] == []
        assert (second.num_inference_steps, second.guidance_scale) == (100, 1.0)
        assert len(most["notes"]) == 2

    async def test_notes_and_warnings_come_in_the_header_too(self, client, service):
        """Where the other routes have them."""
        service.script.warnings = ("prompt cut to 512 tokens",)
        response = await client.post(f"{V1}/txt2img", json={"prompt": "a", "enable_hr": True})

        notes = ["not used: enable_hr", "prompt cut to 512 tokens"]
        assert response.headers["x-klein-warnings"] == "; ".join(notes)
        assert json.loads(response.json()["info"])["notes"] == notes

    async def test_numbers_may_be_texts_and_unknown_fields_anything(self, client, service):
        """As pydantic reads them in the original."""
        await txt2img(
            client, width="512", height=512.0, seed="-1", steps=None, alwayson_scripts={"x": [1]}
        )

        assert (service.specs[0].width, service.specs[0].height) == (512, 512)

    async def test_batches_times_iterations_are_pictures(self, client, service):
        """Each with a seed of its own, and at most ten."""
        await txt2img(client, batch_size=2, n_iter=3, seed=5)
        response = await client.post(
            f"{V1}/txt2img", json={"prompt": "a", "batch_size": 4, "n_iter": 3}
        )

        assert [spec.seed for spec in service.specs] == [5, 6, 7, 8, 9, 10]
        assert response.status_code == 400
        assert "batch_size" in detail_of(response)

    async def test_a_size_left_out_is_the_models(self, client, service):
        """Both sides, or one."""
        await txt2img(client)
        await txt2img(client, width=768)

        assert [(spec.width, spec.height) for spec in service.specs] == [(1024, 1024), (768, 1024)]


class TestImg2img:
    async def edit(self, client, service, **body):
        """Edit a picture of 128x64; returns the spec."""
        response = await client.post(f"{V1}/img2img", json={"prompt": "a", **body})
        assert response.status_code == 200, response.text
        return service.specs[-1]

    @pytest.mark.parametrize("write", [b64, data_url])
    async def test_the_first_picture_is_edited(self, client, service, write):
        """In base64 or as a data URL; the size follows it unless one is sent."""
        pictures = [write(photo(128, 64)), write(photo(64, 64))]
        spec = await self.edit(client, service, init_images=pictures)
        sized = await self.edit(client, service, init_images=pictures[:1], width=256, height=256)

        assert (spec.width, spec.height, len(spec.references)) == (128, 64, 2)
        assert spec.mask is None
        assert (sized.width, sized.height) == (256, 256)

    @pytest.mark.parametrize(("invert", "left"), [(0, 255), (1, 0), (True, 0), ("0", 255)])
    async def test_white_is_repainted(self, client, service, invert, left):
        """Or black, where the mask is to be inverted."""
        painted = Image.new("L", (128, 64))
        painted.paste(255, (0, 0, 64, 64))
        spec = await self.edit(
            client,
            service,
            init_images=[b64(photo(128, 64))],
            mask=b64(encode(painted)),
            inpainting_mask_invert=invert,
        )

        assert spec.mask.weights[:128] == bytes([left] * 64 + [255 - left] * 64)

    async def test_what_cannot_be_used_is_noted(self, client):
        """Such as the strength, of which this model knows nothing."""
        response = await client.post(
            f"{V1}/img2img",
            json={
                "prompt": "a",
                "init_images": [b64(photo())],
                "denoising_strength": 0.6,
                "mask_blur": 4,
            },
        )

        notes = json.loads(response.json()["info"])["notes"]
        assert notes == ["not used: denoising_strength, mask_blur"]
        assert "init_images" not in response.json()["parameters"]

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ({}, "init_images is missing"),
            ({"init_images": [b64(photo())] * 5}, "init_images holds 5 pictures"),
            ({"init_images": [7]}, "init_images[0] must be a string"),
            ({"init_images": ["http://10.0.0.1/a.png"]}, "nothing is fetched"),
            ({"init_images": ["bm8gcGljdHVyZQ=="]}, "none of PNG, JPEG, WEBP"),
            ({"init_images": [b64(photo())], "width": 512}, "height is missing"),
            (
                {"init_images": [b64(photo())], "mask": b64(encode(Image.new("L", (128, 128))))},
                "repaints nothing",
            ),
        ],
        ids=str,
    )
    async def test_what_is_wrong_is_said(self, client, service, body, words):
        """In one sentence."""
        response = await client.post(f"{V1}/img2img", json={"prompt": "a", **body})

        assert response.status_code == 400
        assert words in detail_of(response)
        assert not service.tickets


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ({"prompt": "a", "width": 1000, "height": 1000}, "nearest valid size is 1008x1008"),
            ({"prompt": " "}, "prompt is blank"),
            ({}, "prompt is missing"),
            ({"prompt": "a", "steps": 0}, "steps must lie"),
            ({"prompt": "a", "cfg_scale": "much"}, "cfg_scale must be a number"),
            ({"prompt": "a", "seed": -2}, "seed must lie"),
            ({"prompt": "a", "batch_size": 0}, "batch_size must lie"),
        ],
        ids=str,
    )
    async def test_a_wrong_field_is_named(self, client, service, body, words):
        """Sizes and seeds by the same rules as everywhere."""
        response = await client.post(f"{V1}/txt2img", json=body)

        assert response.status_code == 400
        assert words in detail_of(response)
        assert not service.tickets

    async def test_all_errors_have_this_dialects_shape(self, serve, service):
        """Those of the model, of routes, methods, bodies, hosts and origins too."""
        client = await serve()
        service.script.error = OutOfMemory("No room.")
        post = f"{V1}/txt2img"
        responses = [
            await client.post(post, json={"prompt": "a"}),
            await client.get(f"{V1}/nothing"),
            await client.get(post),
            await client.post(post, data={"prompt": "a"}),
            await client.post(post, content=b"{", headers={"content-type": "application/json"}),
            await client.post(post, json={}, headers={"host": "evil.example"}),
            await client.post(post, json={}, headers={"origin": "http://evil.example"}),
        ]

        assert [each.status_code for each in responses] == [500, 404, 405, 415, 400, 400, 403]
        details = [detail_of(each) for each in responses]
        assert details[0] == "No room."
        assert responses[0].json()["error"] == "out_of_memory"

    async def test_other_routes_keep_openais(self, client):
        """A path that only begins alike is not of this dialect."""
        for path in ("/sdapiv1/options", "/v1/nothing"):
            assert set((await client.get(path)).json()) == {"error"}
            assert "message" in (await client.get(path)).json()["error"]


class TestKeys:
    @pytest.mark.parametrize(
        "headers",
        [
            basic("anyone", KEYS[0]),
            basic("", KEYS[1]),
            {"authorization": f"basic {b64(KEYS[0].encode())}"},
            {"authorization": f"Bearer {KEYS[0]}"},
            {"api-key": KEYS[0]},
        ],
        ids=["user", "no user", "key alone", "bearer", "azure"],
    )
    async def test_the_password_is_the_key(self, serve, headers):
        """Whatever the user is called."""
        client = await serve(api_keys=KEYS)

        assert (await client.get(f"{V1}/options", headers=headers)).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            basic(KEYS[0], ""),
            basic(KEYS[0], "wrong-key-0000"),
            {"authorization": "Basic "},
            {"authorization": "Basic %%%"},
            {"authorization": f"Basic {KEYS[0]}"},
        ],
        ids=["none", "as user", "wrong", "bare", "no base64", "not encoded"],
    )
    async def test_nothing_else_is(self, serve, headers):
        """401, and a challenge that asks for a password."""
        client = await serve(api_keys=KEYS)
        response = await client.get(f"{V1}/options", headers=headers)

        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Basic realm=")
        assert "password" in detail_of(response)

    @pytest.mark.parametrize("value", ["", "Basic ", "Basic Og=="])
    async def test_without_keys_an_empty_password_is_none(self, client, value):
        """Open WebUI and SillyTavern send one where the field is left empty."""
        response = await client.get(f"{V1}/options", headers={"authorization": value})

        assert response.status_code == 200

    async def test_passwords_are_for_this_dialect_only(self, serve):
        """All other routes want the key itself."""
        client = await serve(api_keys=KEYS)

        for path in ("/v1/models", "/sdapi", "/health"):
            response = await client.get(path, headers=basic("a", KEYS[0]))
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"

    async def test_a_password_that_a_browser_remembers_lets_no_foreign_page_in(
        self, serve, service
    ):
        """A browser adds it to whatever any page sends; a bearer key only a page that has it."""
        client = await serve(api_keys=KEYS)
        foreign = {"origin": "http://evil.example"}
        body = {"prompt": "a"}
        remembered = await client.post(
            f"{V1}/txt2img", json=body, headers=basic("a", KEYS[0]) | foreign
        )
        given = await client.post(
            f"{V1}/txt2img", json=body, headers={"authorization": f"Bearer {KEYS[0]}"} | foreign
        )

        assert (remembered.status_code, given.status_code) == (403, 200)
        assert len(service.tickets) == 1


@pytest.mark.parametrize(
    ("origins", "status"), [("*", 403), ("http://ui.example", 200), ("http://b.example", 403)]
)
async def test_a_remembered_password_needs_an_origin_that_is_named(serve, origins, status):
    """`*` stands for pages that know the key, which one that a browser adds it for does not."""
    client = await serve(api_keys=KEYS, allowed_origins=(origins,))
    response = await client.post(
        f"{V1}/txt2img",
        json={"prompt": "a"},
        headers=basic("a", KEYS[0]) | {"origin": "http://ui.example"},
    )

    assert response.status_code == status


async def test_it_can_be_turned_off(serve):
    """`KLEIN_SDAPI=false`: as if there were no such routes, and no passwords."""
    client = await serve(sdapi=False)
    closed = await serve(sdapi=False, api_keys=KEYS)

    response = await client.get(f"{V1}/options")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_url"
    response = await closed.get(f"{V1}/options", headers=basic("a", KEYS[0]))
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sd-models", {"title", "model_name", "hash", "sha256", "filename", "config"}),
        ("samplers", {"name", "aliases", "options"}),
        ("schedulers", {"name", "label", "aliases", "default_rho", "need_inner_model"}),
        ("upscalers", {"name", "model_name", "model_path", "model_url", "scale"}),
        ("latent-upscale-modes", None),
        ("sd-vae", None),
        ("sd-modules", None),
    ],
)
async def test_the_lists_have_the_originals_keys(client, name, keys):
    """One entry, or none."""
    entries = (await client.get(f"{V1}/{name}")).json()

    assert [set(each) for each in entries] == ([keys] if keys else [])


async def test_setting_options_changes_nothing(client):
    """Clients send all of them back, one changed, and insist on a 200."""
    before = (await client.get(f"{V1}/options")).json()
    response = await client.post(
        f"{V1}/options", json={**before, "sd_model_checkpoint": "dreamshaper"}
    )

    assert (response.status_code, response.json()) == (200, None)
    assert (await client.get(f"{V1}/options")).json() == before


class TestOwnJobs:
    @pytest.fixture
    async def running(self):
        """The real service, whose pictures wait."""
        runtime = InProcess()
        runtime.worker.release.clear()
        return runtime

    @pytest.fixture
    async def client(self, running):
        """A client of it, with two keys."""
        app = create_app(Settings.read({}, api_keys=KEYS), lambda _: running)
        async with client_of(app) as client:
            yield client

    def ask(self, client, key: str) -> asyncio.Task[httpx.Response]:
        """Ask for two pictures."""
        return asyncio.create_task(
            client.post(f"{V1}/txt2img", json={"prompt": "a", "n_iter": 2}, headers=basic("a", key))
        )

    async def progress(self, client, key: str):
        """Look at what a key has running."""
        return (await client.get(f"{V1}/progress", headers=basic("a", key))).json()

    async def test_an_idle_client_sees_nothing(self, client, running):
        """0.0 and no job, though another one waits: SillyTavern waits for exactly that."""
        waiting = self.ask(client, KEYS[0])
        await running.worker.started.wait()
        other = await self.progress(client, KEYS[1])
        running.worker.release.set()
        await waiting

        for idle in (other, await self.progress(client, KEYS[0])):
            assert idle["progress"] == 0.0
            assert idle["state"]["job_count"] == 0
            assert idle["eta_relative"] == 0.0

    async def test_a_client_sees_its_own(self, client, running):
        """Jobs, and the step of the one that runs."""
        waiting = self.ask(client, KEYS[0])
        await running.worker.started.wait()
        begun = await self.progress(client, KEYS[0])
        running.worker.release.set()
        await waiting

        assert begun["progress"] == 0.01
        assert (begun["state"]["job_count"], begun["state"]["job_no"]) == (2, 0)
        assert begun["state"]["sampling_steps"] == 4

    async def test_interrupt_stops_the_clients_own_only(self, client, running):
        """Its request ends at once; the other's goes on."""
        first, second = self.ask(client, KEYS[0]), self.ask(client, KEYS[1])
        await running.worker.started.wait()
        await until(lambda: running.service.status().queue_size == 3)
        response = await client.post(f"{V1}/interrupt", headers=basic("a", KEYS[0]))
        stopped = await first
        running.worker.release.set()
        made = await second

        assert (response.status_code, response.json()) == (200, {})
        assert stopped.status_code == 499
        assert detail_of(stopped) == "The request was cancelled."
        assert len(made.json()["images"]) == 2
