"""The main job, over a real socket: a prompt goes in, a picture comes out, nothing is lost."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import OpenAI
from PIL import Image

from tests.support.timing import TIMED

pytestmark = [pytest.mark.slow, pytest.mark.torch]

SMALL = {"prompt": "a red circle", "width": 128, "height": 128, "num_inference_steps": 2}


def pixels(data: bytes) -> np.ndarray:
    """Height x width x 3, uint8."""
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_prompt_becomes_a_png(shapes) -> None:
    """With its seed, its stage times and the request's id in the headers."""
    status, headers, body = shapes.post("/generate", SMALL | {"seed": 3})

    assert status == 200
    assert headers["content-type"] == "image/png"
    assert pixels(body).shape == (128, 128, 3)
    assert headers["x-klein-seed"] == "3"
    assert headers["x-request-id"]
    for stage in ("queue", "text", "denoise", "decode", "encode", "total"):
        assert f"{stage};dur=" in headers["server-timing"]


@pytest.mark.full
def test_the_pixels_are_those_of_the_pipeline(klein, tiny_klein) -> None:
    """The same generator on the CPU gives the same picture as calling diffusers directly."""
    import torch
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(tiny_klein, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    direct = pipeline(
        prompt="a red circle",
        width=96,
        height=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="np",
    ).images[0]
    _, _, body = klein.post("/generate", SMALL | {"width": 96, "height": 64, "seed": 5})

    np.testing.assert_array_equal(pixels(body), (direct * 255).round().astype(np.uint8))


def test_the_http_process_holds_no_torch(shapes) -> None:
    """Nothing that the worker says brings the library in, which is seconds and hundreds of
    megabytes.
    """
    assert shapes.post("/generate", SMALL)[0] == 200

    maps = Path(f"/proc/{shapes.process.pid}/maps").read_text()

    assert "python" in maps
    assert "libtorch" not in maps


def test_the_same_seed_gives_the_same_bytes_whatever_ran_between(shapes) -> None:
    """Determinism, also after another prompt and size, and image i of n uses seed + i."""
    _, _, first = shapes.post("/generate", SMALL | {"seed": 11})
    shapes.post("/generate", SMALL | {"prompt": "something else", "width": 256, "seed": 1})
    _, _, again = shapes.post("/generate", SMALL | {"seed": 11})
    with OpenAI(base_url=shapes.url + "/v1", api_key="none", max_retries=0) as client:
        both = client.images.generate(
            prompt="a red circle", size="128x128", n=2, extra_body={"seed": 10, "steps": 2}
        )

    assert first == again
    assert [image.seed for image in both.data] == [10, 11]
    np.testing.assert_array_equal(pixels(base64.b64decode(both.data[1].b64_json)), pixels(first))


def test_the_openai_client_gets_three_images_of_the_size_asked_for(shapes) -> None:
    """n=3 gives three different pictures."""
    with OpenAI(base_url=shapes.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(
            model="shapes", prompt="a cat", n=3, size="256x128", extra_body={"steps": 2}
        )
    made = [pixels(base64.b64decode(image.b64_json)).shape for image in answer.data]
    assert made == [(128, 256, 3)] * 3
    assert len({image.b64_json for image in answer.data}) == 3
    assert answer.size == "256x128"


@pytest.mark.parametrize(
    ("service", "tokens"), [("shapes", 64), pytest.param("klein", 512, marks=pytest.mark.full)]
)
def test_a_long_prompt_is_cut_and_said_so(request, service, tokens) -> None:
    """More than *tokens*: 200, a warning in the header, and the picture of the cut prompt."""
    server = request.getfixturevalue(service)
    _, headers, body = server.post("/generate", SMALL | {"prompt": "a cat and " * 400, "seed": 1})

    assert headers["x-klein-warnings"] == f"prompt cut to {tokens} tokens"
    assert pixels(body).shape == (128, 128, 3)


@pytest.mark.full
def test_fifty_clients_at_once_fit_or_are_told_when_to_come_again(scripted, tmp_path) -> None:
    """Queue of four, one on the card: five pictures, forty-five 503, gauges back at zero."""
    gate = tmp_path / "gate"
    server = scripted(f"gate={gate}", queue_images=4, deadline_s=60)
    server.wait_until_ready()
    url = server.url

    async def storm() -> list[tuple[int, dict[str, str]]]:
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits()) as client:
            await asyncio.gather(*(client.get("/health/live") for _ in range(50)))

            async def one() -> tuple[int, dict[str, str]]:
                answer = await client.post("/generate", json={"prompt": "x"})
                return answer.status_code, dict(answer.headers)

            asking = [asyncio.create_task(one()) for _ in range(50)]
            waiting = asyncio.as_completed(asking)
            for _ in range(45):
                await next(waiting)
            gate.touch()
            return await asyncio.gather(*asking)

    answers = asyncio.run(storm())
    refused = [answer for answer in answers if answer[0] == 503]

    assert Counter(status for status, _ in answers) == {200: 5, 503: 45}
    assert all(1 <= int(headers["retry-after"]) <= 60 for _, headers in refused)
    assert server.metric("klein_queue_size") == 0
    assert server.metric("klein_requests_running") == 0
    assert server.metric("klein_requests_total", route="/generate", outcome="ok") == 5
    assert server.metric("klein_requests_total", route="/generate", outcome="rejected") == 45
    assert server.metric("klein_requests_rejected_total", reason="queue_full") == 45


def test_a_killed_worker_costs_one_job(scripted) -> None:
    """`kill -9` during a job: that one gets an error, those that waited get their pictures."""
    server = scripted("slow=0.5")
    server.wait_until_ready()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.post, "/generate", {"prompt": "x"})
        wait_until(lambda: server.metric("klein_requests_running") == 1)
        others = [pool.submit(server.post, "/generate", {"prompt": "x"}) for _ in range(2)]
        wait_until(lambda: server.metric("klein_queue_size") == 2)
        os.kill(server.worker_pid(), signal.SIGKILL)
        status, headers, body = first.result()

        assert status == 500
        assert headers["x-should-retry"] == "false"
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert [other.result()[0] for other in others] == [200, 200]
    assert server.metric("klein_worker_restarts_total", reason="killed") == 1


