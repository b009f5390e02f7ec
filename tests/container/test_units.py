"""The units of systemd and podman promise what compose.yaml does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from tests.support.server import ROOT
from tools import image_check_compose as compose

UNIT = ROOT / "docker" / "systemd" / "klein.service"
QUADLET = ROOT / "docker" / "quadlet" / "klein.container"


def entries(file: Path) -> dict[str, list[str]]:
    """The values of each key; sections are left out, no key stands in two."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", file.read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def environment(file: Path) -> dict[str, str]:
    """What the unit sets."""
    words = " ".join(entries(file)["Environment"]).split()
    return dict(word.split("=", 1) for word in words)


def composed() -> dict[str, Any]:
    """The service of compose.yaml."""
    service: dict[str, Any] = compose.load([ROOT / "compose.yaml"], {})["services"]["klein"]
    return service


def test_the_container_is_as_confined_as_composes() -> None:
    """A read-only root, no capabilities, the loopback address, the same memory and patience."""
    found, service = entries(QUADLET), composed()

    assert (found["ReadOnly"], found["DropCapability"]) == (["true"], ["all"])
    assert found["NoNewPrivileges"] == ["true"]
    assert found["RunInit"] == ["true"]
    assert found["PublishPort"] == service["ports"] == ["127.0.0.1:8000:8000"]
    assert f"{found['ShmSize'][0]}b" == service["shm_size"]
    assert found["PodmanArgs"] == [f"--memory={service['mem_limit']}"]
    assert f"{found['StopTimeout'][0]}s" == service["stop_grace_period"]
    assert int(found["TimeoutStopSec"][0]) > int(found["StopTimeout"][0])
    (mount,) = found["Tmpfs"]
    assert set(service["tmpfs"][0].partition(":")[2].split(",")) <= set(
        mount.split(":")[1].split(",")
    )
    assert [volume.partition(":")[2] for volume in found["Volume"]] == ["/models"]


def test_the_container_is_given_what_compose_gives() -> None:
    """All interfaces inside, and no image but one that was built here."""
    given, settings = environment(QUADLET), Settings.read(environment(QUADLET))

    assert given.items() <= {**compose.environment(composed(), {})}.items()
    assert (settings.host, settings.trust_network) == ("0.0.0.0", True)
    assert entries(QUADLET)["Image"] == [f"localhost/{composed()['image']}"]


def test_the_service_of_systemd_listens_to_this_machine_alone() -> None:
    """Its settings are the service's own but for where it writes, which is its one folder."""
    found, given = entries(UNIT), environment(UNIT)
    settings = Settings.read(given)

    assert settings.host == "127.0.0.1"
    folder = f"/var/lib/{found['StateDirectory'][0]}"
    assert all(path == folder or path.startswith(f"{folder}/") for path in given.values())
    assert f"{found['TimeoutStopSec'][0]}s" == composed()["stop_grace_period"]
    assert found["CapabilityBoundingSet"] == [""]
    # They would hide the card.
    assert found.keys().isdisjoint({"PrivateDevices", "ProtectClock", "MemoryDenyWriteExecute"})


@pytest.mark.system
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify`: no key that it does not know, no value that it cannot read."""
    program = tmp_path / "klein"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/klein/bin/klein", str(program)))

    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )

    ours = [line for line in done.stderr.splitlines() if str(unit) in line or UNIT.name in line]
    assert (done.returncode, ours) == (0, [])
