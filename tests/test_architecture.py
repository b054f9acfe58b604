"""The design's rules that a machine can check: who imports whom, and what no module may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlx_gemma_mtp

ROOT = Path(mlx_gemma_mtp.__file__).parent

# Imports point down only, or stay inside one of the packages. A new module needs a place here.
LEVELS: dict[str, float] = {
    "config": 0, "request": 0, "json_file": 0, "stats": 0.5, "generation_config": 0.5, "convert.names": 0,
    "views": 1, "sampling": 1, "acceptance": 1, "kalman": 0.5, "costs": 1, "cache": 1.5, "prefix": 1.75,
    "models": 2, "speculative": 2, "depth": 2, "round_clock": 2.2, "depth_view": 2.2, "adaptive": 2.5,
    "loading": 3, "jobs": 2.5, "admission": 3, "scheduler": 3.5, "probe": 3, "profiles": 3.5, "tune": 3.6,
    "bitwise": 3.5, "residency": 3, "products": 3,
    "text": 4, "stops": 4.5, "tool_grammar": 4.5, "tool_calls": 4.6, "constraints": 4.5, "generation": 4.8,
    "runtime": 5, "handle": 5.2, "engine": 5.5,
    "verify": 6, "convert": 6, "benchmark": 6,
    "server": 7, "terminal": 7, "cli_options": 7.2, "generate_cli": 7.5, "chat_cli": 7.5, "info_cli": 7.5,
    "verify_cli": 7.5, "serve_cli": 7.5, "tune_cli": 7.5, "bench_cli": 7.6,
    "cli": 8,
}  # fmt: skip
WITHOUT_MLX = ("config", "request", "json_file", "stats", "generation_config", "convert.names", "acceptance",
               "kalman", "costs", "depth", "round_clock", "depth_view", "adaptive")  # fmt: skip
# Where every failure has to become an answer: to HTTP, in a terminal, to those who wait for the engine's thread or for
# a benchmark's process.
# tokenizers raises plain Exception for a file that it can't read.
BROAD_EXCEPTS = {"server.app": 1, "engine": 1, "cli": 1, "text": 1, "benchmark.arms": 2}
# Where config.json is read or written; benchmark.peers writes one for mlx-vlm.
CONFIGS = ("config", "convert.names", "convert.configs", "benchmark.peers")
# A few of Hugging Face's names for what a model is made of.
KEYS = {
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "num_kv_shared_layers",
    "global_head_dim",
    "per_layer_config",
    "layer_types",
    "rope_parameters",
    "intermediate_size",
    "hidden_size_per_layer_input",
    "attention_k_eq_v",
    "use_double_wide_mlp",
    "enable_moe_block",
    "top_k_experts",
    "backbone_hidden_size",
    "use_ordered_embeddings",
}


def name_of(path: Path) -> str:
    """A module's name within the package, "models.layers" for example; the package's own is ""."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {name_of(path.parent / "__init__.py") for path in ROOT.rglob("__init__.py")}


def imported(module: str) -> Iterator[tuple[str, int]]:
    """What a module imports, anywhere in it: own modules as ".name" within the package, others by their first part."""
    package = module if module in PACKAGES else module.rpartition(".")[0]
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                own = alias.name.startswith("mlx_gemma_mtp")
                yield (alias.name.removeprefix("mlx_gemma_mtp") or ".") if own else alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = package.split(".") if package else []
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            elif (node.module or "").startswith("mlx_gemma_mtp"):
                base = str(node.module).removeprefix("mlx_gemma_mtp").removeprefix(".")
            else:
                yield str(node.module), node.lineno
                continue
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                if inner != "__version__":
                    yield "." + (inner if inner in MODULES else base), node.lineno


def level(module: str) -> float:
    if module == "__main__":
        return LEVELS["cli"] + 1
    known = module if module in LEVELS else module.partition(".")[0]
    assert known in LEVELS, f"{module} has no place in the design's order of modules: give it one in LEVELS"
    return LEVELS[known]


def own_imports(module: str) -> Iterator[tuple[str, int]]:
    return ((name[1:], line) for name, line in imported(module) if name.startswith("."))


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_imports_point_down(module: str) -> None:
    home = module.partition(".")[0]
    for name, line in own_imports(module):
        inside = home == name.partition(".")[0] and home in PACKAGES
        assert name, f"{module}:{line} imports names of the whole package, which lies above all of its modules"
        assert inside or level(name) < level(module), (
            f"{module}:{line} imports {name}: level {level(module)} may not import level {level(name)}"
        )


