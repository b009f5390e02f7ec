"""Build the image and run the service in it, on a machine without a container engine.

    python tools/image_check.py [--fresh] [--extras otel]

debootstrap makes a Debian base, buildah builds the Dockerfile on it in chroot isolation, and the
service runs in the result as compose.yaml would run it: as the image's own user and as PID 1, on a
read-only root with a /tmp and one volume, without capabilities, in a network of its own, so that it
takes no port of this machine and can download nothing. Needs root on Debian and a way to packages.

The base and pip's cache are kept under /var/tmp (IMAGE_CHECK_DIR says where else), so that a second
run takes a fraction of the first; `--fresh` makes them anew. All else is removed, however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import image_check_compose as compose
from tools import image_check_size as sizes
from tools import sbom
from tools.image_check_build import CheckFailed, Workshop, wait_until
from tools.image_check_sandbox import Answer, Place, Running

ROOT = Path(__file__).resolve().parent.parent
KEPT = Path(os.environ.get("IMAGE_CHECK_DIR") or "/var/tmp/klein-image-check")

READY_LIMIT_S = 240
DRAIN_LIMIT_S = 60
COMPILE_LIMIT_S = 180

# What Triton does besides the kernel: a module in C. The CPU build of torch has no Triton.
COMPILE = """
import pathlib, shutil, subprocess, sys, sysconfig
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
definition = "{PyModuleDef_HEAD_INIT, \\"probe\\"}"
source = f"#include <Python.h>\\nstatic struct PyModuleDef probe = {definition};\\n"
source += "PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&probe); }"
(folder / "probe.c").write_text(source)
compiler = shutil.which("gcc") or sys.exit("no C compiler")
include = "-I" + sysconfig.get_paths()["include"]
words = [compiler, "-shared", "-fPIC", include, folder / "probe.c", "-o", folder / "probe.so"]
subprocess.run(words, check=True)
print(sum(1 for _ in folder.rglob("*.so")))
"""

WRITE_ELSEWHERE = """
for folder in / /etc /opt/klein /root /var/tmp; do
    if touch "$folder/x" 2>/dev/null; then echo "$folder"; fi
done
"""

WRITE_AND_REPORT = """
touch /tmp/x /models/x && rm /models/x && id -u && id -un &&
sed -nE 's/^(CapPrm|CapEff|CapBnd|NoNewPrivs):\\s*(.*)/\\1=\\2/p' /proc/self/status
"""


def main() -> int:
    """Run every step, one line each, and say how long it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--fresh", action="store_true", help="make the base and the caches anew")
    parser.add_argument("--extras", default="", choices=["", "otel"], help="build them in too")
    parser.add_argument("--context", type=Path, default=ROOT, help="the checkout to build")
    options = parser.parse_args()
    # So that the clean-up runs when somebody else ends us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    try:
        check(options.context.resolve(), options.extras, fresh=options.fresh)
    except CheckFailed as failure:
        print(f"FAILED: {failure}", flush=True)
        return 1
    print(f"The image holds ({time.monotonic() - began:.0f} s).")
    return 0


def check(context: Path, extras: str, *, fresh: bool) -> None:
    """Build the image of *context* with *extras*, and hold it against every promise."""
    if os.geteuid() != 0:
        raise CheckFailed("a build in chroot isolation needs root; run it as root.")
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing:
        raise CheckFailed(f"{' and '.join(missing)} not found; `make test-system` installs them.")
    scratch = tempfile.TemporaryDirectory(prefix="klein-image-")
    with scratch as folder, Workshop(KEPT, Path(folder), fresh=fresh) as workshop:
        with step("a Debian base with Python"):
            workshop.make_base()
        with step("the image, built from the Dockerfile"):
            workshop.build(context, extras)
        with step("user, health check, entry point, stop signal; no token"):
            facts = workshop.inspect()
            check_facts(facts)
        with workshop.mounted() as rootfs:
            service = compose.load([context / "compose.yaml"], {})["services"]["klein"]
            place = Place(rootfs, facts["config"], compose.environment(service, {}), Path(folder))
            with step("the int8 kernels, no weights"):
                check_files(rootfs)
            with step("its size, and its bill of materials"):
                check_size(rootfs)
                check_materials(rootfs)
            with step("a read-only root, a user without capabilities"):
                check_confinement(place)
            with step("the C compiler that Triton calls works here"):
                check_compiler(place)
            with step("the service: ready, a picture, its end on SIGTERM"):
                check_service(place)
            with step("traces, where the extra is there"):
                check_traces(place, has_them=extras == "otel")


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Print the step's seconds and name when it is done."""
    began = time.monotonic()
    yield
    print(f"ok {time.monotonic() - began:6.1f} s  {name}", flush=True)


