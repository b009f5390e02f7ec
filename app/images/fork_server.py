"""The process that decoders are forked from, and that keeps a number of them ready.

It has imported what decoders need and nothing else, so a new one starts within milliseconds and
shares its memory. Not `multiprocessing`'s fork server, because that has each new process import the
service's main module anew, settings and all, and because there is one of it per process.

On its control socket, which is its stdin, it sends, for each new decoder, the process id with the
other end of its connection and the memory that both share; it receives ids of decoders to kill.
Only it can do that safely, since no id of its children is reused before it has reaped the child. It
exits when the control socket is closed, however the service ends, and kills its decoders.

    python -m app.images.fork_server SIZE CPU_S MEMORY_BYTES
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field

from PIL import Image

from app.images.decoder import Limits, serve
from app.images.preparing import Upload, prepare

_NICE = 10
"""Niceness: behind the service, which answers every client, where CPU cores are short."""
_RETRY_S = 1.0
"""Until the next try after a decoder could not be made or handed over for lack of resources."""
_MESSAGE_BYTES = 64


@dataclass
class ForkServer:
    """Keeps *size* decoders; each serves one request, and is replaced when it has exited."""

    control: socket.socket
    size: int
    limits: Limits
    _children: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Serve until the other end of the control socket is closed."""
        control = self.control.fileno()
        woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        poll = select.poll()
        for end in (control, woken):
            poll.register(end, select.POLLIN)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        retry_at = 0.0
        try:
            while True:
                # Not sooner, whatever wakes it: the end of a decoder that was not handed over does.
                if (wait_s := retry_at - time.monotonic()) <= 0:
                    is_complete = self._fill()
                    wait_s = 0.0 if is_complete else _RETRY_S
                    retry_at = time.monotonic() + wait_s
                ready = {number for number, _ in poll.poll(1000 * wait_s if wait_s > 0 else None)}
                if woken in ready:
                    os.read(woken, 4096)
                    self._reap()
                if control in ready and not self._obey():
                    return
        except ConnectionError:
            return
        finally:
            # First, so that the service sees EOF here before a decoder exits, and blames no image.
            with contextlib.suppress(OSError):
                self.control.shutdown(socket.SHUT_RDWR)
            for pid in self._children:
                os.kill(pid, signal.SIGKILL)
            # In a container there may be no other process that reaps them.
            for pid in self._children:
                os.waitpid(pid, 0)

    def _fill(self) -> bool:
        """Fork the missing decoders; return whether all exist.

        Raises:
            ConnectionError: the service has ended.
        """
        try:
            while len(self._children) < self.size:
                self._fork()
        except ConnectionError:
            raise
        except OSError:
            return False  # no process, descriptor or memory is left
        return True

    def _fork(self) -> None:
        """Fork a decoder and hand it over."""
        ours, theirs = socket.socketpair()
        with ours, theirs, io.FileIO(os.memfd_create("image"), "r+b") as shared:
            pid = os.fork()
            if pid == 0:
                ours.close()
                self._become(theirs, shared)
            self._children.add(pid)
            try:
                ends = [ours.fileno(), shared.fileno()]
                socket.send_fds(self.control, [b"%d" % pid], ends)
            except OSError:
                # Nobody has heard of it. It counts until it has been reaped.
                os.kill(pid, signal.SIGKILL)
                raise

    def _become(self, connection: socket.socket, shared: io.FileIO) -> None:
        """Run as a decoder, and exit."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.control.close()
            # Its own copies of the pages that decoding writes to, while no request waits.
            _warm_up()
            serve(connection, shared, self.limits)
            os._exit(0)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        while self._children and (pid := os.waitpid(-1, os.WNOHANG)[0]):
            self._children.discard(pid)

    def _obey(self) -> bool:
        """Kill the decoder that a message names; return whether the other end is still open."""
        message = self.control.recv(_MESSAGE_BYTES)
        if message and (pid := int(message)) in self._children:
            os.kill(pid, signal.SIGKILL)
        return bool(message)


def _warm_up() -> None:
    """Decode one image of each format: no plug-in of Pillow is left to be imported."""
    picture = Image.new("RGBA", (64, 64))
    for kind in ("PNG", "WEBP", "JPEG", "MPO"):
        buffer = io.BytesIO()
        picture.convert("RGB" if kind in {"JPEG", "MPO"} else "RGBA").save(buffer, kind)
        upload = Upload(buffer.getvalue(), "image")
        prepare(
            [upload],
            upload if kind in {"PNG", "WEBP"} else None,
            (64, 64),
            lambda width, height: (width, height),
        )


def main(size: str, cpu_s: str, memory_bytes: str) -> None:
    """Run as the process; the service alone decides when it exits."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    _warm_up()
    gc.freeze()
    limits = Limits(cpu_s=int(cpu_s), memory_bytes=int(memory_bytes))
    with socket.socket(fileno=0) as connection:
        ForkServer(connection, int(size), limits).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
