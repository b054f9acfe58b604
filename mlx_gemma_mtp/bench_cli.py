"""The command `bench`: verify, tune, race against the peers; then a record, plots and a table to paste.

Imports what takes time when it is called.
"""

from __future__ import annotations

import datetime
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import DrafterOption, DtypeOption, JsonOption, ModelOption, RevisionOption, Source, open_runtime
from .terminal import note, progress_bar

if TYPE_CHECKING:
    from .benchmark.race import Plan
    from .runtime import Runtime

Progress = Callable[[str, float], None]
_VERIFY_DEPTHS = (1, 3)
_PEERS = ("mlx-lm", "mlx-vlm")


def bench(
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Batches 1 and 4, few tokens and repeats, no tuning.")] = False,
    batches: Annotated[str | None, typer.Option(metavar="1,2,4,8", help="Rows decoded together.")] = None,
    drafts: Annotated[int, typer.Option(min=1, max=8, help="Per round, where not chosen by itself.")] = 3,
    new_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", min=2, help="Per prompt; 128.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Turns of everyone; 4.")] = None,
    pause: Annotated[float | None, typer.Option(min=0, help="Seconds before a turn, to cool down; 5.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help=".json, .jsonl or a line each.")] = None,
    peers_python: Annotated[str, typer.Option(help="The Python that has mlx-vlm; this one.")] = sys.executable,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the record and the plots go.")] = Path(
        "bench-results"
    ),
    as_json: JsonOption = False,
) -> None:
    """Measure a pair here: verify, tune, then decode beside mlx-lm and mlx-vlm. Prints a table to paste in an issue."""
    given: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "pause": pause}
    try:
        given["batches"] = None if batches is None else parse_batches(batches)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--batches") from error
    preset = Options.quick if quick else Options.full
    chosen = {name: value for name, value in given.items() if value is not None}
    options = preset(out, drafts=drafts, peers_python=peers_python, prompts=prompts, **chosen)
    source = Source(model=model, drafter=drafter, revision=revision, dtype=dtype)

    def tell(text: str) -> None:
        if not as_json:
            note(text)

    record = run(
        lambda: open_runtime(source, quiet=as_json),
        options,
        note=tell,
        progress=lambda: progress_bar(shown=not as_json and sys.stderr.isatty()),
    )
    write(record, out, tell)
    typer.echo(json.dumps(record) if as_json else markdown(record))


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure. `tune_seconds` 0: the costs are not measured, only read. `prompts`: a file, None: built-in."""

    batches: tuple[int, ...]
    drafts: int
    new_tokens: int
    repeats: int
    pause: float
    tune_seconds: float
    verify_requests: int
    peers_python: str
    prompts: Path | None
    out: Path

    @staticmethod
    def quick(out: Path, **given: Any) -> Options:
        """A minute or two on a small pair: two batches, few tokens, two repeats, hardly a pause."""
        short = {
            "batches": (1, 4),
            "new_tokens": 32,
            "repeats": 2,
            "pause": 0.5,
            "tune_seconds": 0,
            "verify_requests": 3,
        }
        return Options(**{**short, "out": out, **given})

    @staticmethod
    def full(out: Path, **given: Any) -> Options:
        """What a record is made of."""
        long = {"batches": (1, 2, 4, 8), "new_tokens": 128, "repeats": 4, "pause": 5.0, "tune_seconds": 110}
        return Options(**{**long, "verify_requests": 8, "out": out, **given})


def parse_batches(text: str) -> tuple[int, ...]:
    """Batches of a text like "1,2,4,8". Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 128 for part in parts):
        raise ValueError(f"{text!r} is no list of batches from 1 to 128 like 1,2,4,8")
    return tuple(sorted({int(part) for part in parts}))


def run(
    open_runtime: Callable[[], Runtime],
    options: Options,
    *,
    note: Callable[[str], None],
    progress: Callable[[], AbstractContextManager[Progress | None]],
) -> dict[str, Any]:
    """Measure all of it; the record. Raises ValueError, OSError and RuntimeError.

    The pair is in this process's memory only before the race, whose processes load it themselves.
    """
    import mlx.core as mx

    from .benchmark.machine import describe_machine

    machine = describe_machine()
    if machine["load_at_start"] > 0.3 * machine["cores"]:
        note(f"others use this machine (load {machine['load_at_start']}): the figures will be noisy")
    plan, about = _prepared(open_runtime(), options, machine["memory_gb"], note, progress)
    gc.collect()
    mx.clear_cache()
    return {
        "benchmark": "bench",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        **about,
        **_raced(plan, note, progress),
    }


