"""What Ray Serve is given, from the settings: its YAML, its environment, Prometheus' targets."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from app.cli.main import main
from app.cluster.deployment import Shape, describe, write_yaml
from app.cluster.environ import exports, has_haproxy, variables
from app.cluster.targets import Target, replace_file, write_document
from app.errors import StartupError
from app.settings import Settings

OPEN = {"KLEIN_TRUST_NETWORK": "true"}
FOUR = Shape(replicas=4, cores=16)


def described(shape=FOUR, **environ):
    """The configuration for these variables."""
    environ = OPEN | environ
    return describe(Settings.read(environ), shape, environ)


def replica(config):
    """What it says of each replica: its variables and its deployment."""
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    return application["runtime_env"]["env_vars"], deployment


def test_the_settings_reach_the_replicas_as_they_were_written():
    """Lists too; paths are whole, since a replica starts in a folder of its own."""
    given = {
        "KLEIN_LORAS": "a:0.5,b",
        "KLEIN_CACHE_DIR": "cache",
        "KLEIN_MODEL": "models/klein",
        "KLEIN_PORT": "8123",
        "KLEIN_DEVICE": "1,2",
    }
    config = described(**given)
    found, _ = replica(config)

    assert found["KLEIN_LORAS"] == "a:0.5,b"
    assert found["KLEIN_CACHE_DIR"].endswith("/cache")
    assert found["KLEIN_MODEL"].endswith("/models/klein")
    assert found["KLEIN_MODEL"].startswith("/")
    # Ray chooses the card, and Serve's proxy has the port.
    assert (found["KLEIN_DEVICE"], config["http_options"]["port"]) == ("all", 8123)
    assert "KLEIN_PORT" not in found
    assert Settings.read({k: v for k, v in found.items() if k.startswith("KLEIN_")})


def test_each_replica_has_a_card_or_its_share_of_the_cores():
    """Ray would have each compute with one thread."""
    found, deployment = replica(described())
    assert deployment["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    assert found["OMP_NUM_THREADS"] == "4"

    found, deployment = replica(described(replace(FOUR, gpus=0, nodes=2), KLEIN_HOST="0.0.0.0"))
    assert deployment["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 0}
    assert (found["OMP_NUM_THREADS"], found["KLEIN_DEVICE"]) == ("8", "cpu")


@pytest.mark.parametrize(("places", "least"), [("4", 64), ("500", 501)])
def test_serve_hands_over_more_than_the_queue_holds(places, least):
    """So that what is too much is refused by the service itself."""
    _, deployment = replica(described(KLEIN_QUEUE_IMAGES=places))

    assert deployment["max_ongoing_requests"] >= least


def test_what_one_replica_keeps_is_not_offered_by_several():
    """A link would lead to another, and a sleep would be that of one."""
    several, _ = replica(described())
    one, _ = replica(described(Shape()))

    assert [several[f"KLEIN_{name}"] for name in ("IMAGE_URLS", "SLEEP_API")] == ["false"] * 2
    assert [one[f"KLEIN_{name}"] for name in ("IMAGE_URLS", "SLEEP_API")] == ["true"] * 2


def test_it_scales_where_that_is_asked_for():
    """From none, too; the refusals meanwhile say how long a start takes."""
    _, deployment = replica(described(replace(FOUR, min_replicas=0, start_s=42.5)))

    assert deployment["autoscaling_config"]["min_replicas"] == 0
    assert deployment["autoscaling_config"]["max_replicas"] == 4
    assert "num_replicas" not in deployment
    assert deployment["backpressure_config"] == {"status_code": 503, "retry_after_s": 43}


@pytest.mark.parametrize(
    ("shape", "environ", "word"),
    [
        (FOUR, {"KLEIN_TRUST_NETWORK": "false"}, "KLEIN_API_KEYS_FILE"),
        (FOUR, {"KLEIN_API_KEYS": "a-secret-key"}, "dashboard"),
        (replace(FOUR, nodes=2), {}, "KLEIN_HOST=0.0.0.0"),
        (replace(FOUR, min_replicas=5), {}, "--min-replicas"),
        (replace(FOUR, replicas=0), {}, "--replicas"),
    ],
)
def test_what_would_be_open_or_unreachable_is_refused(shape, environ, word):
    """In one sentence that says what to set; no key is repeated."""
    with pytest.raises(StartupError) as refused:
        described(shape, **environ)

    assert word in refused.value.message
    assert "a-secret-key" not in refused.value.message


def test_keys_in_a_file_are_named_and_not_written(tmp_path):
    """Ray shows the configuration to everyone who reaches its dashboard."""
    keys = tmp_path / "keys"
    keys.write_text("a-secret-key\n")
    config = described(KLEIN_TRUST_NETWORK="false", KLEIN_API_KEYS_FILE=str(keys))

    assert replica(config)[0]["KLEIN_API_KEYS_FILE"] == str(keys)
    assert "a-secret-key" not in write_yaml(config)


def test_the_yaml_says_the_same():
    """Its comments are for people."""
    config = described(replace(FOUR, min_replicas=1), KLEIN_MODEL="shapes")
    text = write_yaml(config)

    assert yaml.safe_load(text) == config
    assert "  # " in text


def test_the_command_writes_the_file(tmp_path, monkeypatch, capsys):
    """From settings, options and the number of nodes; as JSON where that is asked for."""
    monkeypatch.setenv("KLEIN_TRUST_NETWORK", "true")
    monkeypatch.setenv("KLEIN_DEVICE", "cpu")
    monkeypatch.setenv("KLEIN_MODEL", "flux.2-klein-4b")
    file = tmp_path / "klein.yaml"

    words = ["cluster", "config", "--replicas", "2", "--cores", "6", "--model", "shapes"]
    assert main([*words, "-o", str(file)]) == 0
    assert main([*words, "--json"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text()) == config
    found, deployment = replica(config)
    assert (found["KLEIN_MODEL"], found["OMP_NUM_THREADS"]) == ("shapes", "3")
    assert deployment["num_replicas"] == 2


def test_the_environment_is_for_a_shell(monkeypatch, capsys):
    """Tokens and HAProxy with its retries; the same as JSON."""
    monkeypatch.setenv("KLEIN_DEADLINE_S", "300")
    assert main(["cluster", "environ", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["cluster", "environ"]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_SERVE_HAPROXY_RETRY_ON"] == "conn-failure 503"
    # HAProxy cuts no stream that the service would still finish.
    assert int(found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 300
    assert lines == exports(variables(Settings.read({"KLEIN_DEADLINE_S": "300"})))
    assert "export RAY_SERVE_HAPROXY_RETRY_ON='conn-failure 503'" in lines
    assert has_haproxy(found)
    assert not has_haproxy({})


def test_prometheus_gets_each_replica_with_its_labels(tmp_path):
    """Also on IPv6; the file is put into place as a whole, for everyone to read."""
    targets = [
        Target("fd00::1", 30001, "klein#b", "two"),
        Target("10.0.0.1", 30000, "klein#a", "one"),
    ]
    file = tmp_path / "klein.json"
    file.write_text("before")
    replace_file(file, write_document(targets))

    first, second = json.loads(file.read_text())
    assert first == {
        "targets": ["10.0.0.1:30000"],
        "labels": {"replica": "klein#a", "node": "one"},
    }
    assert second["targets"] == ["[fd00::1]:30001"]
    assert file.stat().st_mode & 0o777 == 0o644
    assert [*tmp_path.iterdir()] == [file]
    assert json.loads(write_document([])) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["targets"], "pip install '.[ray]'"),
        (["config", "-o", "/nowhere/klein.yaml", "--replicas", "1"], "cannot be written"),
    ],
)
def test_the_command_says_what_is_amiss(words, said, monkeypatch, capsys):
    """Without Ray it writes its files all the same, and asks no cluster."""
    monkeypatch.setenv("KLEIN_TRUST_NETWORK", "true")
    monkeypatch.setenv("KLEIN_DEVICE", "cpu")
    monkeypatch.setattr("app.cli.cluster.find_spec", lambda name: None)

    assert main(["cluster", *words]) == 1
    assert said in capsys.readouterr().err
