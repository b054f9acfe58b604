"""The command `info`: what a model and its drafter are made of, as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from .cli_options import (
    BitwiseOption,
    DrafterOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    Source,
    open_runtime,
)
from .terminal import size_of


def info(
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    bitwise: BitwiseOption = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows of the largest batch, for --bitwise.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show what a model and its drafter are made of."""
    rows = max_batch if bitwise else 0
    source = Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=rows)
    runtime = open_runtime(source, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(runtime.info()))
    else:
        _print_tables(runtime.info())


def _print_tables(data: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    for name, value in data.items():
        if value and _nested(value):
            console.print(_pairs(name, value) if isinstance(value, Mapping) else _rows(name, value))
    plain = {name: value for name, value in data.items() if not _nested(value)}
    if plain:
        console.print(_pairs("runtime", plain))


def _nested(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)
    )


def _pairs(title: str, values: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_words(title), title_justify="left", show_header=False)
    for name, value in _flat(values):
        table.add_row(_words(name), Text(_shown(name, value)))
    return table


def _rows(title: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*map(_words, names), title=_words(title), title_justify="left")
    for row in rows:
        table.add_row(*(Text(_shown(name, row[name]) if name in row else "") for name in names))
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(name: str, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and "bytes" in name:
        return size_of(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_shown(name, item) for item in value)
    return str(value)
