"""The command `convert`: what it prints, writes and exits with."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gemma_mtp.cli import app
from mlx_gemma_mtp.convert.checkpoint import ConvertError
from mlx_gemma_mtp.convert.output import model_card, summarized
from mlx_gemma_mtp.convert.prompts import BUILT_IN, built_in, read_prompts
from tests import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pair(tmp_path_factory.mktemp("pair"), "unified", dtype="bfloat16")[0]


def call(*arguments: object) -> int:
    mx.disable_compile()
    try:
        with pytest.raises(SystemExit) as caught:
            app(["convert", *map(str, arguments)])
    finally:
        mx.enable_compile()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(source, "--out", tmp_path / "out", "-q", "mxfp4", "--no-measure", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert shown.err == ""


def test_a_summary(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(source, "-o", tmp_path / "out", "-q", "4bit", "--no-measure", "--fit", "16GB", "--context", "32k") == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in (
        "fits: 0.8 of the 11.5 GB",
        "of 32,768 tokens",
        "output: 0.",
        "free on the disk",
        "target   4bit",
        "written",
    ):
        assert part in shown.err, part


def test_a_terminal_shows_how_far_it_is(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "ids.jsonl").write_text("[5, 9, 11, 300, 42]\n")
    assert call(source, "-o", tmp_path / "out", "-q", "4bit", "--measure", tmp_path / "ids.jsonl") == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    tensors = json.loads((tmp_path / "out" / "conversion.json").read_text())["target"]["tensors"]
    assert re.search(rf"converting the target .*{len(tensors)}/{len(tensors)} tensors, [\d.]+ MB of [\d.]+ MB,", shown)
    assert "measuring 4bit with drafter 4bit" in shown
    assert "| target | drafter | accepted per round |" in shown


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(source, "--out", tmp_path / "out", "--dry-run") == 0
    assert "nothing written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pair_that_accepts_too_little(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3; the output is there, for whoever wants to look. --measure may stand without a file."""
    (tmp_path / "ids.jsonl").write_text("[5, 9, 11, 300, 42]\n")
    common = (source, "--quantize", "mxfp4", "--min-acceptance")
    assert call(*common, "0.99", "--out", tmp_path / "a", "--measure", tmp_path / "ids.jsonl") == 3
    assert "less than --min-acceptance 99.0%" in capsys.readouterr().err
    assert (tmp_path / "a" / "conversion.json").is_file()
    assert call(*common, "0", "--dry-run", "--measure", "--out", tmp_path / "b") == 0


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (("-q", "5bit"), 1, "'5bit' is no recipe: expected bf16, 8bit"),
        (("--measure", "--no-measure"), 2, "can't be given together"),
        (("--no-measure", "--min-acceptance", "0.5"), 1, "need the measurement"),
        (("--drafter", "none", "--min-acceptance", "0.5"), 1, "needs a drafter"),
        (("--revision", "main"), 1, "--revision is 'main': "),
        (("--fit", "much"), 1, "expected a size like 32GB"),
        (("--measure", "/nowhere.txt"), 1, "can't be read"),
        (("--fit", "1GB", "--context", "9999k"), 1, "doesn't fit"),
    ],
)
def test_errors_are_one_line(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    code: int,
    complaint: str,
) -> None:
    assert call(source, "--out", tmp_path / "out", *options) == code
    shown = capsys.readouterr().err
    assert complaint in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_rule_that_matches_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[[rules]]\nmatch = "model.layers.*"\nbits = 8\n[[rules]]\nmatch = "layers.0.*"\nbits = 8\n')
    assert call(source, "--out", tmp_path / "out", "-q", mine, "--dry-run") == 0
    shown = capsys.readouterr().err
    assert "recipe mine: no matrix of the target matches 'model.layers.*'" in shown
    assert "layers.0" not in shown


def test_prompt_files(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "b"}]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"messages": chat}) + "\n")
    (tmp_path / "c.json").write_text(json.dumps([[1, 2], [3]]))
    assert read_prompts(tmp_path / "a.txt", has_tokenizer=True).prompts(9) == ["one", "two"]
    assert read_prompts(tmp_path / "b.jsonl", has_tokenizer=True).prompts(9) == ["a", chat]
    ids = read_prompts(tmp_path / "c.json", has_tokenizer=False)
    assert ids.ids
    assert ids.prompts(9) == [[1, 2], [3]]
    assert built_in(has_tokenizer=True).prompts(9) == BUILT_IN
    assert all(0 <= t < 9 for row in built_in(has_tokenizer=False).prompts(9) for t in row if isinstance(t, int))
    with pytest.raises(ConvertError, match="has no tokenizer"):
        read_prompts(tmp_path / "a.txt", has_tokenizer=False)
    for text in ("[]", "{}", "[{}]", '[""]', "[[1, true]]", "nonsense"):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(ConvertError, match=r"d\.json"):
            read_prompts(tmp_path / "d.json", has_tokenizer=True)


def test_many_layers_are_one_line() -> None:
    assert summarized([f"layers.{i}.mlp.up_proj" for i in range(30)] + ["norm"]) == "layers.*.mlp.up_proj (30), norm"


def test_a_card_of_a_hub_model() -> None:
    model: dict[str, object] = {
        "source": "google/gemma-4-E2B-it",
        "revision": "0" * 40,
        "recipe": {"name": "4bit"},
        "unquantized": {},
    }
    model |= {"bytes": 3_560_000_000, "bits_per_weight": 5.57}
    record = {"versions": {"mlx_gemma_mtp": "1", "mlx": "2"}, "target": model, "drafter": None, "measured": None}
    card = model_card(record)
    assert "base_model: google/gemma-4-E2B-it" in card
    assert f"| target | google/gemma-4-E2B-it | {'0' * 40} | 4bit | 5.57 | 3.56 GB |" in card
