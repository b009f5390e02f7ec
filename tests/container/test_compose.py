"""compose.yaml holds what it promises: read and merged as an engine would, without one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings, variable
from tests.support.schemas import faults
from tools import image_check_compose as compose

ROOT = Path(__file__).resolve().parents[2]
WITH_A_CARD = [ROOT / "compose.yaml"]
WITHOUT = [*WITH_A_CARD, ROOT / "docker" / "compose.cpu.yaml"]
WITH_ALL = [*WITH_A_CARD, ROOT / "docker" / "compose.all-cards.yaml"]
FILES = pytest.mark.parametrize(
    "files", [WITH_A_CARD, WITHOUT, WITH_ALL], ids=["card", "cpu", "all cards"]
)
# What the container decides and nobody outside.
FIXED = {"KLEIN_HOST", "KLEIN_PORT", "KLEIN_CACHE_DIR"}


def klein(files: list[Path], environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The service as it stands in the merged files."""
    service: dict[str, Any] = compose.load(files, environ or {})["services"]["klein"]
    return service


def in_seconds(duration: str) -> float:
    """A duration of the compose format, such as 10m30s."""
    units = {"h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([hms])", duration)
    assert "".join(number + unit for number, unit in parts) == duration
    return sum(int(number) * units[unit] for number, unit in parts)


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        ("${A:-x}", {}, "x"),
        ("${A:-x}", {"A": ""}, "x"),
        ("${A:-x}", {"A": "y"}, "y"),
        ("${A-x}", {"A": ""}, ""),
        ("${A-x}", {}, "x"),
        ("${A:+x}", {"A": "y"}, "x"),
        ("${A:+x}", {"A": ""}, ""),
        ("${A?say}", {"A": ""}, ""),
        ("${A}", {}, ""),
        ("$A:8000", {"A": "h"}, "h:8000"),
        ("127.0.0.1:${P:-8000}:8000", {}, "127.0.0.1:8000:8000"),
        ("$$A", {"A": "y"}, "$A"),
        ("no variable", {"A": "y"}, "no variable"),
    ],
)
def test_variables_are_replaced_as_compose_does(
    text: str, environ: dict[str, str], expected: str
) -> None:
    """The forms of the compose specification, each with what it means."""
    assert compose.interpolate(text, environ) == expected


@pytest.mark.parametrize("text", ["${A:?say}", "${A?say}", "${}", "${1}", "100$", "${A-x"])
def test_what_compose_refuses_is_refused(text: str) -> None:
    """A missing variable that must be set, and a $ that begins nothing."""
    with pytest.raises(ValueError, match=r"must be set: say|begins no variable"):
        compose.interpolate(text, {})


@FILES
def test_the_files_fit_the_compose_specification(files: list[Path], tmp_path: Path) -> None:
    """As they stand, and merged with every variable replaced."""
    merged = tmp_path / "compose.json"
    merged.write_text(json.dumps(compose.load(files, {})))

    assert faults("vendor.compose-spec", WITH_A_CARD[0], merged) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("read_only", True),
        ("cap_drop", ["ALL"]),
        ("security_opt", ["no-new-privileges:true"]),
        ("init", True),
        ("restart", "unless-stopped"),
        ("shm_size", "1gb"),
        ("mem_limit", "14g"),
        ("tmpfs", ["/tmp:exec,mode=1777,size=1g"]),
        ("volumes", ["models:/models"]),
        ("ports", ["127.0.0.1:8000:8000"]),
    ],
)
@FILES
def test_the_container_is_confined(files: list[Path], key: str, value: object) -> None:
    """Each key of the list, with and without a card."""
    assert klein(files)[key] == value


@FILES
def test_no_key_gives_powers_back(files: list[Path]) -> None:
    """Nothing that undoes the confinement."""
    powers = {"privileged", "cap_add", "devices", "pid", "ipc", "network_mode", "userns_mode"}

    assert powers.isdisjoint(klein(files))
    assert "user" not in klein(files)


def test_the_card_is_reserved() -> None:
    """With capabilities, without which an engine gives none; which card, can be chosen."""
    for environ, card in ({}, "0"), ({"KLEIN_GPU": "1"}, "1"), ({"KLEIN_GPU": "GPU-a"}, "GPU-a"):
        resources = klein(WITH_A_CARD, environ)["deploy"]["resources"]

        expected = {"driver": "nvidia", "device_ids": [card], "capabilities": ["gpu"]}
        assert resources["reservations"]["devices"] == [expected]


