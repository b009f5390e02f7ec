"""What the host pays: weights on disk are mapped, and a load holds no weight twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import write_tiny_klein
from tests.support.layout_files import build, latents, load_model
from tools.random_weights import TINY, write_random

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """In bf16, but for the VAE, which a processor uses in float32."""
    place = tmp_path_factory.mktemp("tiny") / "model"
    written = write_tiny_klein(place, dtype=torch.bfloat16)
    file = written / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.float() for name, value in load_file(file).items()}, file)
    return written


def mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """Where files of *folder* lie in this process's memory."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            begin, end = line.split()[0].split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def weights(components) -> list[torch.Tensor]:
    networks = (
        components.transformer,
        components.encoder,
        components.vae.decoder,
        components.vae.encoder,
    )
    return [each for network in networks for each in network.parameters()]


def test_weights_that_wait_on_disk_are_maps_of_their_files(folder):
    """KLEIN_OFFLOAD=disk at bf16: every weight lies in its file, and the latents are the same."""
    loaded = load_model(folder, "bf16", offload="disk")
    ranges = mapped_ranges(folder)

    for each in [*weights(loaded.components), loaded.components.encoder.table]:
        assert any(begin <= each.data_ptr() < end for begin, end in ranges)
    right = latents(load_model(folder, "bf16"))
    error = (latents(loaded) - right).norm() / right.norm()
    # The last bit of a product hangs on where its weights happen to lie.
    assert float(error) < 1e-2


def test_otherwise_no_file_stays_mapped(folder):
    """Plain reads: a map's pages would count as this process's memory."""
    components = load_model(folder, "bf16").components

    assert mapped_ranges(folder) == []
    assert weights(components)


def test_a_map_cannot_be_written_through(folder):
    """What is done to a weight stays in this process."""
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    loaded = load_model(folder, "bf16", offload="disk")
    with torch.no_grad():
        for each in loaded.components.transformer.parameters():
            each.zero_()

    assert file.read_bytes() == before


LOAD = """
import sys, torch
from pathlib import Path
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel  # their code is no weight
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from tests.support.layout_files import build
folder, linears = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
parts = build(folder, linears=linears, dtype=torch.bfloat16, quantized_cache=folder / "cache")
"""


@pytest.mark.full
@pytest.mark.parametrize(("linears", "share"), [("bf16", 1.25), ("fp8", 0.85)])
def test_a_load_holds_no_weight_twice(tmp_path, linears, share):
    """The peak of a load, conversion and its file included, against the bytes on disk: all of
    them and one part's change, or half of them where they are rounded.
    """
    wide = replace(TINY, encoder=TINY.encoder | {"intermediate_size": 20_000})
    folder = write_random(tmp_path / "model", wide, dtype=torch.bfloat16)
    size = sum(each.stat().st_size for each in folder.rglob("*.safetensors"))

    assert size > 100_000_000
    assert peak_of_load(folder, linears) < share * size


def peak_of_load(folder, linears) -> int:
    """Bytes that a fresh process takes for a load beyond what it had before, at the most."""
    command = [sys.executable, "-c", LOAD, str(folder), linears]
    # klein's layers are larger than 32 MiB, which malloc always maps and gives back. These small
    # ones would lie in its heap and leave holes there, more or fewer from run to run.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environ, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        before = most = anonymous(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.001)
    assert process.returncode == 0
    return most - before


def anonymous(pid: int) -> int:
    """The process's own memory in bytes, without pages of files: how many of its libraries' pages
    are there is the kernel's affair, and differs by more than the load itself.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0  # it has just ended


def test_the_encoder_above_its_last_state_is_not_read(folder):
    """28 layers on disk, 27 in memory; no logits, no final norm."""
    components = build(folder, linears="bf16", dtype=torch.bfloat16)

    assert len(components.encoder.layers) == 27
    assert not [name for name, _ in components.encoder.named_parameters() if "lm_head" in name]
