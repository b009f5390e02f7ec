"""Write docs/cli.md from the parsers of the commands: their options, and what the exit code says.

    python tools/cli_page.py

The parsers are those that `klein` itself uses, so the page cannot say anything else than the
program does; a test compares the two.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from app.cli.completion import shown_actions
from app.cli.console import COMMON
from app.cli.main import COMMANDS, EXIT_CODES, add_all_options, make_parser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

_HEAD = """\
# The command line

<!-- Written by tools/cli_page.py from the parsers of app/cli; change them there. -->

`klein generate` asks the service that runs, and so do `queue`, `cancel`, `sleep`, `wake`,
`models` and `loras`.
Which one that is, `--url` says, else `KLEIN_URL`, else it is the one on this machine at
`KLEIN_PORT`, 8000 where that is not set. Where the service has keys, `KLEIN_KEY_FILE` names a file
with one of them. Both variables are the clients' own: `klein serve` refuses them as it refuses
every variable that is no setting.

Where no service runs, `klein generate` loads a model for itself, and `--local` has it do so always.
It never loads one beside a service that runs unasked: a second model would need the card's memory
once more. A service that still loads is waited for. Ctrl-C takes back what has not been made yet.

```sh
klein generate "a red circle" -n 3 -o pictures/
klein generate "make the circle green" --image circle.png --mask mask.png -o green.png
klein generate "a red circle" -o - > circle.png
klein queue
klein cancel --all
klein sleep
klein wake
klein completion bash > ~/.local/share/bash-completion/completions/klein
klein completion zsh > ~/.zfunc/_klein
klein completion fish > ~/.config/fish/completions/klein.fish
```

The others need no service:

```sh
klein serve --host 127.0.0.1 --port 8000 --model auto
klein generate "a red circle" -o out.png
klein download --model flux.2-klein-4b
klein doctor
klein bench --out report.md
klein compare "a red circle" --precision bf16,fp32
klein selftest
klein cache list
klein --version
```

`klein doctor` says what the card is, which precision and memory plan will be taken and why, and
what is amiss; with `--card` it computes that for a card that is not there. `klein bench` measures,
and writes a report to hand in ([cards.md](cards.md)). `klein selftest` checks the first pictures
from your own weights; `klein cache prune --to-gb 20` deletes what can be made or fetched again.
`pip install .` puts the command into an environment of yours; `python -m app` is the same.

Pictures are named by their seeds where a folder is given, and files that are there are never
replaced without `--overwrite`. While a picture is made, terminals that show pictures (kitty's and
iTerm2's protocols, sixel) show it; others, and all besides, show a line with what is done, how
fast, and how long it will take. Where standard error is no terminal, nothing of that is printed.

Every command takes `--json`: it then prints one JSON document on standard output, for `klein serve`
one for each line of its log.

| exit code | meaning |
|---|---|
"""

_SERVE_EXIT = """
`klein serve` may end with others: 143 after a second signal, which ends it at once, and those of a
worker that cannot go on. A program that reads the output and closes it early, such as `head`, makes
it 141.
"""


def page() -> str:
    """The whole page."""
    _, parsers = make_parser()
    add_all_options(parsers)
    codes = "".join(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items())
    common = {name for names in COMMON for name in names.split()}
    commands = "".join(_command(name, parsers[name], common) for name in COMMANDS)
    shared = argparse.ArgumentParser(add_help=False)
    for names, described in COMMON.items():
        shared.add_argument(*names.split(), **described)
    return (
        _HEAD
        + codes
        + _SERVE_EXIT
        + f"\n## Every command\n\n{_table(shared_rows(shared))}"
        + commands
    )


def shared_rows(parser: argparse.ArgumentParser) -> list[str]:
    """The options that all commands have."""
    return ["| `-h`, `--help` | print the command's usage |\n", *map(_row, shown_actions(parser))]


def _command(name: str, parser: argparse.ArgumentParser, common: set[str]) -> str:
    rows = list(_own_rows(parser, common))
    return f"\n## klein {name}\n\n{parser.description}\n" + (f"\n{_table(rows)}" if rows else "")


def _own_rows(parser: argparse.ArgumentParser, common: set[str]) -> Iterator[str]:
    for action in shown_actions(parser):
        if not {*action.option_strings} & (common | {"--help"}):
            yield _row(action)


def _table(rows: list[str]) -> str:
    return "| option | meaning |\n|---|---|\n" + "".join(rows)


def _row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    value = "" if action.nargs == 0 else _value(action)
    told = (action.help or "").replace("|", "\\|")
    default = action.default
    if action.option_strings and default not in (None, False) and f"({default})" not in told:
        told = f"{told} (`{default}`)".strip()
    return f"| {' '.join(filter(None, (names, value)))} | {told} |\n"


def _value(action: argparse.Action) -> str:
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    repeated = " ..." if action.nargs == "*" else ""
    return f"`{name}{repeated}`"


if __name__ == "__main__":
    PAGE.write_text(page())
