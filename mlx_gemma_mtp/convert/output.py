"""The output directory: appears whole or not at all. Side files, provenance, model card. Knows nothing of MLX."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .checkpoint import ConvertError
from .writer import make_durable, write_durably

RECORD = "conversion.json"
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
)
_MARKS = ("config.json", RECORD)


def check_destination(out: Path, sources: list[Path], *, force: bool) -> None:
    """Refuse a destination that would destroy something. Raises ConvertError."""
    full = out.resolve()
    for source in sources:
        if source.resolve().is_relative_to(full):
            raise ConvertError(f"--out {out} holds the source {source}: choose another directory")
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise ConvertError(f"--out {out} exists: choose another directory, or replace it with --force")
    if not out.is_dir() or out.is_symlink():
        raise ConvertError(f"--out {out} is not a directory")
    if any(out.iterdir()) and not any((out / mark).is_file() for mark in _MARKS):
        raise ConvertError(f"--out {out} is not a model ({' or '.join(_MARKS)} is missing): --force doesn't delete it")


@contextmanager
def appearing(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place at the end, or vanishes if anything goes wrong.

    What an earlier run that was killed has left is put right first. Raises ConvertError if `out` may not be replaced:
    it is there without `force`, even if it came while the caller worked.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    _recover(out)
    check_destination(out, [], force=force)
    temporary, replaced = _sibling(out, "partial", os.getpid()), _sibling(out, "replaced", os.getpid())
    temporary.mkdir()
    try:
        yield temporary
        make_durable(temporary)
        check_destination(out, [], force=force)
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
        make_durable(out.parent)
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _sibling(out: Path, what: str, process: int) -> Path:
    return out.parent / f".{out.name}.{what}-{process}"


def _recover(out: Path) -> None:
    """Remove what killed runs left beside `out`; restore the old output if one was killed between two renames."""
    for what in ("replaced", "partial"):
        prefix = f".{out.name}.{what}-"
        for path in sorted(p for p in out.parent.iterdir() if p.name.startswith(prefix)):
            owner = path.name.removeprefix(prefix)
            if not owner.isdecimal() or _alive(int(owner)):
                continue
            if what == "replaced" and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_space(out: Path, needed: int, *, cache: Path | None = None, absent: int = 0) -> int:
    """Free bytes where `out` will be. Raises ConvertError if `needed` don't fit, or `absent` in the hub's `cache`."""
    place, what = _existing(out.absolute().parent), "the output takes"
    if cache is not None and absent:
        stored = _existing(cache)
        if stored.stat().st_dev == place.stat().st_dev:
            needed, what = needed + absent, "the files to fetch and the output take"
        elif absent > (room := shutil.disk_usage(stored).free):
            raise ConvertError(f"the files to fetch take {gigabytes(absent)}, {stored} has {gigabytes(room)} free")
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConvertError(f"{what} {gigabytes(needed)}, {place} has {gigabytes(free)} free")
    return free


def _existing(place: Path) -> Path:
    """`place`, or what there is above it."""
    while not place.exists():
        place = place.parent
    return place


def copy_side_files(source: Path, out: Path, config: Mapping[str, Any]) -> list[str]:
    """Write the config and copy tokenizer, chat template and processors, durably; the names of what was there."""
    write_durably(out / "config.json", json.dumps(config, indent=2) + "\n")
    copied = []
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
            make_durable(out / name)
            copied.append(name)
    make_durable(out)
    return copied


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """`conversion.json` and the model card."""
    write_durably(out / RECORD, json.dumps(record, indent=2) + "\n")
    write_durably(out / "README.md", model_card(record))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def model_card(record: Mapping[str, Any]) -> str:
    """A README for the output, made of its record alone."""
    target, drafter = record["target"], record["drafter"]
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags: [mlx, mlx-gemma-mtp]"]
    if target["revision"] and not Path(target["source"]).is_absolute():
        lines += [f"base_model: {target['source']}", "base_model_relation: quantized"]
    lines += ["---", "", f"# {Path(target['source']).name or 'Gemma 4'}, {target['recipe']['name']}", ""]
    tool = record["versions"]
    lines.append(f"Converted by mlx-gemma-mtp {tool['mlx_gemma_mtp']} with mlx {tool['mlx']}; details in `{RECORD}`.")
    lines += ["", "```console", '$ mlx-gemma-mtp generate --model DIR "Why is the sky blue?"', "```", ""]
    lines += ["| | source | revision | recipe | bits per weight | size |", "|---|---|---|---|---|---|"]
    for role, model in (("target", target), ("drafter", drafter)):
        if model is not None:
            lines.append(
                f"| {role} | {_shown(model)} | {model['revision'] or 'local'} | {model['recipe']['name']} | "
                f"{model['bits_per_weight']:.2f} | {gigabytes(model['bytes'])} |"
            )
    kept = {role: m["unquantized"] for role, m in (("target", target), ("drafter", drafter)) if m and m["unquantized"]}
    if kept:
        lines += ["", "Unquantized, because a group doesn't divide the width:", ""]
        lines += [f"- {role}: {summarized(paths)}" for role, paths in kept.items()]
    if record["measured"]:
        lines += ["", "## Measured against the source", "", *measured_tables(record["measured"])]
    return "\n".join(lines) + "\n"


def _shown(model: Mapping[str, Any]) -> str:
    """A source's name for others to read: of a directory the last part, as the rest is nobody's business."""
    source = str(model["source"])
    return Path(source).name if Path(source).is_absolute() else source


def summarized(paths: Iterable[str]) -> str:
    """Module paths, those of many layers as one: "layers.*.mlp.up_proj (8)"."""
    counts = Counter(re.sub(r"\blayers\.\d+\.", "layers.*.", path) for path in paths)
    return ", ".join(f"{path} ({n})" if n > 1 else path for path, n in counts.items())


def measured_tables(measured: Mapping[str, Any]) -> list[str]:
    """Markdown tables of fidelity by target, and of acceptance by target and drafter."""
    first = (
        f"{measured['prompts']} prompts ({measured['prompt_set']}), {measured['scored_tokens']} tokens scored, "
        f"greedy, {measured['depth']} drafts a round."
    )
    fidelity = [["target", "mean KL", "top-1 agreement", "perplexity ratio"]]
    for name, row in measured["fidelity"].items():
        fidelity.append(
            [name, f"{row['mean_kl']:.5f}", f"{row['top1_agreement']:.1%}", f"{row['perplexity_ratio']:.4f}"]
        )
    lines = [first, "", *markdown_table(fidelity)]
    if measured["acceptance"]:
        acceptance = [["target", "drafter", "accepted per round", "acceptance by draft position"]]
        for row in measured["acceptance"]:
            shares = ", ".join(f"{x:.0%}" for x in row["acceptance_per_position"])
            acceptance.append([row["target"], row["drafter"], f"{row['accepted_per_round']:.2f}", shares])
        lines += ["", *markdown_table(acceptance)]
    return lines


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, the first row its head; columns are aligned, for terminals."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def remove_quietly(path: Path) -> None:
    """Delete scratch files; that it fails changes nothing for the output."""
    with suppress(OSError):
        shutil.rmtree(path)
