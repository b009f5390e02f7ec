"""A service that cannot start says why in one sentence, says what to do, and leaves;
configuration errors at once, before torch is imported."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.errors import StartupError
from app.telemetry.cards import Cards
from app.telemetry.gpu import Gpu
from app.telemetry.preflight import check_driver, check_gpu
from tests.support.fake_nvml import FakeNvml
from tests.support.server import ROOT
from tests.support.spoilt_weights import not_numbers, spoil, zeroes
from tests.support.timing import TIMED

BUSY = 5
"""How many times as long a start may take by the clock as it computes, on a machine that others
use too. It waits for nothing, so what it computes is what it takes on an idle one."""


def start(
    *arguments: str,
    limit_s: float,
    is_timed: bool = True,
    offline: bool = False,
    **settings: object,
) -> str:
    """Run `klein serve`, which must end with one sentence, and within *limit_s* where *is_timed*;
    return the sentence."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("KLEIN_", "HF_"))}
    environ |= {f"KLEIN_{key.upper()}": str(value) for key, value in settings.items()}
    environ |= {"PYTHONPROFILEIMPORTTIME": "1"} if limit_s <= 2 else {}
    environ |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    computed_before_s = computed_s()
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "app", "serve", "--port", "0", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=BUSY * limit_s,
    )

    took_s = min(computed_s() - computed_before_s, time.monotonic() - started)

    assert not is_timed or took_s < limit_s
    assert done.returncode not in {0, 130}
    assert "Traceback" not in done.stdout + done.stderr
    if limit_s <= 2:
        assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("klein: ")]
    return sentence


def computed_s() -> float:
    """Seconds that the ended children of this process have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("app.cli.serve", {"fastapi", "uvicorn", "torch"}),
        ("app.api.app", {"torch", "diffusers", "transformers", "opentelemetry.sdk"}),
    ],
)
def test_what_takes_long_is_not_imported_early(module: str, absent: set[str]) -> None:
    """The worker is started before FastAPI is imported, and only it imports the model stack."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not absent & set(done.stdout.split())


@pytest.mark.slow
@TIMED
def test_a_bad_setting_is_named(is_timed: bool) -> None:
    """Which one, and what is wrong with it."""
    sentence = start(limit_s=2, is_timed=is_timed, queue_images="many")

    assert "KLEIN_QUEUE_IMAGES" in sentence
    assert "many" not in sentence


@pytest.mark.full
def test_a_misspelt_setting_is_named() -> None:
    """It would be ignored silently otherwise."""
    assert "KLEIN_QUEUE_IMAGE " in start(limit_s=2, queue_image=4)


