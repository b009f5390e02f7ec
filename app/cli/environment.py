"""The environment that a command reads: the process's, completed by a file where one is named."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.console import ENV_FILE
from app.errors import StartupError

if TYPE_CHECKING:
    from app.settings import Settings

URL = "KLEIN_URL"
"""Where the service is that commands ask."""
KEY_FILE = "KLEIN_KEY_FILE"
"""A file with the key that they send to it."""


def take_env_file(words: Sequence[str], environ: MutableMapping[str, str]) -> None:
    """Add the variables of the file that `--env-file` names to *environ*; what is set there stays.

    Raises:
        StartupError: it cannot be read, or a line of it sets no variable.
    """
    for word, following in zip(words, (*words[1:], ""), strict=True):
        if word == ENV_FILE or word.startswith(f"{ENV_FILE}="):
            _, equals, value = word.partition("=")
            for name, text in read_env_file(Path(value if equals else following)).items():
                environ.setdefault(name, text)


def read_env_file(path: Path) -> dict[str, str]:
    """Read lines such as `KLEIN_PORT=8001`, as Docker Compose does: quotes and comments are none.

    Raises:
        StartupError: it cannot be read, or a line of it sets no variable.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError, ValueError):
        raise StartupError(f"{ENV_FILE} names no file that can be read: {path}.") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not name.replace("_", "a").isalnum():
            raise StartupError(
                f"Line {number} of {path} sets no variable, such as KLEIN_PORT=8001."
            )
        found[name] = _unquote(value)
    return found


def _unquote(value: str) -> str:
    """Take off quotes; without any, a comment may follow after a blank."""
    quote = value[:1]
    if quote in {'"', "'"} and (end := value.find(quote, 1)) > 0:
        return value[1:end]
    return value.partition(" #")[0].rstrip()


def own_settings(environ: Mapping[str, str], **overrides: object) -> Settings:
    """Read the settings, and leave out the two variables that only clients of a service know.

    Raises:
        StartupError: as `app.model_choice.read_settings`.
    """
    # Not earlier: a command that asks a service does without.
    from app.model_choice import read_settings

    left = {name: text for name, text in environ.items() if name not in {URL, KEY_FILE}}
    return read_settings(left, **overrides)