@TIMED
def test_sigterm_finishes_what_was_accepted(scripted, tmp_path, is_timed: bool) -> None:
    """Ready turns 503 while the port still listens, new work is refused, exit code 0."""
    gate = tmp_path / "gate"
    server = scripted(f"gate={gate}")
    server.wait_until_ready()
    assert server.get("/health/ready")[0] == 200
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server.post, "/generate", {"prompt": "x"})
        wait_until(lambda: server.metric("klein_requests_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        limit_s = 0.5 if is_timed else 10.0
        wait_until(lambda: server.get("/health/ready")[0] == 503, timeout_s=limit_s)
        status, headers, body = server.post("/generate", {"prompt": "y"})

        assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
        assert int(headers["retry-after"]) >= 1
        assert server.get("/health/live")[0] == 200
        gate.touch()
        assert accepted.result()[0] == 200
    assert server.wait() == 0


@TIMED
def test_a_job_that_hangs_is_answered_at_its_deadline(scripted, is_timed: bool) -> None:
    """504, not to be retried, half a second after the deadline at most."""
    server = scripted("hang@1", deadline_s=1, watchdog_s=3)
    server.wait_until_ready()
    started = time.monotonic()
    status, headers, body = server.post("/generate", {"prompt": "x"})
    took_s = time.monotonic() - started

    assert (status, json.loads(body)["error"]["code"]) == (504, "deadline_exceeded")
    assert headers["x-should-retry"] == "false"
    assert not is_timed or 0.5 <= took_s <= 1.6


@pytest.mark.system
def test_promtool_finds_nothing_to_say_about_a_scrape(scripted, tmp_path) -> None:
    """Names, units and help texts are Prometheus' own way."""
    import shutil
    import subprocess

    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.fail("promtool is missing; run `make test-system`, which installs it")
    server = scripted()
    server.wait_until_ready()
    server.post("/generate", {"prompt": "x"})
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=server.get("/metrics")[2], capture_output=True
    )

    assert (checked.returncode, checked.stderr.decode()) == (0, "")


def wait_until(is_true, *, timeout_s: float = 10.0) -> None:
    """Ask again and again until it is true; a service that is asked all the time does nothing
    else."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.03)


@pytest.mark.full
def test_the_demo_scales_what_it_cannot_make(shapes) -> None:
    """The picture is the one that it makes at the nearest size, and it is said."""
    body = SMALL | {"prompt": "a red circle on a blue background", "seed": 3}
    status, headers, data = shapes.post("/generate", body | {"width": 1536, "height": 512})
    _, _, small = shapes.post("/generate", body | {"width": 512, "height": 176})

    assert status == 200
    assert headers["x-klein-warnings"].startswith("made at 512x176 and scaled to 1536x512")
    scaled = Image.open(io.BytesIO(small)).resize((1536, 512), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(data), np.asarray(scaled))
