"""README.md's tables, made from the newest records in bench/results.

    python bench/tables.py            # write them anew between <!-- table: NAME --> and <!-- end of table -->
    python bench/tables.py --check    # exit with 1 where README.md holds others

Knows no measuring: every number and condition comes from a record.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_gemma_mtp.convert.output import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BLAS = {"mlx": "MLX's own BLAS", "openblas": "OpenBLAS"}
_MARKED = re.compile(r"(<!-- table: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Record = Mapping[str, Any]


class TableError(ValueError):
    """A marker that nothing can be put behind."""


def newest(benchmark: str, results: Path = RESULTS) -> tuple[str, Record]:
    """The file name of a benchmark's last record, and what it holds. Raises TableError."""
    found = sorted(results.glob(f"{benchmark}-[0-9]*.json"))
    if not found:
        raise TableError(f"{results} has no record of {benchmark!r}")
    return found[-1].name, json.loads(found[-1].read_text(encoding="utf-8"))


# --- one table of one benchmark -----------------------------------------------------------------------------------


def decode(record: Record) -> str:
    """Tokens per second of all libraries, by mode and BLAS."""
    drafts = max(record["depths"])
    arms = {
        "mlx-lm, plain": "mlx-lm, plain",
        "mlx-vlm, plain": "mlx-vlm, plain",
        f"mlx-vlm, {drafts} drafts": "mlx-vlm, MTP",
        "ours, plain": "ours, plain",
        f"ours, {drafts} drafts": "ours, MTP",
    }
    rows = [["", *arms.values()]]
    for blas, run in sorted(record["runs"].items(), reverse=True):
        for mode, title in (("one", "one at a time"), ("batch", f"{record['batch']} together")):
            measured = run["summary"][mode]
            rates = [measured[a]["decode_tokens_per_second"]["median"] if a in measured else None for a in arms]
            best = max(filter(None, rates))
            cells = ["-" if r is None else f"**{r:.0f}**" if r == best else f"{r:.0f}" for r in rates]
            rows.append([f"{title}, {BLAS[blas]}", *cells])
    return "\n".join(markdown_table(rows))


def limits(record: Record) -> str:
    """Achieved over ideal, by pair and batch, at every depth measured."""
    runs = record["runs"]
    depths = sorted({c["depth"] for r in runs.values() for p in r["pairs"].values() for c in p["configurations"]})
    rows = [["achieved / ideal", *(f"{d} drafts" if d else "plain" for d in depths)]]
    for blas, run in sorted(runs.items(), reverse=True):
        for name, pair in run["pairs"].items():
            ratios = {(c["batch"], c["depth"]): c["ratio"]["median"] for c in pair["configurations"]}
            size = f"{pair['parameters']['target'] / 1e6:.0f} M parameters"
            for batch in sorted({b for b, _ in ratios}):
                cells = [f"{ratios[batch, d]:.2f}" if (batch, d) in ratios else "-" for d in depths]
                rows.append([f"{name} ({size}), batch {batch}, {BLAS[blas]}", *cells])
    return "\n".join(markdown_table(rows))


def context(record: Record) -> str:
    """Milliseconds of a round's parts and peak memory, by context and BLAS."""
    names = {
        "decode": "decode, ms",
        "verify": f"verify {record['block']}, ms",
        "sliding": "of it: sliding layers",
        "full": "full layers",
        "draft": "a draft, ms",
    }
    rows = [["positions", *names.values(), "weights and K/V", "peak, MTP"]]
    for blas, run in sorted(record["runs"].items(), reverse=True):
        for positions, row in run["times_ms"].items():
            held = [m for m in run["memory"] if m["context"] == int(positions)][-1]
            sizes = [f"{held[n] / 1e6:.0f} MB" for n in ("held_bytes", "peak_bytes")]
            cells = [f"{row[n]['median']:.1f}" for n in names]
            rows.append([f"{int(positions):,}, {BLAS[blas]}", *cells, *sizes])
    return "\n".join(markdown_table(rows))


