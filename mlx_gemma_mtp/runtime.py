"""`load` and `Runtime`: a pair of models for one caller. Knows nothing of threads, HTTP or terminals."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any

import mlx.core as mx

from .adaptive import parse_depth
from .cache import KVCache
from .config import LayerSpec
from .constraints import Grammars
from .loading import Loaded, Progress, load_pair
from .models.drafter import Drafter
from .models.target import Target
from .request import Contract, FinishReason, Request, SamplingParams, TokenLogprob
from .sampling import Constraint
from .scheduler import Scheduler
from .speculative import MAX_DEPTH, Speculator
from .stats import SpecStats
from .text import Piece, TextCodec, read_stop_ids
from .views import CacheSpec

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text (put into the chat template as a user's message), token ids, or chat messages."""

_CHUNK = 512


@dataclass(kw_only=True)
class Timing:
    """Seconds and what they were spent on. `peak_memory` is in bytes, weights and K/V included."""

    prompt_tokens: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after each request's first, which the prefill gives."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, float | int]:
        """Ready for JSON."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "decode_tokens": self.decode_tokens,
            "prefill_seconds": round(self.prefill_seconds, 6),
            "decode_seconds": round(self.decode_seconds, 6),
            "prefill_tokens_per_second": round(self.prefill_rate, 2),
            "decode_tokens_per_second": round(self.decode_rate, 2),
            "peak_memory_bytes": self.peak_memory,
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

    `contract` says what the tokens promise (see `request.Contract`). With n > 1, `choices` holds all outputs, of which
    this is the first.
    """

    tokens: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    text: str = ""
    thinking: str | None = None
    finish_reason: FinishReason | None = None
    contract: Contract = "exact"
    logprobs: list[TokenLogprob] | None = None
    choices: list[Generation] = field(default_factory=list)
    stats: SpecStats = field(default_factory=SpecStats)
    timing: Timing = field(default_factory=Timing)


