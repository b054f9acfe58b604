"""Plots of the newest record of every benchmark, or of the records named, as PNG files.

    pip install -e '.[plot]' && python bench/plot.py [RECORD.json ...] [--out bench/plots]

Speed by batch, by depth and by acceptance; time to the first token; acceptance by position; cost and memory by
context:
whatever the records hold. See mlx_gemma_mtp/benchmark/plots.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tables import RESULTS, TableError, newest

from mlx_gemma_mtp.benchmark.plots import draw, plots_of

BENCHMARKS = ("bench", "decode", "limits", "context", "serve", "acceptance")


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="default: the newest of every kind in bench/results")
    parser.add_argument("--out", type=Path, default=RESULTS.parent / "plots")
    args = parser.parse_args()
    records = [json.loads(path.read_text(encoding="utf-8")) for path in args.records]
    for name in BENCHMARKS if not records else ():
        try:
            records.append(newest(name)[1])
        except TableError as missing:
            print(f"{missing}: not drawn", file=sys.stderr)
    try:
        for record in records:
            for file in draw(plots_of(record), args.out, prefix=f"{record['benchmark']}-"):
                print(file)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
