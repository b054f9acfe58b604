"""`load` and `Runtime`: a pair of models for one caller. Knows nothing of threads, HTTP or terminals."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any

import mlx.core as mx

from .adaptive import AdaptiveDepth, DepthMemory, parse_depth
from .bitwise import choose_shapes
from .cache import KVCache
from .config import LayerSpec
from .constraints import Grammars
from .costs import CostFacts, CostModel
from .depth import DepthPolicy, FixedDepth
from .generation import Filling, Generation, Step, Timing
from .generation_config import generation_defaults, read_stop_ids
from .loading import Loaded, Progress, load_pair, memory_limit
from .models.drafter import Drafter
from .models.layers import Layer
from .models.linear import gelu_gate, rms_norm
from .models.target import Target
from .prefix import PrefixCache
from .probe import ProbeResult, Widths, cached_probe, known_probe
from .products import product_costs
from .profiles import Profile
from .request import Request, SamplingParams
from .residency import wired
from .sampling import Constraint
from .scheduler import Pipelined, Scheduler
from .speculative import MAX_DEPTH, Speculator
from .stops import OutputReader, checked_stops
from .text import TextCodec
from .tune import Tuning, tune
from .views import CacheSpec

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text (put into the chat template as a user's message), token ids, or chat messages."""

_CHUNK = 512


def load(
    path: str = "demo",
    *,
    drafter: str | None = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    bitwise: bool = False,
    max_batch: int = 8,
) -> Runtime:
    """Load a pair: a directory, a hub id, or "demo" (the bundled one); see `loading.load_pair` for the rest.

    A quick probe of a few shapes, kept on disk, tells whether blocks' logits are single steps' bit for bit. `bitwise`
    makes sure of it in batches of up to `max_batch`: see `Runtime.require_bitwise`.
    """
    loaded = load_pair(str(path), drafter=drafter, dtype=dtype, revision=revision, progress=progress)
    if loaded.drafter is None and drafter is not None:
        log.warning("%s: no drafter found, decoding plainly", loaded.path)
    if progress:
        progress("loading the tokenizer", 0.0)
    runtime = Runtime(loaded)
    if (costs := runtime.profile().read()) is not None:
        runtime.depth_memory.costs = costs
    elif loaded.drafter is not None:
        if progress:
            progress("timing products", 0.0)
        runtime.depth_memory.costs = CostModel(cost_facts(loaded, measured=True))
    if progress:
        progress("comparing blocks with single steps", 0.0)
    if bitwise:
        runtime.require_bitwise(max_batch=max_batch)
    else:
        runtime.probe(max_batch=max_batch, quick=True)
    return runtime


