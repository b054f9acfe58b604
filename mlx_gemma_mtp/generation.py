"""What a caller of `Runtime` gets: steps of a stream, finished outputs, timing. Knows nothing of MLX or models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .depth import DepthChoice
from .request import Contract, FinishReason, TokenEvent, TokenLogprob
from .stats import SpecStats
from .stops import OutputReader
from .text import Piece, merged


@dataclass(kw_only=True)
class Timing:
    """Seconds and what they were spent on. `peak_memory` is in bytes, weights and K/V included.

    Of the prompts' tokens, `reused_tokens` were not computed: a prefix cache had them. `depth`: what was drafted in the
    end, and why.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory: int = 0
    depth: DepthChoice | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed per second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after each request's first, which the prefill gives."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "decode_tokens": self.decode_tokens,
            "prefill_seconds": round(self.prefill_seconds, 6),
            "decode_seconds": round(self.decode_seconds, 6),
            "prefill_tokens_per_second": round(self.prefill_rate, 2),
            "decode_tokens_per_second": round(self.decode_rate, 2),
            "peak_memory_bytes": self.peak_memory,
            "depth": None if self.depth is None else asdict(self.depth),
        }


@dataclass(kw_only=True)
class Step:
    """What one step of a stream brought. `text` is the new text that is final; `pieces` tells thought from answer."""

    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]
    text: str
    pieces: tuple[Piece, ...]
    finish_reason: FinishReason | None
    stats: SpecStats
    timing: Timing


@dataclass(kw_only=True)
class Generation:
    """A finished output. `text` is the answer alone; `thinking` the thought before it, or None.

    `contract` says what the tokens promise (see `request.Contract`). `stop` is the stop string that ended it (it is not
    in the text; the tokens go up to the one that completed it), or None. `error` says what went wrong where the finish
    reason is "error". `bitwise`: whether blocks' logits are single steps' to the last bit here, on which `exact` rests,
    as far as it was probed (None: it wasn't); where not, `differing_shapes` names the shapes, rows x tokens. With
    n > 1, `choices` holds all outputs, of which this is the first.
    """

    tokens: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    text: str = ""
    thinking: str | None = None
    finish_reason: FinishReason | None = None
    stop: str | None = None
    error: str | None = None
    contract: Contract = "exact"
    bitwise: bool | None = None
    differing_shapes: tuple[str, ...] = ()
    logprobs: list[TokenLogprob] | None = None
    choices: list[Generation] = field(default_factory=list)
    stats: SpecStats = field(default_factory=SpecStats)
    timing: Timing = field(default_factory=Timing)


class Filling:
    """An output on its way: takes the events of its request, until a stop string or the last event ends it."""

    def __init__(self, output: Generation, reader: OutputReader | None, *, logprobs: bool) -> None:
        """`reader` None: there is no tokenizer, and no text."""
        self.output = output
        self._reader = reader
        self._text: dict[str, str] = {"answer": "", "thinking": ""}
        output.logprobs = [] if logprobs else None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the output, of which the scheduler knows nothing."""
        return self.output.stop is not None

    def settle(self) -> None:
        """Count as cut what the request was given beyond the stop string; again after it was cancelled."""
        stats = self.output.stats
        stats.cut += stats.tokens - len(self.output.tokens)

    def take(self, event: TokenEvent) -> Step | None:
        """Note the tokens of an event; None for one behind a stop string, which is counted as cut."""
        output, reader = self.output, self._reader
        if reader is not None and reader.matched is not None:
            self.settle()
            return None
        kept, pieces = len(event.tokens), tuple[Piece, ...]()
        output.finish_reason, output.error = event.finish_reason, event.error
        if reader is not None:
            read = reader.push(event.tokens, event.drafted)
            kept, pieces = read.kept, read.pieces
            if event.finish_reason is not None:
                pieces = merged((*pieces, *reader.flush()))
            if reader.matched is not None:
                output.finish_reason, output.stop = "stop", reader.matched
            for piece in pieces:
                self._text[piece.kind] += piece.text
            output.text, output.thinking = self._text["answer"], self._text["thinking"] or None
        output.tokens += event.tokens[:kept]
        output.drafted += event.drafted[:kept]
        if output.logprobs is not None:
            output.logprobs += event.logprobs[:kept]
        if reader is not None and reader.matched is not None:
            self.settle()
        return Step(
            tokens=event.tokens[:kept],
            drafted=event.drafted[:kept],
            text="".join(p.text for p in pieces),
            pieces=pieces,
            finish_reason=output.finish_reason,
            stats=output.stats,
            timing=output.timing,
        )
