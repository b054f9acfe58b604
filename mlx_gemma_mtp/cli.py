"""The command line. Knows the runtime's interface, and nothing of models, caches or MLX.

stdout carries the answer alone (or, with --json, one object); all else goes to stderr. Modules that take time
to import are imported by the command that needs them, so that --help answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO, cast

import typer
from typer.core import TyperGroup

from .convert.cli import ConvertCommand
from .convert.cli import convert as _convert

if TYPE_CHECKING:
    from .constraints import Spec
    from .generation import Generation, Step, Timing
    from .request import FinishReason, SamplingParams
    from .runtime import Runtime
    from .stats import SpecStats
    from .text import Piece

_PROGRAM = "mlx-gemma-mtp"
_DEMO = "demo"
_PROBED_ROWS = 8
_USAGE, _FAILURE, _INTERRUPTED, _BROKEN_PIPE = 2, 1, 130, 141
_DIM, _DRAFTED, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[0m"
_LEVELS = "▁▂▃▄▅▆▇█"
# Bytes of K/V that a chat keeps of its earlier turns.
_CHAT_PREFIXES = 2 << 30
# Output of a model must not move the cursor or rename the window: a terminal gets newlines and tabs only.
_CONTROLS = {i: None for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}

# Newer versions of typer carry their own click: this name leads to the error classes of either.
_UsageError, _ClickError = cast(tuple[type[typer.BadParameter], ...], typer.BadParameter.__mro__[1:3])


class _Group(TyperGroup):
    """Commands whose errors are one line (or one JSON object) on stderr, and an exit code."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **__: Any) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments

        def run() -> None:
            with self.make_context(prog_name or _PROGRAM, arguments) as context:
                self.invoke(context)

        sys.exit(_guarded(run, as_json="--json" in options))


app = typer.Typer(
    cls=_Group,
    name=_PROGRAM,
    help="Gemma 4 with its MTP drafters, in MLX.",
    add_completion=False,
    rich_markup_mode=None,  # importing rich would double the time that --help takes
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Directory or hub id of the target. Without it: the demo pair."),
]
DrafterOption = Annotated[
    str, typer.Option(help='Directory or hub id of the drafter, "auto", or "none" for plain decoding.')
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
DtypeOption = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; the checkpoint's own.")]
DepthOption = Annotated[str, typer.Option(metavar="N|auto", help="Tokens to draft per round; 0: none.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0, the default: always the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens only; 0: from all.")]
TopPOption = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that make up this share.")]
MinPOption = Annotated[float | None, typer.Option(help="Draw only tokens at least this likely beside the likeliest.")]
OwnSamplingOption = Annotated[
    bool, typer.Option("--model-sampling", help="Sample as the model's generation_config.json says; options go first.")
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text in the answer. Repeatable.")
]
SeedOption = Annotated[int | None, typer.Option(help="Sampled output comes again, the same at every depth.")]
BitwiseOption = Annotated[
    bool,
    typer.Option("--bitwise", help="Decode only in shapes probed to round like single steps; fail where none does."),
]
JsonSchemaOption = Annotated[
    Path | None, typer.Option("--json-schema", metavar="FILE", help="The answer is JSON, valid under this schema.")
]
RegexOption = Annotated[str | None, typer.Option("--regex", help="The whole answer matches this.")]
GrammarOption = Annotated[
    Path | None, typer.Option("--grammar", metavar="FILE", help="The whole answer is a sentence of this Lark grammar.")
]
SystemOption = Annotated[str | None, typer.Option(help="System message.")]
ThinkingOption = Annotated[bool, typer.Option("--thinking/--no-thinking", help="Let the model think first.")]
HighlightOption = Annotated[bool, typer.Option("--highlight", help="Colour the accepted drafts.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; errors are JSON, too.")]


def main() -> None:
    """Run the command line on the process's arguments, and exit."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"{_PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
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
    _refuse_together({"--highlight": highlight, "--json": as_json})
    held = _constraint(json_schema, regex, grammar)
    params = _Sampling.of(
        model_sampling, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, constraint=held
    )
    limits = _Limits(
        max_tokens=max_tokens, depth=_depth(depth), ignore_eos=ignore_eos, sampling=params, stop=_stops(stop)
    )
    ask = _ask(text, prompt, tokens, raw=raw, system=system, thinking=thinking)
    source = _Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=int(bitwise))
    runtime = _open(source, quiet=as_json)
    ids = _prompt_ids(runtime, ask, quiet=as_json)
    if as_json:
        result = runtime.generate(ids, **limits.arguments(runtime))
        typer.echo(json.dumps(_record(result, runtime, source, limits)))
        return
    printer = _Printer(highlight=highlight)
    steps = runtime.stream(ids, **limits.arguments(runtime))
    _print_summary(printer.follow(steps, with_text=runtime.text is not None))


@app.command()
def chat(
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Per answer.")] = 1024,
    depth: DepthOption = "auto",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    model_sampling: OwnSamplingOption = False,
    seed: SeedOption = None,
    stop: StopOption = None,
    system: SystemOption = None,
    thinking: ThinkingOption = False,
    highlight: HighlightOption = False,
    bitwise: BitwiseOption = False,
) -> None:
    """Hold a conversation. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves."""
    params = _Sampling.of(model_sampling, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    limits = _Limits(max_tokens=max_tokens, depth=_depth(depth), ignore_eos=False, sampling=params, stop=_stops(stop))
    source = _Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=int(bitwise))
    runtime = _open(source, quiet=False)
    if runtime.text is None or not runtime.text.has_chat_template:
        lacks = "tokenizer" if runtime.text is None else "chat template"
        raise ValueError(f"this model has no {lacks}, which a conversation needs; try `{_PROGRAM} generate`")
    _Chat(runtime, limits, system=system, thinking=thinking, highlight=highlight).run()


@app.command()
def info(
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    bitwise: BitwiseOption = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Rows of the largest batch, for --bitwise.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Show what a model and its drafter are made of."""
    rows = max_batch if bitwise else 0
    source = _Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=rows)
    runtime = _open(source, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(runtime.info()))
    else:
        _print_tables(runtime.info())


