"""The command `generate`: one prompt, answered on stdout. Imports what takes time when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import (
    DEMO,
    BitwiseOption,
    DepthOption,
    DrafterOption,
    DtypeOption,
    GrammarOption,
    HighlightOption,
    JsonOption,
    JsonSchemaOption,
    Limits,
    MinPOption,
    ModelOption,
    OwnSamplingOption,
    RegexOption,
    RevisionOption,
    Sampling,
    SeedOption,
    Source,
    StopOption,
    SystemOption,
    TemperatureOption,
    ThinkingOption,
    TopKOption,
    TopPOption,
    UsageError,
    open_runtime,
    parse_depth,
    parse_stops,
    refuse_together,
    with_system,
)
from .terminal import Outcome, Printer, note, size_of

if TYPE_CHECKING:
    from .constraints import Spec
    from .generation import Generation
    from .runtime import Runtime

_LEVELS = "▁▂▃▄▅▆▇█"


def generate(
    text: Annotated[str | None, typer.Argument(metavar="PROMPT", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; else stdin.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="5,9,11", help="Prompt as token ids.")] = None,
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1)] = 256,
    depth: DepthOption = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the text as it is.")] = False,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    model_sampling: OwnSamplingOption = False,
    seed: SeedOption = None,
    stop: StopOption = None,
    json_schema: JsonSchemaOption = None,
    regex: RegexOption = None,
    grammar: GrammarOption = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    bitwise: BitwiseOption = False,
    highlight: HighlightOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one prompt. The answer comes on stdout as it is made, then a summary on stderr."""
    refuse_together({"--highlight": highlight, "--json": as_json})
    held = _constraint(json_schema, regex, grammar)
    params = Sampling.of(
        model_sampling, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, constraint=held
    )
    limits = Limits(
        max_tokens=max_tokens, depth=parse_depth(depth), ignore_eos=ignore_eos, sampling=params, stop=parse_stops(stop)
    )
    ask = _ask(text, prompt, tokens, raw=raw, system=system, thinking=thinking)
    source = Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=int(bitwise))
    runtime = open_runtime(source, quiet=as_json)
    ids = _prompt_ids(runtime, ask, quiet=as_json)
    if as_json:
        result = runtime.generate(ids, **limits.arguments(runtime))
        typer.echo(json.dumps(_record(result, runtime, source, limits)))
        return
    printer = Printer(highlight=highlight)
    steps = runtime.stream(ids, **limits.arguments(runtime))
    _print_summary(printer.follow(steps, with_text=runtime.text is not None))


def _constraint(json_schema: Path | None, regex: str | None, grammar: Path | None) -> Spec | None:
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    if all(value is None for value in given.values()):
        return None
    refuse_together({name: value is not None for name, value in given.items()})
    from .constraints import JsonSchema, Lark, Regex

    try:
        if json_schema is not None:
            return JsonSchema(json_schema.read_text(encoding="utf-8"))
        if grammar is not None:
            return Lark(grammar.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return None if regex is None else Regex(regex)


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """What to answer: token ids, or text."""

    tokens: list[int] | None
    text: str
    raw: bool
    system: str | None
    thinking: bool


def _ask(
    text: str | None, prompt: str | None, tokens: str | None, *, raw: bool, system: str | None, thinking: bool
) -> _Ask:
    refuse_together({"PROMPT": text is not None, "--prompt": prompt is not None, "--tokens": tokens is not None})
    for other, given in (("--raw", raw), ("--system", system is not None), ("--thinking", thinking)):
        refuse_together({"--tokens": tokens is not None, other: given})
        refuse_together({"--raw": raw and other != "--raw", other: given})
    ids = None if tokens is None else _ids(tokens)
    words = prompt if text is None else text
    if ids is None and words is None:
        words = _read_stdin()
    return _Ask(tokens=ids, text=words or "", raw=raw, system=system, thinking=thinking)


def _read_stdin() -> str:
    wanted = "give it as an argument, with --prompt or --tokens, or on stdin"
    if sys.stdin.isatty():
        raise UsageError(f"there is no prompt: {wanted}")
    text = sys.stdin.read()
    if not text.strip():
        raise UsageError(f"there is no prompt, and stdin is empty: {wanted}")
    return text.removesuffix("\n")


def _ids(tokens: str) -> list[int]:
    parts = [part.strip() for part in tokens.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise typer.BadParameter(f"{tokens!r} is no list of token ids like 5,9,11", param_hint="--tokens")
    return [int(part) for part in parts]


def _prompt_ids(runtime: Runtime, ask: _Ask, *, quiet: bool) -> list[int]:
    if ask.tokens is not None:
        return ask.tokens
    codec = runtime.text
    if codec is None:
        raise UsageError("this model has no tokenizer: give its prompt as ids, with --tokens")
    if ask.raw:
        return codec.encode(ask.text)
    if not codec.has_chat_template and ask.system is None and not ask.thinking:
        if not quiet:
            note("this model has no chat template: the prompt is read as raw text")
        return codec.encode(ask.text)
    return codec.render(with_system([{"role": "user", "content": ask.text}], ask.system), thinking=ask.thinking)


def _record(result: Generation, runtime: Runtime, source: Source, limits: Limits) -> dict[str, Any]:
    drafter = runtime.info()["drafter"]
    return {
        "model": source.model or DEMO,
        "drafter": drafter and drafter["path"],
        "depth": limits.depth,
        "tokens": list(result.tokens),
        "text": result.text,
        **({} if result.thinking is None else {"thinking": result.thinking}),
        "finish_reason": result.finish_reason,
        "stop": result.stop,
        "contract": result.contract,
        "bitwise": result.bitwise,
        "differing_shapes": list(result.differing_shapes),
        "stats": result.stats.to_dict(),
        "timing": result.timing.to_dict(),
    }


def _print_summary(outcome: Outcome) -> None:
    timing, stats = outcome.timing, outcome.stats
    lines = [
        ("output", f"{outcome.tokens} tokens, ended by {outcome.finish_reason}"),
        ("decode", f"{timing.decode_rate:.1f} tokens/s"),
        (
            "prefill",
            f"{timing.prefill_rate:.1f} tokens/s ({timing.prompt_tokens} tokens, {timing.reused_tokens} reused)",
        ),
        ("rounds", f"{stats.rounds}, {stats.accepted_per_round:.2f} drafts accepted per round"),
        ("accepted", _bars(stats.acceptance_per_position)),
        ("depth", "" if timing.depth is None else str(timing.depth)),
        ("memory", f"{size_of(timing.peak_memory)} at its peak"),
    ]
    note("\n" + "\n".join(f"{name:<9} {value}" for name, value in lines if value))


def _bars(shares: Sequence[float]) -> str:
    """Share of drafts accepted at each position, as a small bar and a number."""
    top = len(_LEVELS) - 1
    return "  ".join(f"{i}: {_LEVELS[round(share * top)]} {share:.0%}" for i, share in enumerate(shares, start=1))