class Runtime:
    """A target, its drafter (or none) and its tokenizer (or none), in memory, for one caller at a time.

    `compiled`: whether rounds go through mx.compile (None: where it works).
    """

    def __init__(self, loaded: Loaded, *, compiled: bool | None = None) -> None:
        self._loaded = loaded
        self.config, self.drafter_config = loaded.config, loaded.drafter_config
        self.text = TextCodec.from_directory(loaded.path)
        self._grammars: Grammars | None = None
        self._claimed = False
        self.depth_memory = DepthMemory(CostModel(cost_facts(loaded)))
        self.bits: ProbeResult | None = None
        self._stop_ids = read_stop_ids(loaded.path) if self.text is None else self.text.stop_ids
        spec = CacheSpec(slots=self.config.kv_slots, max_block=MAX_DEPTH + 1, dtype=loaded.dtype)
        self._compiled = _can_compile() if compiled is None else compiled
        self.prefixes = PrefixCache(spec, 0)
        self._new_speculator = partial(Speculator, loaded.target, loaded.drafter, spec, compiled=self._compiled)
        self._speculator = self._new_speculator()

    @property
    def dtype(self) -> mx.Dtype:
        """What is computed in."""
        return self._speculator.spec.dtype

    @property
    def generation_defaults(self) -> SamplingParams:
        """How the checkpoint's makers want tokens chosen. Nothing here uses them unasked: `SamplingParams()` is greedy.

        Raises ValueError for a generation_config.json that can't be used.
        """
        return generation_defaults(self._loaded.path)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        depth: int | str = "auto",
        ignore_eos: bool = False,
        n: int = 1,
    ) -> Generation:
        """Decode one prompt to its end, `n` times over (all of them are in `choices`).

        Greedy unless `sampling` says otherwise. The output ends at `max_tokens`, at an id of the checkpoint's that ends
        outputs (unless `ignore_eos`), at one of `stop_ids`, or where its answer holds one of the texts in `stop`.
        """
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1")
        outputs = self.generate_batch(
            [self._ids(prompt)] * n,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            stop_ids=stop_ids,
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
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        depth: int | str = "auto",
        ignore_eos: bool = False,
        max_batch: int | None = None,
        choices: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Decode prompts of any lengths as one ragged batch (of at most `max_batch` rows; default: all at once).

        `sampling` is one for all or one each, in one batch; for more that differs, see `decode`. `choices` tells
        outputs of one seed apart (`Request`).
        """
        sampling = SamplingParams() if sampling is None else sampling
        params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(params) != len(prompts):
            raise ValueError(f"sampling has {len(params)} entries for {len(prompts)} prompts")
        requests = [
            self.request(
                prompt,
                max_tokens=max_tokens,
                sampling=p,
                stop=stop,
                stop_ids=stop_ids,
                ignore_eos=ignore_eos,
                choice=choices[i] if choices else 0,
            )
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]
        return self.decode(requests, depth=depth, max_batch=max_batch)

    def request(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        depth: int | None = None,
        ignore_eos: bool = False,
        choice: int = 0,
    ) -> Request:
        """A request of this pair: `stop_ids` come beside the checkpoint's own, which `ignore_eos` leaves out."""
        more = frozenset(stop_ids)
        if stop and self.text is None:
            raise ValueError(f"stop is {stop!r}, but this checkpoint has no tokenizer: use stop_ids")
        ids = self._ids(prompt)
        return Request(
            prompt=ids,
            max_tokens=max_tokens,
            sampling=SamplingParams() if sampling is None else sampling,
            stop=checked_stops(stop),
            stop_ids=more if ignore_eos and more else more | self._stop_ids,
            depth=depth,
            ignore_eos=ignore_eos and not more,
            choice=choice,
            checkpoints=self.text.checkpoints(ids) if self.text is not None and self.prefixes.limit else (),
        )

    def decode(
        self, requests: Sequence[Request], *, depth: int | str = "auto", max_batch: int | None = None
    ) -> list[Generation]:
        """Decode requests as one ragged batch (of at most `max_batch` rows; default: all at once).

        `depth` is for requests that name none. `timing` is that of the batch, in every output.
        """
        outputs = [Generation() for _ in requests]
        for _ in self._run(requests, outputs, depth, max_batch):
            pass
        return outputs

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        depth: int | str = "auto",
        ignore_eos: bool = False,
    ) -> Iterator[Step]:
        """Decode one prompt, step by step; see `generate`. Dropping the iterator ends the request."""
        request = self.request(
            prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, stop_ids=stop_ids, ignore_eos=ignore_eos
        )
        return self._run([request], [Generation()], depth, None)

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

    def next_logits(self, tokens: Sequence[int]) -> mx.array:
        """Logits (vocab,), float32, after the last of `tokens`."""
        _, hidden = self._prefilled(self._checked(tokens))
        return self._loaded.target.unembed(hidden)[0].astype(mx.float32)

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

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an output."""
        return self._stop_ids

    def scheduler(
        self,
        *,
        depth: int | str | DepthPolicy = "auto",
        max_batch: int = 8,
        prefill_budget: int = 512,
        kv_budget: int | None = None,
        prefix_cache: int | PrefixCache = 0,
        speculator: Speculator | None = None,
    ) -> Scheduler:
        """A scheduler over these models, to be made and stepped in one thread; see `Scheduler`. Raises ValueError.

        It keeps constraints, but knows no stop strings: see `stops.OutputReader`.
        """
        shapes = self._speculator.shapes
        if shapes is not None:
            max_batch = min(max_batch, shapes.max_rows)
            # What one request computed is not what another would have, bit for bit.
            prefix_cache = prefix_cache if shapes.free else 0
        return Scheduler(
            self._speculator if speculator is None else speculator,
            vocab_size=self.config.vocab_size,
            max_positions=self.config.max_positions,
            depth=self.depth_policy(depth) if isinstance(depth, int | str) else depth,
            max_batch=max_batch,
            chunk=_CHUNK,
            prefill_budget=prefill_budget,
            kv_budget=kv_budget,
            prefix_cache=prefix_cache,
            pipelined=_pipelined(),
            constrain=self.constraint,
        )

    def profile(self) -> Profile:
        """Where `tune` keeps this pair's costs on this machine."""
        models = [m for m in (self._loaded.target, self._loaded.drafter) if m is not None]
        weights = [a for model in models for portion in model.arrays for a in portion]
        return Profile(self._speculator.spec, weights)

    def tune(self, *, seconds: float = 110.0, progress: Progress | None = None) -> Tuning:
        """Measure what rounds cost, and use and keep it. Raises ValueError where there is no drafter, and OSError."""
        self._check_free()
        tuning = tune(
            self._speculator,
            cost_facts(self._loaded, measured=self._loaded.drafter is not None),
            vocab_size=self.config.vocab_size,
            max_positions=self.config.max_positions,
            pipelined=_pipelined(),
            seconds=seconds,
            progress=progress,
        )
        self.depth_memory.costs = tuning.costs
        self.profile().write(tuning.costs)
        return tuning

    def depth_policy(self, depth: int | str) -> AdaptiveDepth | FixedDepth:
        """The policy for a caller's `depth`. All that are "auto" here learn into one memory. Raises ValueError."""
        policy = parse_depth(depth, self.depth_memory, ahead=_pipelined() == "all")
        return policy if self._loaded.drafter is not None else FixedDepth(0)

    def probe(
        self,
        *,
        max_batch: int = 8,
        depth: int = MAX_DEPTH,
        quick: bool = False,
        least: int = 1,
        seconds: float | None = None,
    ) -> ProbeResult:
        """Compare the logits of blocks with those of single steps, byte by byte; `bits` has the result afterwards.

        For batches of up to `max_batch` rows and drafts of up to `depth`, in about `seconds` at most (default: 60, or
        5 if `quick`, which compares a few shapes if no more is known). Results are kept on disk: see
        `probe.cached_probe`. `least`: single steps are padded to so many tokens.
        """
        target, positions, compiled = self._loaded.target, self.config.max_positions, self._compiled
        weights = [a for portion in target.arrays for a in portion]
        vocab, spec = self.config.vocab_size, self._speculator.spec
        wide = Widths.full(max_batch, depth, positions, least=least, compiled=compiled)
        few = Widths.quick(max_batch, depth, positions, compiled=compiled)
        known = known_probe(spec, wide, vocab_size=vocab, weights=weights) if quick else None
        self.bits = known or cached_probe(
            target,
            spec,
            few if quick else wide,
            vocab_size=vocab,
            weights=weights,
            seconds=(5.0 if quick else 60.0) if seconds is None else seconds,
        )
        return self.bits

    def require_bitwise(self, *, max_batch: int = 8, depth: int = MAX_DEPTH, seconds: float = 300.0) -> None:
        """Decode from now on in such shapes only in which blocks' logits are single steps', bit for bit.

        Single steps may have to be padded, and blocks and batches may get smaller: `info` tells. Where prompts' K/V
        depends on what is computed beside them, they are prefilled one by one. Raises BitwiseError where there is no
        such decode path.
        """
        shapes, found = choose_shapes(
            lambda least: self.probe(max_batch=max_batch, depth=depth, least=least, seconds=seconds),
            drafts=self._loaded.drafter is not None,
        )
        self.bits, self._speculator.shapes = found, shapes
        if shapes.max_rows < max_batch:
            log.warning("batches are of %d rows at most: larger ones are not bitwise here", shapes.max_rows)

    def keep_prefixes(self, limit: int) -> None:
        """Keep up to `limit` bytes of K/V of prompts and outputs between calls, for prompts that begin alike."""
        self.prefixes.limit = limit
        self.prefixes.shrink(limit)

    def default_kv_budget(self, prefix_cache: int = 0) -> int:
        """Bytes that K/V may take here: what the weights, `prefix_cache` and a sixteenth for all else leave free."""
        drafter = self._loaded.drafter
        portions = [*self._loaded.target.arrays, *([] if drafter is None else drafter.arrays)]
        weights = sum(a.nbytes for portion in portions for a in portion)
        limit = memory_limit()
        return max(limit - limit // 16 - weights - prefix_cache, 0)

    @contextmanager
    def serving(self, *, kv_budget: int | None = None, prefix_cache: int = 0, **options: Any) -> Iterator[Scheduler]:
        """A scheduler for an engine, which makes, steps and leaves it in one thread; direct calls raise meanwhile.

        `kv_budget` None: `default_kv_budget`. For the rest see `scheduler`. Raises ValueError and RuntimeError.
        """
        self._check_free()
        self._claimed, speculator = True, self._new_speculator()
        speculator.shapes = self._speculator.shapes
        try:
            budget = self.default_kv_budget(prefix_cache) if kv_budget is None else kv_budget
            yield self.scheduler(kv_budget=budget, prefix_cache=prefix_cache, speculator=speculator, **options)
        finally:
            speculator.forget()
            self._claimed = False

    def _check_free(self) -> None:
        if self._claimed:
            raise RuntimeError("an Engine has this runtime: submit requests to it, or shut it down first")

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
            "exactness": self._exactness(),
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

    def _exactness(self) -> dict[str, Any]:
        """Whether `exact` holds to the last bit here, and what was done for it. Ready for JSON."""
        (bitwise, differing), shapes = self.bitwise(), self._speculator.shapes
        out: dict[str, Any] = {"bitwise": bitwise, "differing_shapes": list(differing)}
        if self.bits is not None:
            out |= {"probe": self.bits.describe(), "probe_seconds": round(self.bits.seconds, 3)}
        if shapes is not None:
            longest = [f"{rows}x{block}" for rows, block in shapes.longest.items()]
            out |= {"steps_padded_to": shapes.least, "longest_blocks": longest}
        return out

    def bitwise(self) -> tuple[bool | None, tuple[str, ...]]:
        """What an output says of it; see `Generation`."""
        if self._speculator.shapes is not None:
            return True, ()
        return (None, ()) if self.bits is None else (self.bits.bitwise, self.bits.differing_shapes)

    def constraint(self, request: Request) -> Constraint | None:
        """The constraint of a request, started for its output; None: it has none. Raises ValueError."""
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
        self._check_free()
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
        self, requests: Sequence[Request], outputs: Sequence[Generation], depth: int | str, max_batch: int | None
    ) -> Iterator[Step]:
        """Fill `outputs`; yields what each event brought."""
        self._check_free()
        rows = max_batch or max(len(requests), 1)
        policy = self.depth_policy(depth)
        scheduler = self.scheduler(depth=policy, max_batch=rows, prefix_cache=self.prefixes)
        timing, fillings = Timing(), dict[int, Filling]()
        for request, output in zip(requests, outputs, strict=True):
            number, output.stats = scheduler.add(request)
            output.contract, output.timing = request.sampling.contract, timing
            output.bitwise, output.differing_shapes = self.bitwise()
            least, asked = request.sampling.min_tokens, request.sampling.logprobs
            stream = None if self.text is None else self.text.stream(request.prompt)
            reader = None if stream is None else OutputReader(stream, request.stop, min_tokens=least)
            fillings[number] = Filling(output, reader, logprobs=asked is not None)
            timing.prompt_tokens += len(request.prompt)
        mx.reset_peak_memory()
        reused = self.prefixes.reused_tokens
        with wired():
            try:
                while scheduler.busy:
                    prefill, begin = scheduler.next_is_prefill, time.perf_counter()
                    events = scheduler.step()
                    spent = time.perf_counter() - begin
                    timing.peak_memory = mx.get_peak_memory()
                    if any(event.finish_reason is not None for event in events):
                        timing.depth = policy.describe()
                    timing.reused_tokens = self.prefixes.reused_tokens - reused
                    if prefill:
                        timing.prefill_seconds += spent
                    else:
                        timing.decode_seconds += spent
                    for event in events:
                        filling = fillings[event.request_id]
                        step = filling.take(event)
                        if step is None:
                            continue
                        if filling.stopped and event.finish_reason is None:
                            timing.depth = policy.describe()
                            scheduler.cancel(event.request_id)
                            filling.settle()
                        timing.decode_tokens += 0 if prefill else len(step.tokens)
                        yield step
            finally:
                # A caller who leaves in the middle leaves what was computed to the prefix cache.
                for number in fillings:
                    scheduler.cancel(number)


