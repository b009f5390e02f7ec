"""The one door to the pictures: what it takes and refuses, and that each request ends once."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from app import __version__
from app.domain import ImageSpec, Lora, RawImage, Stage, WorkerStage
from app.errors import Cancelled, GenerationFailed, InvalidRequest, Kind, Unavailable
from app.images import OutputFormat
from app.request_context import RequestContext, current_request
from app.service.adapters import Adapters
from app.service.results import Advance, Picture, Queued
from tests.support.in_process import InProcess

PNG = OutputFormat("png")
SPEC = ImageSpec("a red circle", 64, 64, 4, 1.0, 7)
TINY = RawImage(16, 16, b"\0" * 768)


@pytest.fixture
async def at() -> AsyncIterator[InProcess]:
    """A service with four places, whose files carry metadata."""
    async with InProcess(capacity=4, has_metadata=True) as runtime:
        yield runtime


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": " "}, "prompt"),
        ({"width": 100}, "width"),
        ({"height": 100}, "height"),
        ({"width": 64, "height": 512}, "width"),
        ({"width": 4096, "height": 4096}, "width"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": 3.0}, "guidance_scale"),
        ({"seed": -2}, "seed"),
        ({"references": (TINY,) * 5}, "references"),
        ({"width": 2048, "height": 2048, "references": (TINY,) * 2}, "width"),
    ],
)
async def test_a_refusal_names_a_field_of_the_spec(at, change, field) -> None:
    """Whatever protocol the request came by; nothing of it is queued."""
    with pytest.raises(InvalidRequest) as refused:
        at.service.submit([SPEC, replace(SPEC, **change)], client="a", output=PNG)

    assert refused.value.param == field
    assert hasattr(SPEC, field)
    assert at.queue.size == 0


@pytest.mark.parametrize("per_minute", [0, 4])
async def test_more_than_there_can_ever_be_is_the_callers_mistake(per_minute) -> None:
    """Of places or of a minute's images; what is counted has the service's own word."""
    runtime = InProcess(capacity=8 if per_minute else 4, per_minute=per_minute)
    with pytest.raises(InvalidRequest) as refused:
        runtime.service.submit([SPEC] * 5, client="a", output=PNG)

    assert refused.value.param == "images"
    assert refused.value.message.startswith("images is 5, but at most 4 ")


async def test_a_deadline_that_cannot_be_met_is_refused(at) -> None:
    """The predicted time is more than the client allows."""
    at.estimator.learn(SPEC, 2.0)
    admission = at.service.admit(client="a", deadline_s=1.0)
    with pytest.raises(InvalidRequest) as refused:
        admission.submit([SPEC], PNG)

    assert refused.value.param == "deadline_s"
    assert at.queue.size == 0


async def test_pictures_come_in_order_and_the_ticket_ends_once(at) -> None:
    """Three images of one request; cancelling afterwards changes nothing."""
    ticket = at.service.submit(
        [replace(SPEC, seed=seed) for seed in (3, 4, 5)], client="a", output=PNG
    )
    pictures = await ticket.pictures()
    ticket.cancel()
    await at.queue.wait_until_empty()

    assert [picture.seed for picture in pictures] == [3, 4, 5]
    assert at.worker.made == 3
    assert set(pictures[0].seconds) == {
        "queue", "text", "reference", "denoise", "decode", "encode", "total"
    }  # fmt: skip
    assert repr(at.queue) == "<JobQueue 0 of 4 waiting, 0 running>"


async def test_the_first_error_ends_the_whole_ticket(at) -> None:
    """The second of three fails: the third is never made, and its place is free."""
    at.worker.errors[2] = GenerationFailed("It could not be made.")
    ticket = at.service.submit([SPEC] * 3, client="a", output=PNG)
    with pytest.raises(GenerationFailed):
        await ticket.pictures()
    await at.queue.wait_until_empty()

    assert repr(at.queue) == "<JobQueue 0 of 4 waiting, 0 running>"


async def test_events_end_with_the_picture_or_the_error(at) -> None:
    """A stream of one image; the next job's error comes out of the iterator."""
    ticket = at.service.submit([SPEC], client="a", output=PNG)
    events = [event async for _, event in ticket.events()]
    at.worker.errors[2] = GenerationFailed("It could not be made.")
    failing = at.service.submit([SPEC], client="a", output=PNG).events()

    assert isinstance(events[0], Queued)
    assert isinstance(events[-1], Picture)
    assert await anext(failing) == (0, Queued(0))
    with pytest.raises(GenerationFailed):
        await anext(failing)