def _prepared(
    runtime: Runtime,
    options: Options,
    memory_gb: float,
    note: Callable[[str], None],
    progress: Callable[[], AbstractContextManager[Progress | None]],
) -> tuple[Plan, dict[str, Any]]:
    """What can only be done with the pair in memory, and the plan of the race."""
    from .benchmark.race import Plan, entrants, fit_together

    info = runtime.info()
    target = Path(info["model"]["path"])
    drafter = None if info["drafter"] is None else Path(info["drafter"]["path"])
    with progress() as tell:
        verified = _verified(runtime, options, tell)
    note(f"verify: {verified['verdict']}, {verified['requests']} requests, {verified['seconds']:.0f} s")
    with progress() as tell:
        tuned = _tuned(runtime, options, tell)
    if tuned is not None:
        note(f"costs of rounds: {tuned['source']}")
    name, prompts = _prompts(runtime, options)
    who = entrants(("ours", *_PEERS), options.drafts, drafter=drafter is not None)
    plan = Plan(
        target=target,
        drafter=drafter,
        dtype=info["dtype"],
        prompts=prompts,
        entrants=who,
        batches=options.batches,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        pause=options.pause,
        together=fit_together(target, drafter, len({e.process for e in who}), memory_gb),
        singles=2 if options.repeats <= 2 else 4,
        peers_python=options.peers_python,
    )
    about = {
        "pair": {"target": info["model"], "drafter": info["drafter"]},
        "dtype": info["dtype"],
        "backend": info["backend"],
        "exactness": info["exactness"],
        "prompts": {"kind": name, "lengths": [len(p) for p in prompts]},
        "drafts": options.drafts,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "pause_s": options.pause,
        "processes": "together" if plan.together else "one at a time",
        "verify": verified,
        "tune": tuned,
    }
    return plan, about


def _verified(runtime: Runtime, options: Options, progress: Progress | None) -> dict[str, Any]:
    """A short `verify`: some built-in requests, few depths."""
    from .verify import Limits, built_in_cases, verify

    cases = built_in_cases(runtime.text, Limits.of(runtime, options.new_tokens))[: options.verify_requests]
    depths = _VERIFY_DEPTHS if runtime.drafter_config is not None else (0,)
    report = verify(runtime, cases, depths=depths, max_batch=8, progress=progress)
    by_position = {s.depth: s.stats.acceptance_per_position for s in report.speculation if s.way == "batch"}
    return {
        "verdict": report.verdict,
        "mlx_lm": report.mlx_lm_verdict,
        "requests": len(cases),
        "depths": list(depths),
        "seconds": round(report.seconds, 2),
        "acceptance_by_position": {str(k): [round(x, 4) for x in shares] for k, shares in by_position.items()},
    }


def _tuned(runtime: Runtime, options: Options, progress: Progress | None) -> dict[str, Any] | None:
    """The costs of rounds: the profile's if there is one, else measured (and kept), if there is time for it."""
    if runtime.drafter_config is None:
        return None
    if runtime.profile().read() is not None:
        return {"source": "read from the profile", "profile": str(runtime.profile().path)}
    if not options.tune_seconds:
        return {"source": "not measured: auto learns while it decodes"}
    from . import tune_cli

    tuning = runtime.tune(seconds=options.tune_seconds, progress=progress)
    return {"source": "measured", **tune_cli.to_dict(tuning, runtime.profile().path)}


def _prompts(runtime: Runtime, options: Options) -> tuple[str, list[list[int]]]:
    """Name and token ids of what is decoded."""
    from .convert.prompts import built_in, read_prompts

    has = runtime.text is not None
    found = built_in(has_tokenizer=has) if options.prompts is None else read_prompts(options.prompts, has_tokenizer=has)
    prompts = found.prompts(runtime.config.vocab_size)
    return found.name, [list(runtime.request(p, max_tokens=1).prompt) for p in prompts]


