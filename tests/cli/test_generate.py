"""`klein generate`: what can be known before the model is loaded is refused before, by HTTP's
rules."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from app.api.config import ApiConfig
from app.api.native.request import read, table
from app.cli import generate, local, output
from app.cli.console import add_options
from app.cli.main import main
from app.cli.warm_worker import warm_runtime
from app.domain import ImageSpec
from app.engine.adapters.shapes import linear_shapes
from app.engine.models.registry import find_model, find_spec
from app.errors import InvalidRequest
from app.limits import Limits
from app.service.adapters import Adapters
from app.settings import Settings
from app.worker.supervisor import Supervisor
from tests.cli.test_console import Terminal
from tests.support.scripted_engine import MakeScriptedEngine, Script

CONFIG = ApiConfig(
    is_strict=True,
    has_aliases=True,
    lists_aliases=False,
    has_links=False,
    public_url=None,
    heartbeat_s=15.0,
)
KLEIN = find_spec("flux.2-klein-4b")
GUIDED = replace(KLEIN, default_guidance=4.0, max_guidance=10.0)
SPEC = ImageSpec("a red circle", 1024, 1024, 4, KLEIN.default_guidance, 7)


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """A folder to write to, and no worker may be started."""

    def fail(_) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr(Supervisor, "start", fail)
    monkeypatch.setenv("KLEIN_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "nodir/x.png"], "no folder nodir"),
        (["-o", "taken.png"], "is there already"),
        (["-o", "nodir/"], "no folder nodir"),
        (["-o", "x.png", "--format", "jpeg"], "does not fit the name"),
        (["-o", "-", "-n", "2"], "one picture"),
        (["-n", "0"], "-n must lie between 1 and"),
        (["--mask", "taken.png"], "name that by --image"),
        (["--image", "nofile.png"], "cannot be read"),
        (["--image", "taken.png"], "is none of PNG"),
        (["--image", "taken.png", *["--image", "taken.png"] * 4], "the most is 4"),
        (["--url", "127.0.0.1:1"], "take one of them"),
        (["-o", "x.gif"], "must end in"),
        (["--steps", "0"], "--steps must lie between 1 and"),
        (["--steps", "9999"], "--steps must lie between 1 and"),
        (["--seed", "-2"], "--seed must lie between -1 and"),
        (["--seed", str(2**53)], "--seed must lie between -1 and"),
        (["--guidance", "nan"], "--guidance must"),
        (["--guidance", "0"], "--guidance must"),
        (["--size", "100x100"], "nearest valid size is"),
        (["--size", "big"], "--size must be"),
        (["--size", "512x128"], "between 1:3 and 3:1"),
        (["--size", "99999x99999"], "nearest valid size is"),
    ],
)
def test_what_can_be_known_is_refused_before_loading(unloaded, capsys, words, says) -> None:
    """One sentence, exit code 1, no worker and no file."""
    (unloaded / "taken.png").touch()

    assert main(["generate", "a red circle", "--local", *words]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"klein: .*\n", said)
    assert says in said
    assert [path.name for path in unloaded.iterdir()] == ["taken.png"]


@pytest.mark.parametrize("prompt", ["", " \n", "x" * 32_001, "half \ud800"])
def test_a_text_that_is_none_is_refused_before_loading(unloaded, capsys, prompt) -> None:
    """Also bytes on the command line that are no Unicode."""
    assert main(["generate", prompt, "--local"]) == 1
    assert capsys.readouterr().err.startswith("klein: The prompt ")


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "a red circle", "--steps", "0"],
        ["compare", "a red circle", "-o", "nodir/x.png"],
        ["bench", "--steps", "0"],
        ["bench", "--out", "nodir/x.md"],
    ],
)
def test_other_commands_that_draw_refuse_as_early(unloaded, capsys, words) -> None:
    """Steps and the place of the result are judged before the first worker starts."""
    assert main(words) == 1
    assert re.fullmatch(r"klein: .*\n", capsys.readouterr().err.splitlines(keepends=True)[-1])


@pytest.mark.parametrize("card", [KLEIN, GUIDED, find_spec("shapes")])
@pytest.mark.parametrize(
    "change",
    [
        *({"width": w, "height": h} for w, h in ((4096, 64), (1024, 336), (1024, 352), (8, 8))),
        *({"width": w, "height": h} for w, h in ((1000, 1000), (512, 512), (128, 128), (64, 64))),
        *({"width": w, "height": h} for w, h in ((2048, 2048), (4096, 1376), (0, 512), (-16, 16))),
        *({"num_inference_steps": steps} for steps in (-1, 0, 1, 50, 51, 100, 10**9)),
        *({"guidance_scale": scale} for scale in (0.0, 0.5, 1.0, 4.0, 10.0, 10.5, float("inf"))),
        *({"seed": seed} for seed in (-2, 0, 2**53 - 1, 2**53)),
        *({"prompt": prompt} for prompt in ("", " ", "x" * 32_000, "x" * 32_001, "\ud800")),
    ],
    ids=lambda change: ",".join(f"{k}={str(v)[:8]!a}" for k, v in change.items()),
)
def test_the_rules_are_those_of_http(card, change) -> None:
    """What `POST /generate` takes is taken here, and what it refuses is refused here."""
    own = {"num_inference_steps": card.default_steps, "guidance_scale": card.default_guidance}
    spec = replace(SPEC, width=card.default_width, height=card.default_height, **own)
    sent = {"prompt": spec.prompt, **change}

    limits = Limits.of(card, 4_194_304, 4)
    assert is_taken(lambda: limits.check(replace(spec, **change))) == (
        is_taken(lambda: read(table(card, limits, CONFIG).read(sent), card, limits, Adapters()))
    )


def is_taken(ask) -> bool:
    try:
        ask()
    except InvalidRequest:
        return False
    return True


def draw(folder: Path, *words: str) -> int:
    """Run the command with the scripted engine."""
    parser = argparse.ArgumentParser()
    add_options(parser, generate.OPTIONS)
    given = parser.parse_args(["a", "-o", str(folder / "x.png"), "--local", *words])
    environ = {"KLEIN_DEVICE": "cpu", "KLEIN_MODEL": "shapes", "KLEIN_URL": "http://unused"}
    return generate.run(given, environ, make_engine=MakeScriptedEngine(Script()))


def test_seed_minus_one_draws_one(tmp_path, capsys) -> None:
    """As over HTTP; the one that was drawn is printed."""
    assert draw(tmp_path, "--seed", "-1", "--steps", "1", "--size", "128x128") == 0

    said = capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 0
    (seed,) = re.findall(r"128x128, seed (-?\d+),", said)
    assert int(seed) >= 0


def test_several_pictures_by_a_model_of_its_own(tmp_path, monkeypatch, capsys) -> None:
    """Seeds that follow each other, an edit's size, and JSON; a terminal sees load and steps."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    Image.new("RGB", (128, 192), "red").save(tmp_path / "red.png")
    Image.new("L", (128, 192), 255).save(tmp_path / "mask.png")
    words = ["--image", str(tmp_path / "red.png"), "--mask", str(tmp_path / "mask.png"), "--json"]
    assert draw(tmp_path, "-n", "2", "--seed", "4", "--steps", "2", *words) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["url"] is None
    assert [Path(each["path"]).name for each in told["pictures"]] == ["x-4.png", "x-5.png"]
    assert [(each["width"], each["height"]) for each in told["pictures"]] == [(128, 192)] * 2
    assert all(each["seconds"]["total"] > 0 for each in told["pictures"])
    assert "white was repainted" in sys.stderr.getvalue()
    assert "| starting the worker" in sys.stderr.getvalue()
    assert "0 of 2, denoise 1/2" in sys.stderr.getvalue()