async def test_the_events_of_several_say_which_image_they_are_of(at) -> None:
    """Each is queued behind the one before, and comes as soon as it is done: the next is not begun
    here until it has come."""
    run, has_come = at.worker.run, asyncio.Event()
    has_come.set()

    async def run_after_the_last(job_id, spec, on_progress):
        await has_come.wait()
        has_come.clear()
        return await run(job_id, spec, on_progress)

    at.worker.run = run_after_the_last
    ticket = at.service.submit([SPEC] * 3, client="a", output=PNG)
    events = []
    async for event in ticket.events():
        events.append(event)
        if isinstance(event[1], Picture):
            has_come.set()
    pictures = [index for index, event in events if isinstance(event, Picture)]

    assert [(index, event.position) for index, event in events[:3]] == [(0, 0), (1, 1), (2, 2)]
    assert pictures == [0, 1, 2]
    assert isinstance(events[-1][1], Picture)


async def test_the_first_error_ends_the_events_of_all(at) -> None:
    """The picture before it has come; the third is never made, and its place is free."""
    at.worker.errors[2] = GenerationFailed("It could not be made.")
    run, pictures = at.worker.run, []

    async def run_two(job_id, spec, on_progress):
        if at.worker.made == 2:
            await asyncio.Event().wait()
        return await run(job_id, spec, on_progress)

    at.worker.run = run_two
    ticket = at.service.submit([SPEC] * 3, client="a", output=PNG)

    async def read() -> None:
        async for index, event in ticket.events():
            pictures.extend([index] * isinstance(event, Picture))

    with pytest.raises(GenerationFailed):
        await read()
    await at.queue.wait_until_empty()

    assert pictures == [0]
    assert at.worker.made == 2


async def test_closing_the_events_of_several_cancels_all(at) -> None:
    """Also those that wait."""
    at.worker.release.clear()
    events = at.service.submit([SPEC] * 3, client="a", output=PNG).events()
    await anext(events)
    await at.worker.started.wait()
    await events.aclose()
    await at.queue.wait_until_empty()

    assert at.worker.made == 0


async def test_leaving_cancels_what_waits(at) -> None:
    """The client stops waiting: the running job and the waiting one end as cancelled."""
    at.worker.release.clear()
    ticket = at.service.submit([SPEC] * 2, client="a", output=PNG)
    waiting = asyncio.ensure_future(ticket.pictures())
    await at.worker.started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await at.queue.wait_until_empty()

    assert at.worker.made == 0
    assert all(isinstance(job.future.exception(), Cancelled) for job in ticket.jobs)


async def test_draining_finishes_what_was_accepted_and_takes_nothing(at) -> None:
    """The answer is the time until the last deadline; the state says why nothing is taken."""
    at.worker.release.clear()
    ticket = at.service.submit([SPEC], client="a", output=PNG)
    left_s = at.service.drain()
    with pytest.raises(Unavailable) as refused:
        at.service.submit([SPEC], client="a", output=PNG)
    at.worker.release.set()

    assert 119 < left_s <= 120
    assert refused.value.kind is Kind.DRAINING
    assert at.service.status().stage is WorkerStage.DRAINING
    assert not at.service.status().is_ready
    assert len(await ticket.pictures()) == 1
    await at.queue.wait_until_empty()


async def test_a_cut_prompt_is_told(at) -> None:
    """The picture is made, with a warning."""
    at.worker.is_prompt_cut = True
    (picture,) = await at.service.submit([SPEC], client="a", output=PNG).pictures()

    assert picture.warnings == ("prompt cut to 512 tokens",)


async def test_what_a_route_warns_of_comes_with_each_picture(at) -> None:
    """Before what the pictures tell."""
    at.worker.is_prompt_cut = True
    with at.service.admit(client="a") as admission:
        admission.warnings = ("a word",)
        pictures = await admission.submit([SPEC, SPEC], PNG).pictures()

    assert [each.warnings for each in pictures] == [("a word", "prompt cut to 512 tokens")] * 2


