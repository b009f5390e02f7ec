"""Workers are forked from a process that has their modules, without holding up the event loop.

Each test runs a process of its own, since a process has one fork server.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

SCENARIO = """
import asyncio, json, os, signal, sys, time
from multiprocessing.forkserver import _forkserver

from app.worker.fork_server import ForkServer
from tests.worker.conftest import CONFIG, Listening
from app.worker.supervisor import Supervisor, TimeLimits
from tests.support.scripted_engine import MakeScriptedEngine, Script


async def ready(listening, times=1):
    '''Wait for a worker; return the longest that the loop did not turn meanwhile.'''
    waiting = asyncio.ensure_future(listening.wait_for("ready", times))
    longest, last = 0.0, time.monotonic()
    while not waiting.done():
        await asyncio.sleep(0.002)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    await waiting
    return longest


def parent_of(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


async def main(act, *modules):
    listening = Listening()
    supervisor = Supervisor(
        MakeScriptedEngine(Script.parse([])), CONFIG, listening,
        limits=TimeLimits(load_s=float(os.environ.get("LOAD_S", "60"))),
        fork_server=ForkServer(modules, answer_s=float(os.environ.get("ANSWER_S", "20"))),
    )
    supervisor.start()
    said = await act(supervisor, listening)
    await supervisor.close()
    print(json.dumps(said))
"""

SLOW = "import time\ntime.sleep(0.4)\n"
COUNTED = "with open('imports', 'a') as file:\n    file.write('once ')\n"


def run(folder: Path, act: str, *modules: str, **variables: str) -> subprocess.CompletedProcess:
    """Run *act* in a new process whose workers are to have *modules*."""
    script = folder / "scenario.py"
    names = ", ".join(repr(name) for name in modules)
    script.write_text(
        f"{SCENARIO}\n{act}\nif __name__ == '__main__':\n    asyncio.run(main(act, {names}))\n"
    )
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"} | variables,
    )


def play(folder: Path, act: str, *modules: str, **variables: str) -> object:
    """Run it, and return what *act* said."""
    done = run(folder, act, *modules, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.system
def test_imports_do_not_hold_up_the_loop(tmp_path: Path) -> None:
    """A worker comes once they are over, from a process that is not the service."""
    (tmp_path / "takes_long.py").write_text(SLOW)
    act = """
async def act(supervisor, listening):
    begun = time.monotonic()
    longest = await ready(listening)
    is_forked = parent_of(supervisor.pid) == _forkserver._forkserver_pid
    return longest, time.monotonic() - begun, is_forked
"""
    longest, took, is_forked = play(tmp_path, act, "takes_long")

    assert is_forked
    assert took > 0.4 > 2 * longest


def test_the_next_worker_has_its_modules(tmp_path: Path) -> None:
    """They are imported once, before the first worker; the one after `kill -9` has them too."""
    (tmp_path / "counted.py").write_text(COUNTED)
    act = """
async def act(supervisor, listening):
    await ready(listening)
    os.kill(supervisor.pid, signal.SIGKILL)
    await ready(listening, 2)
"""
    play(tmp_path, act, "counted")

    assert (tmp_path / "imports").read_text() == "once "


@pytest.mark.full
def test_a_killed_fork_server_costs_no_worker(tmp_path: Path) -> None:
    """The worker goes on; the next one comes from a new server."""
    act = """
async def act(supervisor, listening):
    await ready(listening)
    worker, first = supervisor.pid, _forkserver._forkserver_pid
    os.kill(first, signal.SIGKILL)
    await asyncio.sleep(0.1)
    stayed = supervisor.is_ready and supervisor.pid == worker
    os.kill(worker, signal.SIGKILL)
    await ready(listening, 2)
    return stayed, _forkserver._forkserver_pid not in (None, first)
"""
    assert play(tmp_path, act, "wave") == [True, True]


@pytest.mark.full
def test_without_a_fork_server_workers_are_spawned(tmp_path: Path) -> None:
    """A library that cannot be imported is reported by the worker, as it is at any start."""
    (tmp_path / "broken.py").write_text("raise OSError('libcuda.so: cannot open')\n")
    act = """
async def act(supervisor, listening):
    await ready(listening)
    return parent_of(supervisor.pid) == os.getpid()
"""
    assert play(tmp_path, act, "broken") is True


@pytest.mark.full
def test_a_groups_sigterm_is_the_services_to_handle(tmp_path: Path) -> None:
    """Service managers send it to every process; the server stays, and still tells of exits."""
    act = """
async def act(supervisor, listening):
    await ready(listening)
    first = _forkserver._forkserver_pid
    os.kill(first, signal.SIGTERM)
    os.kill(supervisor.pid, signal.SIGKILL)
    await ready(listening, 2)
    return _forkserver._forkserver_pid == first, listening.heard
"""
    assert play(tmp_path, act, "wave") == [True, ["ready", "killed", "ready"]]


@pytest.mark.full
def test_imports_that_hang_are_a_start_that_took_too_long(tmp_path: Path) -> None:
    """The service ends with a sentence instead of waiting for ever."""
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(30)\n")
    act = """
async def act(supervisor, listening):
    await listening.wait_for("fatal")
    os.kill(_forkserver._forkserver_pid, signal.SIGKILL)
    return listening.fatal
"""
    code, sentence = play(tmp_path, act, "hangs", LOAD_S="0.3")

    assert code == 1
    assert "took longer than 0.3 s" in sentence


@pytest.mark.full
def test_a_server_that_hangs_is_replaced(tmp_path: Path) -> None:
    """It is killed after a while, and the worker spawned; the next one has a new server."""
    act = """
async def act(supervisor, listening):
    await ready(listening)
    first = _forkserver._forkserver_pid
    os.kill(first, signal.SIGSTOP)
    os.kill(supervisor.pid, signal.SIGKILL)
    await ready(listening, 2)
    spawned = parent_of(supervisor.pid) == os.getpid()
    os.kill(supervisor.pid, signal.SIGKILL)
    await ready(listening, 3)
    return spawned, parent_of(supervisor.pid) not in (first, os.getpid())
"""
    assert play(tmp_path, act, "wave", ANSWER_S="0.4") == [True, True]


@pytest.mark.full
def test_a_worker_can_be_killed_without_its_server(tmp_path: Path) -> None:
    """Though the server that would report its end is gone, and it stands still."""
    act = """
async def act(supervisor, listening):
    import multiprocessing
    await ready(listening)
    worker = supervisor.pid
    os.kill(worker, signal.SIGSTOP)
    os.kill(_forkserver._forkserver_pid, signal.SIGKILL)
    await asyncio.sleep(0.1)
    multiprocessing.active_children()
    supervisor._handle.kill()
    await ready(listening, 2)
    return os.path.exists(f"/proc/{worker}") and open(f"/proc/{worker}/stat").read().split()[2]
"""
    assert play(tmp_path, act, "wave") in (False, "Z")


@pytest.mark.full
def test_ctrl_c_while_modules_are_imported_is_quiet(tmp_path: Path) -> None:
    """The whole group gets it, and the service alone answers."""
    (tmp_path / "takes_long.py").write_text(SLOW)
    act = """
async def act(supervisor, listening):
    while not (server := _forkserver._forkserver_pid):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    os.kill(server, signal.SIGINT)
    await ready(listening)
    return server == parent_of(supervisor.pid)
"""
    done = run(tmp_path, act, "takes_long")
    assert (done.stdout, done.stderr) == ("true\n", "")


@pytest.mark.full
def test_a_service_that_ends_takes_its_fork_server_along(tmp_path: Path) -> None:
    """Killed or not: nothing keeps its pipe open."""
    act = """
async def act(supervisor, listening):
    await ready(listening)
    print(json.dumps(_forkserver._forkserver_pid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    server = int(run(tmp_path, act, "wave").stdout)
    # Gone already, or soon.
    with suppress(ProcessLookupError):
        watched = os.pidfd_open(server)
        assert select.select([watched], [], [], 5)[0]
        os.close(watched)