def expect(holds: object, message: str) -> None:
    """Fail with *message* unless *holds*."""
    if not holds:
        raise CheckFailed(message)


def check_facts(facts: dict[str, Any]) -> None:
    """Hold what the image says about itself, as an engine reads it."""
    config = facts["config"]
    environ = dict(entry.split("=", 1) for entry in config["Env"])
    user = config.get("User", "")
    expect(re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), f"User is {user!r}, not two numbers above 0.")
    probe = config.get("Healthcheck") or {}
    expect(probe.get("Test", ["NONE"])[0] == "CMD", f"no exec-form health check: {probe}.")
    expect(probe.get("StartPeriod") == 30 * 60 * 10**9, f"start period not 30 minutes: {probe}.")
    entry_point = [config.get("Entrypoint"), config.get("Cmd")]
    expect(entry_point == [["klein"], ["serve"]], f"it starts with {entry_point}.")
    expect(config.get("StopSignal") == "SIGTERM", f"stop signal {config.get('StopSignal')!r}.")
    expect(environ.get("PYTHONUNBUFFERED") == "1", "PYTHONUNBUFFERED is not 1.")
    volumes = list(config.get("Volumes") or ())
    expect(volumes == ["/models"], f"volumes {volumes}.")
    for name in ("HOME", "HF_HOME", "KLEIN_CACHE_DIR"):
        value = environ.get(name, "")
        expect(f"{value}/".startswith("/models/"), f"{name}={value} lies outside the volume.")
    expect("HF_TOKEN" not in json.dumps(facts), "HF_TOKEN stands in the image or its history.")


def check_files(rootfs: Path) -> None:
    """Hold the image's files: the int8 kernels are there, no weights but the demo's, no model."""
    packages = list((rootfs / "opt/klein/lib").glob("python3*/site-packages"))
    expect(len(packages) == 1, f"not one environment: {packages}.")
    expect((packages[0] / "comfy_kitchen").is_dir(), "the int8 kernels are not installed.")
    found = (path for path in (rootfs / "opt/klein").rglob("*.safetensors"))
    weights = [path for path in found if packages[0] / "app" not in path.parents]
    expect(not weights, f"weights in the image: {weights[:3]}.")
    expect(not any((rootfs / "models").iterdir()), "the volume's place is not empty.")


def check_size(rootfs: Path) -> None:
    """Print what takes how much, and hold what the image has besides torch."""
    size = sizes.measure(rootfs)
    print("\n".join(sizes.table(size)), flush=True)
    most = sizes.MOST_BESIDE_TORCH
    words = f"{size.beside_torch / 1e6:.0f} MB besides torch, at most {most / 1e6:.0f} are allowed."
    expect(size.beside_torch <= most, words)


def check_materials(rootfs: Path) -> None:
    """Hold that the bill of materials names Python's packages and Debian's."""
    parts = json.loads(sbom.of_image(rootfs))["components"]
    kinds = {part["purl"].partition("/")[0]: 0 for part in parts}
    expect(kinds.keys() == {"pkg:pypi", "pkg:deb"}, f"it names {sorted(kinds)} alone.")
    names = {part["name"] for part in parts}
    expect({"torch", "starlette", "gcc", "libc6"} <= names, f"it names only {sorted(names)}.")


