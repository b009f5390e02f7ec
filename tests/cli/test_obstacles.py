"""What the machine denies is one sentence and an exit code; who stops reading is no error."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.cli.main import main
from app.errors import StartupError
from app.worker.transport import check_room, pair

ROOT = Path(__file__).resolve().parents[2]
KLEIN = (sys.executable, "-m", "app")
SERVE = (*KLEIN, "serve", "--port", "0", "--model", "shapes")


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    """Run *command* without settings of ours, for at most a minute."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("KLEIN_", "PYTHON"))}
    environ |= {"PYTHONPATH": str(ROOT), "KLEIN_DEVICE": "cpu"}
    options = {"stdout": subprocess.PIPE, "cwd": ROOT, **options}
    return subprocess.run(
        command, env=environ, stderr=subprocess.PIPE, text=True, timeout=60, **options
    )


def only_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that tells why; no traceback above it."""
    assert done.returncode not in {0, 130}
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("klein: ")]
    return sentence


def leave_behind() -> None:
    """Stand in a folder that is no more."""
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    Path(folder).rmdir()


@pytest.mark.slow
def test_too_few_files_are_one_sentence() -> None:
    """The limit that was found and the command that raises it."""
    done = run(*SERVE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16)))

    assert "16 are allowed" in only_sentence(done)
    assert "ulimit -n" in only_sentence(done)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.system
def test_a_current_folder_that_was_deleted_is_one_sentence() -> None:
    """It is named before anything looks for it."""
    done = run(*SERVE, preexec_fn=leave_behind)

    assert "current folder has been deleted" in only_sentence(done)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.system
@pytest.mark.parametrize("most", [2, 4, 8])
def test_too_few_processes_are_one_sentence(most, tmp_path) -> None:
    """Libraries would print their own words, or end the process as Ctrl-C does."""
    user = "setpriv --reuid 54321 --regid 54321 --clear-groups"
    reading = "--inh-caps +dac_read_search --ambient-caps +dac_read_search"
    words = f"prlimit --nproc={most} {user} {reading}".split()
    done = run("env", f"HOME={tmp_path}", *words, *SERVE)

    assert f"ulimit -u, which is {most}" in only_sentence(done)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "is_tried"),
    [
        (["download", "--model", "shapes"], False),
        (["--version"], False),
        (["doctor", "--help"], False),
        (["serve", "--help"], True),
        (["generate", "--help"], True),
        (["bench", "--help"], True),
        (["compare", "--help"], True),
    ],
)
def test_only_what_computes_needs_a_thread_for_each_of_its_cores(
    monkeypatch, capsys, words, is_tried
) -> None:
    """For the cores that this process may use: a container with one of 128 may have few threads."""
    tried: list[object] = []

    class Counted:
        def __init__(self, *, target) -> None:
            tried.append(target)

        def start(self) -> None:
            """It runs nowhere."""

        def join(self) -> None:
            """It has ended."""

    monkeypatch.setattr("app.cli.system_limits.Thread", Counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with contextlib.suppress(SystemExit):
        main(words)

    assert bool(tried) == is_tried
    assert len(tried) in {0, 9}


@pytest.mark.system
def test_a_user_without_a_home_folder_is_one_sentence() -> None:
    """One whom the system does not know, without HOME; the way out is named."""
    user = "setpriv --reuid 54321 --regid 54321 --clear-groups"
    reading = "--inh-caps +dac_read_search --ambient-caps +dac_read_search"
    done = run("env", "-u", "HOME", *f"{user} {reading}".split(), *SERVE)

    assert "set HOME, or give a path that begins with /" in only_sentence(done)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.system
def test_shared_memory_that_cannot_be_written_to_is_one_sentence() -> None:
    """A /dev/shm that is read-only, in a file system of its own."""
    script = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    done = run("unshare", "-m", "sh", "-c", script, "sh", *SERVE)

    assert "/dev/shm" in only_sentence(done)
    assert "--shm-size" in only_sentence(done)


@pytest.mark.system
def test_shared_memory_that_is_too_small_is_one_sentence() -> None:
    """Of 4 MB, in a file system of its own: what is there, what is needed, and how to get it."""
    script = 'mount -t tmpfs -o size=4m none /dev/shm && exec "$@"'
    done = run("unshare", "-m", "sh", "-c", script, "sh", *SERVE)

    said = only_sentence(done)
    assert "/dev/shm has 4.2 MB free and 16.8 MB are needed" in said
    assert "--shm-size=32m" in said


def test_each_worker_needs_room_for_its_pixels(tmp_path: Path) -> None:
    """More workers, more room; a folder that is not there is told of by what makes the pipe."""
    check_room(1)
    check_room(1, tmp_path / "absent")

    with pytest.raises(StartupError, match=r"16\.8 for each worker, .* --shm-size=\d+m"):
        check_room(10**9)


@pytest.mark.parametrize("made", ["RawArray", "Semaphore"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOENT, errno.ENOSYS, errno.ENOSPC])
def test_memory_that_cannot_be_shared_is_named(made, number) -> None:
    """No /dev/shm, or one that is closed or full: what must be mounted is said."""

    def fail(*_) -> None:
        raise OSError(number, os.strerror(number))

    context = SimpleNamespace(
        Pipe=multiprocessing.Pipe, RawArray=multiprocessing.RawArray, Semaphore=lambda count: None
    )
    setattr(context, made, fail)
    with pytest.raises(StartupError, match="/dev/shm must be a tmpfs"):
        pair(context)


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("download", "--model", "shapes"), marks=pytest.mark.slow),
        pytest.param(("--help",), marks=pytest.mark.system),
        pytest.param(("doctor", "--json"), marks=pytest.mark.system),
    ],
)
def test_who_stops_reading_gets_no_error(words) -> None:
    """Nothing on standard error, and the exit code that a shell gives after SIGPIPE; as for
    `klein doctor --json | head`."""
    stdout = closed_pipe()
    done = run(*KLEIN, *words, stdout=stdout)
    os.close(stdout)

    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.system
def test_a_full_disk_under_the_output_is_one_sentence() -> None:
    """An error of the system that nobody foresaw has no traceback either."""
    with Path("/dev/full").open("w") as full:
        done = run(*KLEIN, "--version", stdout=full)

    assert "No space left on device" in only_sentence(done)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied (/x)"),
        (MemoryError(), "too little free memory"),
    ],
)
def test_what_the_system_denies_while_a_command_runs_is_one_sentence(
    monkeypatch, capsys, error, says
) -> None:
    """Whatever the command was doing."""

    def fail(*_, **__) -> None:
        raise error

    monkeypatch.setattr("app.cli.download.run", fail)
    assert main(["download", "--model", "shapes"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said


def test_another_pipe_that_breaks_is_told(monkeypatch, capfd) -> None:
    """One to a process that died, for example; only our own output may end us without a word."""

    def fail(*_, **__) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("app.cli.download.run", fail)
    assert main(["download", "--model", "shapes"]) == 1
    assert "Broken pipe" in capfd.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch) -> None:
    """It is for whoever mends the program, so it is not hidden."""

    def fail(*_, **__) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("app.cli.download.run", fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        main(["download", "--model", "shapes"])


def test_debug_brings_the_traceback_back(monkeypatch, capsys) -> None:
    """Above the sentence."""

    def fail(*_, **__) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("app.cli.download.run", fail)
    monkeypatch.setenv("KLEIN_LOG_LEVEL", "debug")
    assert main(["download", "--model", "shapes"]) == 1
    assert "Traceback" in capsys.readouterr().err
