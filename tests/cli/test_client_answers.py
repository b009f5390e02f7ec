"""What the commands that ask a service do with whatever answers."""

from __future__ import annotations

import json

import pytest

from app.cli import generate
from app.cli.client.service import Service
from app.cli.main import main
from app.errors import InvalidRequest
from tests.support.fake_service import (
    READY,
    FakeService,
    completed,
    document,
    refusal,
    stream,
)

GENERATIONS = "POST /v1/images/generations"
HEALTH = "GET /health/ready"


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """The current folder, and no variables of the caller's; no model may be loaded."""
    monkeypatch.setattr("app.cli.local.draw_here", lambda *_: pytest.fail("a model is loaded"))
    for name in ("KLEIN_URL", "KLEIN_KEY_FILE", "KLEIN_PORT", "KLEIN_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_key_comes_from_a_file(place, monkeypatch, capsys) -> None:
    """Its first line that is no comment is sent, and nothing is printed of it."""
    (place / "keys").write_text("# mine\n\nfirst-key-1234\nsecond-key-5678\n")
    monkeypatch.setenv("KLEIN_KEY_FILE", "keys")
    with FakeService({"GET /v1/jobs": [document({"data": []})]}) as service:
        assert main(["queue", "--url", service.url]) == 0

    ((_, headers, _),) = service.asked
    assert headers["Authorization"] == "Bearer first-key-1234"
    assert "key" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "# none\n", "\n", "a key in Ünicode\n"])
def test_a_file_without_a_key_is_one_sentence(place, monkeypatch, capsys, content) -> None:
    """Nobody is asked without the key that was meant to be sent."""
    if content is not None:
        (place / "keys").write_text(content)
    monkeypatch.setenv("KLEIN_KEY_FILE", "keys")

    assert main(["queue"]) == 1
    assert "KLEIN_KEY_FILE" in capsys.readouterr().err


def test_a_service_that_wants_a_key_says_where_to_put_it(capsys) -> None:
    """Not the sentence for programs, which talks of headers."""
    with FakeService({"GET /v1/models": [refusal(401, "Bearer", "invalid_api_key")]}) as service:
        assert main(["models", "--url", service.url]) == 1

    assert "name that by KLEIN_KEY_FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("https://pictures.example/klein/v1/", "https://pictures.example/klein"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_address_may_be_what_other_clients_are_given(url, asked) -> None:
    """With `/v1`, with a slash, without a scheme."""
    assert Service.find(url, {}).url == asked
    assert Service.find(None, {"KLEIN_URL": url}).url == asked


@pytest.mark.parametrize(
    "url", ["http://", "ftp://a", "http://me:secret@a", "http://a?key=secret", "http://a:99999", ""]
)
def test_an_address_that_is_none_is_refused(url) -> None:
    """Without repeating it, since it may hold a password."""
    with pytest.raises(InvalidRequest) as refused:
        Service.find(url or "http://[", {})
    assert "secret" not in refused.value.message


def test_the_port_is_the_one_that_serve_takes() -> None:
    """8000 where nothing is set, or something that is no port."""
    assert Service.find(None, {}).url == "http://127.0.0.1:8000"
    assert Service.find(None, {"KLEIN_PORT": "8123"}).url == "http://127.0.0.1:8123"
    assert Service.find(None, {"KLEIN_PORT": "none"}).url == "http://127.0.0.1:8000"
    assert not Service.find(None, {}).is_named


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": 1}', b'{"data": [{"id": 1}]}'])
def test_another_program_is_recognised(capsys, body) -> None:
    """One sentence for whatever it says."""
    with FakeService({"GET /v1/jobs": [(200, {}, body)]}) as service:
        assert main(["queue", "--url", service.url]) == 1

    assert "another program" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"<html>", b'{"ready": 1}', b'{"detail": "Not Found"}'])
def test_another_program_on_our_port_is_no_service(monkeypatch, capsys, body) -> None:
    """A model of its own is loaded beside it; where it was named, it is named as wrong."""
    loaded = []
    monkeypatch.setattr("app.cli.local.draw_here", lambda *_: loaded.append(1))
    with FakeService({HEALTH: [(200, {}, body)]}) as service:
        assert main(["generate", "a", "--url", service.url]) == 1
        assert "another program" in capsys.readouterr().err
        assert not loaded
        monkeypatch.setenv("KLEIN_PORT", service.url.rpartition(":")[2])
        assert main(["generate", "a"]) == 0
    assert loaded


