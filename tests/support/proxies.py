"""HAProxy and nginx with the files in docker/scale/, in front of services on loopback ports."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.server import ROOT, Server

SCALE = ROOT / "docker" / "scale"
PAGE = ROOT / "docs" / "scale.md"
"""Where the measured tables stand."""
PATH = f"{os.environ['PATH']}:/usr/sbin"

NGINX = """{user} daemon off; pid {folder}/nginx.pid; error_log stderr; worker_processes 2;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/a; uwsgi_temp_path {folder}/b; scgi_temp_path {folder}/c;
    include {file};
}}
"""


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until(holds: Callable[[], object], limit_s: float = 20.0) -> None:
    """Ask again until it holds."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def replaced(text: str, **values: str) -> str:
    """Replace each of these words, which the file must have."""
    for old, new in values.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def nginx_command(folder: Path, file: Path) -> list[str]:
    """Run nginx in *folder* with *file*, as one of /etc/nginx/conf.d/."""
    user = "user root;" if os.geteuid() == 0 else ""  # another one may not enter the folder
    main = folder / "main.conf"
    main.write_text(NGINX.format(folder=folder, file=file, user=user))
    return ["nginx", "-p", str(folder), "-c", str(main)]


def haproxy_command(folder: Path, file: Path) -> list[str]:
    """Run HAProxy with *file*, and with a socket in *folder* that tells what it thinks."""
    more = folder / "more.cfg"
    more.write_text(f"global\n    stats socket {folder}/state level user\n")
    return ["haproxy", "-db", "-f", str(file), "-f", str(more)]


FILES = {"haproxy": "haproxy.cfg", "nginx": "nginx.conf"}
COMMANDS = {"haproxy": haproxy_command, "nginx": nginx_command}
LISTENS = {
    "haproxy": ("bind :8000", "bind 127.0.0.1:{}"),
    "nginx": ("listen 8000;", "listen 127.0.0.1:{};"),
}


def answers(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Site:
    """A proxy at *url* and the services behind it, whose pictures wait at *gate*."""

    proxy: str
    port: int
    services: list[Server]
    gate: Path
    folder: Path

    @property
    def url(self) -> str:
        """The proxy's address."""
        return f"http://127.0.0.1:{self.port}"

    def held(self) -> int:
        """How many pictures wait or are made, in all services that still answer."""
        return sum(held_by(each) for each in self.services if each.process.poll() is None)

    def states(self) -> list[str]:
        """What HAProxy thinks of each service: UP, DOWN, ..."""
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(self.folder / "state"))
            one.sendall(b"show stat json\n")
            text = b"".join(iter(lambda: one.recv(65_536), b""))
        found = []
        for entry in json.loads(text):
            fields = {field["field"]["name"]: field["value"]["value"] for field in entry}
            if str(fields["svname"]).startswith("klein-"):
                found.append(fields["status"].split()[0])
        return found


def held_by(service: Server) -> int:
    """How many pictures wait or are made in one service, by one scrape."""
    text = service.get("/metrics")[2].decode()
    found = re.findall(r"^klein_(?:queue_size|requests_running) (\S+)$", text, re.M)
    assert len(found) == 2
    return int(sum(map(float, found)))


@contextmanager
def behind(
    proxy: str,
    folder: Path,
    words: Sequence[str] = (),
    changes: dict[str, str] | None = None,
    **settings: object,
) -> Iterator[Site]:
    """*proxy* with its file of docker/scale/, but for *changes*, before three scripted services."""
    folder.chmod(0o755)
    port, gate = free_port(), folder / "gate"
    gate.touch()
    settings = {
        "model": "flux.2-klein-4b",
        "device": "cpu",
        "trusted_proxies": "127.0.0.1",
    } | settings
    with ExitStack() as stack:
        services = []
        for number in range(3):
            own = {"public_url": f"http://127.0.0.1:{port}/klein-{number}"}
            service = Server(
                *(f"gate={gate}", *words), module="tests.support.scripted_engine", **settings, **own
            )
            stack.callback(end, service)
            services.append(service)
        for service in services:
            service.wait_until_ready()
        old, new = LISTENS[proxy]
        names = {
            f"klein-{number}:8000": service.url.removeprefix("http://")
            for number, service in enumerate(services)
        }
        file = folder / FILES[proxy]
        file.write_text(
            replaced(
                (SCALE / FILES[proxy]).read_text(),
                **{old: new.format(port)},
                **names,
                **(changes or {}),
            )
        )
        command = COMMANDS[proxy](folder, file)
        stack.enter_context(running(command, folder))
        wait_until(lambda: answers(port))
        site = Site(proxy, port, services, gate, folder)
        if proxy == "haproxy":
            wait_until((folder / "state").exists)
            wait_until(lambda: set(site.states()) == {"UP"})
        yield site


@contextmanager
def running(command: Sequence[str], folder: Path) -> Iterator[None]:
    """Run *command* until the end of the block; its output is in the folder's file `log`."""
    assert shutil.which(command[0], path=PATH), f"{command[0]} is missing; run `make test-system`"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"PATH": PATH}, stderr=log, stdout=log, cwd=folder
        )
    try:
        yield
        assert process.poll() is None, (folder / "log").read_text()
    finally:
        process.terminate()
        process.wait(20)


def end(service: Server) -> None:
    """Kill it, if it still runs: what it was asked for is of no interest any more."""
    if service.process.poll() is None:
        service.process.kill()
    service.wait()
