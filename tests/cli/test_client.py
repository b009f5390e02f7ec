"""The commands that ask a service, against a real one whose pictures a test holds back."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from PIL import Image

from app.cli.main import main
from app.worker.supervisor import Supervisor
from tests.support.server import ROOT, Server

pytestmark = pytest.mark.slow

SMALL = ("--size", "256x128", "--steps", "2")


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """Pictures are made while this file is there."""
    gate = tmp_path_factory.mktemp("gate") / "open"
    gate.touch()
    return gate


@pytest.fixture(scope="module")
def service(gate):
    """One for all tests of this file; its trace has a line for each picture's end."""
    words = (f"gate={gate}", f"trace={gate.with_name('trace')}")
    module = "tests.support.scripted_engine"
    with Server(*words, module=module, model="shapes", device="cpu", queue_images=8) as server:
        yield server


@pytest.fixture
def held(gate):
    """No picture is made until the test opens the gate."""
    gate.unlink()
    yield gate.touch
    gate.touch()


@pytest.fixture
def asking(service, monkeypatch, tmp_path):
    """The service is the named one; the current folder is empty, and no model may be loaded."""

    def fail(_) -> None:
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(Supervisor, "start", fail)
    monkeypatch.setenv("KLEIN_URL", service.url)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(service, folder, *words: str) -> subprocess.Popen[str]:
    """A command in a process of its own, as a shell starts it."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KLEIN_")}
    return subprocess.Popen(
        [sys.executable, "-m", "app", *words],
        env=environ | {"KLEIN_URL": service.url, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def waiting(service, count: int = 1) -> list[dict[str, object]]:
    """The jobs at the service, once there are so many."""
    for _ in range(2000):
        jobs = json.loads(service.get("/v1/jobs")[2])["data"]
        if len(jobs) == count:
            return jobs
        time.sleep(0.005)
    raise AssertionError(jobs)


def size_of(path) -> tuple[int, int]:
    """Width and height of a picture's file."""
    with Image.open(path) as picture:
        return picture.size


def test_three_pictures_are_named_by_their_seeds(asking, capsys) -> None:
    """In a folder; the lines say where, and standard error, no terminal, says nothing."""
    (asking / "made").mkdir()

    assert main(["generate", "a cat", "-n", "3", "--seed", "5", "-o", "made", *SMALL]) == 0

    names = {f"klein-{seed}.png" for seed in (5, 6, 7)}
    assert {path.name for path in (asking / "made").iterdir()} == names
    assert {size_of(path) for path in (asking / "made").iterdir()} == {(256, 128)}
    said = capsys.readouterr()
    assert sorted(line.split(":")[0] for line in said.out.splitlines()) == sorted(
        f"made/{name}" for name in names
    )
    assert said.err == ""


def test_a_seed_is_the_services(asking, service) -> None:
    """The same pixels as over HTTP, in the current folder where no place is named."""
    assert main(["generate", "a cat", "--seed", "9", *SMALL]) == 0

    body = {"prompt": "a cat", "seed": 9, "size": "256x128", "num_inference_steps": 2}
    over_http = service.post("/generate", body)[2]
    with Image.open(io.BytesIO(over_http)) as right, Image.open("klein-9.png") as ours:
        assert ours.tobytes() == right.tobytes()
        assert json.loads(ours.text["klein"])["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("where", "format", "kind"),
    [("a.jpg", None, "JPEG"), ("a", "webp", "WEBP"), (".", "jpeg", "JPEG")],
)
def test_the_format_is_that_of_the_name_or_the_option(asking, where, format, kind) -> None:
    """A folder's names get the suffix."""
    words = [] if format is None else ["--format", format]
    assert main(["generate", "a", "--seed", "1", "-o", where, *words, *SMALL]) == 0

    (made,) = asking.iterdir()
    with Image.open(made) as picture:
        assert picture.format == kind


def test_several_pictures_of_one_name_add_their_seeds(asking) -> None:
    """None of them takes the place of another."""
    assert main(["generate", "a", "-n", "2", "--seed", "1", "-o", "a.png", *SMALL]) == 0
    assert {path.name for path in asking.iterdir()} == {"a-1.png", "a-2.png"}


def test_a_taken_name_is_refused_before_anything_is_asked(asking, service, capsys) -> None:
    """Unless `--overwrite` is there."""
    (asking / "a.png").write_text("mine")
    before = service.metric("klein_images_total")

    assert main(["generate", "a", "-o", "a.png", *SMALL]) == 1
    assert "a.png is there already" in capsys.readouterr().err
    assert (asking / "a.png").read_text() == "mine"
    assert service.metric("klein_images_total") == before
    assert main(["generate", "a", "-o", "a.png", "--overwrite", *SMALL]) == 0
    assert size_of("a.png") == (256, 128)


def test_standard_output_takes_one_picture(asking, capsysbinary) -> None:
    """Its bytes and nothing else; the line goes to standard error."""
    assert main(["generate", "a", "-o", "-", "--seed", "3", *SMALL]) == 0

    said = capsysbinary.readouterr()
    with Image.open(io.BytesIO(said.out)) as picture:
        assert picture.size == (256, 128)
    assert b"seed 3" in said.err
    assert not [*asking.iterdir()]