def test_with_all_cards_only_the_cards_are_others() -> None:
    """One reservation in the place of the other, and the service takes each that can serve."""
    one, every = klein(WITH_A_CARD), klein(WITH_ALL)

    expected = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert every["deploy"]["resources"]["reservations"]["devices"] == [expected]
    assert every["environment"] == one["environment"] | {"KLEIN_DEVICE": "all"}
    same = one.keys() - {"deploy", "environment"}
    assert {key: every[key] for key in same} == {key: one[key] for key in same}
    assert Settings.read(compose.environment(every, {})).device == ("all",)


def test_some_of_all_cards_can_be_named() -> None:
    """By what KLEIN_DEVICE admits."""
    outside = {"KLEIN_DEVICE": "GPU-1b2c,0"}
    given = compose.environment(klein(WITH_ALL, outside), outside)

    assert Settings.read(given).device == ("GPU-1b2c", "0")


def test_without_a_card_only_the_card_is_missing() -> None:
    """The CPU file takes the reservation away, says so to the service, and changes nothing else."""
    with_card, without = klein(WITH_A_CARD), klein(WITHOUT)

    assert "deploy" not in without
    assert without["environment"] == with_card["environment"] | {"KLEIN_DEVICE": "cpu"}
    same = with_card.keys() - {"deploy", "environment", "build"}
    assert {key: without[key] for key in same} == {key: with_card[key] for key in same}


def test_both_builds_are_of_this_checkout() -> None:
    """A path in the second file is relative to the first, so the second names none."""
    assert klein(WITH_A_CARD)["build"] == {"context": "."}
    assert klein(WITHOUT)["build"] == {"context": ".", "args": {"PIP_EXTRA_INDEX_URL": ""}}


def test_the_default_image_is_built_here() -> None:
    """Under a name of this machine's, which no registry serves."""
    assert klein(WITH_A_CARD)["image"] == "klein-server:local"
    assert klein(WITH_A_CARD)["pull_policy"] == "build"


def test_a_published_image_is_named_by_whoever_takes_it() -> None:
    """Nothing is built, nothing else changes, and without a name nothing is fetched."""
    files = [*WITH_A_CARD, ROOT / "docker" / "compose.published.yaml"]
    outside = {"KLEIN_IMAGE": f"registry.example/klein-server@sha256:{'0' * 64}"}
    plain, published = klein(WITH_A_CARD, outside), klein(files, outside)

    assert published["image"] == outside["KLEIN_IMAGE"]
    assert published["pull_policy"] == "missing"
    assert "build" not in published
    same = plain.keys() - {"build", "pull_policy"}
    assert {key: published[key] for key in same} == {key: plain[key] for key in same}
    with pytest.raises(ValueError, match="KLEIN_IMAGE must be set: name the image by its digest"):
        klein(files)