def test_an_edit_is_planned_before_loading(tmp_path) -> None:
    """Its pictures, its mask, and its previews, of which there is one less than steps."""
    Image.new("RGB", (128, 192), "red").save(tmp_path / "red.png")
    Image.new("L", (128, 192), 255).save(tmp_path / "mask.png")
    parser = argparse.ArgumentParser()
    add_options(parser, generate.OPTIONS)
    words = ["--image", str(tmp_path / "red.png"), "--mask", str(tmp_path / "mask.png")]
    given = parser.parse_args(["a", *words, "--steps", "2", "--seed", "1", "-n", "2"])
    given.previews = 3

    first, second = local._plan(given, Settings.read({}), find_spec("shapes"))
    assert [first.seed, second.seed] == [1, 2]
    assert [(each.width, each.height) for each in first.references] == [(128, 192)]
    assert first.mask is not None
    assert first.previews == 1


async def test_a_worker_that_comes_and_goes_again_is_no_error(caplog) -> None:
    """A second readiness, and an end after it, find nobody who waits."""
    settings = Settings.read({"KLEIN_DEVICE": "cpu"}, model="shapes")

    async with warm_runtime(settings, make_engine=MakeScriptedEngine(Script())) as (
        runtime,
        info,
        _,
    ):
        runtime.workers.workers[0].on_worker_ready(info, 1.0)
        runtime.on_fatal(70, "It died.")
        await runtime.ended
    assert not [record for record in caplog.records if record.exc_info]


def test_a_folder_that_may_not_be_written_to(unloaded, capsys, monkeypatch) -> None:
    """Judged before loading too; root may write everywhere, so the kernel's answer is given."""
    (unloaded / "closed").mkdir()
    monkeypatch.setattr(output.os, "access", lambda path, mode: path != Path("closed"))

    assert main(["generate", "a", "--local", "-o", "closed/x.png"]) == 1
    assert "may not be written" in capsys.readouterr().err


@pytest.mark.full
def test_adapters_of_the_folder_can_be_named(tmp_path, monkeypatch, capsys) -> None:
    """`--lora` draws with them, by the rules of HTTP, and an unknown one names those like it."""
    from tests.engine.adapters import forge

    shapes = linear_shapes(find_model("shapes").architecture)
    weak = {name: (down / 10, up / 3) for name, (down, up) in forge.draw(shapes, 4).items()}
    (tmp_path / "loras").mkdir()
    forge.write(tmp_path / "loras" / "strange.safetensors", *forge.layouts(weak, 4.0)["ai-toolkit"])
    monkeypatch.setenv("KLEIN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("KLEIN_DEVICE", "cpu")
    path = tmp_path / "a.png"
    words = ["generate", "a red circle", "--seed", "3", "-o", str(path), "--local", "--lora"]

    assert main([*words, "strange:0.5"]) == 0
    (used,) = json.loads(Image.open(path).text["klein"])["loras"]
    assert (used["name"], used["scale"]) == ("strange", 0.5)
    capsys.readouterr()
    assert main([*words, "strage", "--overwrite"]) == 1
    assert "names like it are `strange`" in capsys.readouterr().err