def check_confinement(place: Place) -> None:
    """Hold that volume and /tmp can be written and nothing else, and that no capability is left."""
    with Running(place, ["sh", "-c", WRITE_ELSEWHERE]) as shell:
        code = shell.wait(30)
        expect((code, shell.output()) == (0, ""), f"can be written: {shell.output()}")
    with Running(place, ["sh", "-c", WRITE_AND_REPORT]) as shell:
        code, words = shell.wait(30), shell.output().split()
    caps = [f"{name}={0:016x}" for name in ("CapPrm", "CapEff", "CapBnd")]
    expect((code, words) == (0, ["10001", "klein", *caps, "NoNewPrivs=1"]), f"{code}: {words}")


def check_compiler(place: Place) -> None:
    """Hold that an empty cache gets a compiled .so, and that an empty PATH prevents it."""
    command = ["/opt/klein/bin/python", "-c", COMPILE, "/models/compiled-here"]
    with Running(place, command) as program:
        code, said = program.wait(COMPILE_LIMIT_S), program.output()
    libraries = int(said.split()[-1]) if code == 0 else 0
    expect(libraries > 0, f"it left {libraries} libraries, {code}:\n{said[-3000:]}")
    with Running(place, command, {"PATH": ""}) as program:
        code, said = program.wait(COMPILE_LIMIT_S), program.output()
    expect(code != 0, "it needs no compiler here, so its success proves nothing.")
    expect("compiler" in said.lower(), f"it failed for another reason:\n{said[-3000:]}")


@contextlib.contextmanager
def serving(place: Place, **settings: str) -> Iterator[Running]:
    """Start the image's own command with the demo, and yield it once it is ready."""
    command = [*place.config["Entrypoint"], *place.config["Cmd"]]
    demo = {"KLEIN_MODEL": "shapes", "KLEIN_DEVICE": "cpu"}
    with Running(place, command, demo | settings) as service:
        wait_until(service.is_ready, limit_s=READY_LIMIT_S, what="/health/ready")
        yield service


def draw(service: Running) -> Answer:
    """Ask for a picture, and return the answer, which is one."""
    answer = service.request("POST", "/generate", body={"prompt": "a red circle"})
    expect(answer.status == 200, f"/generate says {answer.status}: {answer.body[:500]!r}")
    return answer


def stop(service: Running, place: Place) -> str:
    """End the service by the image's stop signal, and return what it has said."""
    service.signal(signal.Signals[place.config["StopSignal"]])
    code, said = service.wait(DRAIN_LIMIT_S), service.output()
    expect(code == 0, f"exit code {code} after the stop signal:\n{said[-3000:]}")
    return said


def check_service(place: Place) -> None:
    """Start the image's own command, wait for ready, fetch a picture, end it by its stop signal."""
    with serving(place) as service:
        probe = service.execute(place.config["Healthcheck"]["Test"][1:])
        expect(probe.returncode == 0, f"the health check fails on a ready service: {probe.stderr}")
        answer = draw(service)
        is_png = answer.body.startswith(b"\x89PNG\r\n\x1a\n")
        expect(is_png and answer.type == "image/png", f"no PNG: {answer.type} {answer.body[:40]!r}")
        for host, path, status in (
            ("klein:8000", "/v1/models", 200),
            ("elsewhere.example", "/v1/models", 400),
            ("elsewhere.example", "/health/live", 200),
        ):
            seen = service.request("GET", path, host=host).status
            expect(seen == status, f"Host {host} gets {seen} for {path}, not {status}.")
        said = stop(service, place)
        expect("Traceback" not in said, f"a traceback:\n{said[-3000:]}")


def check_traces(place: Place, *, has_them: bool) -> None:
    """Name a collector that is not there: a picture is made, in a trace if the packages are there.

    Without them the log says so, and nothing is sent.
    """
    collector = "http://127.0.0.1:4318"
    settings = {"KLEIN_LOG_FORMAT": "json", "OTEL_EXPORTER_OTLP_ENDPOINT": collector}
    with serving(place, **settings) as service:
        draw(service)
        said = stop(service, place)
    expect(('"trace_id"' in said) is has_them, f"traces, against what was built:\n{said[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