def test_the_file_for_traces_adds_them_and_nothing_else() -> None:
    """The packages, the collector's address, and a collector as confined as the others."""
    files = [*WITH_A_CARD, ROOT / "docker" / "compose.traces.yaml"]
    plain, traced = klein(WITH_A_CARD), klein(files)
    jaeger = compose.load(files, {})["services"]["jaeger"]
    elsewhere = {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://otlp.example"}

    assert traced["build"] == {"context": ".", "args": {"EXTRAS": "otel"}}
    assert {key: traced[key] for key in traced.keys() - {"build", "environment"}} == {
        key: plain[key] for key in plain.keys() - {"build", "environment"}
    }
    given = compose.environment(traced, {})
    assert given.items() - compose.environment(plain, {}).items() == {
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://jaeger:4318")
    }
    assert klein(files, elsewhere)["environment"].items() >= elsewhere.items()
    assert all(port.startswith("127.0.0.1:") for port in jaeger["ports"])
    assert (jaeger["read_only"], jaeger["cap_drop"]) == (True, ["ALL"])
    assert re.fullmatch(r"[\w/]+:\d+\.\d+\.\d+", jaeger["image"])


def test_the_file_for_a_home_lets_the_card_go() -> None:
    """After five minutes, and when others need it; both can be set from outside, nothing else."""
    files = [*WITH_A_CARD, ROOT / "docker" / "compose.home.yaml"]
    plain, home = klein(WITH_A_CARD), klein(files)

    assert {key: home[key] for key in home.keys() - {"environment"}} == {
        key: plain[key] for key in plain.keys() - {"environment"}
    }
    given = compose.environment(home, {})
    assert given.items() - compose.environment(plain, {}).items() == {
        ("KLEIN_IDLE_SLEEP_S", "300"),
        ("KLEIN_YIELD", "auto"),
    }
    settings = Settings.read(given)
    assert (settings.idle_sleep_s, settings.yields) == (300, "auto")


def test_the_service_takes_the_environment_it_is_given() -> None:
    """On all interfaces without a key, which only the published loopback port makes safe."""
    given = compose.environment(klein(WITH_A_CARD), {})

    settings = Settings.read(given)

    assert (settings.host, settings.trust_network, settings.api_keys) == ("0.0.0.0", True, ())
    assert settings.allowed_hosts == ("klein",)
    assert all(port.startswith("127.0.0.1:") for port in klein(WITH_A_CARD)["ports"])


def test_names_can_be_added_to_the_services_own() -> None:
    """So a proxy in front can keep the name it was called by."""
    outside = {"KLEIN_ALLOWED_HOSTS": "pictures.example"}
    given = compose.environment(klein(WITH_A_CARD, outside), outside)

    assert Settings.read(given).allowed_hosts == ("klein", "pictures.example")


def test_every_setting_can_be_set_from_outside() -> None:
    """One that is missing in compose.yaml's `environment` would be set in vain."""
    settings = {variable(name) for name in Settings.model_fields} - FIXED

    assert settings <= klein(WITH_A_CARD)["environment"].keys()


def test_only_settings_go_in() -> None:
    """The service refuses to start with a KLEIN_ variable that it does not know."""
    known = {variable(name) for name in Settings.model_fields}

    assert klein(WITH_A_CARD)["environment"].keys() - known == {"HF_TOKEN"}


def test_a_variable_that_is_not_set_does_not_go_in() -> None:
    """And one that is set goes in as it is."""
    service = klein(WITH_A_CARD)

    assert "KLEIN_MODEL" not in compose.environment(service, {})
    assert compose.environment(service, {"KLEIN_MODEL": "shapes"})["KLEIN_MODEL"] == "shapes"


@pytest.mark.parametrize(
    ("variable", "key", "value", "seen"),
    [
        ("KLEIN_MEM_LIMIT", "mem_limit", "24g", "24g"),
        ("KLEIN_STOP_GRACE_PERIOD", "stop_grace_period", "30m", "30m"),
        ("KLEIN_PORT", "ports", "9000", ["127.0.0.1:9000:8000"]),
        ("KLEIN_IMAGE", "image", "mine:1.0", "mine:1.0"),
    ],
)
def test_what_a_machine_may_want_otherwise_is_a_variable(
    variable: str, key: str, value: str, seen: object
) -> None:
    """Host memory, patience, port and tag can be chosen without touching the file."""
    assert klein(WITH_A_CARD, {variable: value})[key] == seen


def test_accepted_pictures_have_the_time_to_finish() -> None:
    """The grace period is the longest admitted deadline, for two minutes predicted, and 30 s."""
    deadline_s = Settings().deadline_s + 4 * 120

    assert in_seconds(klein(WITH_A_CARD)["stop_grace_period"]) == deadline_s + 30


def test_the_health_check_is_the_images() -> None:
    """Only its pace is set here: `start_interval`, for which the Dockerfile's builders differ."""
    health = klein(WITH_A_CARD)["healthcheck"]

    assert "test" not in health
    assert "disable" not in health
    assert in_seconds(health["start_interval"]) == 5
    assert in_seconds(health["start_period"]) == 30 * 60


def test_the_models_outlive_the_container() -> None:
    """The volume has a name, so neither weights nor compiled code are fetched twice."""
    assert "models" in compose.load(WITH_A_CARD, {})["volumes"]


def test_the_file_says_why_it_listens_everywhere() -> None:
    """Nobody should learn from it to publish a port without a key."""
    lines = (ROOT / "compose.yaml").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() == "environment:")
    reason = "\n".join(lines[at - 5 : at])

    assert "KLEIN_API_KEYS" in reason
    assert "loopback" in reason


def test_comfyuis_folder_can_be_mounted(tmp_path: Path) -> None:
    """The commented line, uncommented: read-only, at the path that KLEIN_MODEL is to have."""
    line = re.compile(r"# (- \S+/ComfyUI/models:)")
    text = (ROOT / "compose.yaml").read_text()
    assert len(line.findall(text)) == 1
    (path,) = re.findall(r"set KLEIN_MODEL=(\S+)\.$", text, re.M)
    (tmp_path / "compose.yaml").write_text(line.sub(r"\1", text))

    volumes = klein([tmp_path / "compose.yaml"])["volumes"]
    assert volumes == ["models:/models", f"/home/me/ComfyUI/models:{path}:ro"]
