"""A live service with a fake card, after one request of each outcome."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.api.pictures import data_url, photo
from tests.support.server import Server

KEY = "sesame-open"
_HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}


class Watched(Server):
    """The scripted service on its fake card; `ask` sends a prompt that says what happens to it."""

    def __init__(self) -> None:
        super().__init__(
            module="tests.monitoring.carded",
            model="shapes",
            api_keys=KEY,
            queue_images=1,
            watchdog_s=1,
        )

    def ask(self, prompt: str, **headers: str) -> int:
        """Ask for a small picture; return the status."""
        body = {"prompt": prompt, "width": 128, "height": 128, "num_inference_steps": 2}
        return self.post("/generate", body, authorization=f"Bearer {KEY}", **headers)[0]

    def edit(self) -> int:
        """Ask for an edit of the one reference; return the status."""
        body = {"prompt": "edit", "images": [data_url(photo())], "num_inference_steps": 2}
        return self.post("/generate", body, authorization=f"Bearer {KEY}")[0]

    def leave(self) -> None:
        """Ask for a slow picture and go away before it is there."""
        where = urlsplit(self.url)
        body = json.dumps({"prompt": "slow", "width": 128, "height": 128})
        with contextlib.closing(
            http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
        ) as connection:
            connection.request("POST", "/generate", body, _HEADERS)
            self.wait_for_metric("klein_requests_running")
        self.wait_for_metric("klein_requests_total", outcome="cancelled")

    def overflow(self) -> None:
        """Ask for more at a time than may wait."""
        threads = [threading.Thread(target=self.ask, args=("slow",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def sleep(self) -> None:
        """Have the worker sleep; the next picture wakes it."""
        assert self.post("/sleep", {}, authorization=f"Bearer {KEY}")[0] == 200
        self.wait_for_metric("klein_worker_asleep")

    def wait_for_metric(self, name: str, **labels: str) -> None:
        """Wait until the sample is above 0."""
        deadline = time.monotonic() + 30
        while self.metric(name, **labels) == 0:
            assert time.monotonic() < deadline, f"{name} {labels} stayed 0"
            time.sleep(0.1)


@pytest.fixture(scope="package")
def watched() -> Iterator[Watched]:
    """Ready again, and every outcome has been seen once or more."""
    with Watched() as server:
        assert server.ask("a red circle") == 200
        assert server.ask("a red circle") == 200
        assert server.edit() == 200
        assert server.post("/generate", {"prompt": "a red circle"})[0] == 401
        assert server.ask("") == 400
        assert server.ask("oom") == 500
        assert server.ask("fail") == 500
        server.leave()
        server.overflow()
        assert server.ask("hang", x_klein_deadline_s="0.5") == 504
        server.wait_for_metric("klein_worker_restarts_total", reason="hang")
        server.wait_for_metric("klein_ready")
        server.sleep()
        assert server.ask("a red circle") == 200
        yield server
