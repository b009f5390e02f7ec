"""`klein completion`: the script by which a shell completes commands, options and their values.

It is made of the parsers, so it names what this version takes, and asks nobody when it completes.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.cli.console import Options

_PATHS = frozenset({"output", "model", "cache_dir", "what"})
"""What takes a path as well as something else."""


@dataclass(frozen=True, slots=True)
class Word:
    """An option, or an argument without a name, of one command."""

    names: tuple[str, ...]
    help: str
    choices: tuple[str, ...]
    is_path: bool
    takes_value: bool

    @classmethod
    def of(cls, action: argparse.Action) -> Word:
        """Describe what the parser knows by *action*."""
        return cls(
            names=tuple(action.option_strings),
            help=(action.help or "").replace("\n", " "),
            choices=tuple(map(str, action.choices or ())),
            is_path=action.type is Path or action.dest in _PATHS,
            takes_value=action.nargs != 0,
        )


@dataclass(frozen=True, slots=True)
class Described:
    """A command for completion."""

    name: str
    help: str
    words: tuple[Word, ...]

    @property
    def options(self) -> list[Word]:
        """Its words with names."""
        return [word for word in self.words if word.names]

    @property
    def arguments(self) -> list[Word]:
        """Its words without."""
        return [word for word in self.words if not word.names]


def describe() -> list[Described]:
    """Describe every command by its parser."""
    from app.cli.main import COMMANDS, add_all_options, make_parser

    _, parsers = make_parser()
    add_all_options(parsers)
    return [
        Described(name, COMMANDS[name].help, tuple(map(Word.of, shown_actions(parser))))
        for name, parser in parsers.items()
    ]


def shown_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return what the parser's own help shows."""
    return [action for action in parser._actions if action.help is not argparse.SUPPRESS]


def _bash(commands: Sequence[Described]) -> str:
    values, words = [], []
    for each in commands:
        for word in filter(lambda word: word.takes_value, each.options):
            patterns = "|".join(f'"{each.name} {name}"' for name in word.names)
            values.append(f"        {patterns}) {_bash_value([word])} return ;;")
        names = " ".join(name for word in each.options for name in word.names)
        words.append(f'        {each.name}) options="{names}" ;;')
    rest = [f"        {each.name}) {_bash_value(each.arguments)} ;;" for each in commands]
    every = " ".join(each.name for each in commands)
    return "\n".join(
        [
            "_klein() {",
            "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}",
            "    local command= word options",
            '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            "        case $word in -*) ;; *) command=$word; break ;; esac",
            "    done",
            "    COMPREPLY=()",
            '    case "$command $prev" in',
            *values,
            "    esac",
            "    case $command in",
            f'        "") COMPREPLY=($(compgen -W "{every} --help" -- "$cur")); return ;;',
            *words,
            "    esac",
            "    if [[ $cur == -* ]]; then",
            '        COMPREPLY=($(compgen -W "$options" -- "$cur"))',
            "        return",
            "    fi",
            "    case $command in",
            *rest,
            "    esac",
            "}",
            "complete -F _klein klein",
        ]
    )


def _bash_value(words: Iterable[Word]) -> str:
    """Return the commands that offer what *words* may be."""
    choices = [choice for word in words for choice in word.choices]
    told = []
    if choices:
        told.append(f'COMPREPLY=($(compgen -W {shlex.quote(" ".join(choices))} -- "$cur"));')
    if any(word.is_path for word in words):
        told.append('compopt -o filenames; COMPREPLY+=($(compgen -f -- "$cur"));')
    return " ".join(told or [":;"])


def _zsh(commands: Sequence[Described]) -> str:
    lines = ["#compdef klein", "_klein() {", "    local -a commands=("]
    lines += [f"        {shlex.quote(f'{each.name}:{each.help}')}" for each in commands]
    lines += [
        "    )",
        "    if (( CURRENT == 2 )); then",
        "        _describe command commands",
        "        return",
        "    fi",
        "    local command=$words[2]",
        "    shift words; (( CURRENT-- ))",
        "    case $command in",
    ]
    for each in commands:
        told = " ".join(shlex.quote(spec) for word in each.words for spec in _zsh_specs(word))
        lines.append(f"        {each.name}) _arguments {told} ;;")
    lines += [
        "    esac",
        "}",
        'if [ "$funcstack[1]" = _klein ]; then _klein "$@"; else compdef _klein klein; fi',
    ]
    return "\n".join(lines)


def _zsh_specs(word: Word) -> list[str]:
    if not word.names and not word.choices and not word.is_path:
        # Else its description stands in the way of options.
        return []
    value = f"({' '.join(word.choices)})" if word.choices else ("_files" if word.is_path else " ")
    if not word.names:
        return [f"*:{_zsh_text(word.help)}:{value}"]
    after = f":value:{value}" if word.takes_value else ""
    return [f"*{name}[{_zsh_text(word.help)}]{after}" for name in word.names]


def _zsh_text(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "[]:\\" else letter for letter in text)


def _fish(commands: Sequence[Described]) -> str:
    lines = ["complete -c klein -f"]
    for each in commands:
        lines.append(
            f"complete -c klein -n __fish_use_subcommand -a {each.name} -d {_fish_text(each.help)}"
        )
        seen = f"-n '__fish_seen_subcommand_from {each.name}'"
        for word in each.words:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in word.names
            )
            if not word.names and not word.choices and not word.is_path:
                continue
            value = ""
            if word.names and word.takes_value:
                value = " -r" if word.is_path else " -x"
            if word.choices:
                value += f" -a {_fish_text(' '.join(word.choices))}"
            if word.is_path:
                value += " -F"
            lines.append(f"complete -c klein {seen} {names}{value} -d {_fish_text(word.help)}")
    return "\n".join(lines)


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[Sequence[Described]], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
"""What writes the script, by the shell's name."""

OPTIONS: Options = {"shell": {"choices": tuple(SHELLS), "help": "the shell"}}


def run(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print the script; return 0."""
    script = SHELLS[arguments.shell](describe())
    document = {"shell": arguments.shell, "script": script}
    print(json.dumps(document) if arguments.json else script)
    return 0
