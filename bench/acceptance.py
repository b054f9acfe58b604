"""How many drafts are accepted under shared Gumbel noise (a seed) and under rejection sampling (none), side by side.

    python bench/acceptance.py --pair DIR --temperatures 0.3,0.8,1,1.5 --depth 4

The same prompts under both contracts, each prompt several times over, in ragged batches, to the answers' own ends.
Two sets of prompts: the benchmarks' and verify's, which are harder for the demo pair. Knows nothing of speed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import common

from mlx_gemma_mtp import Runtime, SamplingParams, SpecStats, load
from mlx_gemma_mtp.verify import Limits, built_in_cases


def measure(
    runtime: Runtime,
    prompts: list[list[int]],
    temperature: float,
    *,
    depth: int,
    tokens: int,
    repeats: int,
    seeded: bool,
) -> SpecStats:
    """The counters of `repeats` outputs of every prompt."""
    asked = [prompt for prompt in prompts for _ in range(repeats)]
    params = [SamplingParams(temperature=temperature, seed=i if seeded else None) for i in range(len(asked))]
    outputs = runtime.generate_batch(asked, max_tokens=tokens, sampling=params, depth=depth, max_batch=16)
    return SpecStats.total(output.stats for output in outputs)


def main() -> None:
    """Measure and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", help="a target's directory; the demo pair")
    parser.add_argument("--drafter", help="its drafter's directory, if not found beside it")
    parser.add_argument("--temperatures", default="0.3,0.8,1,1.5")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96, help="per output")
    parser.add_argument("--repeats", type=int, default=4, help="outputs per prompt")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pair = common.find_pair(args.pair, args.drafter)
    runtime = load(str(pair.target), drafter=str(pair.drafter), dtype="float32")
    what, chats = common.make_prompts(pair.target)
    built_in = built_in_cases(runtime.text, Limits.of(runtime, args.tokens))
    sets = {what: chats, "verify's built-in prompts": [list(case.tokens) for case in built_in]}
    rows: list[dict[str, Any]] = []
    for (name_of_set, prompts), temperature in product(sets.items(), map(float, args.temperatures.split(","))):
        row: dict[str, Any] = {"prompts": name_of_set, "temperature": temperature}
        for name, seeded in (("shared_noise", True), ("rejection", False)):
            stats = measure(
                runtime, prompts, temperature, depth=args.depth, tokens=args.tokens, repeats=args.repeats, seeded=seeded
            )
            row[name] = stats.to_dict()
            print(
                f"{name_of_set}, temperature {temperature}, {name}: {stats.accepted_per_round:.3f} accepted per round",
                flush=True,
            )
        row["shared_over_rejection"] = round(
            row["shared_noise"]["accepted_per_round"] / row["rejection"]["accepted_per_round"], 4
        )
        rows.append(row)
    record = {
        "benchmark": "shared-noise",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": common.describe_commit(),
        "machine": common.describe_machine(),
        "versions": {package: version(package) for package in ("mlx", "mlx-gemma-mtp")},
        "pair": {
            "target": common.describe_checkpoint(pair.target),
            "drafter": common.describe_checkpoint(pair.drafter),
        },
        "dtype": "float32",
        "lengths": {name: [len(prompt) for prompt in prompts] for name, prompts in sets.items()},
        "tokens": args.tokens,
        "repeats": args.repeats,
        "batch": 16,
        "depth": args.depth,
        "rows": rows,
    }
    out = args.out or common.result_file("shared-noise")
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