@app.command()
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
    from . import verify_cli

    try:
        chosen = verify_cli.parse_depths(depths)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--depths") from error
    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"{html.parent} is not a directory", param_hint="--html")
    options = verify_cli.Options(
        file=file,
        depths=chosen,
        max_tokens=max_tokens,
        max_batch=max_batch,
        allow_ties=allow_ties,
        mlx_lm=mlx_lm,
    )
    lines = verify_cli.read_lines(file)
    rows = max_batch if bitwise else 0
    source = _Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=rows)
    runtime = _open(source, quiet=as_json)
    with _progress(shown=not as_json and sys.stderr.isatty()) as progress:
        report = verify_cli.check(runtime, lines, options, progress)
    raise typer.Exit(verify_cli.show(report, options, as_json=as_json, html=html))


@app.command()
def serve(
    model: ModelOption = None,
    drafter: DrafterOption = "auto",
    revision: RevisionOption = None,
    dtype: DtypeOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8080,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="What clients call the model; may be given several times.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MLX_GEMMA_MTP_API_KEY", help="Asked of every client; see --insecure.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others in without a key.")] = False,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Let pages of this origin ask; *: all.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name this machine is called by, beside localhost.")
    ] = None,
    depth: DepthOption = "auto",
    max_batch: Annotated[int, typer.Option(min=1, help="Requests decoded together.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 64,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="For requests that don't say.")] = 4096,
    prefill_budget: Annotated[int, typer.Option(min=1, help="Prompt tokens per step.")] = 512,
    kv_budget: Annotated[
        str | None, typer.Option(metavar="8GB", help="Memory for K/V; what the device recommends, less the weights.")
    ] = None,
    prefix_cache: Annotated[str, typer.Option(metavar="2GB", help="Memory for prefixes of chats; 0: none.")] = "1GB",
    max_body: Annotated[str, typer.Option(metavar="4MiB", help="Largest body of a request.")] = "4MiB",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers get to finish at the end.")] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log, too.")] = False,
    bitwise: BitwiseOption = False,
) -> None:
    """Serve the OpenAI and Anthropic APIs, and a page to chat on. Without --model: the demo pair."""
    from . import serve_cli

    try:
        options = serve_cli.Options(
            host=host,
            port=port,
            names=name or [model or _DEMO],
            api_key=api_key,
            insecure=insecure,
            cors_origins=cors_origin or (),
            allow_hosts=allow_host or (),
            depth=_depth(depth),
            max_batch=max_batch,
            max_waiting=max_waiting,
            max_tokens=max_tokens,
            prefill_budget=prefill_budget,
            kv_budget=None if kv_budget is None else serve_cli.parse_bytes(kv_budget),
            prefix_cache=serve_cli.parse_bytes(prefix_cache),
            max_body=serve_cli.parse_bytes(max_body),
            timeout=timeout,
            drain=drain,
            log_prompts=log_prompts,
        )
    except ValueError as error:
        raise _UsageError(str(error)) from error
    bound = serve_cli.open_socket(options)
    rows = max_batch if bitwise else 0
    source = _Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=rows)
    runtime = _open(source, quiet=False)
    with serve_cli.open_engine(runtime, options) as engine:
        service = serve_cli.make_service(runtime, engine, options)
        _note(serve_cli.greeting(runtime, options, bound.getsockname()[1]))
        serve_cli.show_logs()
        serve_cli.run(service, serve_cli.make_app(service, options), bound, options)


