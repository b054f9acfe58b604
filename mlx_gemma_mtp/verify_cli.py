"""The command `verify`: options, requests from a file, a table, JSON, a page.

Knows no models; imports what takes time when it is called.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from .terminal import progress_bar

if TYPE_CHECKING:
    from .runtime import Runtime
    from .verify import CaseReport, Check, Report, Verdict, Way

_MARKS: dict[Verdict, str] = {"equal": "=", "near-tie": "≈", "bug": "✗"}
_COLOURS: dict[Verdict, str] = {"equal": "green", "near-tie": "yellow", "bug": "bold red"}
_WAYS: tuple[Way, ...] = ("alone", "batch")


def verify(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE.jsonl]", show_default=False, help="Requests, a JSON object each; -: stdin."),
    ] = None,
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    depths: Annotated[str, typer.Option(metavar="1..6", help="Depths to try; 0: plain, in a batch.")] = "1..6",
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="For requests that don't say.")] = 64,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows of the batch; the rest joins as rows leave.")] = 32,
    allow_ties: Annotated[bool, typer.Option("--allow-ties", help="Let near-ties within rounding pass.")] = False,
    mlx_lm: Annotated[bool, typer.Option("--mlx-lm/--no-mlx-lm", help="Compare plain decoding with mlx-lm's.")] = True,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a page, too.")] = None,
    bitwise: BitwiseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check that drafts change no token: exit code 0 if all outputs equal plain decoding's, 1 if not.

    A line of FILE has a prompt, tokens or messages, and any of OpenAI's parameters: sampling, penalties, seed, stop,
    response_format, logprobs, n, tools; regex, grammar and thinking_budget, too. Without FILE, a built-in set. Sampled
    requests without a seed get one.
    """
    try:
        chosen = parse_depths(depths)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--depths") from error
    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"{html.parent} is not a directory", param_hint="--html")
    options = Options(
        file=file,
        depths=chosen,
        max_tokens=max_tokens,
        max_batch=max_batch,
        allow_ties=allow_ties,
        mlx_lm=mlx_lm,
    )
    lines = read_lines(file)
    rows = max_batch if bitwise else 0
    source = Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=rows)
    runtime = open_runtime(source, quiet=as_json)
    with progress_bar(shown=not as_json and sys.stderr.isatty()) as progress:
        report = check(runtime, lines, options, progress)
    raise typer.Exit(show(report, options, as_json=as_json, html=html))


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to verify; `file` is a path, "-" for stdin, or None for the built-in requests."""

    file: str | None
    depths: tuple[int, ...]
    max_tokens: int
    max_batch: int
    allow_ties: bool
    mlx_lm: bool


def parse_depths(text: str) -> tuple[int, ...]:
    """Depths of a text like "1..6", "2" or "0,3,5". Raises ValueError."""
    depths: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        ends = [first, last] if dots else [first]
        if not all(end.isascii() and end.isdigit() for end in ends):
            raise ValueError(f"{text!r} is no list of depths like 1..6 or 0,2,4")
        depths += range(int(ends[0]), int(ends[-1]) + 1)
    if not depths or len(set(depths)) < len(depths) or max(depths) > 8:
        raise ValueError(f"{text!r} names the depths {depths}, expected different ones from 0 to 8")
    return tuple(depths)


def read_lines(file: str | None) -> list[str] | None:
    """Lines of a file of requests, None for the built-in ones. Raises ValueError and OSError, naming the file."""
    if file is None:
        return None
    if file == "-":
        return sys.stdin.read().splitlines()
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    return text.split("\n")


def check(
    rt: Runtime, lines: Sequence[str] | None, options: Options, progress: Callable[[str, float], None] | None
) -> Report:
    """Read the requests and verify the pair."""
    from .verify import Limits, built_in_cases, read_cases, verify

    limits = Limits.of(rt, options.max_tokens)
    if lines is None:
        cases = built_in_cases(rt.text, limits)
    else:
        cases = read_cases(lines, rt.text, limits, source="stdin" if options.file == "-" else str(options.file))
    return verify(
        rt,
        cases,
        depths=options.depths,
        max_batch=options.max_batch,
        mlx_lm=options.mlx_lm,
        progress=progress,
    )


def show(report: Report, options: Options, *, as_json: bool, html: Path | None) -> int:
    """Show a report on stdout, as JSON or as tables, and write the page. Returns the exit code: 0 if it passed."""
    passed = report.passed(allow_ties=options.allow_ties)
    if html is not None:
        html.write_text(page(report, allow_ties=options.allow_ties), encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps({"passed": passed, **report.to_dict()}) + "\n")
    else:
        _print(report, allow_ties=options.allow_ties)
    return 0 if passed else 1


def verdict_line(report: Report, *, allow_ties: bool) -> str:
    """What the whole comes to."""
    if report.verdict == "equal":
        ways = "alone and in a batch"
        return f"all equal: {len(report.cases)} requests, depths {_numbers(report.depths)}, {ways}"
    bad = sum(case.verdict == report.verdict for case in report.cases)
    what = "near-ties within rounding" if report.verdict == "near-tie" else "a BUG: differences beyond rounding"
    allowed = ", which --allow-ties lets pass" if report.verdict == "near-tie" and allow_ties else ""
    return f"{what} in {bad} of {len(report.cases)} requests{allowed}"


def differences(report: Report) -> Iterator[tuple[str, Check]]:
    """Every check that isn't equal, and what it is called."""
    for entry in report.cases:
        for found in entry.checks:
            if found.difference is not None:
                yield f"{entry.case.name}, depth {found.depth}, {_way(found.way)}", found
        if entry.mlx_lm is not None and entry.mlx_lm.difference is not None:
            yield f"{entry.case.name}, mlx-lm", entry.mlx_lm


