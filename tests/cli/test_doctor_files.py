"""`klein doctor --model PATH` judges the files there as a start would, by their headers alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from app.engine.checkpoint.safetensors_io import SafetensorsFile
from app.engine.hub.cache import HubCache
from app.engine.hub.fetch import hash_file
from app.engine.models import registry
from app.engine.models.entry import RemoteFile
from tests.cli.test_doctor import ask
from tests.support.layout_files import to_comfy
from tests.support.single_files import WEIGHTS, write_fp8

pytestmark = pytest.mark.torch

KEY = "flux.2-klein-4b"


@pytest.fixture
def folder(tiny_klein, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_klein, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _no_weight_is_read(monkeypatch) -> None:
    read = SafetensorsFile.read

    def watch(self, tensor, *more):
        assert tensor.size_bytes <= 4, "more than a scale was read"
        return read(self, tensor, *more)

    monkeypatch.setattr(SafetensorsFile, "read", watch)


def judged(capsys, path: Path, **settings) -> tuple[int, dict[str, str], list[dict]]:
    """The exit code, what is told of each component, and the errors."""
    cache = settings.pop("cache_dir", path.parent / "cache")
    code, said = ask(capsys, "--json", model=str(path), cache_dir=cache, **settings)
    document = json.loads(said)
    errors = [problem for problem in document["problems"] if problem["is_fatal"]]
    return code, document["files"]["parts"], errors


def test_a_whole_folder_can_be_served(capsys, folder) -> None:
    """Each component with its files and the precision they are stored in."""
    code, parts, errors = judged(capsys, folder)

    assert (code, errors) == (0, [])
    assert parts == {
        "transformer": f"{WEIGHTS} (F32, 0.00 GB)",
        "text encoder": "model.safetensors (F32, 0.00 GB)",
        "VAE": f"{WEIGHTS} (F32, 0.00 GB)",
        "tokenizer": "the folder's own",
    }
    _, said = ask(capsys, model=str(folder))
    assert "layout     diffusers folder" in said
    assert f"part       transformer: {WEIGHTS} (F32, 0.00 GB)" in said


def test_comfyuis_folder_lacks_an_encoder(capsys, folder, tmp_path) -> None:
    """What is there is told too, and the problem has a remedy."""
    models = to_comfy(folder, tmp_path / "models")
    (models / "text_encoders" / "qwen_3_4b.safetensors").unlink()
    code, parts, errors = judged(capsys, models)

    assert code == 1
    assert parts["transformer"] == "diffusion_models/flux-2-klein-4b.safetensors"
    assert parts["text encoder"] == "missing"
    assert parts["VAE"] == "vae/flux2-vae.safetensors"
    (error,) = errors
    assert "text_encoders holds 0 files" in error["what"]
    assert error["remedy"].startswith("Give the path of the transformer's file")


def test_a_file_alone_says_where_the_rest_would_come_from(
    capsys, folder, tmp_path, monkeypatch
) -> None:
    """Without a download it cannot be served; after one, its parts come from there."""
    path = write_fp8(folder, tmp_path / "flux-2-klein-4b-fp8.safetensors")
    code, parts, errors = judged(capsys, path)
    assert (code, parts["text encoder"]) == (1, "missing")
    assert parts["transformer"] == path.name
    assert "holds the transformer only" in errors[0]["what"]
    assert "or download the model once" in errors[0]["remedy"]

    files = [each for each in sorted(folder.rglob("*")) if each.is_file()]
    entry = registry.MODELS[KEY]
    shared = tuple(
        RemoteFile(
            entry.spec.hub_id,
            entry.revision,
            str(each.relative_to(folder)),
            each.stat().st_size,
            hash_file(each),
        )
        for each in files
    )
    monkeypatch.setitem(registry.MODELS, KEY, replace(entry, shared=shared))
    for remote, each in zip(shared, files, strict=True):
        place = HubCache(tmp_path / "cache").path(remote)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(each, place)

    code, parts, errors = judged(capsys, path)
    source = f"from the download of {KEY} at {entry.revision[:8]}"
    assert (code, errors) == (0, [])
    assert parts["transformer"] == f"{path.name} (fp8, 20 layers, 0.00 GB)"
    assert parts["text encoder"].endswith(source)
    assert parts["tokenizer"] == source


def test_a_part_of_another_model_is_named(capsys, folder, tmp_path) -> None:
    """By a tensor that does not belong there, or a number that does not fit."""
    vae = tmp_path / "wrong.safetensors"
    shutil.copy(folder / "text_encoder" / "model.safetensors", vae)
    code, parts, errors = judged(capsys, folder, vae=vae)

    assert code == 1
    assert parts["VAE"] == f"{vae} (KLEIN_VAE)"
    assert errors[0]["what"] == "wrong.safetensors is no VAE of FLUX.2."
    assert errors[0]["remedy"] == "Use flux2-vae.safetensors."


@pytest.mark.parametrize("is_right", [True, False])
def test_another_vae_beside_the_catalogues_model(capsys, folder, tmp_path, is_right) -> None:
    """It is judged before 12 GB are downloaded."""
    vae = folder / "vae" / WEIGHTS if is_right else tmp_path / "nothing.safetensors"
    code, said = ask(capsys, "--json", model=KEY, vae=vae, cache_dir=tmp_path / "cache")

    document = json.loads(said)
    assert code == (0 if is_right else 1)
    assert document["files"]["parts"] == {"VAE": f"{vae} (KLEIN_VAE)"}
    assert ("which is no file" in str(document["problems"])) is not is_right