@app.command()
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
    from . import tune_cli

    if plot is not None and not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"{plot.parent} is not a directory", param_hint="--plot")
    runtime = _open(_Source(model=model, drafter=drafter, revision=revision, dtype=dtype), quiet=as_json)
    with _progress(shown=not as_json and sys.stderr.isatty()) as progress:
        tuning = runtime.tune(seconds=seconds, progress=progress)
    file = runtime.profile().path
    if as_json:
        typer.echo(json.dumps(tune_cli.to_dict(tuning, file)))
    else:
        tune_cli.show(tuning)
        _note(f"kept in {file}")
    if plot is not None:
        tune_cli.draw(tuning, plot)
        if not as_json:
            _note(f"drawn in {plot}")


@app.command()
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
    from . import bench_cli

    given: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "pause": pause}
    try:
        given["batches"] = None if batches is None else bench_cli.parse_batches(batches)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--batches") from error
    preset = bench_cli.Options.quick if quick else bench_cli.Options.full
    chosen = {name: value for name, value in given.items() if value is not None}
    options = preset(out, drafts=drafts, peers_python=peers_python, prompts=prompts, **chosen)
    source = _Source(model=model, drafter=drafter, revision=revision, dtype=dtype)

    def tell(text: str) -> None:
        if not as_json:
            _note(text)

    record = bench_cli.run(
        lambda: _open(source, quiet=as_json),
        options,
        note=tell,
        progress=lambda: _progress(shown=not as_json and sys.stderr.isatty()),
    )
    bench_cli.write(record, out, tell)
    typer.echo(json.dumps(record) if as_json else bench_cli.markdown(record))


app.command(name="convert", cls=ConvertCommand)(_convert)


@dataclass(frozen=True, kw_only=True)
class _Source:
    model: str | None
    drafter: str
    revision: str | None
    dtype: str | None
    bitwise_rows: int = 0
    """With --bitwise: rows of the largest batch."""


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """Sampling options as given; `own`: what isn't given is as the model's makers want it, not greedy."""

    own: bool
    given: Mapping[str, Any]

    @staticmethod
    def of(own: bool, **options: Any) -> _Sampling:
        from .request import SamplingParams

        given = {name: value for name, value in options.items() if value is not None}
        try:
            SamplingParams(**given)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        return _Sampling(own=own, given=given)

    def params(self, runtime: Runtime) -> SamplingParams:
        from .request import SamplingParams

        return replace(runtime.generation_defaults if self.own else SamplingParams(), **self.given)


@dataclass(frozen=True, kw_only=True)
class _Limits:
    max_tokens: int
    depth: int | Literal["auto"]
    ignore_eos: bool
    sampling: _Sampling
    stop: tuple[str, ...]

    def arguments(self, runtime: Runtime) -> dict[str, Any]:
        given = {"max_tokens": self.max_tokens, "depth": self.depth, "ignore_eos": self.ignore_eos}
        return {**given, "sampling": self.sampling.params(runtime), "stop": self.stop}


