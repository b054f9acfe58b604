"""Plots of benchmarks' records. What is in a plot is told apart from drawing it, which needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..acceptance import committed

Record = Mapping[str, Any]
Line = tuple[list[float], list[float]]
_NAMES = {"mlx": "MLX's own BLAS", "openblas": "OpenBLAS"}
_TICKS = 12  # more different values than that get the axis' own ticks
_ACCEPTANCES = [i / 20 for i in range(21)]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot: lines (x, y) by label. `name` is that of its file. `ticks`: names of the places on the x axis."""

    name: str
    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    ticks: Sequence[str] = ()


def plots_of(record: Record) -> list[Plot]:
    """What a record has to show; nothing for kinds that are tables only."""
    return [plot for plot in _KINDS.get(record["benchmark"], _none)(record) if plot.lines]


def draw(plots: Sequence[Plot], folder: Path, *, prefix: str = "") -> list[Path]:
    """One PNG for each. Raises RuntimeError where matplotlib is missing, and OSError."""
    files = []
    for plot in plots:
        figure = new_figure(7.5, 4.5)
        axes = figure.subplots()
        for label, (x, y) in plot.lines.items():
            axes.plot(x, y, marker="o", markersize=3, label=label)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
        axes.set_ylim(bottom=0)
        if plot.ticks:
            axes.set_xticks(range(len(plot.ticks)), plot.ticks, rotation=20, ha="right", fontsize="small")
        elif len(places := sorted({at for x, _ in plot.lines.values() for at in x})) <= _TICKS:
            axes.set_xticks(places, [f"{at:g}" for at in places])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{prefix}{plot.name}.png")
        figure.savefig(files[-1], dpi=130)
    return files


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. Raises RuntimeError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install 'mlx-gemma-mtp[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


# --- the kinds of records -----------------------------------------------------------------------------------------


def _none(record: Record) -> Iterator[Plot]:
    yield from ()


def _bench(record: Record) -> Iterator[Plot]:
    """The command `bench`: speed, first token, memory by batch; acceptance by position."""
    measured: Mapping[str, Mapping[str, Any]] = record["summary"]
    arms = list(dict.fromkeys(arm for entered in measured.values() for arm in entered))

    def by_batch(value: Callable[[Mapping[str, Any]], float]) -> dict[str, Line]:
        found = {}
        for arm in arms:
            points = [(float(b), value(entered[arm])) for b, entered in measured.items() if arm in entered]
            found[arm] = ([x for x, _ in points], [y for _, y in points])
        return found

    speed = by_batch(lambda m: float(m["decode_tokens_per_second"]["median"]))
    yield Plot(name="speed-by-batch", title="Decoding", x="batch", y="tokens/s", lines=speed)
    first = by_batch(lambda m: float(m["first_token_s"]["median"]))
    yield Plot(name="first-token", title="Time to the first token of all rows", x="batch", y="s", lines=first)
    peak = by_batch(lambda m: m["peak_bytes"] / 1e9)
    yield Plot(name="memory-by-batch", title="Peak memory", x="batch", y="GB", lines=peak)
    shares = {
        f"{arm}, batch {b}": _by_position(entered[arm]["acceptance_by_position"])
        for b, entered in measured.items()
        for arm in entered
        if entered[arm]["acceptance_by_position"]
    }
    yield Plot(name="acceptance-by-position", title="Drafts accepted", x="position", y="share", lines=shares)


def _by_position(shares: Sequence[float]) -> Line:
    return [float(i + 1) for i in range(len(shares))], list(shares)


def _decode(record: Record) -> Iterator[Plot]:
    """Speed by depth, of the libraries that draft."""
    lines: dict[str, Line] = {}
    for blas, run in record["runs"].items():
        for mode, title in (("one", "one at a time"), ("batch", "together")):
            for library in ("ours", "mlx-vlm"):
                points = [
                    (float(depth), float(run["summary"][mode][arm]["decode_tokens_per_second"]["median"]))
                    for depth in record["depths"]
                    if (arm := f"{library}, {_drafts(depth)}") in run["summary"][mode]
                ]
                if points:
                    label = f"{library}, {title}, {_NAMES[blas]}"
                    lines[label] = [x for x, _ in points], [y for _, y in points]
    yield Plot(name="speed-by-depth", title="Decoding", x="drafts per round", y="tokens/s", lines=lines)


def _drafts(depth: int) -> str:
    return {0: "plain", 1: "1 draft"}.get(depth, f"{depth} drafts")