def test_names_stand_alone() -> None:
    """`convert.names` is at the bottom although its package isn't: it may not import the rest of it."""
    assert not list(own_imports("convert.names"))


def test_the_import_reader_sees_what_there_is() -> None:
    """The rules above hold of nothing if imports aren't seen."""
    assert {name for name, _ in own_imports("loading")} >= {"config", "convert.names", "models.target"}
    assert "mlx.core" in {name for name, _ in imported("views")}
    assert {name for name, _ in own_imports("models.layers")} >= {"config", "views", "models.linear", "models.moe"}
    assert {name for name, _ in own_imports("__main__")} == {"cli"}


@pytest.mark.parametrize(("module", "other"), [("speculative", "models"), ("models", "speculative")])
def test_rounds_and_models_do_not_know_each_other(module: str, other: str) -> None:
    for name in MODULES:
        if name.partition(".")[0] == module:
            assert not [n for n, _ in own_imports(name) if n.partition(".")[0] == other]


def test_the_loop_knows_no_text() -> None:
    for module in filter(None, MODULES):
        if level(module) < LEVELS["text"]:
            outside = {name.partition(".")[0] for name, _ in imported(module)}
            assert not outside & {"tokenizers", "transformers", "mlx_lm", "jinja2", "llguidance"}, module


@pytest.mark.parametrize("module", WITHOUT_MLX)
def test_the_bottom_has_no_mlx(module: str) -> None:
    assert not [name for name, _ in imported(module) if name.partition(".")[0] in ("mlx", "numpy")]


@pytest.mark.parametrize("module", ["", *WITHOUT_MLX])
def test_importing_the_bottom_loads_no_mlx(module: str) -> None:
    """Nor do the packages on the way to it."""
    name = f"mlx_gemma_mtp.{module}".removesuffix(".")
    code = f"import sys, {name}; print(*sorted(m for m in sys.modules if m.partition('.')[0] in ('mlx', 'numpy')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def foreign_modules(module: str) -> set[str]:
    """Names that stand for modules of others: `os`, or `mx` for mlx.core."""
    imports = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.Import)]
    return {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}


@pytest.mark.parametrize("module", MODULES)
def test_no_attribute_is_looked_up_by_name(module: str) -> None:
    """A type that may lack an attribute has no contract. Others' modules may well differ between systems."""
    others = foreign_modules(module)
    found = [
        node.lineno
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "getattr", "setattr", "delattr")
        and not (isinstance(node.args[0], ast.Name) and node.args[0].id in others)
    ]
    # The package's own lazy names are the one exception.
    assert len(found) <= (1 if module == "" else 0), f"{module or '__init__'}: lines {found}"


BROAD = ("Exception", "BaseException")


def swallows_all(handler: ast.ExceptHandler) -> bool:
    """Whether it catches everything, and does not raise it again when it has cleaned up."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(kind is None or (isinstance(kind, ast.Name) and kind.id in BROAD) for kind in kinds)
    last = handler.body[-1]
    return broad and not (isinstance(last, ast.Raise) and last.exc is None)


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_swallowed(module: str) -> None:
    handlers = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.ExceptHandler)]
    broad = [handler.lineno for handler in handlers if swallows_all(handler)]
    assert len(broad) <= BROAD_EXCEPTS.get(module, 0), f"{module}: broad excepts in lines {broad}"
    suppressed = [
        node.lineno
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name | ast.Attribute)
        and (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) == "suppress"
        and any(isinstance(arg, ast.Name) and arg.id in BROAD for arg in node.args)
    ]
    assert not suppressed, f"{module}: everything suppressed in lines {suppressed}"


@pytest.mark.parametrize("module", [m for m in MODULES if m not in CONFIGS])
def test_keys_of_hugging_face_are_read_in_one_place(module: str) -> None:
    found = {
        node.value: node.lineno
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KEYS
    }
    assert not found, f"{module} knows keys of config.json: {found}"


def test_the_keys_are_those_that_configs_have() -> None:
    read = {node.value for node in ast.walk(MODULES["config"]) if isinstance(node, ast.Constant)}
    lists = " ".join(value for value in read if isinstance(value, str)).split()
    assert set(lists) >= KEYS


@pytest.mark.parametrize("module", MODULES)
def test_every_module_opens_by_saying_what_it_is(module: str) -> None:
    assert ast.get_docstring(MODULES[module])