def _constraint(json_schema: Path | None, regex: str | None, grammar: Path | None) -> Spec | None:
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    if all(value is None for value in given.values()):
        return None
    _refuse_together({name: value is not None for name, value in given.items()})
    from .constraints import JsonSchema, Lark, Regex

    try:
        if json_schema is not None:
            return JsonSchema(json_schema.read_text(encoding="utf-8"))
        if grammar is not None:
            return Lark(grammar.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _UsageError(str(error)) from error
    return None if regex is None else Regex(regex)


def _stops(stop: Sequence[str] | None) -> tuple[str, ...]:
    if stop and not all(stop):
        raise typer.BadParameter("'' is empty, expected a text", param_hint="--stop")
    return tuple(stop or ())


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
    _refuse_together({"PROMPT": text is not None, "--prompt": prompt is not None, "--tokens": tokens is not None})
    for other, given in (("--raw", raw), ("--system", system is not None), ("--thinking", thinking)):
        _refuse_together({"--tokens": tokens is not None, other: given})
        _refuse_together({"--raw": raw and other != "--raw", other: given})
    ids = None if tokens is None else _ids(tokens)
    words = prompt if text is None else text
    if ids is None and words is None:
        words = _read_stdin()
    return _Ask(tokens=ids, text=words or "", raw=raw, system=system, thinking=thinking)


def _read_stdin() -> str:
    wanted = "give it as an argument, with --prompt or --tokens, or on stdin"
    if sys.stdin.isatty():
        raise _UsageError(f"there is no prompt: {wanted}")
    text = sys.stdin.read()
    if not text.strip():
        raise _UsageError(f"there is no prompt, and stdin is empty: {wanted}")
    return text.removesuffix("\n")


def _ids(tokens: str) -> list[int]:
    parts = [part.strip() for part in tokens.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise typer.BadParameter(f"{tokens!r} is no list of token ids like 5,9,11", param_hint="--tokens")
    return [int(part) for part in parts]


def _depth(depth: str) -> int | Literal["auto"]:
    from .adaptive import parse_depth

    value = int(depth) if depth.isascii() and depth.isdigit() else depth
    try:
        parse_depth(value)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--depth") from error
    return value if isinstance(value, int) else "auto"


def _refuse_together(given: Mapping[str, bool]) -> None:
    names = [name for name, present in given.items() if present]
    if len(names) > 1:
        raise _UsageError(f"{' and '.join(names)} can't be given together")


def _open(source: _Source, *, quiet: bool) -> Runtime:
    from .runtime import load

    _show_warnings(quiet)
    if source.model is None and not quiet:
        _note("this is the bundled demo pair; name a real one with, say, --model google/gemma-4-E4B-it")
    drafter = None if source.drafter == "none" else source.drafter
    with _progress(shown=not quiet and sys.stderr.isatty()) as progress:
        return load(
            source.model or _DEMO,
            drafter=drafter,
            dtype=source.dtype,
            revision=source.revision,
            progress=progress,
            bitwise=source.bitwise_rows > 0,
            max_batch=source.bitwise_rows or _PROBED_ROWS,
        )


def _show_warnings(quiet: bool) -> None:
    import logging

    class _Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _note(record.getMessage())

    log = logging.getLogger(__package__)
    log.handlers = [logging.NullHandler() if quiet else _Notes(logging.WARNING)]
    log.propagate = False


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[str, float], None] | None]:
    if not shown:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=1.0)

    def report(what: str, share: float) -> None:
        if share == 0:  # a download shows the hub's own bars, which a second one would garble
            _note(what)
            return
        bar.start()
        bar.update(task, description=what, completed=share)

    try:
        yield report
    finally:
        bar.stop()


def _prompt_ids(runtime: Runtime, ask: _Ask, *, quiet: bool) -> list[int]:
    if ask.tokens is not None:
        return ask.tokens
    codec = runtime.text
    if codec is None:
        raise _UsageError("this model has no tokenizer: give its prompt as ids, with --tokens")
    if ask.raw:
        return codec.encode(ask.text)
    if not codec.has_chat_template and ask.system is None and not ask.thinking:
        if not quiet:
            _note("this model has no chat template: the prompt is read as raw text")
        return codec.encode(ask.text)
    return codec.render(_messages([{"role": "user", "content": ask.text}], ask.system), thinking=ask.thinking)


