"""`--depth auto` beside fixed depths, in one run and one process: decode speed of a pair in float32, by batch.

    python bench/depth.py --pair demo|random --acceptance 0.8 --batches 1,4,8

The arms (auto, and each fixed depth) take turns, forwards and backwards. The best fixed depth is chosen on every
second repeat and scored on the others. `random` is a pair of 60 M parameters with random weights whose drafter does
its work, but whose guesses are scripted: the target's own tokens, right with the probability --acceptance.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import pairs

from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.runtime import Runtime
from mlx_gemma_mtp.speculative import Choose, DrafterModel
from mlx_gemma_mtp.views import HeldView

Arm = int | str
LENGTH = 40


class Scripted:
    """A drafter that does a real one's work and guesses from a script: `tokens` by position, each right or wrong."""

    def __init__(self, real: DrafterModel, tokens: Sequence[int], acceptance: float, vocab_size: int) -> None:
        draw, self._real = random.Random(0), real
        rows, length = 8, len(tokens) + 16
        right = [[draw.random() < acceptance for _ in range(length)] for _ in range(rows)]
        known = [*tokens, *[0] * 16]
        self._guesses = mx.array(
            [[t if ok else (t + 1) % vocab_size for t, ok in zip(known, r, strict=True)] for r in right]
        )
        # The probability that it claims for its guess is the one that it has.
        self._logit = mx.log(mx.array(acceptance * (vocab_size - 1) / (1 - acceptance)))
        mx.eval(self._guesses, self._logit)

    def draft(self, token: mx.array, hidden: mx.array, view: HeldView, depth: int, choose: Choose) -> mx.array:
        """See `speculative.DrafterModel`."""
        rows, steps = mx.arange(token.shape[0]), iter(range(depth))

        def scripted(scores: mx.array, ids: mx.array | None) -> mx.array:
            guess = self._guesses[rows, view.lengths + 1 + next(steps)]
            likely = mx.where(mx.arange(scores.shape[-1])[None] == guess[:, None], self._logit, 0.0)
            return choose(likely + 0.0 * scores, None)

        return self._real.draft(token, hidden, view, depth, scripted)


def random_pair(acceptance: float, new: int) -> tuple[Runtime, list[int]]:
    """The random pair, and the prompt that its script is of."""
    with pairs.random_pair(pairs.SHAPE_60M) as path:
        runtime = Runtime(load_pair(str(path), dtype="float32"))
    prompt = [random.Random(7).randrange(5, runtime.config.vocab_size) for _ in range(LENGTH)]
    plain = runtime.generate(prompt, max_tokens=new + 9, depth=0, ignore_eos=True).tokens
    real = runtime._speculator.drafter
    assert real is not None
    runtime._speculator.drafter = Scripted(real, prompt + plain, acceptance, runtime.config.vocab_size)
    return runtime, prompt


def measure(
    runtime: Runtime, prompts: list[list[int]], arms: Sequence[Arm], args: argparse.Namespace
) -> tuple[dict[Arm, list[float]], int]:
    """Decode rates of every repeat, and auto's compilations in them, behind one warm run of each arm.

    auto has three warm runs, as it also tries things out.
    """
    rates: dict[Arm, list[float]] = {arm: [] for arm in arms}
    for arm in [*arms, "auto", "auto"]:
        runtime.generate_batch(prompts, max_tokens=args.new, depth=arm, ignore_eos=True)
    expected, compiled = None, dict.fromkeys(arms, 0)
    for repeat in range(args.repeats):
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            before = runtime._speculator.traces
            outputs = runtime.generate_batch(prompts, max_tokens=args.new, depth=arm, ignore_eos=True)
            compiled[arm] += runtime._speculator.traces - before
            rates[arm].append(outputs[0].timing.decode_rate)
            tokens = [o.tokens for o in outputs]
            expected = tokens if expected is None else expected
            if tokens != expected:
                print(f"  depth {arm} gave other tokens", file=sys.stderr)
    print(f"  compilations while measured: auto {compiled['auto']}, others {sum(compiled.values()) - compiled['auto']}")
    return rates, compiled["auto"]


def judge(rates: dict[Arm, list[float]]) -> dict[str, Any]:
    """auto over the best fixed depth (chosen on the even repeats, scored on the odd ones) and over plain."""
    fixed = [arm for arm in rates if arm != "auto"]
    best = max(fixed, key=lambda arm: statistics.median(rates[arm][::2]))
    ratio = [a / b for a, b in zip(rates["auto"][1::2], rates[best][1::2], strict=True)]
    plain = [a / b for a, b in zip(rates["auto"], rates[0], strict=True)]
    return {
        "best": best,
        "auto_over_best": common.Spread.of(ratio).to_dict(),
        "auto_over_plain": common.Spread.of(plain).to_dict(),
        "tokens_per_second": {str(arm): common.Spread.of(r).to_dict() for arm, r in rates.items()},
        "samples": {str(arm): [round(x, 3) for x in r] for arm, r in rates.items()},
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pair", choices=["demo", "random"], default="demo")
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--deepest", type=int, default=6)
    parser.add_argument("--tune", action="store_true", help="measure the costs first, as `tune` does")
    parser.add_argument("--tune-seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path, help="the record (default: none)")
    args = parser.parse_args()
    if args.pair == "random":
        runtime, prompt = random_pair(args.acceptance, args.new)
        everyone = [prompt] * 8
    else:
        runtime = Runtime(load_pair("demo", dtype="float32"))
        everyone = common.make_prompts(common.DEMO)[1]
    arms: list[Arm] = ["auto", *range(args.deepest + 1)]
    if args.tune:
        runtime.tune(seconds=args.tune_seconds)
    found = {}
    for batch in map(int, args.batches.split(",")):
        rates, compiled = measure(runtime, everyone[:batch], arms, args)
        found[batch] = {**judge(rates), "auto_compilations": compiled}
        medians = {arm: round(s["median"], 1) for arm, s in found[batch]["tokens_per_second"].items()}
        over, plain = found[batch]["auto_over_best"]["median"], found[batch]["auto_over_plain"]["median"]
        print(f"batch {batch}: {over:.3f}x of best fixed ({found[batch]['best']}), {plain:.3f}x of plain; {medians}")
        print(f"  {runtime.depth_policy('auto').describe()}; purse {runtime.depth_memory.purse:.3f}")
    if args.out:
        record = {
            "benchmark": "depth",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": common.describe_commit(),
            "machine": common.describe_machine(),
            "preload": os.environ.get("LD_PRELOAD", ""),
            "mlx": version("mlx"),
            "pair": args.pair,
            "acceptance": args.acceptance if args.pair == "random" else None,
            "new_tokens": args.new,
            "costs_measured_in_this_run": args.tune,
            "dtype": "float32",
            "batches": found,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
