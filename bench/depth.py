"""`--depth auto` beside fixed depths, in one run and one process: decode speed of a pair in float32, by batch.

    python bench/depth.py --pair demo|random --acceptance 0.8 --batches 1,4,8

All arms (auto, and each fixed depth) decode the same requests at the same time, each in a scheduler of its own: they
take turns of --slice milliseconds in random order, and only an arm's own turns count, for auto's clock, too. So a
machine that slows down does so for all of them. The best fixed depth is chosen on every second repeat and scored on the
others, on the same texts. Compiled rounds are shared: what auto needs is mostly there behind the warm-ups, which also
teach it.
`random` is a pair of 60 M parameters with random weights whose drafter does its work, but whose guesses are scripted:
the target's own tokens, right with the probability --acceptance.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import pairs

from mlx_gemma_mtp.adaptive import AdaptiveDepth, DepthMemory
from mlx_gemma_mtp.depth import DepthPolicy, RoundShape, RowOutcome, RowState
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.request import Request
from mlx_gemma_mtp.runtime import Runtime
from mlx_gemma_mtp.scheduler import Scheduler
from mlx_gemma_mtp.speculative import Choose, DrafterModel
from mlx_gemma_mtp.views import HeldView

Arm = int | str
LENGTH, TEXTS = 40, 8  # tokens of the random pair's prompts, and how many there are
SPREAD = 9  # lengths that are asked for, the longest of them --new tokens


class Scripted:
    """A drafter that does a real one's work and guesses from a script: the next tokens of `texts`, right or wrong."""

    def __init__(self, real: DrafterModel, texts: Sequence[Sequence[int]], acceptance: float, vocab_size: int) -> None:
        draw, self._real = random.Random(0), real
        rows, length = 8, len(texts[0]) + 16
        right = [[[draw.random() < acceptance for _ in range(length)] for _ in range(rows)] for _ in texts]
        # Which text a row continues is told by the token that it is at.
        self._known = mx.array([[*text, *[0] * 16] for text in texts])
        self._guesses = mx.where(mx.array(right), self._known[:, None], (self._known[:, None] + 1) % vocab_size)
        # The probability that it claims for its guess is the one that it has.
        self._logit = mx.log(mx.array(acceptance * (vocab_size - 1) / (1 - acceptance)))
        mx.eval(self._known, self._guesses, self._logit)

    def draft(self, token: mx.array, hidden: mx.array, view: HeldView, depth: int, choose: Choose) -> mx.array:
        """See `speculative.DrafterModel`."""
        rows, steps = mx.arange(token.shape[0]), iter(range(depth))
        text = mx.argmax(self._known[:, view.lengths] == token[None], axis=0)

        def scripted(scores: mx.array, ids: mx.array | None) -> mx.array:
            guess = self._guesses[text, rows, view.lengths + 1 + next(steps)]
            likely = mx.where(mx.arange(scores.shape[-1])[None] == guess[:, None], self._logit, 0.0)
            return choose(likely + 0.0 * scores, None)

        return self._real.draft(token, hidden, view, depth, scripted)


def random_pair(acceptance: float, new: int) -> tuple[Runtime, list[list[int]]]:
    """The random pair, and prompts of texts that its script knows: with one alone, its luck would choose the depth."""
    with pairs.random_pair(pairs.SHAPE_60M) as path:
        runtime = Runtime(load_pair(str(path), dtype="float32"))
    draw, vocab_size = random.Random(7), runtime.config.vocab_size
    prompts = [[draw.randrange(5, vocab_size) for _ in range(LENGTH)] for _ in range(TEXTS)]
    plain = [runtime.generate(p, max_tokens=new + 9, depth=0, ignore_eos=True).tokens for p in prompts]
    real = runtime._speculator.drafter
    assert real is not None
    texts = [p + t for p, t in zip(prompts, plain, strict=True)]
    runtime._speculator.drafter = Scripted(real, texts, acceptance, vocab_size)
    return runtime, prompts