def _messages(turns: Sequence[Mapping[str, str]], system: str | None) -> list[Mapping[str, str]]:
    return [*turns] if system is None else [{"role": "system", "content": system}, *turns]


def _record(result: Generation, runtime: Runtime, source: _Source, limits: _Limits) -> dict[str, Any]:
    drafter = runtime.info()["drafter"]
    return {
        "model": source.model or _DEMO,
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


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    tokens: int
    finish_reason: FinishReason | None
    stats: SpecStats
    timing: Timing


class _Printer:
    """Shows an output as it comes: the answer on stdout, a thought before it on stderr, dimmed."""

    def __init__(self, *, highlight: bool) -> None:
        self._drafted = _DRAFTED if highlight and _styled(sys.stdout) else ""
        if highlight and not self._drafted:
            _note("--highlight needs a terminal: nothing is coloured")
        self._thinking = False
        self._last = ""
        self.answer = ""

    def follow(self, steps: Iterable[Step], *, with_text: bool) -> _Outcome:
        """Show every step as it comes (without text: its ids); what the whole came to."""
        last, count = None, 0
        try:
            for last in steps:
                count += len(last.tokens)
                if with_text:
                    for piece in last.pieces:
                        self._show(piece)
                else:
                    self._show_ids(last)
                sys.stdout.flush()
        finally:
            self._end_line()
        if last is None:
            raise RuntimeError("the output ended before its first step")
        if self._drafted:
            sys.stderr.write(f"{self._drafted}coloured{_RESET}: drafted and accepted; the rest: the target's own\n")
        return _Outcome(tokens=count, finish_reason=last.finish_reason, stats=last.stats, timing=last.timing)

    def _show(self, piece: Piece) -> None:
        if piece.kind == "thinking":
            sys.stdout.flush()
            self._write(sys.stderr, piece.text, _DIM if _styled(sys.stderr) else "")
            sys.stderr.flush()
        else:
            if self._thinking:
                sys.stderr.write("\n\n")
                sys.stderr.flush()
            self.answer += piece.text
            self._write(sys.stdout, piece.text, self._drafted if piece.drafted else "")
        self._thinking = piece.kind == "thinking"

    def _show_ids(self, step: Step) -> None:
        for token, drafted in zip(step.tokens, step.drafted, strict=True):
            self._write(sys.stdout, f"{' ' if self._last else ''}{token}", self._drafted if drafted else "")

    def _write(self, stream: TextIO, text: str, style: str) -> None:
        if stream.isatty():
            text = text.translate(_CONTROLS)
        stream.write(f"{style}{text}{_RESET}" if style else text)
        self._last = text[-1:] or self._last

    def _end_line(self) -> None:
        if self._last not in ("", "\n"):
            stream = sys.stderr if self._thinking else sys.stdout
            stream.write("\n")
        sys.stdout.flush()


class _Chat:
    """A conversation in a terminal, or line by line from a pipe."""

    _HELP = (
        "/help         this list\n"
        "/system TEXT  set the system message (without TEXT: none)\n"
        "/clear        forget the conversation\n"
        "/exit         leave"
    )

    def __init__(
        self, runtime: Runtime, limits: _Limits, *, system: str | None, thinking: bool, highlight: bool
    ) -> None:
        assert runtime.text is not None
        self._runtime = runtime
        self._codec = runtime.text
        self._limits = limits
        self._system = system
        self._thinking = thinking
        self._highlight = highlight
        self._turns: list[Mapping[str, str]] = []
        runtime.keep_prefixes(_CHAT_PREFIXES)

    def run(self) -> None:
        """Read and answer lines until /exit or the end of input."""
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 - gives input() line editing and history
            _note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while (line := _read_line()) is not None:
            words = line.strip()
            if words == "/exit":
                return
            if words.startswith("/"):
                self._command(words)
            elif words:
                self._answer(words)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/help":
            _note(self._HELP)
        elif name == "/clear":
            self._turns = []
            _note("the conversation is forgotten")
        elif name == "/system":
            self._system = rest.strip() or None
            _note("the system message is set" if self._system else "there is no system message now")
        else:
            _note(f"{name} is no command; /help lists them")

    def _answer(self, words: str) -> None:
        turns = [*self._turns, {"role": "user", "content": words}]
        printer = _Printer(highlight=self._highlight)
        try:
            ids = self._codec.render(_messages(turns, self._system), thinking=self._thinking)
            steps = self._runtime.stream(ids, **self._limits.arguments(self._runtime))
            outcome = printer.follow(steps, with_text=True)
        except KeyboardInterrupt:
            _note("stopped")
        except ValueError as error:
            _note(f"error: {error}")
            return
        else:
            _note(_speed(outcome))
        self._turns = [*turns, {"role": "assistant", "content": printer.answer}]


def _read_line() -> str | None:
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    while True:
        try:
            if sys.stdout.isatty():
                return input("> ")
            sys.stderr.write("> ")  # input() would write it to stdout, which has the answers alone
            sys.stderr.flush()
            return input("")
        except EOFError:
            sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            _note("\nCtrl-D or /exit leaves")


def _speed(outcome: _Outcome) -> str:
    cut = ", cut at --max-tokens" if outcome.finish_reason == "length" else ""
    accepted = f"{outcome.stats.accepted_per_round:.2f} accepted per round"
    return f"{outcome.tokens} tokens{cut}, {outcome.timing.decode_rate:.1f} tokens/s, {accepted}"


def _print_summary(outcome: _Outcome) -> None:
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
        ("memory", f"{_bytes(timing.peak_memory)} at its peak"),
    ]
    _note("\n" + "\n".join(f"{name:<9} {value}" for name, value in lines if value))