def sentence(found: Check) -> str:
    """A difference in words."""
    d = found.difference
    if d is None:
        return "equal"
    plain, other = _token(d.expected, d.expected_text), _token(d.got, d.got_text)
    words = f"{found.verdict} at position {d.position}: plain {plain}, here {other}"
    if d.margin is not None and d.tolerance is not None:
        words += f", margin {d.margin:.3g} (rounding explains {2 * d.tolerance:.2g})"
    if d.excluded:
        words += ", one of them left out by top-k, top-p or min-p"
    return words


def _token(token: int | None, text: str) -> str:
    return "ended" if token is None else f"{token} {text!r}" if text else str(token)


def _way(way: Way) -> str:
    return "alone" if way == "alone" else "in the batch"


def _numbers(values: Sequence[int]) -> str:
    whole = len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1))
    return f"{values[0]}..{values[-1]}" if whole else ", ".join(map(str, values))


def _cells(report: Report, entry: CaseReport) -> Iterator[Check | None]:
    """A request's checks in the order of the columns: depths alone, depths in the batch, mlx-lm."""
    by_place = {(c.way, c.depth): c for c in entry.checks}
    for way in _WAYS:
        for depth in report.depths:
            yield by_place[way, depth]
    if report.mlx_lm_verdict is not None:
        yield entry.mlx_lm


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield "model", report.model
    yield "drafter", report.drafter or "none"
    yield "computed in", f"{report.dtype} on {report.backend}"
    for way in _WAYS:
        parts = [s for s in report.speculation if s.way == way]
        text = ", ".join(f"{s.depth}: {s.stats.accepted_per_round:.2f}" for s in parts)
        yield f"accepted per round, {_way(way)}", text
    if report.mlx_lm_verdict is not None:
        yield "mlx-lm, greedy (information only)", report.mlx_lm_verdict
    elif report.mlx_lm_note is not None:
        yield "mlx-lm", f"not compared: {report.mlx_lm_note}"
    yield "took", f"{report.seconds:.1f} s"