def prefill(record: Record) -> str:
    """Tokens per second until the first token, ours and mlx-lm's, and peak memory."""
    rows = [["prefill, tokens/s (peak memory)", "ours", "mlx-lm"]]
    for blas, run in sorted(record["runs"].items(), reverse=True):
        for what, p in run["prefill"].items():
            if what == "environments":
                continue
            total, title = sum(p["lengths"]), f"{what} ({len(p['lengths'])} x {p['lengths'][0]} tokens), {BLAS[blas]}"
            cells = [
                f"{total / p['seconds'][name]['median']:.0f} ({p['peak_bytes'][name] / 1e6:.0f} MB)"
                for name in ("ours", "mlx-lm")
            ]
            rows.append([title, *cells])
    return "\n".join(markdown_table(rows))


def serve(record: Record) -> str:
    """Tokens per second, and mean time to first token, by scenario."""
    runs = record["runs"]
    arms = list(dict.fromkeys(a for r in runs.values() for s in r["summary"].values() for a in s))
    rows = [["tokens/s (first token)", *arms]]
    for blas, run in sorted(runs.items(), reverse=True):
        for scenario, measured in run["summary"].items():
            cells = []
            for arm in arms:
                m = measured.get(arm)
                first = None if m is None else m["mean_first_token_s"]["median"]
                cells.append("-" if m is None else f"{m['tokens_per_second']['median']:.0f} ({first:.2f} s)")
            rows.append([f"{scenario}, {BLAS[blas]}", *cells])
    return "\n".join(markdown_table(rows))


def convert_cost(record: Record) -> str:
    """Time, memory and size of a conversion, ours and mlx-lm's."""
    rows = [["", "time", "peak memory", "output"]]
    for side, label in (("ours", "ours"), ("mlx-lm", "`mlx_lm.convert`")):
        row = record["median"][side]
        times = ", ".join(f"{sample['wall_s']:.0f}" for sample in record["samples"][side])
        peak, output = row["peak_rss_bytes"] / 1e9, row["output_bytes"] / 1e9
        rows.append([label, f"{row['wall_s']:.0f} s ({times})", f"{peak:.2f} GB", f"{output:.1f} GB"])
    return "\n".join(markdown_table(rows))


def accepted(measured: Record) -> str:
    """Accepted drafts per round and fidelity for every combination of recipes; "source" is bf16."""
    drafters = list(dict.fromkeys(row["drafter"] for row in measured["acceptance"]))
    cells = {(row["target"], row["drafter"]): row for row in measured["acceptance"]}

    def shown(name: str) -> str:
        return {"source": "bf16"}.get(name, name.replace("-g32", ", groups of 32"))

    rows = [["target / drafter", *map(shown, drafters), "mean KL", "top-1", "perplexity"]]
    for target, fidelity in measured["fidelity"].items():
        row = [f"{cells[target, d]['accepted_per_round']:.2f}" for d in drafters]
        row += [f"{fidelity['mean_kl']:.4f}", f"{fidelity['top1_agreement']:.1%}"]
        rows.append([shown(target), *row, f"{fidelity['perplexity_ratio']:.3f}"])
    return "\n".join(markdown_table(rows))


def depth(records: Mapping[str, Record]) -> str:
    """Tokens per second of plain decoding, of the best fixed depth and of auto, and how long the policy took."""
    rows = [["`--depth auto`", "plain", "best fixed depth", "auto", "auto / plain", "auto / best", "policy"]]
    for record in records.values():
        pair = f"60 M parameters, {record['acceptance']:.1f} accepted" if record["pair"] == "random" else "demo"
        blas = BLAS["openblas" if record["preload"] else "mlx"]
        for batch, found in record["batches"].items():
            speed, best = found["tokens_per_second"], found["best"]
            cells = [f"{speed['0']:.0f}", f"{speed[str(best)]:.0f} (at {best})", f"{speed['auto']:.0f}"]
            cells += [f"{found[n]:.2f}" for n in ("auto_over_plain", "auto_over_best")]
            policy, waited = (found[f"policy_ms_per_round{n}"] for n in ("", "_waited_for"))
            cells.append(f"{policy:.2f} ({waited:.2f})")
            rows.append([f"{pair}, batch {batch}, {blas}", *cells])
    return "\n".join(markdown_table(rows))