def cost_facts(loaded: Loaded, *, measured: bool = False) -> CostFacts:
    """What a round of a pair reads, in bytes: where the cost of drafting starts from before it is measured.

    `measured`: how it grows with the tokens of a forward is timed with some of the target's MLPs; see `product_costs`.
    """
    config, drafter = loaded.config, loaded.drafter_config
    spec = CacheSpec(slots=config.kv_slots, max_block=MAX_DEPTH + 1, dtype=loaded.dtype)
    moe = next((s.moe for s in config.layers if s.moe is not None), None)
    experts = sum(3 * s.moe.experts * s.moe.hidden * config.hidden_size for s in config.layers if s.moe is not None)
    # Of the tables of per-layer embeddings a forward reads a few rows.
    tables = config.per_layer_vocab * config.per_layer_hidden * len(config.layers)
    size = _sizes(loaded.target)
    each = size["bytes"] / max(size["parameters"], 1)
    draft = 0.0
    if loaded.drafter is not None and drafter is not None:
        size = _sizes(loaded.drafter)
        head = drafter.vocab_size * drafter.hidden_size if drafter.centroids else 0
        unread = head * (1 - drafter.centroids.top_k / drafter.centroids.count) if drafter.centroids else 0.0
        draft = (size["parameters"] - unread) * size["bytes"] / max(size["parameters"], 1)
    facts = CostFacts(
        dense=(loaded.target.parameters - experts - tables) * each,
        experts=experts * each,
        count=moe.experts if moe else 1,
        used=moe.top_k if moe else 1,
        kv=float(spec.bytes_per_token()),
        drafter=draft,
    )
    if not measured:
        return facts
    with wired():
        costs = product_costs([_mlp(layer) for layer in loaded.target.layers], config.hidden_size, loaded.dtype)
    return replace(facts, products=costs)


def _mlp(layer: Layer) -> Callable[[mx.array], mx.array]:
    return lambda x: layer.down(gelu_gate(*layer.gate_up(rms_norm(x, None, layer.eps))))


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


def _pipelined() -> Pipelined:
    """Rounds that are launched ahead on this device."""
    return "all" if mx.default_device().type == mx.gpu else "plain"


def _can_compile() -> bool:
    """Whether mx.compile works here: MLX's CPU backend needs a C++ compiler for it."""
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.ones(3)))
    except RuntimeError:
        mx.disable_compile()
        log.warning("mx.compile doesn't work here (no C++ compiler?): decoding will be slower")
        return False
    return True
