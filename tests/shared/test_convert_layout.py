"""Plans for the ten official checkpoints and every recipe, from files that have their headers and no data."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlx_gemma_mtp.convert.checkpoint import ITEM_BYTES, Checkpoint
from mlx_gemma_mtp.convert.fit import kv_bytes
from mlx_gemma_mtp.convert.plan import ModelPlan, PairPlan, plan_pair
from mlx_gemma_mtp.convert.recipes import RECIPES, drafter_default
from tests.shared import SIZES, config, inventory, needs_shared

pytestmark = needs_shared

BYTES = {"BF16": 2, "F32": 4, "I64": 8}
Plans = Callable[[str, str], PairPlan]


def write_hollow(directory: Path, name: str) -> Path:
    """A checkpoint whose single file has the real header and size, but takes no space."""
    directory.mkdir()
    header, end = {}, 0
    for tensor, (kind, shape) in inventory(name).items():
        size = math.prod(shape) * BYTES[kind]
        header[tensor] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    file = directory / "model.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(file, 8 + len(head) + end)
    (directory / "config.json").write_text(json.dumps(config(name)))
    return directory


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    @cache
    def sources(size: str) -> tuple[Checkpoint, Checkpoint]:
        place = tmp_path_factory.mktemp(size)
        name = f"gemma-4-{size}-it"
        return (
            Checkpoint(write_hollow(place / "target", name)),
            Checkpoint(write_hollow(place / "drafter", f"{name}-assistant")),
        )

    def make(size: str, recipe: str) -> PairPlan:
        return plan_pair(*sources(size), RECIPES[recipe], lambda kinds: drafter_default(RECIPES[recipe], kinds))

    return make


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_has_a_place(plans: Plans, size: str, recipe: str) -> None:
    """Nothing is lost, nothing made up: what isn't skipped by a rule keeps its number of values."""
    pair = plans(size, recipe)
    for plan, name in zip(pair.models, (f"gemma-4-{size}-it", f"gemma-4-{size}-it-assistant"), strict=True):
        real = inventory(name)
        read = {s.name for o in plan.outputs for s in o.sources}
        assert len(real) == len(read) + sum(plan.skipped.values())
        values = sum(math.prod(real[n][1]) for n in read)
        assert sum(o.rows * o.columns for o in plan.outputs) == values
        towers = {n for n in real if "vision" in n or "audio" in n}
        assert towers <= read
        assert all(o.spec is None for o in plan.outputs if o.sources[0].name in towers)
        # No real width but 12B's audio input, which isn't quantized, is odd to any group.
        assert plan.unquantized == {}


def test_sizes(plans: Plans) -> None:
    found = {size: [round(plans(size, r).bytes / 1e9, 2) for r in ("bf16", "8bit", "4bit", "mxfp4")] for size in SIZES}
    # bf16 is the official files less the key/value weights of layers that share.
    for size in ("12B", "26B-A4B", "31B"):
        real = sum(
            math.prod(s) * BYTES[k] for n in ("", "-assistant") for k, s in inventory(f"gemma-4-{size}-it{n}").values()
        )
        assert plans(size, "bf16").bytes == real
    for row in found.values():
        assert row == sorted(row, reverse=True)
        assert 1.7 < row[0] / row[1] < 2
        assert row[0] / row[2] > 2.4


def test_row_pieces_cover_every_tensor_once(plans: Plans) -> None:
    """Each expert is a matrix of its own: its gate rows, then its up rows."""
    for output in plans("26B-A4B", "4bit").target.outputs[:200]:
        places = sorted(to + i for first, last, to in output.row_ranges(3_000_000) for i in (0, last - first - 1))
        assert places[0] == 0
        assert places[-1] == output.rows - 1
        assert sum(last - first for first, last, _ in output.row_ranges(3_000_000)) == output.rows
        if output.path.endswith("layers.0.experts.switch_glu.up_proj"):
            assert next(output.row_ranges(1 << 30)) == (704, 1408, 0)


def write_hollow_output(directory: Path, plan: ModelPlan) -> Path:
    """What a conversion would write, without its data."""
    directory.mkdir()
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for slot in sorted(plan.slots, key=lambda s: -ITEM_BYTES[s.dtype]):
        header[slot.name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": [end, end + slot.size]}
        end += slot.size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    file = directory / "model.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(file, 8 + len(head) + end)
    index = {"metadata": {}, "weight_map": {slot.name: file.name for slot in plan.slots}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(plan.config))
    return directory


@pytest.mark.parametrize("recipe", ["bf16", "4bit", "nvfp4"])
@pytest.mark.parametrize("size", SIZES)
def test_mlx_lm_takes_every_target(plans: Plans, tmp_path: Path, size: str, recipe: str) -> None:
    """Strictly: every name and shape; nothing is read."""
    from mlx_lm.utils import load_model

    load_model(write_hollow_output(tmp_path / "target", plans(size, recipe).target), lazy=True)


THEIRS = """
import sys
from pathlib import Path
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.utils import load_model
load_model(Path(sys.argv[1]), lazy=True)
load_drafter(sys.argv[2], lazy=True)
"""


@pytest.mark.parametrize("recipe", ["bf16", "4bit"])
@pytest.mark.parametrize("size", SIZES)
def test_mlx_vlm_takes_every_pair(plans: Plans, tmp_path: Path, size: str, recipe: str) -> None:
    """Vision and audio, too."""
    python = os.environ.get("MLX_GEMMA_MTP_VLM_PYTHON")
    if python is None:
        pytest.skip("MLX_GEMMA_MTP_VLM_PYTHON names no Python that has mlx-vlm")
    places = [write_hollow_output(tmp_path / str(i), plan) for i, plan in enumerate(plans(size, recipe).models)]
    subprocess.run([python, "-c", THEIRS, *map(str, places)], check=True)


@pytest.mark.parametrize("size", SIZES)
def test_official_configs_come_through_unchanged(plans: Plans, size: str) -> None:
    for plan, name in zip(
        plans(size, "bf16").models, (f"gemma-4-{size}-it", f"gemma-4-{size}-it-assistant"), strict=True
    ):
        assert plan.config == config(name)


def test_the_table_of_sizes(plans: Plans) -> None:
    """Gigabytes in convert/README.md."""
    text = (Path(__file__).parents[2] / "convert" / "README.md").read_text(encoding="utf-8")
    recipes = ("bf16", "8bit", "6bit", "4bit", "mxfp8", "nvfp4", "mxfp4", "q4_0")
    for size in SIZES:
        cells = []
        for recipe in recipes:
            target, drafter = (plan.bytes / 1e9 for plan in plans(size, recipe).models)
            cells.append(f"{target:.1f} + {drafter:.2f}")
        kv = kv_bytes(plans(size, "bf16").target_config, 32768) / 1e9
        assert f"| {size} | {' | '.join(cells)} | {kv:.2f} |" in text