def _limits(record: Record) -> Iterator[Plot]:
    """Achieved beside ideal by depth; speed by acceptance, computed from the rounds' times; memory by context."""
    for blas, run in record["runs"].items():
        for name, pair in run["pairs"].items():
            of = f"{Path(name).name}-{blas}"
            where = f"{Path(name).name}, {_NAMES[blas]}"
            rows, ideal, gain = pair["configurations"], dict[str, Line](), dict[str, Line]()
            for batch in sorted({c["batch"] for c in rows}):
                ours = sorted((c for c in rows if c["batch"] == batch), key=lambda c: int(c["depth"]))
                depths = [float(c["depth"]) for c in ours]
                for what in ("ideal", "achieved"):
                    ideal[f"batch {batch}, {what}"] = depths, [float(c[f"{what}_tokens_per_second"]) for c in ours]
                gain |= {f"batch {batch}, {label}": line for label, line in _gains(ours).items()}
            title = f"Limits: {where}"
            yield Plot(name=f"limits-{of}", title=title, x="drafts per round", y="tokens/s", lines=ideal)
            title = f"Speed by acceptance, from measured rounds: {where}"
            yield Plot(name=f"speed-by-acceptance-{of}", title=title, x="acceptance", y="times plain", lines=gain)
            held = _memory(pair["memory"])
            yield Plot(name=f"memory-{of}", title=f"Memory: {where}", x="tokens of context", y="MB", lines=held)


def _gains(rows: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """By depth, how many times plain speed the measured rounds of one batch give at each acceptance."""
    ms = {int(c["depth"]): float(c["achieved_ms"]["median"]) for c in rows}
    if 0 not in ms:
        return {}
    return {
        _drafts(k): (list(_ACCEPTANCES), [committed([a] * k)[-1] * ms[0] / ms[k] for a in _ACCEPTANCES])
        for k in ms
        if k
    }


def _memory(samples: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for depth in sorted({m["depth"] for m in samples}):
        ours = [m for m in samples if m["depth"] == depth]
        x = [float(m["context"]) for m in ours]
        lines[f"peak, {_drafts(depth)}"] = x, [m["peak_bytes"] / 1e6 for m in ours]
        if depth == 0:
            lines["weights and K/V"] = x, [m["held_bytes"] / 1e6 for m in ours]
            lines["K/V"] = x, [m["kv_bytes"] / 1e6 for m in ours]
    return lines


def _context(record: Record) -> Iterator[Plot]:
    """Milliseconds of a round's parts, and memory, by context."""
    names = {
        "decode": "decoding a token",
        "verify": f"verifying {record['block']} tokens",
        "sliding": "layers with a window",
        "full": "layers without a window",
        "draft": "a draft",
    }
    for blas, run in record["runs"].items():
        times, where = run["times_ms"], _NAMES[blas]
        contexts = [float(c) for c in times]
        lines = {label: (contexts, [float(times[c][n]["median"]) for c in times]) for n, label in names.items()}
        yield Plot(name=f"time-by-context-{blas}", title=f"Cost: {where}", x="tokens of context", y="ms", lines=lines)
        held = _memory(run["memory"])
        title = f"Memory: {where}"
        yield Plot(name=f"memory-by-context-{blas}", title=title, x="tokens of context", y="MB", lines=held)


def _serve(record: Record) -> Iterator[Plot]:
    """Speed by batch, and the mean time to the first token by scenario."""
    for blas, run in record["runs"].items():
        measured = run["summary"]
        arms = list(dict.fromkeys(arm for s in measured.values() for arm in s))
        batches = [s for s in measured if s.startswith("batch ")]
        speed, first = dict[str, Line](), dict[str, Line]()
        for arm in arms:
            known = [s for s in batches if arm in measured[s]]
            rates = [float(measured[s][arm]["tokens_per_second"]["median"]) for s in known]
            speed[arm] = [float(s.removeprefix("batch ")) for s in known], rates
            places = [i for i, s in enumerate(measured) if arm in measured[s]]
            times = [float(m[arm]["mean_first_token_s"]["median"]) for m in measured.values() if arm in m]
            first[arm] = [float(i) for i in places], times
        where = _NAMES[blas]
        yield Plot(name=f"serving-{blas}", title=f"Serving: {where}", x="batch", y="tokens/s", lines=speed)
        title = f"Time to the first token: {where}"
        yield Plot(name=f"first-token-{blas}", title=title, x="", y="s", lines=first, ticks=list(measured))


def _acceptance(record: Record) -> Iterator[Plot]:
    """The share of drafts accepted at each position, by recipe of both models."""
    lines = {
        row["target"].replace("source", "bf16"): _by_position(row["acceptance_per_position"])
        for row in record["measured_built_in"]["acceptance"]
        if row["target"] == row["drafter"]
    }
    title = "Drafts accepted, built-in prompts, target and drafter alike"
    yield Plot(name="acceptance-by-position", title=title, x="position", y="share", lines=lines)


_KINDS: dict[str, Callable[[Record], Iterator[Plot]]] = {
    "bench": _bench,
    "decode": _decode,
    "limits": _limits,
    "context": _context,
    "serve": _serve,
    "acceptance": _acceptance,
}