@pytest.mark.slow
@TIMED
def test_a_taken_port_is_found_first(is_timed: bool) -> None:
    """Before the model, which may take minutes."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = start(
            "--port", str(port), limit_s=2, is_timed=is_timed, device="cpu", model="shapes"
        )

    assert str(port) in sentence
    assert "--port" in sentence


@pytest.mark.full
def test_a_public_address_needs_a_key() -> None:
    """Three ways out are named."""
    sentence = start(limit_s=2, host="0.0.0.0")

    for way_out in ("KLEIN_API_KEYS", "127.0.0.1", "KLEIN_TRUST_NETWORK"):
        assert way_out in sentence


@pytest.mark.full
def test_a_model_that_is_not_there() -> None:
    """The setting that names it is named."""
    assert "KLEIN_MODEL" in start(limit_s=2, model="/nowhere/at/all", device="cpu")


class OldDriver(FakeNvml):
    """A driver of 2022, that knows CUDA 11.8; one card, with two others on it."""

    cuda = 11080

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self.cuda

    def nvmlDeviceGetComputeRunningProcesses(self, card: int) -> list[object]:
        from types import SimpleNamespace

        return [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=8_500_000_000),
            SimpleNamespace(pid=2**22 + 1, usedGpuMemory=500_000_000),
        ]


class FullCard(OldDriver):
    """A driver of today."""

    cuda = 13000


def test_no_driver() -> None:
    """What to install, and how to do without."""

    def load() -> None:
        raise OSError("libnvidia-ml.so.1")

    with pytest.raises(StartupError, match="Install a driver") as refused:
        check_driver(Cards(load_nvml=load), "13.0")
    assert "KLEIN_DEVICE=cpu" in refused.value.message


@pytest.mark.slow
@TIMED
def test_no_card_ends_the_start_at_once(is_timed: bool) -> None:
    """The model needs a card, and this machine has none."""
    assert "KLEIN_DEVICE=cpu" in start(limit_s=2, is_timed=is_timed, model="flux.2-klein-4b")


def check(load: Callable[[], FakeNvml]) -> str | None:
    """What is said of the card against a torch for CUDA 13."""
    return check_gpu(Gpu(0, load_nvml=load), "13.0")


def test_a_driver_too_old() -> None:
    """Found and needed are both named."""
    said = check(OldDriver)

    assert said is not None
    assert "580.65.06 is too old" in said
    assert "11.8" in said
    assert "13.0" in said


def test_a_driver_too_old_can_be_mended_in_two_ways() -> None:
    """The driver's number, or a torch for the CUDA that it knows, by the name that the Dockerfile
    takes.
    """
    said = str(check(OldDriver))
    dockerfile = (ROOT / "Dockerfile").read_text()
    (argument,) = re.findall(r"([A-Z_]{6,}) names an index", said)

    assert "install NVIDIA's driver 580 or newer, or another build of the same torch" in said
    assert "for CUDA 11.8 or an earlier 11:" in said
    assert f"ARG {argument}=" in dockerfile
    assert (ROOT / re.findall(r"docs/\w+\.md", said)[0]).is_file()


def test_a_driver_of_the_same_major_version_will_do() -> None:
    """CUDA's minor versions fit together; a card with room is not refused."""

    def load() -> FullCard:
        return FullCard(used_bytes=1_000_000_000)

    assert check_gpu(Gpu(0, load_nvml=load), "13.2") is None


def test_too_little_free_memory() -> None:
    """How much is free and needed, and who holds it, the largest first."""
    said = check(FullCard)

    assert said is not None
    assert "3.9 GB free of 12.9 GB" in said
    assert "4.5 GB are needed" in said
    assert f"(process {os.getpid()}, 8.5 GB), a program outside this container" in said


def remove_file(folder: Path) -> str:
    """Missing."""
    next((folder / "vae").glob("*.safetensors")).unlink()
    return "vae"


def cut_file(folder: Path) -> str:
    """Truncated."""
    file = next((folder / "transformer").glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1000)
    return file.name


def swap_file(folder: Path) -> str:
    """Another model's."""
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))
    return "text_encoder"


@pytest.mark.full
@pytest.mark.torch
@pytest.mark.parametrize("damage", [remove_file, cut_file, swap_file])
def test_missing_truncated_and_wrong_files(tiny_klein, tmp_path, damage) -> None:
    """Within ten seconds, and the file or the part is named."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_klein, folder)
    name = damage(folder)

    assert name in start(limit_s=10, model=str(folder), device="cpu")


@pytest.mark.full
@pytest.mark.torch
@pytest.mark.parametrize("damage", [zeroes, not_numbers])
def test_a_model_that_draws_nothing_is_not_served(tiny_klein, tmp_path, damage) -> None:
    """Its files are whole, its warm-up picture is not: what is likely wrong, and what to do."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_klein, folder)
    spoil(folder, "vae", damage)
    sentence = start(limit_s=10, model=str(folder), device="cpu")

    assert "warm-up picture shows nothing" in sentence
    assert "klein download --verify" in sentence


@pytest.mark.full
@pytest.mark.torch
def test_no_network_and_no_cache(tmp_path) -> None:
    """Which file, and what to do."""
    sentence = start(
        limit_s=10, offline=True, model="flux.2-klein-4b", device="cpu", cache_dir=tmp_path
    )

    assert "not in the cache" in sentence
    assert "start again" in sentence


@pytest.mark.full
@pytest.mark.torch
def test_a_full_disk(tmp_path, monkeypatch) -> None:
    """How much is needed and free, and which setting names another disk."""
    from app.engine.hub import download
    from app.engine.models.registry import MODELS

    usage = SimpleNamespace(free=1_000_000_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(StartupError, match="KLEIN_CACHE_DIR is too small") as refused:
        download.ensure(MODELS["flux.2-klein-4b"], tmp_path, "fp8", lambda progress: None)
    assert "1.0 GB are free" in refused.value.message