def test_nobody_at_a_named_address_is_an_error(capsys) -> None:
    """No model is loaded instead."""
    assert main(["generate", "a", "--url", "127.0.0.1:1"]) == 1
    assert "start one by `klein serve`" in capsys.readouterr().err


def test_what_others_say_moves_no_cursor(capsys) -> None:
    """Escape sequences of an answer do not reach the terminal."""
    job = {"id": "\x1b[2J", "state": "queued\n", "position": 0, "images": 1, "images_done": 0}
    job |= {"progress": 0, "created": 0}
    answers = {
        "GET /v1/jobs": [document({"data": [job]})],
        "GET /v1/models": [refusal(500, "\x1b]0;title\a", "internal_error")],
    }
    with FakeService(answers) as service:
        assert main(["queue", "--url", service.url]) == 0
        assert main(["models", "--url", service.url]) == 1

    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err


def test_a_service_that_loads_is_waited_for(monkeypatch, place) -> None:
    """It is asked again once it is ready."""
    monkeypatch.setattr("app.cli.client.pictures._LOOK_S", 0.01)
    loading = document({"ready": False, "stage": "weights", "progress": 0.5}, 503)
    answers = {
        HEALTH: [loading, loading, READY],
        GENERATIONS: [
            refusal(503, "The model is still being loaded.", "model_loading"),
            stream(completed(b"picture")),
        ],
    }
    with FakeService(answers) as service:
        assert main(["generate", "a", "--url", service.url, "--seed", "7"]) == 0

    assert (place / "klein-7.png").read_bytes() == b"picture"


def test_a_service_that_fails_while_it_loads_is_not_waited_for(monkeypatch, capsys) -> None:
    """Its reason is told."""
    monkeypatch.setattr("app.cli.client.pictures._LOOK_S", 0.01)
    failed = document({"ready": False, "stage": "failed", "reason": "The card is gone."}, 503)
    loading = refusal(503, "The model is still being loaded.", "model_loading")
    with FakeService({HEALTH: [failed], GENERATIONS: [loading]}) as service:
        assert main(["generate", "a", "--url", service.url]) == 1

    assert capsys.readouterr().err == "klein: The card is gone.\n"


def test_a_full_queue_is_asked_again_when_it_says_so(monkeypatch, place, capsys) -> None:
    """Three times, then its sentence is told."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("app.cli.client.pictures.time.monotonic", iter(range(100)).__next__)
    full = refusal(503, "The queue is full.", "server_is_overloaded", Retry_After="1")
    made = stream(completed(b"picture"))
    with FakeService({HEALTH: [READY], GENERATIONS: [full, full, made, full]}) as service:
        words = ["generate", "a", "--url", service.url, "--overwrite"]
        assert main([*words, "-o", "a.png"]) == 0
        assert main([*words, "-o", "b.png"]) == 1

    assert (place / "a.png").exists()
    assert not (place / "b.png").exists()
    assert "The queue is full." in capsys.readouterr().err
    assert len(service.bodies(GENERATIONS)) == 7


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (stream(), "ended the stream"),
        (stream("queued 0", "denoise 1/4"), "ended the stream"),
        (stream({"type": "error", "error": {"message": "No room.", "type": "server_error"}}), "No"),
        (stream({"type": "image_generation.completed"}), "cannot be read"),
        (stream({"no": "type"}), "cannot be read"),
        (stream(completed(b"x", size="big")), "cannot be read"),
        ((200, {}, b"data: [1]\n\n"), "cannot be read"),
        ((502, {}, b"<html>"), "another program"),
    ],
)
def test_a_stream_that_fails_is_one_sentence(place, capsys, answer, says) -> None:
    """And nothing is written."""
    with FakeService({HEALTH: [READY], GENERATIONS: [answer]}) as service:
        assert main(["generate", "a", "--url", service.url]) == 1

    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not [*place.iterdir()]


def test_what_is_asked_for_is_sent(place) -> None:
    """Under the service's names, and nothing that was not asked for."""
    words = ["--size", "64x32", "--steps", "2", "--guidance", "1", "--lora", "a:0.5", "--lora", "b"]
    with FakeService({HEALTH: [READY], GENERATIONS: [stream(completed(b"x"))]}) as service:
        assert main(["generate", "a cat", "--url", service.url, "--seed", "7", *words]) == 0
        assert main(["generate", "a cat", "--url", service.url, "-o", "b.jpg"]) == 0

    first, second = service.bodies(GENERATIONS)
    assert first == {
        "prompt": "a cat",
        "output_format": "png",
        "stream": True,
        "partial_images": 0,
        "size": "64x32",
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "loras": [{"name": "a", "scale": 0.5}, {"name": "b"}],
        "seed": 7,
    }
    assert second.keys() == {"prompt", "output_format", "stream", "partial_images", "seed"}
    assert second["output_format"] == "jpeg"


