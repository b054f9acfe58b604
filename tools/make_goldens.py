"""Make the goldens of tests/parity: what transformers computes for the tiny pairs of tests/tiny.py.

Needs an environment of its own with `torch` and `transformers==5.17.0` (5.23.0 can't make the assistant):

    python tools/make_goldens.py [--only KIND] [--out tests/parity/goldens]

Each case becomes `<kind>-<seed>.json` (tokens, drafts, accepted counts, margins, versions) and `.npz`
(logits).

Drafts come from transformers' assistant model, but not from its candidate generator as it is: in the
first round that hands over the hidden state of the prompt's first position instead of its last, and in
later rounds the key of one rejected draft. `first_candidates` mends the former, to check that our way of
calling the assistant is transformers' own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
)
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import tiny  # noqa: E402

LENGTHS = (1, 3, 9, 14, 31, 50, 77)
ALL_POSITIONS_OF = 31  # the length whose logits are kept at every position; it is longer than the window
WINDOW = 16
UNREAD_KEYS = frozenset({
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
})  # fmt: skip
NEW_TOKENS = 200
FIRST_DEPTH = 8
ROUND_DEPTH = 4
# The least gaps, between what is chosen and the next best, that a recorded prompt may have.
MARGIN = 1e-3  # logits of the target
DRAFT_MARGIN = 2e-4  # logits of the drafter
ROUTER_MARGIN = 2e-6  # probabilities of experts


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair to record."""

    kind: tiny.Kind
    seed: int
    style: tiny.Style


CASES = tuple(
    Case(kind=kind, seed=seed, style="hf" if seed else "google")
    for kind in tiny.KINDS
    for seed in (0, 1)
    if kind != "text" or seed == 1
)