class Watched(AdaptiveDepth):
    """The policy with a clock that stands still while other arms have their turns, and the seconds that it takes.

    `worked`: those of them that this thread had a processor for: BLAS's waiting threads may have it meanwhile.
    `waited`: those in which no round is on its way (begun and not observed; a CPU may be done with it already).
    Describing a choice isn't counted.
    """

    def __init__(self, memory: DepthMemory) -> None:
        self.away, self.took, self.worked, self.waited = 0.0, 0.0, 0.0, 0.0
        self.rounds = Counter[tuple[int, int]]()
        self._begun = 0
        super().__init__(memory, clock=lambda: time.perf_counter() - self.away)

    def _spent(self, worked: float, begin: float) -> None:
        seconds = time.perf_counter() - begin
        self.worked += time.thread_time() - worked
        self.took += seconds
        if self._begun == 0:
            self.waited += seconds

    def plan(self, rows: Sequence[RowState], *, width: int, context: int, compiled: Callable[[int], bool]) -> list[int]:
        """See `DepthPolicy`."""
        worked, begin = time.thread_time(), time.perf_counter()
        depths = super().plan(rows, width=width, context=context, compiled=compiled)
        self._spent(worked, begin)
        return depths

    def begin(self) -> None:
        """See `DepthPolicy`."""
        worked, begin = time.thread_time(), time.perf_counter()
        super().begin()
        self._spent(worked, begin)
        self._begun += 1

    def meanwhile(self) -> None:
        """See `DepthPolicy`."""
        worked, begin = time.thread_time(), time.perf_counter()
        super().meanwhile()
        self._spent(worked, begin)

    def observe(self, shape: RoundShape, outcomes: Sequence[RowOutcome]) -> None:
        """See `DepthPolicy`."""
        self._begun -= 1
        worked, begin = time.thread_time(), time.perf_counter()
        super().observe(shape, outcomes)
        self._spent(worked, begin)
        self.rounds[shape.verified, shape.drafted] += 1

    def forget(self, request: int) -> None:
        """See `DepthPolicy`."""
        worked, begin = time.thread_time(), time.perf_counter()
        super().forget(request)
        self._spent(worked, begin)

    def abort(self) -> None:
        """See `DepthPolicy`."""
        self._begun = 0
        super().abort()


@dataclass
class Racer:
    """An arm's requests on their way. The first token of each, which the prefill gives, is not counted."""

    scheduler: Scheduler
    outputs: dict[int, list[int]]
    tokens: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, runtime: Runtime, depth: int | DepthPolicy, prompts: list[list[int]], new: Sequence[int]) -> Racer:
        """Prefill all prompts; `new`: the tokens that each is to get."""
        scheduler = runtime.scheduler(depth=depth, max_batch=len(prompts))
        racer = cls(scheduler, {})
        for prompt, most in zip(prompts, new, strict=True):
            racer.outputs[scheduler.add(Request(prompt=prompt, max_tokens=most, ignore_eos=True))[0]] = []
        while scheduler.waiting:
            racer._step()
        racer.tokens = 0
        return racer

    def turn(self, seconds: float) -> bool:
        """Decode for `seconds`; whether there is more to do."""
        begin = time.perf_counter()
        while self.scheduler.busy and time.perf_counter() - begin < seconds:
            self._step()
        mx.synchronize()  # of a round launched ahead, some may be left
        self.seconds += time.perf_counter() - begin
        return self.scheduler.busy

    def _step(self) -> None:
        for event in self.scheduler.step():
            self.outputs[event.request_id] += event.tokens
            self.tokens += len(event.tokens)


@dataclass
class Found:
    """Tokens and seconds of each repeat by arm; of auto also compilations, rounds and its policy's seconds.

    `worked` and `waited`: see `Watched`.
    """

    arms: dict[Arm, list[tuple[int, float]]]
    compiled: int = 0
    rounds: Counter[tuple[int, int]] = field(default_factory=Counter)
    policy: float = 0.0
    worked: float = 0.0
    waited: float = 0.0
    different: int = 0  # arms of a repeat whose tokens weren't those of the first arm


