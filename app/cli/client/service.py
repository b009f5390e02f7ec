"""A service that runs already: where it is, and one question to it at a time.

Only the standard library's client is used, so that a command which asks answers at once.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from app.cli.console import Options, plain
from app.cli.environment import KEY_FILE, URL
from app.errors import InvalidRequest, Kind, KleinError, StartupError

ASKING: Options = {
    "--url": {"help": f"where the service is ({URL}); http://127.0.0.1:8000 where left out"}
}
"""The option of every command that asks a service."""

_PORT = "8000"
_CONNECT_S = 10.0
_ANSWER_S = 60.0
"""Seconds without a byte; a service that draws sends a sign of life every fifteen."""
_MOST_BYTES = 64 * 1024 * 1024
"""Of an answer that is no picture."""
_HIGHEST_PORT = 65_535


class NoService(KleinError):
    """Nobody answers there, or somebody who is no klein-server."""

    kind = Kind.WORKER_DOWN


@dataclass(frozen=True, slots=True)
class Service:
    """One service; *is_named* says whether the user has named it, and it is no guess."""

    url: str
    key: str | None = field(default=None, repr=False)
    is_named: bool = True

    @classmethod
    def find(cls, url: str | None, environ: Mapping[str, str]) -> Service:
        """Return the one that *url*, or the environment, names; else that of this machine.

        Raises:
            KleinError: the address is none, or the file of the key cannot be read.
        """
        key = _read_key(environ)
        if named := url or environ.get(URL):
            return cls(_checked(named), key)
        port = environ.get("KLEIN_PORT", "")
        is_port = port.isascii() and port.isdigit() and 0 < int(port[:6]) <= _HIGHEST_PORT
        return cls(f"http://127.0.0.1:{port if is_port else _PORT}", key, is_named=False)

    def state(self) -> dict[str, Any]:
        """Return what `/health/ready` says: whether it is ready, its stage, how far it is.

        Raises:
            NoService: no klein-server answers there.
        """
        try:
            answer = self._document("GET", "/health/ready", allowed=(200, 503))
        except NoService:
            raise
        except KleinError as error:
            raise self._absent(f"it answers: {error.message}") from None
        if not isinstance(answer.get("ready"), bool) or "stage" not in answer:
            raise self._absent("what answers there is another program")
        return answer

    def get(self, path: str) -> dict[str, Any]:
        """GET *path*, which answers with a JSON object.

        Raises:
            KleinError: it refuses, or nobody answers.
        """
        return self._document("GET", path)

    def listed(self, path: str, *keys: str) -> dict[str, Any]:
        """GET *path*, whose `data` is a list of objects that have *keys*, as `get`."""
        found = self.get(path)
        data = found.get("data")
        is_list = isinstance(data, list) and all(isinstance(each, dict) for each in data)
        if not is_list or not all(each.keys() >= set(keys) for each in found["data"]):
            raise self._absent("what answers there is another program")
        return found

    def delete(self, path: str) -> dict[str, Any]:
        """DELETE *path*, as `get`."""
        return self._document("DELETE", path)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """POST *body* to *path*, as `get`."""
        return self._document("POST", path, body)

    @contextmanager
    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        on_open: Callable[[socket.socket], None] = lambda opened: None,
        allowed: tuple[int, ...] = (200,),
    ) -> Iterator[HTTPResponse]:
        """Send one request and yield the answer, whose body is not read yet.

        *on_open* gets the connection's socket; whoever shuts that down ends the request.

        Raises:
            KleinError: the status is none of *allowed*; the sentence is the service's.
            NoService: nobody answers, or the connection breaks off.
        """
        parts = urlsplit(self.url)
        with closing(_connection(parts)) as connection:
            try:
                connection.connect()
                connection.sock.settimeout(_ANSWER_S)
                on_open(connection.sock)
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, parts.path + path, data, self._headers(data))
                # The answer may own the socket by now.
                with connection.getresponse() as answer:
                    if answer.status not in allowed:
                        raise self._refusal(answer)
                    yield answer
            except (OSError, HTTPException) as error:
                raise self._absent(_reason(error)) from None

    def _document(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        allowed: tuple[int, ...] = (200,),
    ) -> dict[str, Any]:
        with self.ask(method, path, body, allowed=allowed) as answer:
            return self._read(answer)

    def _headers(self, data: bytes | None) -> dict[str, str]:
        headers = {"Accept": "application/json, text/event-stream"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        return headers

    def _read(self, answer: HTTPResponse) -> dict[str, Any]:
        try:
            found = json.loads(answer.read(_MOST_BYTES))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._absent("what answers there is another program")
        return found

    def _refusal(self, answer: HTTPResponse) -> KleinError:
        if answer.status == 401:
            return KleinError(
                f"The service at {self.url} needs a key; put one of its keys into a file, and name "
                f"that by {KEY_FILE}.",
                kind=Kind.UNAUTHORIZED,
            )
        error = self._read(answer).get("error")
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            return self._absent(f"what answers there says {answer.status}")
        return error_of(error, answer.getheader("Retry-After"))

    def _absent(self, why: str) -> NoService:
        return NoService(
            f"No klein-server answers at {self.url} ({plain(why)}); start one by `klein serve`, or "
            f"name another by --url or {URL}."
        )


def error_of(error: Mapping[str, Any], retry_after: str | None = None) -> KleinError:
    """Return the error that a service has sent as OpenAI's error object."""
    message, code = plain(error.get("message") or "It gave no reason."), error.get("code")
    param = error.get("param")
    if error.get("type") == "invalid_request_error" and code != "client_closed_request":
        return InvalidRequest(message, param=param, code=code)
    is_number = retry_after is not None and retry_after.isascii() and retry_after.isdigit()
    return KleinError(
        message,
        param=param,
        code=code,
        retry_after_s=int(retry_after) if retry_after and is_number else None,
    )


def _connection(parts: SplitResult) -> HTTPConnection:
    assert parts.hostname is not None, "the address has been checked"
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(parts.hostname, parts.port, timeout=_CONNECT_S)


def _checked(url: str) -> str:
    """Complete an address such as `127.0.0.1:8000`; what clients of OpenAI are given will do."""
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        is_address = bool(parts.hostname) and parts.port != 0 and parts.username is None
    except ValueError:
        is_address = False
    if not is_address or parts.scheme not in {"http", "https"} or parts.query or parts.fragment:
        raise InvalidRequest(
            f"--url, or {URL}, must be an address such as http://127.0.0.1:8000, without a key "
            "or a name in it."
        )
    return whole.rstrip("/").removesuffix("/v1").rstrip("/")


def _read_key(environ: Mapping[str, str]) -> str | None:
    """Return the first key of the file that the environment names."""
    name = environ.get(KEY_FILE)
    if not name:
        return None
    try:
        lines = [line.strip() for line in Path(name).expanduser().read_text().splitlines()]
    except (OSError, UnicodeDecodeError, ValueError, RuntimeError):
        raise StartupError(f"{KEY_FILE} names a file that cannot be read; correct it.") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or not (keys[0].isascii() and keys[0].isprintable()):
        raise StartupError(f"The file of {KEY_FILE} must hold a key on a line of its own.")
    return keys[0]


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it is silent"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "the connection broke off"
