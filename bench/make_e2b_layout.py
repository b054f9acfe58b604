"""A synthetic checkpoint in E2B's real layout: every name, shape and type of google/gemma-4-E2B-it, random values.

    python bench/make_e2b_layout.py OUT [--reference ../shared/gemma4]

10.2 GB in one file. The names and shapes come from the inventory of the real checkpoint's header in the reference
data (whose generated header has the real file's size to the byte); config and tokenizer files from there, too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shutil
from pathlib import Path

import mlx.core as mx

NAME = "gemma-4-E2B-it"
BLOCK = 1 << 25  # values; every tensor is a piece of one block of them, from another place
SIZES = {"BF16": 2}


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reference", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "gemma4")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    write_config(arguments.reference, arguments.out)
    print(f"{write_weights(arguments.reference, arguments.out) / 1e9:.2f} GB in {arguments.out}")


def write_weights(reference: Path, out: Path) -> int:
    """The file's size."""
    with gzip.open(reference / "layout" / f"{NAME}.tensors.json.gz") as f:
        table = json.load(f)["map"]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (kind, shape) in sorted(table.items()):
        size = math.prod(shape) * SIZES[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    block = random_block()
    with (out / "model.safetensors").open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        at = 0
        left = end
        while left:
            piece = block[at : at + left]
            f.write(piece)
            left -= len(piece)
            at = (at + 2 * 7919) % (len(block) // 2)
    return 8 + len(head) + end


def random_block() -> memoryview:
    """Normal values of the size of real weights, always the same."""
    values = (0.02 * mx.random.normal((BLOCK,), key=mx.random.key(0))).astype(mx.bfloat16).view(mx.uint16)
    return memoryview(values).cast("B")  # type: ignore[arg-type]


def write_config(reference: Path, out: Path) -> None:
    """Config and tokenizer, which mlx-lm needs to convert at all."""
    for name in ("config", "generation_config"):
        shutil.copyfile(reference / "configs" / f"{NAME}.{name}.json", out / f"{name}.json")
    with gzip.open(reference / "tokenizer" / "tokenizer.json.gz") as f:
        (out / "tokenizer.json").write_bytes(f.read())
    shutil.copyfile(reference / "tokenizer" / "tokenizer_config.12B-it.json", out / "tokenizer_config.json")


if __name__ == "__main__":
    main()