def race(
    runtime: Runtime, prompts: list[list[int]], arms: Sequence[Arm], new: Sequence[int], turn: float
) -> tuple[dict[Arm, Racer], Watched, int]:
    """All arms on the same requests, in turns; with auto's policy and its compilations."""
    policy = Watched(runtime.depth_memory)
    racers: dict[Arm, Racer] = {}
    compiled, left = 0, 0.0
    for arm in arms:
        traces = runtime._speculator.traces
        racers[arm] = Racer.start(runtime, policy if arm == "auto" else int(arm), prompts, new)
        if arm == "auto":
            compiled, left = runtime._speculator.traces - traces, time.perf_counter()
    going, draw = list(arms), random.Random(0)
    while going:
        # What ran before an arm has left its own in the caches: in a fixed order plain decoding would always come
        # behind auto, that often decodes plainly, too, and auto behind the deepest.
        draw.shuffle(going)
        for arm in tuple(going):
            traces = runtime._speculator.traces
            if arm == "auto":
                policy.away += time.perf_counter() - left
            if not racers[arm].turn(turn):
                going.remove(arm)
            if arm == "auto":
                compiled, left = compiled + runtime._speculator.traces - traces, time.perf_counter()
    return racers, policy, compiled


def measure(
    runtime: Runtime, everyone: list[list[int]], rows: int, repeats: int, arms: Sequence[Arm], args: argparse.Namespace
) -> Found:
    """Repeats with other prompts each where the batch is smaller, behind some that warm up."""
    found = Found({arm: [] for arm in arms})
    for repeat in range(-2 * args.warmups, repeats):
        # Even repeats choose the best depth, odd ones score it: both have the same texts.
        request = repeat // 2 * rows
        prompts = [everyone[(request + i) % len(everyone)] for i in range(rows)]
        # With one length for all, the depth whose blocks happen to end where requests do would be the best.
        new = [args.new - (request + i) % SPREAD for i in range(rows)]
        first = repeat // 2 % len(arms)
        order = [*arms[first:], *arms[:first]]
        racers, policy, compiled = race(runtime, prompts, order, new, args.slice / 1000)
        for arm in arms:
            if racers[arm].outputs != racers[arms[0]].outputs:
                print(f"  depth {arm} gave other tokens than {arms[0]}", file=sys.stderr)
                found.different += 1
        if repeat < 0:
            continue
        for arm, racer in racers.items():
            found.arms[arm].append((racer.tokens, racer.seconds))
        found.compiled += compiled
        found.rounds.update(policy.rounds)
        found.policy += policy.took
        found.worked += policy.worked
        found.waited += policy.waited
    return found