def _bars(shares: Sequence[float]) -> str:
    """Share of drafts accepted at each position, as a small bar and a number."""
    top = len(_LEVELS) - 1
    return "  ".join(f"{i}: {_LEVELS[round(share * top)]} {share:.0%}" for i, share in enumerate(shares, start=1))


def _print_tables(data: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    for name, value in data.items():
        if value and _nested(value):
            console.print(_pairs(name, value) if isinstance(value, Mapping) else _rows(name, value))
    plain = {name: value for name, value in data.items() if not _nested(value)}
    if plain:
        console.print(_pairs("runtime", plain))


def _nested(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)
    )


def _pairs(title: str, values: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_words(title), title_justify="left", show_header=False)
    for name, value in _flat(values):
        table.add_row(_words(name), Text(_shown(name, value)))
    return table


def _rows(title: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*map(_words, names), title=_words(title), title_justify="left")
    for row in rows:
        table.add_row(*(Text(_shown(name, row[name]) if name in row else "") for name in names))
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(name: str, value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and "bytes" in name:
        return _bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_shown(name, item) for item in value)
    return str(value)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _styled(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def _note(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"{_DIM}{text}{_RESET}\n" if _styled(sys.stderr) else f"{text}\n")
    sys.stderr.flush()


def _guarded(run: Callable[[], None], *, as_json: bool) -> int:
    """Run a command; the exit code. Whatever goes wrong is told in one line, without a traceback."""
    try:
        run()
        sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except _ClickError as error:
        return _told(error.format_message(), error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError):  # or the interpreter's own flush at exit would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:  # the edge of the program: people get a line, with MLX_GEMMA_MTP_DEBUG all of it
        if os.environ.get("MLX_GEMMA_MTP_DEBUG"):
            raise
        expected = isinstance(error, ValueError | OSError | RuntimeError) or type(error).__module__.startswith(
            __package__ or ""
        )
        return _told(str(error) if expected else f"{type(error).__name__}: {error}", _FAILURE, as_json)


def _told(message: str, code: int, as_json: bool) -> int:
    line = " ".join(message.split())
    if as_json:
        kind = "usage" if code == _USAGE else "failure"
        sys.stderr.write(json.dumps({"error": {"type": kind, "message": line}}) + "\n")
    else:
        sys.stderr.write(f"error: {line}\n")
    return code
