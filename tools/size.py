"""Counts the code: `python tools/size.py [folder]` prints one table for `app` or another folder.

Statements are nodes of the syntax tree; docstrings, under fields too, do not count. Lengths of
functions and files are in lines, decorators and docstrings included. The comment share is the share
of lines that hold a comment among those that are not empty.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileSize:
    """What one file holds: *functions* are the lengths of its functions in lines."""

    lines: int
    filled_lines: int
    comment_lines: int
    statements: int
    functions: tuple[int, ...]


def measure(source: str) -> FileSize:
    """Count one file's *source*."""
    tree = ast.parse(source)
    lines = source.splitlines()
    return FileSize(
        lines=len(lines),
        filled_lines=sum(1 for line in lines if line.strip()),
        comment_lines=len(set(_comment_lines(source))),
        statements=sum(1 for node in ast.walk(tree) if _is_counted(node)),
        functions=tuple(
            _length(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ),
    )


def table(sizes: Sequence[FileSize]) -> list[tuple[str, str]]:
    """Sum *sizes* up: one row for each figure."""
    functions = [length for size in sizes for length in size.functions]
    filled = sum(size.filled_lines for size in sizes)
    comments = sum(size.comment_lines for size in sizes)
    return [
        ("files", str(len(sizes))),
        ("statements", f"{sum(size.statements for size in sizes):,}"),
        ("functions", f"{len(functions):,}"),
        ("function, lines, p50 / p90 / max", _quantiles(functions)),
        ("file, lines, p50 / p90 / max", _quantiles([size.lines for size in sizes])),
        ("comment share", f"{comments / filled:.1%}"),
    ]


def main(arguments: Sequence[str]) -> int:
    """Print the table of the folder that *arguments* name, `app` where they name none."""
    folder = Path(arguments[0] if arguments else "app")
    sizes = [measure(path.read_text()) for path in sorted(folder.rglob("*.py"))]
    if not sizes:
        print(f"There is no Python file under {folder}; name a folder that holds some.")
        return 1
    for name, value in table(sizes):
        print(f"{name:<36}{value}")
    return 0


def _is_counted(node: ast.AST) -> bool:
    is_text = (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
    return isinstance(node, ast.stmt) and not is_text


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return (node.end_lineno or node.lineno) - first + 1


def _comment_lines(source: str) -> Iterator[int]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0]


def _quantiles(values: Sequence[int]) -> str:
    ordered = sorted(values)
    return " / ".join(str(ordered[int(share * (len(ordered) - 1))]) for share in (0.5, 0.9, 1.0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