def judge(found: Found) -> dict[str, Any]:
    """auto over the best fixed depth (chosen on the even repeats, scored on the odd ones) and over plain decoding."""

    def rate(arm: Arm, first: int = 0, step: int = 1) -> float:
        """Tokens per second of some of the repeats together."""
        samples = found.arms[arm][first::step]
        return sum(tokens for tokens, _ in samples) / sum(seconds for _, seconds in samples)

    fixed = [arm for arm in found.arms if arm != "auto"]
    rates = {arm: [tokens / seconds for tokens, seconds in samples] for arm, samples in found.arms.items()}
    best = max(fixed, key=lambda arm: rate(arm, 0, 2))
    single = [a / b for a, b in zip(rates["auto"], rates[0], strict=True)]
    return {
        "best": best,
        "auto_over_best": round(rate("auto", 1, 2) / rate(best, 1, 2), 4),
        "auto_over_best_of_all_repeats": round(rate("auto") / max(rate(arm) for arm in fixed), 4),
        "auto_over_plain": round(rate("auto") / rate(0), 4),
        "auto_over_plain_of_repeats": common.Spread.of(single).to_dict(),
        "tokens_per_second": {str(arm): round(rate(arm), 2) for arm in found.arms},
        "samples": {str(arm): [round(x, 2) for x in r] for arm, r in rates.items()},
        "arms_with_different_tokens": found.different,
        "auto_compilations": found.compiled,
        "auto_rounds": {f"{verified}+{drafted}": n for (verified, drafted), n in found.rounds.most_common()},
        "policy_ms_per_round": round(1000 * found.policy / found.rounds.total(), 4),
        "policy_cpu_ms_per_round": round(1000 * found.worked / found.rounds.total(), 4),
        "policy_ms_per_round_waited_for": round(1000 * found.waited / found.rounds.total(), 4),
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. Exits with 2 where they don't fit together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pair", choices=["demo", "random"], default="demo")
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--batches", default="1,4,8")
    about = "tokens, or up to 8 fewer (default: 64; the demo's answers end at 69 to 92)"
    parser.add_argument("--new", type=int, default=64, help=about)
    parser.add_argument("--repeats", default="48,24,16", help="of each batch (default: 48,24,16)")
    parser.add_argument("--warmups", type=int, default=4, help="pairs of repeats before (default: 4)")
    parser.add_argument("--slice", type=float, default=30.0, metavar="MS", help="an arm's turn (default: 30)")
    parser.add_argument("--depths", default="0,1,2,3,4,5,6", help="the fixed ones (default: 0 to 6)")
    parser.add_argument("--tune", action="store_true", help="measure the costs first, as `tune` does")
    parser.add_argument("--tune-seconds", type=float, default=110.0, help="at most (default: 110, as `tune`)")
    parser.add_argument("--out", type=Path, help="the record (default: none)")
    args = parser.parse_args(argv)
    for name in ("batches", "repeats", "depths"):
        try:
            setattr(args, name, [int(n) for n in getattr(args, name).split(",")])
        except ValueError:
            parser.error(f"--{name} is {getattr(args, name)!r}, expected numbers such as 1,4")
    if len(args.repeats) < len(args.batches):
        parser.error(f"--repeats is {args.repeats}, expected one for each of --batches {args.batches}")
    return args


def main() -> None:
    """Measure, print and record."""
    args = parse()
    if args.pair == "random":
        runtime, everyone = random_pair(args.acceptance, args.new)
    else:
        runtime = Runtime(load_pair("demo", dtype="float32"))
        everyone = common.make_prompts(common.DEMO)[1]
    arms: list[Arm] = ["auto", *args.depths]
    if args.tune:
        runtime.tune(seconds=args.tune_seconds)
    found = {}
    for rows, repeats in zip(args.batches, args.repeats, strict=False):
        costs = runtime.depth_memory.costs
        expected = [round(1000 * costs.level * s, 1) for s in costs.table(rows, 200).steady()]
        told = found[rows] = judge(measure(runtime, everyone, rows, repeats, arms, args))
        print(f"batch {rows}: {told['auto_over_best']:.3f}x of best fixed ({told['best']}), ", end="")
        print(f"{told['auto_over_plain']:.3f}x of plain; {told['tokens_per_second']}; ", end="")
        print(f"{told['auto_compilations']} compiled, policy {told['policy_ms_per_round']:.3f} ms a round, ", end="")
        print(f"{told['policy_cpu_ms_per_round']:.3f} of CPU time; ", end="")
        print(f"{told['policy_ms_per_round_waited_for']:.3f} of them waited for")
        print(f"  rounds (verified+drafted) {told['auto_rounds']}; expected before: {expected}")
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
            "new_tokens": [args.new - SPREAD + 1, args.new],
            "slice_ms": args.slice,
            "repeats_by_batch": dict(zip(args.batches, args.repeats, strict=False)),
            "warmups": args.warmups,
            "costs_measured_in_this_run": args.tune,
            "tune_seconds": args.tune_seconds if args.tune else None,
            "dtype": "float32",
            "batches": found,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