def _raced(
    plan: Plan, note: Callable[[str], None], progress: Callable[[], AbstractContextManager[Progress | None]]
) -> dict[str, Any]:
    from .benchmark.race import race, same_tokens, summary, without_tokens

    with progress() as tell:
        outcome = race(plan, tell)
    for name, reason in outcome.left_out.items():
        note(f"left out: {name}: {reason}")
    if not outcome.samples:
        raise RuntimeError(f"nothing could be measured: {'; '.join(outcome.left_out.values())}")
    return {
        "versions": {"mlx-gemma-mtp": version("mlx-gemma-mtp"), **_versions(outcome.about)},
        "environments": outcome.about,
        "left_out": outcome.left_out,
        "same_tokens_as_plain": same_tokens(outcome),
        "summary": summary(outcome),
        "samples": without_tokens(outcome),
    }


def _versions(about: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of the packages that ran, each in its own library's process."""
    found: dict[str, str] = {}
    for library, environment in about.items():
        versions = environment["versions"]
        found |= {name: versions[name] for name in ("python", "mlx", library) if name in versions and name not in found}
    return found


def write(record: Mapping[str, Any], out: Path, note: Callable[[str], None]) -> None:
    """The record as OUT/bench-<date>.json, and the plots beside it where matplotlib is there. Raises OSError."""
    from .benchmark.machine import host_class
    from .benchmark.plots import draw, plots_of

    out.mkdir(parents=True, exist_ok=True)
    file = out / f"bench-{record['date'][:10]}-{host_class()}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    note(f"record: {file}")
    try:
        plots = draw(plots_of(record), out)
    except RuntimeError as error:
        note(f"no plots: {error}")
    else:
        note(f"plots: {', '.join(map(str, plots))}")


_CELLS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "tokens/s, decoding": lambda m: f"{m['decode_tokens_per_second']['median']:.1f}",
    "s to the first token": lambda m: f"{m['first_token_s']['median']:.2f}",
    "GB at the peak": lambda m: f"{m['peak_bytes'] / 1e9:.3g}",
    "accepted per round": lambda m: "" if m["accepted_per_round"] is None else f"{m['accepted_per_round']:.2f}",
}


def markdown(record: Mapping[str, Any]) -> str:
    """A table and its conditions, to be pasted into an issue."""
    return "\n".join(_lines(record))


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    from .convert.output import markdown_table

    machine, pair, measured = record["machine"], record["pair"], record["summary"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    drafter = "no drafter" if pair["drafter"] is None else Path(pair["drafter"]["path"]).name
    yield f"**{Path(pair['target']['path']).name}** with {drafter}, {record['dtype']}, {record['backend']}"
    yield ""
    yield f"{machine['chip']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['os']}; {versions}"
    yield ""
    arms = list(dict.fromkeys(arm for entered in measured.values() for arm in entered))
    for title, cell in _CELLS.items():
        rows = [[cell(entered[a]) if a in entered else "-" for a in arms] for entered in measured.values()]
        yield from markdown_table([[title, *arms], *([f"batch {b}", *r] for b, r in zip(measured, rows, strict=True))])
        yield ""
    yield f"Over ours, plain: {'; '.join(_ratios(measured))}."
    verify, different = record["verify"], [a for a, same in record["same_tokens_as_plain"].items() if not same]
    yield f"verify: {verify['verdict']} ({verify['requests']} requests). Other tokens than ours, plain: " + (
        ", ".join(different) or "none"
    )
    for name, reason in record["left_out"].items():
        yield f"Left out: {name}: {reason}"
    yield (
        f"{record['new_tokens']} new tokens, prompts of {min(record['prompts']['lengths'])} to "
        f"{max(record['prompts']['lengths'])} tokens ({record['prompts']['kind']}), medians of {record['repeats']} "
        f"repeats in alternating order, {record['pause_s']:g} s pauses, processes {record['processes']}, load at start "
        f"{machine['load_at_start']}."
    )


def _ratios(measured: Mapping[str, Mapping[str, Any]], plain: str = "ours, plain") -> Sequence[str]:
    """By batch, our drafts' speed in that of our plain decoding."""
    found = []
    for batch, entered in measured.items():
        if plain in entered:
            base = entered[plain]["decode_tokens_per_second"]["median"]
            rates = {a: m["decode_tokens_per_second"]["median"] / base for a, m in entered.items() if a != plain}
            ours = [f"{a.removeprefix('ours, ')} {r:.2f}x" for a, r in rates.items() if a.startswith("ours")]
            found.append(f"batch {batch}: {', '.join(ours) or 'no drafts'}")
    return found