def test_timings_and_warnings_are_told(capsys) -> None:
    """A warning once, however many pictures have it."""
    last = completed(b"x", warnings=["prompt cut to 64 tokens"])
    made = stream(
        "queued 1", "waking 4.0", "timing text;dur=21.5, total;dur=1500", "peak 1\n: x", last
    )
    with FakeService({HEALTH: [READY], GENERATIONS: [made]}) as service:
        assert main(["generate", "a", "--url", service.url, "-n", "2", "--json"]) == 0

    said = capsys.readouterr()
    assert said.err == "klein: prompt cut to 64 tokens\n"
    found = json.loads(said.out)
    assert found["url"] == service.url
    assert [each["seconds"] for each in found["pictures"]] == [{"text": 0.0215, "total": 1.5}] * 2


@pytest.mark.parametrize(
    ("words", "environ", "says"),
    [
        (["--model", "flux.2-klein-4b"], {}, "serves shapes, not flux.2-klein-4b"),
        ([], {"KLEIN_MODEL": "flux.2-klein-4b"}, "serves shapes, not flux.2-klein-4b"),
        ([], {"KLEIN_MODEL": "./x", "KLEIN_VARIANT": "flux.2-klein-4b"}, "serves shapes, not"),
        (["--model", "./folder"], {}, "cannot be told"),
        (["--precision", "fp8"], {}, "--precision says how a model is loaded"),
        (["--cache-dir", "x"], {}, "--cache-dir says how a model is loaded"),
        (["--model", "shapes"], {}, ""),
        ([], {"KLEIN_MODEL": "auto"}, ""),
        ([], {"KLEIN_MODEL": "./folder"}, ""),
    ],
)
def test_a_service_with_another_model_is_not_asked(
    monkeypatch, capsys, words, environ, says
) -> None:
    """Nor is the wanted one loaded beside it: it says how to have that."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    answers = {
        HEALTH: [READY],
        "GET /v1/models": [document({"data": [{"id": "shapes"}]})],
        GENERATIONS: [stream(completed(b"x"))],
    }
    with FakeService(answers) as service:
        assert main(["generate", "a", "--url", service.url, *words]) == (1 if says else 0)

    said = capsys.readouterr().err
    assert says in said
    assert ("--local" in said) == bool(says)


def test_a_name_that_was_taken_meanwhile_stays(place, monkeypatch, capsys) -> None:
    """A picture takes seconds, and somebody else may have written there."""
    ask = generate.draw

    def take(*given: object) -> None:
        (place / "a.png").write_bytes(b"theirs")
        ask(*given)

    monkeypatch.setattr(generate, "draw", take)
    with FakeService({HEALTH: [READY], GENERATIONS: [stream(completed(b"x"))]}) as service:
        assert main(["generate", "a", "--url", service.url, "-o", "a.png"]) == 1

    assert (place / "a.png").read_bytes() == b"theirs"
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sleep", "wake"])
def test_the_card_is_freed_and_taken_back(capsys, command) -> None:
    """What the service answers is printed, as it is or as a sentence."""
    answer = {"is_sleeping": command == "sleep", "state": "asleep", "message": "It is\x1b[2J so."}
    with FakeService({f"POST /{command}": [document(answer), document(answer)]}) as service:
        assert main([command, "--url", service.url]) == 0
        assert "It is" in (out := capsys.readouterr().out)
        assert "\x1b" not in out
        assert main([command, "--url", service.url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == answer
