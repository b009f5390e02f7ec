"""From a checkpoint and a card's free memory to the plan, and what a refused start says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.cli.doctor.plan_preview import assume, preview_plan
from app.engine.adapters.shapes import linear_shapes, slot_bytes
from app.engine.checkpoint.detect import open_checkpoint
from app.engine.config import EngineConfig
from app.engine.memory.budget import choose_plan, count_exact, count_weights
from app.engine.memory.planner import CONTEXT_BYTES, GB, Plan
from app.engine.models.registry import find_model, find_spec
from app.engine.quantization.linear import Fp8Linear
from app.engine.quantization.select import GpuCapabilities, choose_precision
from app.engine.roofline import find_gpu
from app.errors import StartupError
from app.settings import Settings
from tests.support.layout_files import build

pytestmark = pytest.mark.torch

MODEL = find_spec("flux.2-klein-4b")
ARCHITECTURE = find_model("flux.2-klein-4b").architecture
CARD = torch.device("cuda", 0)
FACTS = GpuCapabilities((8, 9), frozenset(["fp8"]))


@pytest.fixture(scope="module")
def checkpoint(tiny_klein):
    opened = open_checkpoint(tiny_klein)
    with opened.files:
        yield opened


@pytest.fixture
def plan(checkpoint, monkeypatch):
    """Plan for a card with so much free memory."""

    def choose(free_bytes, precision="fp8", device=CARD, **settings):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_bytes, 12 * GB))
        config = EngineConfig(MODEL.id, None, "", 0, precision, **settings)
        chosen = choose_precision(precision, FACTS, is_small=False)
        return choose_plan(
            config, MODEL, ARCHITECTURE, checkpoint, device, chosen, has_kernels=True
        )

    return choose


def test_what_is_counted_is_what_lies_on_the_card(checkpoint, tiny_klein):
    """One byte for each weight of a block, two for the others; besides, three scales a layer."""
    counted = count_weights(
        checkpoint, ARCHITECTURE, choose_precision("fp8", FACTS, is_small=False)
    )
    built = build(tiny_klein, dtype=torch.bfloat16)
    layers = [each for each in built.transformer.modules() if isinstance(each, Fp8Linear)]

    assert layers
    assert counted.transformer + 3 * 4 * len(layers) == sum(
        each.nbytes for each in built.transformer.parameters()
    )
    decoder = [
        each.nbytes
        for name, each in built.vae.state_dict().items()
        if not name.startswith("encoder.")
    ]
    # One of its numbers is a counter of eight bytes.
    assert counted.decoder == sum(decoder) - 6


def test_exact_weights_are_counted_in_their_type(checkpoint):
    """Four bytes each at fp32, two at bf16, whatever the files hold."""
    sizes = [
        count_exact(checkpoint, choose_precision(name, FACTS, is_small=False))
        for name in ("fp32", "bf16")
    ]

    assert sizes[0] == 2 * sizes[1] > 0


def test_a_processor_holds_everything_itself(plan):
    """No card is asked, and the largest picture is the model's."""
    found = plan(0, device=torch.device("cpu"))

    assert (found.name, found.peak_bytes) == (Plan.HOST, 0)
    assert found.max_pixels == (MODEL.max_pixels,) * (MODEL.max_references + 1)


def test_the_operators_limit_of_pixels_holds(plan):
    """Below what the memory would allow, for every number of references."""
    assert set(plan(11 * GB, max_pixels=2_097_152).max_pixels) == {2_097_152}


def test_a_share_of_the_card_is_planned_as_a_smaller_card(plan):
    """Its bytes are PyTorch's, and the context comes on top."""
    share = 1_200_000_000

    assert plan(11 * GB, memory_bytes=share) == plan(share + CONTEXT_BYTES)


def test_too_small_a_card_ends_the_start_with_what_to_do(plan):
    """One sentence with both numbers."""
    with pytest.raises(StartupError) as refused:
        plan(800_000_000)

    assert refused.value.message == (
        "The card has 0.8 GB of 12.0 GB free, which is too little even with the text encoder in "
        "host memory; close what else uses it."
    )


@pytest.mark.parametrize(
    ("offload", "missing", "name", "reason"),
    [
        ("auto", 0, Plan.RESIDENT, "all networks need 4.0 GB"),
        ("auto", 1, Plan.OFFLOAD, "one network at a time: all networks need 4.0 GB"),
        ("none", 1, Plan.RESIDENT, "all networks need 4.0 GB"),
        ("model", 0, Plan.OFFLOAD, "as asked for"),
        ("disk", 0, Plan.OFFLOAD, "as asked for"),
    ],
)
def test_exact_networks_wait_outside_the_card_where_they_have_no_room(
    plan, offload, missing, name, reason
):
    """At the byte where they just fit, and one below; KLEIN_OFFLOAD goes first."""
    needed = plan(12 * GB, "bf16").peak_bytes
    found = plan(needed - missing, "bf16", offload=offload)

    assert found.name is name
    assert found.reasons[0].startswith(reason)
    assert found.peak_bytes == needed


@pytest.mark.parametrize(("precision", "gigabytes"), [("bf16", 20.0), ("fp32", 35.9)])
def test_the_doctor_plans_exact_weights_as_the_engine_does(precision, gigabytes):
    """The planner's own words, for klein's published files on an assumed card."""
    target = assume(find_gpu("rtx-3060"))
    settings = Settings(precision=precision)
    found = preview_plan(target, settings, MODEL).plan
    large = preview_plan(replace(target, free_bytes=80 * GB), settings, MODEL).plan

    assert (found.name, large.name) == (Plan.OFFLOAD, Plan.RESIDENT)
    assert found.peak_bytes / GB == pytest.approx(gigabytes, abs=0.05)
    assert found.reasons == (
        f"one network at a time: all networks need {found.peak_bytes / GB:.1f} GB, "
        f"free are {(target.free_bytes - CONTEXT_BYTES) / GB:.1f} GB",
    )


def test_doctor_counts_adapters_as_the_engine_does():
    """The preview of a plan has room for the rank that the settings ask for, on small cards too."""
    card = find_gpu("rtx-3060")
    needed = slot_bytes(linear_shapes(ARCHITECTURE), 128)
    plain, with_adapters = (
        preview_plan(replace(assume(card), lora_rank=rank), Settings(plan="resident"), MODEL).plan
        for rank in (0, 128)
    )

    assert with_adapters.peak_bytes - plain.peak_bytes == needed


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_memory_for_adapters_is_planned_where_they_are_expected(plan, checkpoint, precision):
    """As much as slots of the rank take, or nothing."""
    free = 12_000_000_000
    needed = slot_bytes(checkpoint.transformer.linear_shapes, 64)

    with_adapters = plan(free, precision, lora_rank=64).peak_bytes

    assert needed > 0
    assert with_adapters - plan(free, precision).peak_bytes == needed