async def test_the_file_says_how_it_was_made(at) -> None:
    """All that is needed to make it again, twice, and none of the references."""
    (picture,) = await at.service.submit([SPEC], client="a", output=PNG).pictures()
    info = Image.open(io.BytesIO(picture.data)).info

    assert info.pop("parameters") == (
        "a red circle\nNegative prompt: \nSteps: 4, Sampler: Euler, CFG scale: 1, Seed: 7, "
        f"Size: 64x64, Model: flux.2-klein-4b, Version: klein-server {__version__}"
    )
    assert json.loads(info.pop("klein")) == {
        "prompt": "a red circle",
        "seed": 7,
        "steps": 4,
        "guidance": 1.0,
        "size": "64x64",
        "model": "flux.2-klein-4b",
        "precision": "int8",
        "device": "cpu",
    }
    assert not info


async def test_the_file_says_what_was_timed(at) -> None:
    """Where a race chose: the attention's kernel, and the times of a step."""
    at.worker.info = replace(
        at.worker.info,
        attention="cuDNN",
        race={"linears": {"fp8": 19.25, "int8": 36.0}, "attention": {"cudnn": 9.9}},
    )
    (picture,) = await at.service.submit([SPEC], client="a", output=PNG).pictures()

    told = recipe_of(picture)
    assert told["attention"] == "cuDNN"
    assert told["race"] == "linears fp8 19.2 ms, int8 36.0 ms; attention cudnn 9.9 ms"


@pytest.mark.parametrize(
    ("info", "is_ready", "kind"), [(None, False, Kind.LOADING), ("kept", False, Kind.WORKER_DOWN)]
)
async def test_without_a_worker_nothing_is_taken(at, info, is_ready, kind) -> None:
    """While the model is loaded, and while a worker is replaced."""
    at.worker.is_ready = is_ready
    if info is None:
        at.worker.info = None
    with pytest.raises(Unavailable) as refused:
        at.service.admit(client="a")

    assert refused.value.kind is kind
    assert refused.value.retry_after_s >= 5


def test_a_stage_is_written_as_its_word() -> None:
    """As in the comments of a stream."""
    assert f"{Stage.DENOISE}" == "denoise"


async def test_a_ticket_tells_how_far_it_has_come(at: InProcess) -> None:
    """What has ended, and the step of the one that runs."""
    ticket = at.service.submit([SPEC, SPEC, SPEC], client="a", output=PNG)
    first, second, _ = ticket.jobs

    assert ticket.advance() == Advance(images=3, done=0, step=0, steps=4)
    first.step = 3
    assert ticket.advance() == Advance(images=3, done=0, step=3, steps=4)
    at.queue.cancel(first)
    assert ticket.advance() == Advance(images=3, done=1, step=0, steps=4)
    second.step = 1
    assert ticket.advance() == Advance(images=3, done=1, step=1, steps=4)
    ticket.cancel()
    assert ticket.advance().done == 3


async def test_adapters_are_in_the_file_and_in_the_log_line(at) -> None:
    """With scales and hashes in the file, also those of the weights; by name in the line."""
    at.service.adapters = Adapters(fused=(Lora("grain", 0.5, "b" * 64, "/loras/grain", 8),))
    context = RequestContext("r1")
    token = current_request.set(context)
    loras = (Lora("ink", -1 / 3, "a" * 64, "/loras/ink", 16), Lora("oil", 1.0, "c" * 64, "", 16))
    ticket = at.service.submit([replace(SPEC, loras=loras)], client="a", output=PNG)
    current_request.reset(token)
    (picture,) = await ticket.pictures()

    told = recipe_of(picture)
    assert told["loras"] == [
        {"name": "ink", "scale": -1 / 3, "sha256": "a" * 64},
        {"name": "oil", "scale": 1.0, "sha256": "c" * 64},
    ]
    assert told["fused_loras"] == [{"name": "grain", "scale": 0.5, "sha256": "b" * 64}]
    settings = Image.open(io.BytesIO(picture.data)).text["parameters"]
    assert f'Lora hashes: "ink: {"a" * 12}, oil: {"c" * 12}", ' in settings
    assert "/loras" not in str(told)
    assert context.loras == ("ink", "oil")


def recipe_of(picture: Picture) -> dict[str, Any]:
    """What the file says under `klein`."""
    return json.loads(Image.open(io.BytesIO(picture.data)).text["klein"])
