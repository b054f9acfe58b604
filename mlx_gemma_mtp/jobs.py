"""A request on its way: what it has been given, what its constraint allows, what a round means for it.

Knows no models, caches of batches, threads or clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .cache import Held, KVCache
from .request import ConstraintError, FinishReason, Request, TokenEvent, TokenLogprob
from .sampling import Constraint, History
from .speculative import Block, Masks, Round
from .stats import SpecStats


@dataclass(kw_only=True, eq=False)
class Job:
    """A request on its way: waiting, being prefilled (it has a cache of its own), or a row of the batch."""

    id: int
    request: Request
    stats: SpecStats = field(default_factory=SpecStats)
    output: list[int] = field(default_factory=list)
    constraint: Constraint | None = None
    error: str | None = None
    cache: KVCache | None = None
    tokens: npt.NDArray[np.int32]
    """What its cache holds or will hold: the prompt, and behind it what was given out before it was preempted."""
    stops: list[int] = field(default_factory=list)
    """Lengths at which its prefill makes a stop, as others may go on from there."""
    points: dict[int, Held] = field(default_factory=dict)
    """Its rings at some of these lengths."""

    @property
    def history(self) -> History:
        """What its sampler needs to know."""
        request = self.request
        return History(request.sampling, request.prompt, self.output, request.stop_ids, request.choice)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the longest output."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def done(self) -> int:
        """Tokens prefilled so far."""
        return 0 if self.cache is None else self.cache.lengths[0]

    @property
    def left(self) -> int:
        """Tokens not prefilled yet."""
        return len(self.tokens) - self.done

    def take(self, result: Round, row: int) -> TokenEvent:
        """What a row's new tokens mean for this request: cut at a stop token or at max_tokens."""
        count, request = result.counts[row], self.request
        tokens, drafted = result.tokens[row][:count], [True] * (count - 1) + [False]
        reason: FinishReason | None = None
        kept = min(count, request.max_tokens - (self.stats.tokens - count))
        if not request.ignore_eos:
            stop = next((i for i, t in enumerate(tokens[:kept]) if t in request.stop_ids), None)
            if stop is not None:
                kept, reason = stop, "stop"
        if self.error is not None:
            kept, reason = 0, "error"
        self.stats.cut += count - kept
        self.output += tokens[:kept]
        if self.constraint is not None and self.error is None:
            try:
                self.constraint.advance(tokens[:kept])
            except ConstraintError as error:
                self.error, reason = str(error), "error"
        if reason is None and self.stats.tokens >= request.max_tokens:
            reason = "length"
        asked = request.sampling.logprobs
        logprobs = [] if asked is None else result.logprobs[row][:kept]
        return TokenEvent(
            request_id=self.id,
            tokens=tuple(tokens[:kept]),
            drafted=tuple(drafted[:kept]),
            finish_reason=reason,
            logprobs=tuple(TokenLogprob(p.token, p.logprob, p.top[:asked]) for p in logprobs),
            error=self.error,
        )


def masks(jobs: Sequence[Job | None], block: Block, offered: Sequence[int], vocab_size: int) -> Masks | None:
    """What the constraints of a batch's rows (None: a free row) allow at each position of a block; None: there is none.

    Row r offers offered[r] drafts. A constraint that fails when the masks are made fails its job alone.
    """
    if all(job is None or job.constraint is None for job in jobs):
        return None
    words = -(-vocab_size // 32)
    drafts: list[list[int]] = block.tokens[:, 1:].tolist() if block.depth else [[]] * len(jobs)  # type: ignore[assignment]

    def make() -> mx.array:
        allowed = np.full((len(jobs), block.depth + 1, words), 0xFFFFFFFF, np.uint32)
        for row, job in enumerate(jobs):
            if job is None or job.constraint is None or job.error is not None:
                continue
            try:
                allowed[row, : offered[row] + 1] = job.constraint.masks(drafts[row][: offered[row]])
            except ConstraintError as error:
                job.error = str(error)
        return mx.array(allowed)

    return make