def load(
    path: str = "demo",
    *,
    drafter: str | None = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Runtime:
    """Load a pair: a directory, a hub id, or "demo" (the bundled one); see `loading.load_pair` for the rest."""
    loaded = load_pair(str(path), drafter=drafter, dtype=dtype, revision=revision, progress=progress)
    if loaded.drafter is None and drafter is not None:
        log.warning("%s: no drafter found, decoding plainly", loaded.path)
    if progress:
        progress("loading the tokenizer", 0.0)
    return Runtime(loaded)


class Runtime:
    """A target, its drafter (or none) and its tokenizer (or none), in memory, for one caller at a time.

    `compiled`: whether rounds go through mx.compile (None: where it works).
    """

    def __init__(self, loaded: Loaded, *, compiled: bool | None = None) -> None:
        self._loaded = loaded
        self.config, self.drafter_config = loaded.config, loaded.drafter_config
        self.text = TextCodec.from_directory(loaded.path)
        self._grammars: Grammars | None = None
        self._stop_ids = read_stop_ids(loaded.path) if self.text is None else self.text.stop_ids
        spec = CacheSpec(slots=self.config.kv_slots, max_block=MAX_DEPTH + 1, dtype=loaded.dtype)
        self._speculator = Speculator(
            loaded.target, loaded.drafter, spec, compiled=_can_compile() if compiled is None else compiled
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: SamplingParams | None = None,
        depth: int | str = "auto",
        ignore_eos: bool = False,
        n: int = 1,
    ) -> Generation:
        """Decode one prompt to its end, `n` times over (all of them are in `choices`)."""
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1")
        outputs = self.generate_batch(
            [self._ids(prompt)] * n,
            max_tokens=max_tokens,
            sampling=sampling,
            depth=depth,
            ignore_eos=ignore_eos,
            choices=range(n),
        )
        outputs[0].choices = outputs
        return outputs[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 256,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        depth: int | str = "auto",
        ignore_eos: bool = False,
        max_batch: int | None = None,
        choices: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Decode prompts of any lengths as one ragged batch (of at most `max_batch` rows; default: all at once).

        `sampling` is one for all or one each, in one batch. `choices` tells outputs of one seed apart (`Request`).
        `timing` is that of the batch, in every output.
        """
        ids, outputs = [self._ids(p) for p in prompts], [Generation() for _ in prompts]
        for _ in self._run(ids, outputs, max_tokens, sampling, depth, ignore_eos, max_batch, choices):
            pass
        for output, prompt in zip(outputs, ids, strict=True):
            if self.text is not None:
                output.text, output.thinking = self.text.split(output.tokens, prompt)
        return outputs

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: SamplingParams | None = None,
        depth: int | str = "auto",
        ignore_eos: bool = False,
    ) -> Iterator[Step]:
        """Decode one prompt, step by step. Dropping the iterator ends the request."""
        ids = self._ids(prompt)
        output, reader = Generation(), self.text.stream(ids) if self.text is not None else None
        for new, flags in self._run([ids], [output], max_tokens, sampling, depth, ignore_eos, None):
            pieces: tuple[Piece, ...] = ()
            if reader is not None:
                pieces = reader.push(new, flags) + (reader.flush() if output.finish_reason else ())
            yield Step(
                tokens=new,
                drafted=flags,
                text="".join(p.text for p in pieces),
                pieces=pieces,
                finish_reason=output.finish_reason,
                stats=output.stats,
                timing=output.timing,
            )

    def logits(self, tokens: Sequence[int]) -> mx.array:
        """Logits (L, vocab), float32, after each of `tokens`: for scoring and parity."""
        target, parts, tokens = self._loaded.target, [], self._checked(tokens)
        cache = KVCache.with_row(self._speculator.spec, len(tokens))
        for start in range(0, len(tokens), _CHUNK):
            chunk = mx.array([list(tokens[start : start + _CHUNK])], mx.int32)
            view = cache.view(chunk.shape[1], start=start)
            parts.append(target.unembed(target(chunk, view))[0].astype(mx.float32))
            cache.arrays = view.arrays_after(mx.array([chunk.shape[1]], mx.int32))
            mx.eval(parts[-1], *cache.arrays)
        return mx.concatenate(parts)

    def draft(self, tokens: Sequence[int], depth: int = 4, position: int | None = None) -> list[int]:
        """The drafter's greedy guesses after `tokens` and the target's own next token.

        `position` is what its queries are turned to (default: the last position held, len(tokens) - 1).
        """
        if self._loaded.drafter is None:
            raise ValueError("there is no drafter: load one to draft")
        cache, hidden = self._prefilled(self._checked(tokens))
        token = mx.argmax(self._loaded.target.unembed(hidden), axis=-1).astype(mx.int32)
        block = self._speculator.draft(cache, token, hidden, depth, position=position)
        drafted: list[int] = block[0].tolist()  # type: ignore[assignment]
        return drafted

    def info(self) -> dict[str, Any]:
        """What is loaded: layers, parameters, bytes of weights and K/V, and what the drafter reads. Ready for JSON."""
        loaded, spec = self._loaded, self._speculator.spec
        layers = self.config.layers
        out: dict[str, Any] = {
            "model": {
                "path": str(loaded.path),
                "type": self.config.model_type,
                "vocabulary": self.config.vocab_size,
                "hidden": self.config.hidden_size,
                "layers": {
                    "total": len(layers),
                    "sliding": sum(s.window is not None for s in layers),
                    "full": sum(s.window is None for s in layers),
                    "sharing_kv": sum(not s.writes_kv for s in layers),
                    "window": next((s.window for s in layers if s.window is not None), None),
                },
                "experts": layers[0].moe.experts if layers[0].moe else 0,
                "context": self.config.max_positions,
                **_sizes(loaded.target),
            },
            "kv": {
                "dtype": str(spec.dtype).removeprefix("mlx.core."),
                "bytes_per_1k_tokens": 1024 * spec.bytes_per_token(),
                "ring_bytes_per_request": spec.ring_bytes(),
            },
            "drafter": None,
            "skipped_tensors": dict(loaded.skipped),
            "backend": str(mx.default_device()),
            "dtype": str(loaded.dtype).removeprefix("mlx.core."),
        }
        if loaded.drafter is not None and self.drafter_config is not None:
            out["drafter"] = {
                "path": str(loaded.drafter_path),
                "type": self.drafter_config.model_type,
                "layers": len(self.drafter_config.layers),
                "head": "centroids" if self.drafter_config.centroids else "full",
                "reads_target_layers": [self._read_by(s) for s in self.drafter_config.layers],
                "kv_bytes": 0,
                **_sizes(loaded.drafter),
            }
        return out

    def _constrain(self, request: Request) -> Constraint | None:
        """The constraint of a request, started for its output."""
        if request.sampling.constraint is None:
            return None
        if self.text is None:
            raise ValueError(f"constraint is {request.sampling.constraint!r}, but this checkpoint has no tokenizer")
        if self._grammars is None:
            self._grammars = Grammars(self.text, self.config.vocab_size, self._stop_ids)
        return self._grammars.of_request(request)

    def _read_by(self, layer: LayerSpec) -> int:
        return self.config.kv_slots[layer.kv_slot].layer

    def _prefilled(self, tokens: Sequence[int]) -> tuple[KVCache, mx.array]:
        cache = KVCache.with_row(self._speculator.spec, len(tokens))
        for start in range(0, len(tokens), _CHUNK):
            hidden = self._speculator.prefill(cache, tokens[start : start + _CHUNK])
        return cache, hidden

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = _whole_numbers(tokens)
        if not ids:
            raise ValueError("tokens is empty, expected at least one token id")
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"tokens has id {token}, expected 0 to {self.config.vocab_size - 1}")
        return ids

    def _ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt of any form."""
        if not isinstance(prompt, str) and not any(isinstance(t, Mapping) for t in prompt):
            return _whole_numbers(prompt)
        if self.text is None:
            raise ValueError("this checkpoint has no tokenizer: expected a prompt of token ids")
        if isinstance(prompt, str) and not self.text.has_chat_template:
            return self.text.encode(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self.text.render(messages)  # type: ignore[arg-type]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        outputs: Sequence[Generation],
        max_tokens: int,
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        depth: int | str,
        ignore_eos: bool,
        max_batch: int | None,
        choices: Sequence[int] | None = None,
    ) -> Iterator[tuple[tuple[int, ...], tuple[bool, ...]]]:
        """Fill `outputs` step by step; yields each event's tokens and whether they were drafted."""
        sampling = SamplingParams() if sampling is None else sampling
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(prompts):
            raise ValueError(f"sampling has {len(params)} entries for {len(prompts)} prompts")
        scheduler = Scheduler(
            self._speculator,
            vocab_size=self.config.vocab_size,
            max_positions=self.config.max_positions,
            depth=parse_depth(depth),
            max_batch=max_batch or max(len(prompts), 1),
            chunk=_CHUNK,
            constrain=self._constrain,
        )
        timing, by_id = Timing(), {}
        for i, (ids, output, p) in enumerate(zip(prompts, outputs, params, strict=True)):
            request = Request(
                prompt=ids,
                max_tokens=max_tokens,
                sampling=p,
                stop_ids=self._stop_ids,
                ignore_eos=ignore_eos,
                choice=choices[i] if choices else 0,
            )
            output.contract, output.logprobs = p.contract, None if p.logprobs is None else []
            number, output.stats = scheduler.add(request)
            by_id[number] = output
            output.timing = timing
            timing.prompt_tokens += len(ids)
        mx.reset_peak_memory()
        while scheduler.busy:
            prefill, begin = scheduler.next_is_prefill, time.perf_counter()
            events = scheduler.step()
            spent = time.perf_counter() - begin
            timing.peak_memory = mx.get_peak_memory()
            if prefill:
                timing.prefill_seconds += spent
            else:
                timing.decode_seconds += spent
            for event in events:
                output = by_id[event.request_id]
                output.tokens += event.tokens
                output.drafted += event.drafted
                if output.logprobs is not None:
                    output.logprobs += event.logprobs
                output.finish_reason = event.finish_reason
                timing.decode_tokens += 0 if prefill else len(event.tokens)
            for event in events:
                yield event.tokens, event.drafted


def _whole_numbers(tokens: Any) -> list[int]:
    """Token ids of any integer type (Python's, NumPy's, MLX's) as plain ones."""
    values: Any = tokens.tolist() if isinstance(tokens, mx.array) else tokens
    ids = []
    for token in values:
        try:
            ids.append(index(token))
        except TypeError:
            raise ValueError(f"prompt has {token!r}, expected token ids, a text or chat messages") from None
    return ids


def _sizes(model: Target | Drafter) -> dict[str, int]:
    return {
        "parameters": model.parameters,
        "bytes": sum(a.nbytes for portion in model.arrays for a in portion),
    }


def _can_compile() -> bool:
    """Whether mx.compile works here: MLX's CPU backend needs a C++ compiler for it."""
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.ones(3)))
    except RuntimeError:
        mx.disable_compile()
        log.warning("mx.compile doesn't work here (no C++ compiler?): decoding will be slower")
        return False
    return True