class Oracle:
    """A target and its drafter in transformers: float32, eager attention, no end of sequence."""

    def __init__(self, directory: Path, kind: tiny.Kind) -> None:
        if kind == "unified":
            _relabel(directory)
        target_class = Gemma4ForCausalLM if kind == "text" else Gemma4ForConditionalGeneration
        self.target = _load(target_class, directory)
        self.drafter = _load(Gemma4AssistantForCausalLM, directory / "drafter")
        text = self.target.config.get_text_config()
        self.window = text.sliding_window
        self.embed = self.target.get_input_embeddings()
        self.router_gaps: list[float] = []
        self.final: torch.Tensor | None = None  # what the drafter's last final norm gave, (1, 1, hidden)
        for module in self.target.modules():
            if isinstance(module, Gemma4TextRouter):
                module.register_forward_hook(
                    lambda _, __, out: self.router_gaps.append(_gap(out[0], text.top_k_experts))
                )
        self.drafter.model.norm.register_forward_hook(lambda _, __, out: setattr(self, "final", out))
        settings = self.drafter.generation_config
        settings.num_assistant_tokens = FIRST_DEPTH
        settings.num_assistant_tokens_schedule = "constant"

    def read(self, tokens: list[int]) -> Reading:
        """One forward pass over `tokens`: logits, hidden states, and the keys and values drafters see."""
        self.router_gaps.clear()
        out = self.target(
            input_ids=torch.tensor([tokens]),
            output_hidden_states=True,
            return_shared_kv_states=True,
            use_cache=False,
        )
        router_margin = min(self.router_gaps, default=float("inf"))
        return Reading(
            router_margin=router_margin,
            logits=out.logits[0],
            hidden=out.hidden_states[-1],
            kv=dict(out.shared_kv_states),
        )

    def greedy(self, tokens: list[int], *, assisted: bool, new: int = NEW_TOKENS) -> list[int]:
        """The next `new` tokens, by transformers' own loops."""
        out = self.target.generate(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            assistant_model=self.drafter if assisted else None,
        )
        return [int(x) for x in out[0, len(tokens) :]]

    def draft(self, reading: Reading, token: int, length: int, depth: int, position: int) -> Drafts:
        """`depth` greedy drafts after `token`, which follows the first `length` positions of `reading`."""
        kv = {}
        for kind, (keys, values) in reading.kv.items():
            first = max(0, length - self.window) if kind == "sliding_attention" else 0
            kv[kind] = (keys[:, :, first:length], values[:, :, first:length])
        hidden = reading.hidden[:, length - 1 : length]
        tokens, margin = [], float("inf")
        for _ in range(depth):
            embedded = self.embed(torch.tensor([[token]]))
            out = self.drafter(
                inputs_embeds=torch.cat([embedded, hidden], dim=-1),
                position_ids=torch.tensor([[position]]),
                attention_mask=None,
                shared_kv_states=kv,
            )
            margin = min(margin, _gap(out.logits[0, -1], 1), self._centroid_gap())
            token = int(out.logits[0, -1].argmax())
            hidden = out.last_hidden_state
            tokens.append(token)
        return Drafts(tokens=tokens, margin=margin)

    def _centroid_gap(self) -> float:
        """The gap between the last centroid chosen and the next, if the draft depends on that choice."""
        head = self.drafter.masked_embedding
        if head is None or self.final is None:
            return float("inf")
        top = head.centroid_intermediate_top_k
        scores, order = head.centroids(self.final)[0, -1].sort(descending=True)
        tokens = head.token_ordering.view(head.num_centroids, -1)[order[: top + 1]]
        best = (self.drafter.lm_head.weight[tokens] @ self.final[0, -1]).amax(dim=-1)
        if best[:top].argmax() < top - 1 and best[top] < best[:top].max():
            return float("inf")
        return float(scores[top - 1] - scores[top])

    def first_candidates(self, tokens: list[int]) -> list[int]:
        """The first round's candidates of transformers' own generator, from the last position's hidden."""
        generator: Any = SinglePositionMultiTokenCandidateGenerator
        original = generator.get_candidates
        seen: list[list[int]] = []

        def mended(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not seen:
                kwargs["n_last_matches"] = len(tokens) - 1
            ids, logits = original(self, input_ids, *args, **kwargs)
            if logits is not None:
                seen.append(ids[0, input_ids.shape[1] :].tolist())
            return ids, logits

        generator.get_candidates = mended
        try:
            self.greedy(tokens, assisted=True, new=FIRST_DEPTH + 2)
        finally:
            generator.get_candidates = original
        return seen[0]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Logits (L, V), hidden (1, L, H) after the final norm, keys and values (1, heads, L, D) by layer type.

    `router_margin` is the least gap in probability between the last expert chosen and the next one.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    kv: dict[str, tuple[torch.Tensor, torch.Tensor]]
    router_margin: float


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Drafted tokens and the smallest gap by which any of them was chosen."""

    tokens: list[int]
    margin: float


def record(oracle: Oracle, tokens: list[int]) -> tuple[dict[str, Any], torch.Tensor] | None:
    """What is kept of one prompt, and its logits (L, V); None when a choice in it is too close to call."""
    greedy = oracle.greedy(tokens, assisted=False)
    reading = oracle.read(tokens + greedy)
    length = len(tokens)
    path = reading.logits[length - 1 : length - 1 + NEW_TOKENS]
    if path.argmax(dim=-1).tolist() != greedy:
        raise SystemExit("one forward pass over the greedy tokens disagrees with transformers' generate")
    margin = _gap(path, 1)
    if margin < MARGIN or reading.router_margin < ROUTER_MARGIN:
        return None

    drafts = {}
    draft_margin = float("inf")
    for name, position in (("length", length), ("length_minus_one", length - 1)):
        found = oracle.draft(reading, greedy[0], length, FIRST_DEPTH, position)
        drafts[name] = found.tokens
        draft_margin = min(draft_margin, found.margin)
    accepted, rounds_margin = _rounds(oracle, reading, tokens, greedy)
    draft_margin = min(draft_margin, rounds_margin)
    if draft_margin < DRAFT_MARGIN:
        return None

    if length <= WINDOW and oracle.first_candidates(tokens) != drafts["length"]:
        raise SystemExit("driving the assistant by hand disagrees with transformers' candidate generator")
    assisted = oracle.greedy(tokens, assisted=True) == greedy
    kept = {
        "tokens": tokens,
        "greedy": greedy,
        "assisted_equal": assisted,
        "margin": round(margin, 6),
        "drafts": drafts,
        "draft_margin": round(draft_margin, 6),
        "accepted": accepted,
    }
    return kept, reading.logits[:length]


def _rounds(oracle: Oracle, reading: Reading, tokens: list[int], greedy: list[int]) -> tuple[list[int], float]:
    """Drafts accepted in each round of depth `ROUND_DEPTH` while whole rounds fit, and the smallest margin.

    Positions are length - 1, and a round sees the keys of exactly the tokens before it.
    """
    accepted: list[int] = []
    margin = float("inf")
    done = 1
    while True:
        length = len(tokens) + done - 1
        found = oracle.draft(reading, greedy[done - 1], length, ROUND_DEPTH, length - 1)
        count = 0
        for drafted, chosen in zip(found.tokens, greedy[done:], strict=False):
            if drafted != chosen:
                break
            count += 1
        if done + count + 1 > NEW_TOKENS:
            return accepted, margin
        margin = min(margin, found.margin)
        accepted.append(count)
        done += count + 1


def make(case: Case, out: Path) -> None:
    """Record one case."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        tiny.write_pair(directory, case.kind, seed=case.seed, style=case.style, window=WINDOW)
        fingerprint = tiny.fingerprint(directory)
        _check_config(case)
        oracle = Oracle(directory, case.kind)
    prompts: list[dict[str, Any]] = []
    last: list[Any] = []
    every: Any = None
    for length in LENGTHS:
        for attempt in range(20):
            stream = np.random.RandomState([length, attempt, case.seed])
            tokens = stream.randint(3, tiny.VOCAB, size=length).tolist()
            found = record(oracle, tokens)
            if found:
                break
        else:
            raise SystemExit(f"{case}: no prompt of length {length} has margins above {MARGIN}")
        kept, logits = found
        prompts.append(kept)
        last.append(logits[-1].numpy())
        if length == ALL_POSITIONS_OF:
            every = logits.numpy()
        drafted = ROUND_DEPTH * len(kept["accepted"])
        print(
            f"  length {length:3} attempt {attempt} margin {kept['margin']:.4f} "
            f"drafts {kept['draft_margin']:.5f} "
            f"distinct {len(set(kept['greedy'])):3} accepted {sum(kept['accepted']) / drafted:.2f} "
            f"assisted {'same' if kept['assisted_equal'] else 'DIFFERENT'}",
            flush=True,
        )
    golden = {
        "kind": case.kind,
        "seed": case.seed,
        "style": case.style,
        "window": WINDOW,
        "round_depth": ROUND_DEPTH,
        "all_positions": LENGTHS.index(ALL_POSITIONS_OF),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "weights_sha256": fingerprint,
        "prompts": prompts,
    }
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{case.kind}-{case.seed}"
    (out / f"{stem}.json").write_text(_to_json(golden))
    np.savez_compressed(out / f"{stem}.npz", last=np.stack(last), every=every)


def _load(model_class: Any, directory: Path) -> Any:
    model, info = model_class.from_pretrained(
        directory,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    problems = {name: value for name, value in info.items() if value}
    if problems:
        raise SystemExit(f"{model_class.__name__} doesn't load every tensor: {problems}")
    model.generation_config.eos_token_id = None
    for name in ("temperature", "top_k", "top_p"):
        setattr(model.generation_config, name, None)
    return model.eval()


def _relabel(directory: Path) -> None:
    """Let the dense classes read a unified pair: its text decoder is theirs."""
    for path, model_type in (
        (directory / "config.json", "gemma4"),
        (directory / "drafter" / "config.json", "gemma4_assistant"),
    ):
        config = json.loads(path.read_text())
        config["model_type"] = model_type
        config["text_config"]["model_type"] = "gemma4_text"
        config["architectures"] = None
        path.write_text(json.dumps(config))


def _check_config(case: Case) -> None:
    """Fail unless tests/tiny.py writes in the "hf" style what transformers saves for the "google" style."""
    shape = tiny.SHAPES[case.kind]
    makers: tuple[Callable[[tiny.Style], dict[str, Any]], ...] = (
        lambda style: tiny.target_config(shape, style, WINDOW, "float32", False),
        lambda style: tiny.drafter_config(shape, style, WINDOW, "float32"),
    )
    for make_config in makers:
        google = make_config("google")
        config: Any = CONFIG_MAPPING[google["model_type"]](**google)
        with tempfile.TemporaryDirectory() as temporary:
            config.save_pretrained(temporary)
            saved = json.loads((Path(temporary) / "config.json").read_text())
        written = make_config("hf")
        if _plain(saved) != _plain(written):
            raise SystemExit(f"{case.kind}: transformers saves {saved}\nbut tests/tiny.py writes {written}")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without the keys that every transformers config has and no model reads."""
    return {k: _plain(v) if isinstance(v, dict) else v for k, v in config.items() if k not in UNREAD_KEYS}


def _gap(scores: torch.Tensor, count: int) -> float:
    """How far the `count`-th best of the last axis is above the next one; the least such gap."""
    best = torch.topk(scores, count + 1).values
    return float((best[..., count - 1] - best[..., count]).min())


def _to_json(golden: dict[str, Any]) -> str:
    """JSON with one line for each list of numbers."""
    text = json.dumps(golden, indent=1)
    return re.sub(r"\[[^][{}]*\]", lambda found: "".join(found[0].split()), text) + "\n"


def main() -> None:
    """Record every case, or those of one kind."""
    parser = argparse.ArgumentParser(description="Make the goldens of tests/parity with transformers.")
    parser.add_argument("--only", choices=tiny.KINDS, help="this kind only")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "parity" / "goldens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    messages: Any = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    for case in CASES:
        if args.only in (None, case.kind):
            print(f"{case.kind}-{case.seed} ({case.style})", flush=True)
            make(case, args.out)
    total = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{total / 1e6:.2f} MB in {args.out}")


if __name__ == "__main__":
    main()
