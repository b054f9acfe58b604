"""The command `tune`: a table, a plot in the terminal, a plot as PNG. Knows nothing of how rounds are measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .benchmark.plots import new_figure
from .cli_options import DrafterOption, DtypeOption, JsonOption, ModelOption, RevisionOption, Source, open_runtime
from .costs import DEEPEST
from .terminal import note, progress_bar

if TYPE_CHECKING:
    from .tune import Curve, Tuning

ACCEPTANCES = (0.5, 0.6, 0.7, 0.8, 0.9)
_WIDTH = 40


def tune(
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    seconds: Annotated[float, typer.Option(min=1, help="About how long to measure at most.")] = 110.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the costs, too (extra: plot).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what drafting costs on this machine, and keep it: `--depth auto` chooses well from the start then."""
    if plot is not None and not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"{plot.parent} is not a directory", param_hint="--plot")
    runtime = open_runtime(Source(model=model, drafter=drafter, revision=revision, dtype=dtype), quiet=as_json)
    with progress_bar(shown=not as_json and sys.stderr.isatty()) as progress:
        tuning = runtime.tune(seconds=seconds, progress=progress)
    file = runtime.profile().path
    if as_json:
        typer.echo(json.dumps(to_dict(tuning, file)))
    else:
        show(tuning)
        note(f"kept in {file}")
    if plot is not None:
        draw(tuning, plot)
        if not as_json:
            note(f"drawn in {plot}")


def table(tuning: Tuning) -> list[str]:
    """A line for each shape: milliseconds of rounds by drafts, and the best depths."""
    shares = " ".join(f"{a:.0%}" for a in ACCEPTANCES)
    drafts = "".join(f"{k:>7}" for k in range(DEEPEST + 1))
    lines = [f"rows context{drafts}  drafts (ms per round); best at {shares}"]
    for curve in tuning.curves:
        times = "".join(f"{1000 * s:7.1f}" for s in curve.seconds)
        best = "   ".join(str(curve.best(a)) for a in ACCEPTANCES)
        lines.append(f"{curve.rows:4} {curve.context:7}{times}  {best}")
    return lines


def show(tuning: Tuning) -> None:
    """The table, and the rates of the first shape as bars, on stdout."""
    print(*table(tuning), "", *bars(tuning.curves[0]), sep="\n")
    for rows, context in tuning.left_out:
        print(f"no time for {rows} rows in {context} tokens: they are guessed from the others")


def bars(curve: Curve, acceptance: float = 0.7) -> list[str]:
    """Tokens per second by depth, a bar each; the best one is marked."""
    rates = [curve.rate(k, acceptance) for k in range(DEEPEST + 1)]
    top, best = max(rates), curve.best(acceptance)
    title = f"tokens/s at acceptance {acceptance:.0%}, {curve.rows} row(s), {curve.context} tokens"
    return [title] + [
        f"{k} {'█' * max(round(_WIDTH * rate / top), 1):<{_WIDTH}} {rate:8.1f}{'  <- best' if k == best else ''}"
        for k, rate in enumerate(rates)
    ]


def draw(tuning: Tuning, file: Path) -> None:
    """Costs by depth, and tokens/s by depth at each acceptance with the chosen depth marked, as an image.

    Raises RuntimeError where matplotlib is missing.
    """
    figure = new_figure(11, 4.5)
    costs: Any
    speed: Any
    costs, speed = figure.subplots(1, 2)
    depths = range(DEEPEST + 1)
    for curve in tuning.curves:
        label = f"{curve.rows} x {curve.context}"
        costs.plot(depths, [1000 * s for s in curve.seconds], marker="o", markersize=3, label=label)
    costs.set(title="Cost of a round", xlabel="drafts", ylabel="ms")
    costs.legend(title="rows x context", fontsize="small")
    first = tuning.curves[0]
    for a in ACCEPTANCES:
        rates = [first.rate(k, a) for k in depths]
        (line,) = speed.plot(depths, rates, label=f"{a:.0%}")
        speed.plot(first.best(a), max(rates), marker="o", color=line.get_color())
    speed.set(title=f"Tokens/s, {first.rows} row(s), {first.context} tokens", xlabel="drafts", ylabel="tokens/s")
    speed.legend(title="acceptance", fontsize="small")
    figure.savefig(file, dpi=130)


def to_dict(tuning: Tuning, file: Path) -> dict[str, Any]:
    """Ready for JSON."""
    return {
        "profile": str(file),
        "seconds": round(tuning.seconds, 2),
        "curves": [
            {
                "rows": c.rows,
                "context": c.context,
                "seconds": [round(s, 6) for s in c.seconds],
                "best": {f"{a}": c.best(a) for a in ACCEPTANCES},
            }
            for c in tuning.curves
        ],
        "left_out": [list(shape) for shape in tuning.left_out],
        "costs": tuning.costs.to_dict(),
    }
