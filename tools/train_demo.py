"""Train the bundled demo pair, or a drafter for another Gemma 4 target, with torch and transformers on a CPU.

    python tools/train_demo.py all --out DIR                     both models, tokenizer, figures, model card
    python tools/train_demo.py target --out DIR                  tokenizer and target only
    python tools/train_demo.py drafter --target DIR --text F...  a drafter for a Hugging Face Gemma 4 target
    python tools/train_demo.py evaluate --pair DIR               answers and greedy acceptance of a pair

Knows nothing of MLX. Needs torch, transformers 5.17, tokenizers, safetensors (the extra `tools`). A drafter
learns every position of a text as an anchor: it reads the frozen target's keys and values up to there, keeps
the anchor's position through all its steps, and is taught the target's distribution for each next token.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import tokenizers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from demo_corpus import Chat, chats
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4Config,
    Gemma4TextModel,
)
from transformers import PreTrainedTokenizerFast as Chatter
from transformers.models.gemma4 import modeling_gemma4

TEMPLATE = Path(__file__).resolve().parent.parent / "mlx_gemma_mtp" / "demo" / "chat_template.jinja"
VOCAB, STOP_IDS, NEWLINE = 2048, [1, 106, 50], 107
STEP_TOKENS = 3072  # tokens for each step of an optimizer, over all workers
# fmt: off
SPECIAL = {
    "<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<|tool>": 46, "<tool|>": 47,
    "<|tool_call>": 48, "<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51,
    '<|"|>': 52, "<|think|>": 98, "<|channel>": 100, "<channel|>": 101, "<|turn>": 105, "<turn|>": 106}
NAMED = {
    "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
    "mask_token": "<mask>", "soc_token": "<|channel>", "eoc_token": "<channel|>", "sot_token": "<|turn>",
    "eot_token": "<turn|>", "std_token": "<|tool>", "etd_token": "<tool|>", "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>", "str_token": "<|tool_response>", "etr_token": "<tool_response|>",
    "escape_token": '<|"|>', "think_token": "<|think|>"}
COMMON: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "dtype": "bfloat16",
    "enable_moe_block": False, "eos_token_id": 1, "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02, "model_type": "gemma4_text", "moe_intermediate_size": None,
    "num_experts": None, "pad_token_id": 0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "top_k_experts": None, "use_bidirectional_attention": None, "use_cache": True}
TARGET: dict[str, Any] = COMMON | {
    "attention_k_eq_v": False, "final_logit_softcapping": 30.0, "global_head_dim": 64, "head_dim": 32,
    "hidden_size": 160, "hidden_size_per_layer_input": 16, "intermediate_size": 224,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2, "max_position_embeddings": 8192,
    "num_attention_heads": 4, "num_global_key_value_heads": None, "num_hidden_layers": 8,
    "num_key_value_heads": 1, "num_kv_shared_layers": 4, "sliding_window": 128, "use_double_wide_mlp": True,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}
GENERATION = {
    "bos_token_id": 2, "do_sample": True, "eos_token_id": STOP_IDS, "pad_token_id": 0, "temperature": 1.0,
    "top_k": 64, "top_p": 0.95}
# fmt: on
Batch = tuple[Tensor, Tensor]  # token ids and the weight of each token as a prediction, flat or (B, T)
Windows = Iterator[tuple[list[int], list[float]]]
LossOf = Callable[[Batch, float], tuple[Tensor, dict[str, float]]]  # of a batch and the share of the time that is over


# --- tokenizer --------------------------------------------------------------------------------------------


def build_tokenizer(texts: Sequence[str], out: Path) -> None:
    """Write the tokenizer's files: byte-fallback BPE in Gemma's style, special tokens at Gemma's ids."""
    teacher = Tokenizer(models.BPE())
    teacher.normalizer = normalizers.Replace(" ", "▁")
    # The teacher sees words, so no piece spans two words or digits. The tokenizer splits nothing, as Gemma's.
    teacher.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^\W\d_]+|▁+|\n+|\d|[^\w\s]|_"), "isolated")
    letters = [chr(c) for c in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB + 600, initial_alphabet=letters, show_progress=False)
    teacher.train_from_iterator(texts, trainer)
    learned = [tuple(pair) for pair in json.loads(teacher.to_str())["model"]["merges"]]
    pieces = dict.fromkeys([f"<0x{b:02X}>" for b in range(256)] + letters)
    fixed = SPECIAL | {"\n": NEWLINE, "\n\n": NEWLINE + 1}
    free = [i for i in range(VOCAB) if i not in fixed.values()]
    merges = [("\n", "\n")]
    for a, b in [("▁", "▁"), ("▁▁", "▁▁"), *learned]:
        whole = a + b
        if a in pieces and b in pieces and (a, b) not in merges and (whole in pieces or len(pieces) < len(free)):
            pieces[whole] = None
            merges.append((a, b))
    names = [*pieces, *(f"<unused{i}>" for i in range(len(free) - len(pieces)))]
    vocab = fixed | dict(zip(names, free, strict=True))
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(tok.to_str(), encoding="utf-8")
    _write_json(
        out / "tokenizer_config.json",
        NAMED
        | {"backend": "tokenizers", "clean_up_tokenization_spaces": False, "extra_special_tokens": []}
        | {"model_max_length": TARGET["max_position_embeddings"], "padding_side": "left"}
        | {"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    if TEMPLATE.resolve() != (out / TEMPLATE.name).resolve():
        shutil.copy(TEMPLATE, out / TEMPLATE.name)


def load_tokenizer(path: Path) -> Chatter:
    """The tokenizer of a model directory, with its chat template."""
    tok = Chatter(tokenizer_file=str(path / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tok.chat_template = (path / "chat_template.jinja").read_text()
    return tok


# --- data -------------------------------------------------------------------------------------------------


def render(tok: Chatter, chat: Chat, upto: int | None = None) -> str:
    """A chat through the template; with `upto`, only so many messages and the generation prompt."""
    text = tok.apply_chat_template(
        chat.messages[:upto],
        tools=chat.tools,
        enable_thinking=chat.thinking,
        tokenize=False,
        add_generation_prompt=upto is not None,
    )
    return cast(str, text)


def chat_windows(tok: Chatter, seed: str, outside: float) -> Windows:
    """Endless training chats: weight 1 for what the model has to say, `outside` for prompts and responses.

    The template strips the thoughts of earlier turns, so with thinking on only the last turn is something to learn.
    """
    opening = tok("<|turn>model\n", add_special_tokens=False)["input_ids"]
    for chat in chats(seed):
        ids = tok(render(tok, chat), add_special_tokens=False)["input_ids"]
        weights, said = list[float](), False
        for at, i in enumerate(ids):
            weights.append(1.0 if said else outside)
            if i in (SPECIAL["<turn|>"], SPECIAL["<|tool_response>"]):
                said = False
            elif i == SPECIAL["<tool_response|>"] or ids[max(0, at + 1 - len(opening)) : at + 1] == opening:
                said = True
                if chat.thinking and i == NEWLINE:
                    weights = [min(w, outside) for w in weights]
        yield ids, weights


def file_windows(tok: Chatter, files: Sequence[Path], seed: str) -> Windows:
    """Endless paragraphs of text files in a seeded random order; every token counts."""
    paragraphs = [p for f in files for p in f.read_text(encoding="utf-8").split("\n\n") if p.strip()]
    r = random.Random(seed)
    while True:
        ids = tok(r.choice(paragraphs) + "\n\n", add_special_tokens=False)["input_ids"]
        yield ids, [1.0] * len(ids)


def batches(windows: Windows, count: int) -> Iterator[Batch]:
    """Texts laid end to end and cut into pieces of `count` tokens."""
    ids: list[int] = []
    weights: list[float] = []
    for more, w in windows:
        ids += more
        weights += w
        if len(ids) >= count:
            yield torch.tensor(ids[:count]), torch.tensor(weights[:count])
            ids, weights = ids[count:], weights[count:]


def as_rows(batch: Batch, progress: float) -> Batch:
    """Rows of 256 tokens for most of the time, rows of 512 in the last part."""
    length = 256 if progress < 0.75 else 512
    return batch[0].view(-1, length), batch[1].view(-1, length)


# --- the target -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Target:
    """A Gemma 4 text model with its tied head."""

    text: Gemma4TextModel

    def __call__(self, ids: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Hidden states after the final norm (B, T, D), and the last storing layer's K and V of each kind."""
        out = self.text(input_ids=ids, use_cache=False, return_shared_kv_states=True)
        return out.last_hidden_state, dict(out.shared_kv_states)

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped logits in float32, (..., V)."""
        raw, cap = (
            (hidden @ self.text.embed_tokens.weight.T).float(),
            self.text.config.final_logit_softcapping,
        )
        return torch.tanh(raw / cap) * cap if cap else raw

    @torch.no_grad()
    def generate(self, ids: list[int], limit: int) -> list[int]:
        """Greedy continuation, with a stop id at its end if one came."""
        cache, new = DynamicCache(config=self.text.config), list[int]()
        step = torch.tensor([ids])
        while len(new) < limit and not (new and new[-1] in STOP_IDS):
            hidden = self.text(input_ids=step, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
            new.append(int(self.logits(hidden).argmax()))
            step = torch.tensor([[new[-1]]])
        return new


def target_config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "dtype": "bfloat16",
        "eos_token_id": [1, 106],
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "text_config": TARGET,
        "tie_word_embeddings": True,
        "vision_config": None,
    }


def load_target(path: Path) -> Target:
    """A target from a Hugging Face directory, in float32, frozen."""
    config = Gemma4Config.from_pretrained(path)
    text = Gemma4TextModel(config.get_text_config()).float().eval().requires_grad_(False)
    prefix, have = "model.language_model.", dict[str, Tensor]()
    for file in sorted(path.glob("*.safetensors")):
        have |= {k.removeprefix(prefix): v.float() for k, v in load_file(file).items() if k.startswith(prefix)}
    missing = text.load_state_dict(have, strict=False).missing_keys
    if missing:
        raise ValueError(f"{path}: missing tensors {missing[:4]}, {len(missing)} in all")
    return Target(text=text)


def init_target(text: Gemma4TextModel) -> None:
    """Unit-sized residual stream and dot products; the rest as in transformers."""
    config = text.config
    for name, p in text.named_parameters():
        if "embed_tokens_per_layer" in name:
            nn.init.normal_(p, std=0.1)
        elif "embed_tokens" in name:
            nn.init.normal_(p, std=config.hidden_size**-0.5)
        elif name.endswith("k_norm.weight"):
            nn.init.constant_(p, p.shape[0] ** -0.5)
        elif p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif "post_" in name:
            nn.init.constant_(p, 0.3)


# --- training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Worker processes of one thread each: threads wait in every operation, workers once a step."""

    rank: int
    size: int

    def average(self, params: Sequence[nn.Parameter], progress: float) -> float:
        """Average the gradients over the crew, in place, and the progress."""
        if self.size == 1:
            return progress
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([progress])]) / self.size
        dist.all_reduce(flat)
        for p, part in zip(params, flat[:-1].split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)
        return float(flat[-1])

    def share(self, tokens: int) -> int:
        """This worker's share of the tokens, in whole rows."""
        return max(512, tokens // self.size // 512 * 512)

    def wait(self) -> None:
        """Until all workers are here."""
        if self.size > 1:
            dist.barrier()


class Optimizer:
    """Muon for the matrices, AdamW for tables and norms; warm-up, plateau, linear end, by share of time."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], rate: float, tables: Sequence[str]) -> None:
        table = [p for n, p in named if p.ndim == 2 and any(t in n for t in tables)]
        matrix = [p for n, p in named if p.ndim == 2 and not any(t in n for t in tables)]
        vector = [p for _, p in named if p.ndim != 2]
        groups = [{"params": table}, {"params": vector, "lr": rate / 2}]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrix, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [[g["lr"] for g in part.param_groups] for part in self.parts]
        self.params = [p for _, p in named]

    def step(self, progress: float, number: int) -> None:
        scale = min(1.0, (number + 1) / 20) * min(1.0, (1 - progress) / 0.6 + 0.01)
        nn.utils.clip_grad_norm_(self.params, 1.0)
        for part, rates in zip(self.parts, self.rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            part.step()
            part.zero_grad(set_to_none=True)


def train(
    loss_of: LossOf, data: Iterator[Batch], opt: Optimizer, crew: Crew, minutes: float, what: str
) -> dict[str, float]:
    """Train for so many minutes of wall clock; returns the last figures."""
    start, tokens, mean, shown, progress = time.monotonic(), 0, dict[str, float](), 0.0, 0.0
    for number, batch in enumerate(data):
        if progress >= 1:
            break
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, figures = loss_of(batch, progress)
        loss.backward()
        progress = crew.average(opt.params, (time.monotonic() - start) / (60 * minutes))
        opt.step(min(progress, 1.0), number)
        tokens += batch[0].numel() * crew.size
        mean = {k: v if k not in mean else 0.95 * mean[k] + 0.05 * v for k, v in figures.items()}
        if (spent := time.monotonic() - start) > shown and crew.rank == 0:
            shown = spent + 30
            text = "  ".join(f"{k} {v:.3f}" for k, v in mean.items())
            print(f"{what} {spent:5.0f} s  step {number:5d}  {tokens / spent:6.0f} tokens/s  {text}", flush=True)
    done = {"seconds": round(time.monotonic() - start, 1), "steps": number, "tokens": tokens}
    return done | {k: round(v, 4) for k, v in mean.items()}


def train_target(out: Path, crew: Crew, seed: int, minutes: float, resume: bool, rate: float) -> dict[str, float]:
    """Tokenizer and target, from nothing or from those in `out`; writes them into `out`."""
    torch.manual_seed(seed)
    if crew.rank == 0 and not resume:
        plain = Chatter(tokenizer_object=Tokenizer(models.BPE()), bos_token="<bos>")
        plain.chat_template = TEMPLATE.read_text()
        texts = (render(plain, c) for c in itertools.islice(chats(seed), 12000))
        build_tokenizer([part for t in texts for part in _split_specials(t)], out)
    crew.wait()
    tok = load_tokenizer(out)
    if resume:
        target = load_target(out)
        target.text.requires_grad_(True).train()
    else:
        target = Target(text=Gemma4TextModel(Gemma4Config(**target_config()).text_config).float().train())
        init_target(target.text)

    def loss_of(batch: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
        ids, weights = as_rows(batch, progress)
        logits = target.logits(target(ids)[0][:, :-1])
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        w = weights[:, 1:].flatten()
        said = w == 1
        return (losses * w).sum() / w.sum(), {
            "loss": losses[said].mean().item(),
            "prompt": losses[~said].mean().item(),
        }

    opt = Optimizer(list(target.text.named_parameters()), rate, ["embed_tokens"])
    data = batches(chat_windows(tok, f"{seed}-target-{crew.rank}", 0.15), crew.share(STEP_TOKENS))
    figures = train(loss_of, data, opt, crew, minutes, "target")
    if crew.rank == 0:
        weights = {f"model.language_model.{k}": v for k, v in target.text.state_dict().items()}
        _save(weights, target_config(), out)
    crew.wait()
    return figures


# --- the drafter ------------------------------------------------------------------------------------------


def drafter_config(target: dict[str, Any], hidden: int, wide: int, centroids: int, top: int) -> dict[str, Any]:
    """The config of a drafter for a target's `text_config`; no centroids: a plain tied head."""
    keep = (
        "global_head_dim head_dim max_position_embeddings num_attention_heads num_global_key_value_heads "
        "num_key_value_heads rope_parameters sliding_window vocab_size attention_k_eq_v"
    )
    text = COMMON | {k: target[k] for k in keep.split() if k in target}
    text |= {
        "final_logit_softcapping": None,
        "hidden_size": hidden,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": wide,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 0,
    }
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": target["hidden_size"],
        "centroid_intermediate_top_k": top,
        "dtype": "bfloat16",
        "model_type": "gemma4_assistant",
        "num_centroids": centroids or 2048,
        "text_config": text,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": bool(centroids),
    }


def new_drafter(config: dict[str, Any]) -> Gemma4AssistantForCausalLM:
    model = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(**config)).float()
    for name, p in model.named_parameters():
        if "embed_tokens" in name or "centroids" in name:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif name.endswith("q_norm.weight"):
            nn.init.constant_(p, 1.0)
        elif p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif "post_" in name:
            nn.init.constant_(p, 0.3)
    if model.masked_embedding is not None:
        model.masked_embedding.token_ordering.copy_(torch.arange(model.vocab_size))
    return model


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """What the drafter reads for some anchors of a text: anchor p sees the keys up to p, in every step."""

    at: Tensor  # (B, N) positions
    embeds: Tensor  # (B, T, D) the target's scaled embeddings of the text
    hidden: Tensor  # (B, N, D) the target's hidden states at the anchors
    kv: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]  # (B, 1, N, T), true where a key may be read

    @classmethod
    @torch.no_grad()
    def of(cls, target: Target, ids: Tensor, at: Tensor) -> tuple["Anchors", Tensor]:
        """The anchors of a text, and the target's logits at all its positions."""
        hidden, kv = target(ids)
        back = (at[..., None] - torch.arange(ids.shape[1]))[:, None]
        near = (back >= 0) & (back < target.text.config.sliding_window)
        masks = {"full_attention": back >= 0, "sliding_attention": near}
        embeds = target.text.embed_tokens(ids)
        return cls(at=at, embeds=embeds, hidden=pick(hidden, at), kv=kv, masks=masks), target.logits(hidden)


def pick(values: Tensor, at: Tensor) -> Tensor:
    """`values` (B, T, ...) at the positions (B, N)."""
    return values[torch.arange(values.shape[0])[:, None], at]


def draft_step(model: Gemma4AssistantForCausalLM, a: Anchors, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One step for all anchors: the drafter's state (B, N, d), and the hidden (B, N, D) for the next step."""
    x = model.pre_projection(torch.cat([embeds, hidden], dim=-1))
    out = model.model(
        inputs_embeds=x, attention_mask=a.masks, position_ids=a.at, shared_kv_states=a.kv, use_cache=False
    )
    state = out.last_hidden_state
    return state, model.post_projection(state)


def balanced_clusters(rows: Tensor, count: int, rounds: int = 25) -> tuple[Tensor, Tensor]:
    """k-means with equal clusters: the row numbers cluster by cluster (n,), and the centres (count, d)."""
    n, size = rows.shape[0], rows.shape[0] // count
    centres = rows[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]]
    for _ in range(rounds):
        order = torch.cdist(rows, centres).flatten().argsort().tolist()
        owner, room = [-1] * n, [size] * count
        for flat in order:
            row, c = divmod(flat, count)
            if owner[row] < 0 and room[c]:
                owner[row], room[c] = c, room[c] - 1
        owners = torch.tensor(owner)
        centres = torch.stack([rows[owners == c].mean(0) for c in range(count)])
    return owners.argsort(stable=True), centres


def train_drafter(
    target: Target,
    windows: Windows,
    config: dict[str, Any],
    out: Path,
    crew: Crew,
    seed: int,
    minutes: float,
    steps: int,
) -> dict[str, float]:
    """Distil a drafter from a frozen target over `steps` unrolled steps; writes it into `out`."""
    torch.manual_seed(seed + 7)
    model = new_drafter(config).train()
    head, clusters = model.masked_embedding, Tensor()

    def loss_of(data: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
        nonlocal clusters
        ids, weights = as_rows(data, progress)
        said = weights == 1
        # Half of the positions, those first that are followed by something to say.
        rows, length = ids.shape
        first = said[:, 2 : length + 1 - steps] + torch.rand(rows, length - 1 - steps)
        anchors, logits = Anchors.of(target, ids, first.topk(length // 2).indices.sort().values)
        if head is not None and progress > 0.35 and not len(clusters):
            table = model.model.embed_tokens.weight.detach().float()
            ordering, centres = balanced_clusters(table, head.num_centroids)
            head.token_ordering.copy_(ordering)
            head.centroids.weight.data.copy_(centres)
            clusters = torch.empty_like(ordering)
            clusters[ordering] = torch.arange(len(ordering)) // head.vocab_size_per_centroid
        hidden, active = anchors.hidden, torch.ones_like(anchors.at, dtype=torch.bool)
        total, figures = torch.zeros(()), dict[str, float]()
        for k in range(1, steps + 1):
            state, hidden = draft_step(model, anchors, pick(anchors.embeds, anchors.at + k), hidden)
            active = active & pick(said, anchors.at + k + 1)
            mine = model.lm_head(state[active]).float()
            want = pick(logits, anchors.at + k)[active].softmax(-1)
            loss = -(want * mine.log_softmax(-1)).sum(-1).mean()
            if len(clusters):
                mass = torch.zeros(len(want), head.num_centroids).index_add_(1, clusters, want)
                centre = head.centroids(state[active]).float()
                loss = loss - 0.5 * (mass * centre.log_softmax(-1)).sum(-1).mean()
                figures["recall"] = _recall(centre, clusters[want.argmax(-1)], head.centroid_intermediate_top_k)
            total = total + loss * 0.85 ** (k - 1)
            figures[f"hit{k}"] = (mine.argmax(-1) == want.argmax(-1)).float().mean().item()
        return total, {"loss": total.item()} | figures

    named = [(name, p) for name, p in model.named_parameters() if not name.startswith("lm_head")]
    opt = Optimizer(named, 4e-3, ["embed_tokens", "centroids"])
    figures = train(loss_of, batches(windows, crew.share(STEP_TOKENS)), opt, crew, minutes, "drafter")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("lm_head")}
    if crew.rank == 0:
        _save(
            weights,
            config,
            out,
            is_assistant=True,
            num_assistant_tokens=steps,
            num_assistant_tokens_schedule="constant",
        )
    return figures


def _recall(centre: Tensor, wanted: Tensor, top: int) -> float:
    return (centre.topk(top).indices == wanted[:, None]).any(-1).float().mean().item()


def load_drafter(path: Path) -> Gemma4AssistantForCausalLM:
    """A drafter from its directory, in float32."""
    config = json.loads((path / "config.json").read_text())
    model = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(**config)).float().eval()
    have = {k: v if v.dtype == torch.int64 else v.float() for k, v in load_file(path / "model.safetensors").items()}
    missing = model.load_state_dict(have, strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{path}: missing tensors {missing}")
    model.tie_weights()
    return model.requires_grad_(False)


# --- evaluation -------------------------------------------------------------------------------------------


@torch.no_grad()
def drafts_of(model: Gemma4AssistantForCausalLM, target: Target, ids: Tensor, depth: int) -> Tensor:
    """Greedy drafts (N, depth) for every anchor p of a text (1, T); the token at p + 1 is the pending one."""
    anchors, _ = Anchors.of(target, ids, torch.arange(ids.shape[1] - 1)[None])
    embeds, hidden, drafts = anchors.embeds[:, 1:], anchors.hidden, list[Tensor]()
    for _ in range(depth):
        state, hidden = draft_step(model, anchors, embeds, hidden)
        if model.masked_embedding is None:
            logits = model.lm_head(state)
        else:
            parts = state.split(128, dim=1)
            logits = torch.cat([model.masked_embedding(part, model.lm_head.weight) for part in parts], dim=1)
        drafts.append(logits.argmax(-1))
        embeds = target.text.embed_tokens(drafts[-1])
    return torch.stack(drafts, dim=-1)[0]


def accepted_per_round(drafts: Tensor, ids: Sequence[int], prompt: int, depth: int) -> list[int]:
    """Accepted drafts of each round, `ids[prompt:]` being the target's greedy text; the last may be cut."""
    at, counts = prompt, list[int]()
    while at < len(ids) - 1:  # ids[at] is pending, the cache holds the tokens before it
        n = 0
        while n < depth and at + 1 + n < len(ids) and int(drafts[at - 1, n]) == ids[at + 1 + n]:
            n += 1
        counts.append(n)
        at += n + 1
    return counts


def evaluate(pair: Path, seed: int, prompts: int, depth: int, limit: int = 200) -> dict[str, Any]:
    """Answers to held-out prompts, how many are exactly the corpus' answer, and greedy acceptance."""
    target, tok = load_target(pair), load_tokenizer(pair)
    drafter = load_drafter(pair / "drafter") if (pair / "drafter").exists() else None
    rounds, samples, exact, by_kind = list[int](), list[dict[str, str]](), 0, dict[str, list[int]]()
    new_tokens = 0
    for chat in itertools.islice(chats(seed, held_out=True), prompts):
        prompt = render(tok, chat, -1)
        ids = tok(prompt, add_special_tokens=False)["input_ids"]
        new = target.generate(ids, limit)
        new_tokens += len(new)
        answer = tok.decode(new)
        right = render(tok, chat)[len(prompt) :].rstrip("\n") == answer
        exact += right
        by_kind.setdefault(chat.kind, []).append(int(right))
        if drafter is not None and len(new) > 1:
            text = ids + new
            counts = accepted_per_round(drafts_of(drafter, target, torch.tensor([text]), depth), text, len(ids), depth)
            rounds += counts
        samples.append({"kind": chat.kind, "prompt": prompt, "answer": answer, "expected": "yes" if right else "no"})
    figures: dict[str, Any] = {
        "prompts": prompts,
        "new_tokens": new_tokens,
        "answers_equal_to_corpus": round(exact / prompts, 3),
        "by_kind": {k: f"{sum(v)}/{len(v)}" for k, v in sorted(by_kind.items())},
    }
    if rounds:
        reach = [sum(c >= k for c in rounds) for k in range(depth + 1)]
        figures |= {
            "depth": depth,
            "rounds": len(rounds),
            "accepted_per_round": round(sum(rounds) / len(rounds), 3),
            "acceptance_by_position": [round(b / max(a, 1), 3) for a, b in itertools.pairwise(reach)],
        }
    return figures | {"samples": samples}


# --- files and the command line ---------------------------------------------------------------------------


def _split_specials(text: str) -> list[str]:
    for special in SPECIAL:
        text = text.replace(special, "\0")
    return [part for part in text.split("\0") if part]


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _save(weights: dict[str, Tensor], config: dict[str, Any], out: Path, **generation: Any) -> None:
    """bfloat16 weights (integers as they are), config.json and generation_config.json."""
    out.mkdir(parents=True, exist_ok=True)
    stored = {
        k: (v if v.dtype == torch.int64 else v.to(torch.bfloat16)).detach().contiguous() for k, v in weights.items()
    }
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", GENERATION | generation)


def _fast_cpu(threads: int) -> None:
    """Set the threads, keep freed memory (glibc faults large blocks in again), fuse norms."""
    torch.set_num_threads(threads)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 1 << 28)):
            libc.mallopt(option, value)

    def norm(self: Any, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(
            x.float(), (x.shape[-1],), self.weight if self.with_scale else None, self.eps
        ).type_as(x)

    modeling_gemma4.Gemma4RMSNorm.forward = norm


def write_card(out: Path, record: dict[str, Any]) -> None:
    """`training.json` and the model card."""
    samples = record["evaluation"].pop("samples")
    _write_json(out / "training.json", record | {"samples": samples[:25]})
    e, t, d = record["evaluation"], record["target"], record["drafter"]
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    indent = "\n  "
    rows = "\n".join(
        f"- **{s['kind']}**\n\n  ```text\n  {(s['prompt'] + s['answer']).replace(chr(10), indent)}\n  ```"
        for s in samples[:12]
    )
    (out / "README.md").write_text(f"""# The demo pair

A tiny Gemma 4 target of the E type and its drafter, trained from scratch by `tools/train_demo.py` on chats
made by `tools/demo_corpus.py`: numbers, words, animals, countries, planets, little stories, lists, JSON,
Python, tool calls. It exists so that the whole runtime can be tried and tested without a download. It knows
nothing else, and it is no product of Google.

| | target | drafter |
|---|---|---|
| parameters | {t["parameters"]:,} | {d["parameters"]:,} |
| layers | 8, of them 4 that share K/V | 4, query-only |
| hidden size | 160 | {d["hidden"]} |
| training | {t["tokens"]:,} tokens, {t["seconds"]:.0f} s | {d["tokens"]:,} tokens, {d["seconds"]:.0f} s |

Vocabulary {VOCAB}; sliding window 128; bfloat16; {size:.1f} MB in all. The KV-shared layers store no k_proj,
v_proj and k_norm, as transformers saves them. Trained on {record["machine"]}.

On {e["prompts"]} held-out prompts, with the stored bfloat16 weights:

- greedy answers equal to the corpus' own, word for word: {e["answers_equal_to_corpus"]:.0%} (a story may
  begin in several ways, so not every other answer is wrong);
- greedy drafts accepted per round at depth {e["depth"]}: **{e["accepted_per_round"]}**;
- acceptance of each draft, given the ones before: {", ".join(map(str, e["acceptance_by_position"]))}.

All figures are in `training.json`.

Licence: Apache-2.0, as the rest of this repository. The corpus is generated, so no other licence applies.

## Greedy answers to held-out prompts

{rows}
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="command", required=True)
    both, one, two, three = (sub.add_parser(n) for n in ("all", "target", "drafter", "evaluate"))
    for p in (both, one, two, three):
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    for p in (both, one):
        p.add_argument("--out", type=Path, required=True)
        p.add_argument("--rate", type=float, default=4e-3, help="the target's highest learning rate")
        p.add_argument("--resume", action="store_true", help="go on with the tokenizer and target in OUT")
        p.add_argument(
            "--minutes",
            type=float,
            default=40,
            help="wall clock for training; `all` gives the target 72%% of it",
        )
    two.add_argument(
        "--target", type=Path, required=True, help="a Gemma 4 target in Hugging Face layout, with tokenizer"
    )
    two.add_argument("--text", type=Path, nargs="+", help="UTF-8 files to train on; without: the demo's chats")
    two.add_argument("--out", type=Path, help="where to write; default: TARGET/drafter")
    two.add_argument("--minutes", type=float, default=12)
    for p in (both, two):
        p.add_argument("--hidden", type=int, default=64)
        p.add_argument("--intermediate", type=int, default=128)
        p.add_argument("--centroids", type=int, default=64, help="0: a plain head")
        p.add_argument("--top-centroids", type=int, default=8)
        p.add_argument("--steps", type=int, default=4, help="unrolled steps")
    three.add_argument("--pair", type=Path, required=True)
    for p in (both, three):
        p.add_argument("--prompts", type=int, default=120)
        p.add_argument("--depth", type=int, default=4)
    args = parser.parse_args()
    if args.command == "evaluate":
        _fast_cpu(args.workers)
        print(json.dumps(evaluate(args.pair, args.seed, args.prompts, args.depth), indent=1, ensure_ascii=False))
        return
    with tempfile.TemporaryDirectory() as meeting:
        mp.start_processes(_work, (args, meeting), nprocs=args.workers, start_method="spawn")


def _work(rank: int, a: argparse.Namespace, meeting: str) -> None:
    """One worker of the crew; the first one writes and reports."""
    _fast_cpu(1)
    crew, start, record = Crew(rank=rank, size=a.workers), time.monotonic(), dict[str, Any]()
    if crew.size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=crew.size)
    if a.command in ("all", "target"):
        minutes = a.minutes * (0.72 if a.command == "all" else 1)
        record["target"] = train_target(a.out, crew, a.seed, minutes, a.resume, a.rate)
    if a.command in ("all", "drafter"):
        where = a.out if a.command == "all" else a.target
        out = where / "drafter" if a.command == "all" else a.out or where / "drafter"
        target, tok, seed = load_target(where), load_tokenizer(where), f"{a.seed}-drafter-{rank}"
        text = json.loads((where / "config.json").read_text())["text_config"]
        config = drafter_config(text, a.hidden, a.intermediate, a.centroids, a.top_centroids)
        own_text = a.command == "drafter" and a.text
        windows = file_windows(tok, a.text, seed) if own_text else chat_windows(tok, seed, 0.0)
        minutes = a.minutes * (0.28 if a.command == "all" else 1)
        record["drafter"] = train_drafter(target, windows, config, out, crew, a.seed, minutes, a.steps)
    if rank > 0:
        return
    if a.command == "all":
        torch.set_num_threads(a.workers)
        for name, path in (("target", a.out), ("drafter", a.out / "drafter")):
            stored = load_file(path / "model.safetensors")
            record[name]["parameters"] = sum(v.numel() for v in stored.values() if v.dtype != torch.int64)
        record["drafter"]["hidden"] = a.hidden
        record["evaluation"] = evaluate(a.out, a.seed, a.prompts, a.depth)
        versions = {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, safetensors)}
        record |= {
            "seed": a.seed,
            "minutes": a.minutes,
            "seconds_in_all": round(time.monotonic() - start),
            "versions": versions | {"python": platform.python_version()},
            "machine": f"{platform.machine()}, {a.workers} workers of one CPU thread",
        }
        write_card(a.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