def test_an_edit_sends_its_pictures_and_its_mask(asking, capsys) -> None:
    """The size follows the first picture; what the service refuses is named by the option."""
    Image.new("RGB", (128, 192), "red").save("a.png")
    Image.new("RGB", (128, 192), "blue").save("b.jpg")
    Image.new("L", (128, 192), 255).save("mask.png")
    words = ["generate", "a cat", "--image", "a.png", "--image", "b.jpg", "--steps", "2"]

    assert main([*words, "--mask", "mask.png", "-o", "made.webp"]) == 0
    assert size_of("made.webp") == (128, 192)
    assert "white was repainted" in capsys.readouterr().err
    assert main([*words, "--mask", "b.jpg", *["--image", "a.png"] * 3, "-o", "c.png"]) == 1
    assert capsys.readouterr().err.startswith("klein: --image holds 5 pictures")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "big"], "--size must be"),
        (["--steps", "0"], "--steps must"),
        (["--guidance", "99"], "--guidance must"),
        (["--lora", "none-such"], "no adapter `none-such`"),
        (["--lora", "a:b"], "--lora must be"),
    ],
)
def test_what_the_service_refuses_is_named_by_the_option(asking, capsys, words, says) -> None:
    """The service's own sentence, exit code 1, no file."""
    assert main(["generate", "a", *words]) == 1

    said = capsys.readouterr().err
    assert said.startswith("klein: ")
    assert says in said
    assert not [*asking.iterdir()]


def test_own_jobs_are_listed_and_taken_back(asking, service, held, capsys) -> None:
    """By their ids, or all; who waits for them is told."""
    asked = start(service, asking, "generate", "a", "-n", "3", *SMALL)
    jobs = waiting(service, 3)

    assert main(["queue"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert all(str(job["id"]) in line for job, line in zip(jobs, table[1:], strict=True))
    assert main(["cancel", str(jobs[2]["id"]), "no-such-job"]) == 1
    said = capsys.readouterr()
    assert said.out == f"cancelled {jobs[2]['id']}\n"
    assert "no-such-job: no job of yours" in said.err
    out, err = asked.communicate(timeout=20)
    # The first that fails takes the others back.
    assert (asked.returncode, out) == (1, "")
    assert "cancelled" in err
    waiting(service, 0)


def test_all_jobs_are_taken_back(asking, service, held, capsys) -> None:
    """Also one that runs; with none there is nothing to do."""
    asked = start(service, asking, "generate", "a", *SMALL)
    waiting(service)

    assert main(["cancel", "--all", "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)["data"]
    assert job["state"] == "cancelled"
    assert asked.wait(20) == 1
    asked.communicate()
    assert main(["cancel", "--all"]) == 0
    assert main(["cancel"]) == 1
    assert main(["cancel", "a", "--all"]) == 1


def test_one_that_fails_takes_the_others_back(asking, service, held, capsys) -> None:
    """At once, not when the command's process ends."""

    def spoil() -> None:
        service.request("DELETE", f"/v1/jobs/{waiting(service, 3)[1]['id']}")

    other = threading.Thread(target=spoil)
    other.start()
    assert main(["generate", "a", "-n", "3", *SMALL]) == 1
    other.join()

    assert "cancelled" in capsys.readouterr().err
    waiting(service, 0)


def test_ctrl_c_takes_the_job_back(asking, service, gate, held) -> None:
    """The exit code is 130, nothing is printed, and the card does not draw on.

    While the command waits it has neither a process of its own nor the library of models.
    """
    asked = start(service, asking, "generate", "a", "-n", "6", *SMALL)
    waiting(service, 4)
    process = psutil.Process(asked.pid)
    assert process.children() == []
    assert not [each for each in process.memory_maps() if "torch" in each.path]
    asked.send_signal(signal.SIGINT)
    out, err = asked.communicate(timeout=20)

    assert (asked.returncode, out, err) == (130, "", "")
    waiting(service, 0)
    assert not [*asking.iterdir()]
    assert gate.with_name("trace").read_text().splitlines()[-1].startswith("stopped")


def test_the_first_lines_of_the_service_say_what_it_needs(service) -> None:
    """Where it listens, who reaches it, what it needs, and then what it loads."""
    words = [line.split()[2] for line in service.lines[:4]]

    assert words == ["Listening", "Only", "Needs", "Model"]


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["generate", "a", *SMALL], {"url", "pictures"}),
        (["queue"], {"object", "data", "has_more"}),
        (["cancel", "--all"], {"object", "data"}),
        (["models"], {"object", "data"}),
        (["loras"], {"object", "data"}),
    ],
)
def test_each_answers_with_one_document(asking, capsys, words, keys) -> None:
    """`--json`, of which standard output holds nothing else."""
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == keys


def test_what_is_served_is_listed(asking, capsys) -> None:
    """The model, and that there are no adapters of a scripted engine."""
    assert main(["models"]) == 0
    assert main(["loras"]) == 0
    assert main(["queue"]) == 0

    said = capsys.readouterr().out
    assert "shapes" in said
    assert "No job of yours" in said
