"""docs/getting-started.md: the planner's answers for two cards, ComfyUI's folder, and the server's
file of settings.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from app.cli.environment import take_env_file
from app.engine.checkpoint import detect
from app.engine.models.registry import find_model
from app.errors import StartupError
from app.settings import Settings
from tests.cli.test_doctor import TORCH, ask
from tests.docs.sentences import ROOT
from tests.support.fake_nvml import FakeCard, FakeNvml
from tests.support.layout_files import to_comfy
from tests.support.server import Server

PAGE = (ROOT / "docs" / "getting-started.md").read_text()
FILES = dict(re.findall(r"^\| `(\w+)` \| `([\w.-]+)`", PAGE, re.M))
"""ComfyUI's folders with the file that is looked for in each."""
GB = 1_000_000_000


class Desk(FakeNvml):
    """A 12 GB card with a display, of this name and capability."""

    def __init__(self, name: str, capability: tuple[int, int]) -> None:
        super().__init__(FakeCard(name=name), used_bytes=2 * GB)
        self._capability = capability

    def nvmlDeviceGetCudaComputeCapability(self, card: int) -> tuple[int, int]:
        return self._capability


CARDS = [Desk("NVIDIA GeForce RTX 3060", (8, 6)), Desk("NVIDIA GeForce RTX 4070", (8, 9))]


@pytest.fixture
def models(tiny_klein: Path, tmp_path: Path) -> Path:
    """ComfyUI's models folder, with the page's names; tiny weights, so a tokenizer of their own."""
    folder = to_comfy(tiny_klein, tmp_path / "ComfyUI" / "models")
    (folder / "diffusion_models" / "flux-2-klein-4b.safetensors").rename(
        folder / "diffusion_models" / FILES["diffusion_models"]
    )
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("card", CARDS, ids=["rtx-3060", "rtx-4070"])
def test_each_card_serves_comfyuis_folder(capsys, models, tmp_path, card) -> None:
    """`klein doctor --model` finds the three files, and everything has room on the card."""
    code, said = ask(capsys, "--model", str(models), nvml=card, torch=TORCH, model=str(models))

    assert set(FILES) == {"diffusion_models", "text_encoders", "vae"}
    assert code == 0
    assert said.rstrip().endswith("It can serve.")
    assert "layout     ComfyUI models folder" in said
    assert "plan       resident" in said
    for folder, name in FILES.items():
        assert f": {name} (" in said, folder


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.full
def test_the_folder_is_served(models) -> None:
    """`KLEIN_MODEL` names it, and nothing else is needed, but here for a card."""
    with Server(model=models, device="cpu") as server:
        status, headers, body = server.post(
            "/generate", {"prompt": "a red circle", "width": 64, "height": 64}
        )

    assert (status, headers["content-type"]) == (200, "image/png")
    assert body.startswith(b"\x89PNG")
    assert "the model's files are those that KLEIN_MODEL names." in server.log


@pytest.mark.torch
def test_two_files_of_klein_are_refused(models) -> None:
    """As the page says, with the sentence that it quotes."""
    folder = models / "diffusion_models"
    shutil.copy(folder / FILES["diffusion_models"], folder / "flux-2-klein-4b.safetensors")

    with pytest.raises(StartupError, match="diffusion_models holds 2 files that could be meant"):
        detect.open_checkpoint(models)


def test_the_sizes_of_the_files_are_the_published_ones() -> None:
    """Of the transformer in both precisions, the text encoder and the VAE."""
    entry = find_model("flux.2-klein-4b")
    said = dict(re.findall(r"^\| `(\w+)` \| .+ \| ([\d., ]+) GB \|$", PAGE, re.M))
    by_part = {
        part: sum(file.size_bytes for file in entry.shared if file.path.startswith(part))
        for part in ("text_encoder/", "vae/")
    }

    assert said == {
        "diffusion_models": ", ".join(
            f"{entry.transformers[kind].size_bytes / GB:.1f}" for kind in ("fp8", "bf16")
        ),
        "text_encoders": f"{by_part['text_encoder/'] / GB:.1f}",
        "vae": f"{by_part['vae/'] / GB:.1f}",
    }


def test_the_servers_file_is_accepted(tmp_path, monkeypatch) -> None:
    """`--env-file klein.env`, with the keys beside it."""
    (block,) = re.findall(r"^```\n(KLEIN_.*?)^```$", PAGE, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    Path("klein.env").write_text(block)
    Path("klein-keys").write_text("0123456789abcdef\n")
    environ: dict[str, str] = {}
    take_env_file(("--env-file", "klein.env"), environ)
    settings = Settings.read(environ)

    assert settings.api_keys == ("0123456789abcdef",)
    assert settings.trusted_proxies
    assert settings.host == "127.0.0.1"