DEPTH = [f"depth-{pair}-{blas}" for pair in ("demo", "random") for blas in ("openblas", "mlx")]

TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "decode": ("decode", decode),
    "limits": ("limits", limits),
    "context": ("context", context),
    "prefill": ("context", prefill),
    "serve": ("serve", serve),
    "convert": ("convert", convert_cost),
    "acceptance": ("acceptance", lambda record: accepted(record["measured"])),
    "acceptance-built-in": ("acceptance", lambda record: accepted(record["measured_built_in"])),
}
"""By the name in the marker: the benchmark whose record it needs, and what renders it."""


# --- the file -----------------------------------------------------------------------------------------------------


def conditions(name: str, record: Record) -> str:
    """The line under a table: where its numbers come from."""
    machine = record["machine"]
    versions = record.get("versions") or ({"mlx": record["mlx"]} if "mlx" in record else _versions(record))
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("mlx", "mlx-lm", "mlx-vlm") if name in versions)
    repeats = f", {_repeats(record)} repeats" if "repeats" in record else ""
    where = f"{machine['chip']}, {machine['cores']} cores, {machine['os'].partition('-')[0]}"
    return f"{where}; {libraries}{repeats}: `bench/results/{name}`"


def _repeats(record: Record) -> str:
    """How many there were: of limits as many as there was time for, in each configuration."""
    runs = record.get("runs", {}).values()
    pairs = [pair for run in runs for pair in run.get("pairs", {}).values()]
    counts = [c["repeats"] for pair in pairs for c in pair["configurations"]]
    return f"{min(counts)} to {max(counts)}" if counts else str(record["repeats"])


def _versions(record: Record) -> dict[str, str]:
    found: dict[str, str] = {}
    for run in record["runs"].values():
        for about in run["environments"].values():
            found |= about["versions"]
    return found


def rendered(text: str, results: Path = RESULTS) -> str:
    """A text with every marked table made anew. Raises TableError."""

    def one(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "depth":
            found = dict(newest(benchmark, results) for benchmark in DEPTH if any(results.glob(f"{benchmark}-[0-9]*")))
            if not found:
                return f"{match[1]}Not measured yet: `python bench/depth.py`\n{match[3]}"
            files: dict[str, list[str]] = {}
            for file, record in found.items():
                files.setdefault(conditions("", record).partition(":")[0], []).append(f"`bench/results/{file}`")
            where = "; ".join(f"{machine}: {', '.join(names)}" for machine, names in files.items())
            return f"{match[1]}{depth(found)}\n\n{where}\n{match[3]}"
        if name not in TABLES:
            raise TableError(f"there is no table {name!r}, expected one of {', '.join([*TABLES, 'depth'])}")
        benchmark, render = TABLES[name]
        try:
            file, record = newest(benchmark, results)
        except TableError:
            return f"{match[1]}Not measured yet: `python bench/run_all.py --only {benchmark}`\n{match[3]}"
        return f"{match[1]}{render(record)}\n\n{conditions(file, record)}\n{match[3]}"

    return _MARKED.sub(one, text)


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something would change")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    text = args.file.read_text(encoding="utf-8")
    fresh = rendered(text)
    if args.check:
        if fresh != text:
            print(f"{args.file.name} holds other tables than bench/results: run python bench/tables.py")
        return int(fresh != text)
    args.file.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
