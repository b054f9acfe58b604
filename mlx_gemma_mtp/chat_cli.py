"""The command `chat`: a conversation in a terminal, or line by line from a pipe. Knows the runtime's interface only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import (
    PROGRAM,
    BitwiseOption,
    DepthOption,
    DrafterOption,
    DtypeOption,
    HighlightOption,
    Limits,
    MinPOption,
    ModelOption,
    OwnSamplingOption,
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
    open_runtime,
    parse_depth,
    parse_stops,
    with_system,
)
from .terminal import Outcome, Printer, note

if TYPE_CHECKING:
    from .runtime import Runtime

# Bytes of K/V that a chat keeps of its earlier turns.
_CHAT_PREFIXES = 2 << 30


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
    params = Sampling.of(model_sampling, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    limits = Limits(
        max_tokens=max_tokens, depth=parse_depth(depth), ignore_eos=False, sampling=params, stop=parse_stops(stop)
    )
    source = Source(model=model, drafter=drafter, revision=revision, dtype=dtype, bitwise_rows=int(bitwise))
    runtime = open_runtime(source, quiet=False)
    if runtime.text is None or not runtime.text.has_chat_template:
        lacks = "tokenizer" if runtime.text is None else "chat template"
        raise ValueError(f"this model has no {lacks}, which a conversation needs; try `{PROGRAM} generate`")
    _Chat(runtime, limits, system=system, thinking=thinking, highlight=highlight).run()


class _Chat:
    """A conversation in a terminal, or line by line from a pipe."""

    _HELP = (
        "/help         this list\n"
        "/system TEXT  set the system message (without TEXT: none)\n"
        "/clear        forget the conversation\n"
        "/exit         leave"
    )

    def __init__(
        self, runtime: Runtime, limits: Limits, *, system: str | None, thinking: bool, highlight: bool
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
            note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
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
            note(self._HELP)
        elif name == "/clear":
            self._turns = []
            note("the conversation is forgotten")
        elif name == "/system":
            self._system = rest.strip() or None
            note("the system message is set" if self._system else "there is no system message now")
        else:
            note(f"{name} is no command; /help lists them")

    def _answer(self, words: str) -> None:
        turns = [*self._turns, {"role": "user", "content": words}]
        printer = Printer(highlight=self._highlight)
        try:
            ids = self._codec.render(with_system(turns, self._system), thinking=self._thinking)
            steps = self._runtime.stream(ids, **self._limits.arguments(self._runtime))
            outcome = printer.follow(steps, with_text=True)
        except KeyboardInterrupt:
            note("stopped")
        except ValueError as error:
            note(f"error: {error}")
            return
        else:
            note(_speed(outcome))
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
            note("\nCtrl-D or /exit leaves")


def _speed(outcome: Outcome) -> str:
    cut = ", cut at --max-tokens" if outcome.finish_reason == "length" else ""
    accepted = f"{outcome.stats.accepted_per_round:.2f} accepted per round"
    return f"{outcome.tokens} tokens{cut}, {outcome.timing.decode_rate:.1f} tokens/s, {accepted}"