def _print(report: Report, *, allow_ties: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    depths = [str(d) for d in report.depths]
    other = ["mlx-lm"] if report.mlx_lm_verdict is not None else []
    heads = ["request", "tokens", *depths, *(f"b{d}" for d in depths), *other]
    table = Table(*heads, title="Plain decoding against drafts of depth d, alone (d) and in one batch (bd)")
    table.title_justify = "left"
    for entry in report.cases:
        cells = [
            Text("") if c is None else Text(_MARKS[c.verdict], style=_COLOURS[c.verdict]) for c in _cells(report, entry)
        ]
        table.add_row(Text(entry.case.name), str(len(entry.plain.tokens)), *cells)
    console.print(table)
    for name, found in differences(report):
        console.print(Text(f"{name}: ") + Text(sentence(found), style=_COLOURS[found.verdict]))
    for name, value in _facts(report):
        console.print(Text(f"{name}: {value}"))
    console.print(Text(verdict_line(report, allow_ties=allow_ties), style=_COLOURS[report.verdict]))


# --- the page ----------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --equal: #1a7f37; --tie: #9a6700; --bug: #cf222e; --line: #8886; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --equal: #3fb950; --tie: #d29922; --bug: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: center; }
th:first-child, td:first-child, .facts td, .list td { text-align: left; }
.list td { vertical-align: top; } tbody tr:hover { background: var(--soft); }
.equal { color: var(--equal); } .near-tie { color: var(--tie); } .bug { color: var(--bug); font-weight: 700; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; border-radius: .4rem; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report, *, allow_ties: bool = False) -> str:
    """One HTML page of a report, with nothing to fetch from anywhere."""
    line = f'<p class="{report.verdict}">{escape(verdict_line(report, allow_ties=allow_ties))}</p>'
    facts = "".join(f"<tr><td>{escape(n)}</td><td>{escape(v)}</td></tr>" for n, v in _facts(report))
    found = "".join(
        f'<tr><td>{escape(n)}</td><td class="{c.verdict}">{escape(sentence(c))}</td></tr>'
        for n, c in differences(report)
    )
    listed = f'<h2>Differences</h2><div class="scroll"><table class="list"><tbody>{found}</tbody></table></div>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>verify: {escape(report.verdict)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Are the tokens with drafts those of plain decoding?</h1>{line}"
        f"{_page_table(report)}{listed if found else ''}"
        f'<h2>What was compared</h2><div class="scroll"><table class="facts"><tbody>{facts}</tbody></table></div>'
        f"<h2>Plain outputs</h2>{''.join(map(_page_output, report.cases))}</body></html>\n"
    )


def _page_table(report: Report) -> str:
    spans = "".join(f'<th colspan="{len(report.depths)}" scope="colgroup">depth, {_way(w)}</th>' for w in _WAYS)
    other = '<th rowspan="2" scope="col">mlx-lm</th>' if report.mlx_lm_verdict is not None else ""
    heads = "".join(f'<th scope="col">{d}</th>' for _ in _WAYS for d in report.depths)
    rows = []
    for entry in report.cases:
        cells = "".join("<td></td>" if c is None else _page_cell(c) for c in _cells(report, entry))
        name = f'<th scope="row">{escape(entry.case.name)}</th>'
        rows.append(f"<tr>{name}<td>{len(entry.plain.tokens)}</td>{cells}</tr>")
    return (
        '<div class="scroll"><table><thead><tr><th rowspan="2" scope="col">request</th>'
        f'<th rowspan="2" scope="col">tokens</th>{spans}{other}</tr><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _page_cell(found: Check) -> str:
    at = "" if found.difference is None else f" at {found.difference.position}"
    title = escape(sentence(found))
    return f'<td class="{found.verdict}" title="{title}">{_MARKS[found.verdict]} {found.verdict}{at}</td>'


def _page_output(entry: CaseReport) -> str:
    from .verify import sampling_dict

    params = sampling_dict(entry.case.sampling)
    how = ", ".join(f"{k} {v}" for k, v in params.items()) or "greedy"
    seed = " (our seed)" if entry.case.seeded else ""
    text = entry.text or " ".join(map(str, entry.plain.tokens))
    return (
        f"<details><summary>{escape(entry.case.name)} ({escape(how)}{seed})</summary>"
        f"<pre>{escape(entry.case.text)}</pre><pre>{escape(text)}</pre></details>"
    )
