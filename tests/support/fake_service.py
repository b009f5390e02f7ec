"""A service whose answers a test writes down: what a client does with each of them."""

from __future__ import annotations

import base64
import json
import threading
from collections import deque
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

Answer = tuple[int, Mapping[str, str], bytes]
READY: Answer = (200, {}, b'{"ready": true, "stage": "ready"}')


def document(found: object, status: int = 200, **headers: str) -> Answer:
    """An answer in JSON; underscores in header names stand for dashes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps(found).encode()


def refusal(status: int, message: str, code: str, **headers: str) -> Answer:
    """An error as the service sends it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return document({"error": error}, status, **headers)


def stream(*events: Mapping[str, object] | str) -> Answer:
    """Events, and comments between them."""
    lines = (
        f": {each}\n\n" if isinstance(each, str) else f"event: e\ndata: {json.dumps(each)}\n\n"
        for each in events
    )
    return 200, {"content-type": "text/event-stream"}, "".join(lines).encode()


def completed(data: bytes, **more: object) -> dict[str, object]:
    """The last event of a picture."""
    text = base64.b64encode(data).decode()
    kind = {"type": "image_generation.completed", "b64_json": text}
    return {**kind, "size": "64x32", "seed": 7, **more}


class FakeService:
    """`answers` has lists of answers by method and path; the last of a list is given for ever."""

    def __init__(self, answers: Mapping[str, list[Answer]]) -> None:
        self.asked: list[tuple[str, Mapping[str, str], bytes]] = []
        left = {place: deque(given) for place, given in answers.items()}
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                place = f"{self.command} {self.path}"
                asked.append((place, dict(self.headers), body))
                given = left.get(place) or deque([(404, {}, b"<html>not here</html>")])
                status, headers, data = given.popleft() if len(given) > 1 else given[0]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing is logged."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeService:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def bodies(self, place: str) -> list[dict[str, object]]:
        """What was sent there, as JSON."""
        return [json.loads(body) for asked, _, body in self.asked if asked == place]
