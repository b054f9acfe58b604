"""The chat format of real Gemma 4 checkpoints: their tokenizer and templates against recorded ids."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_gemma_mtp.text import TextCodec

DATA = Path(__file__).parents[2].parent / "shared" / "gemma4"
EMPTY_THOUGHT = "<|channel>thought\n<channel|>"

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the shared reference data is not beside the repository ({DATA})"
)


def _json(name: str) -> dict[str, Any]:
    if not (DATA / name).is_file():
        return {}
    value: dict[str, Any] = json.loads((DATA / name).read_text(encoding="utf-8"))
    return value


TEMPLATES = sorted((DATA / "templates").glob("*.jinja"))
CHATS = _json("golden_chat_ids.json").get("cases", [])
TOKENS = _json("golden_tokens.json")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    directory = tmp_path_factory.mktemp("gemma4")
    with (
        gzip.open(DATA / "tokenizer" / "tokenizer.json.gz") as packed,
        open(directory / "tokenizer.json", "wb") as out,
    ):
        shutil.copyfileobj(packed, out)
    for source, name in (
        ("tokenizer/tokenizer_config.12B-it.json", "tokenizer_config.json"),
        ("configs/gemma-4-E2B-it.config.json", "config.json"),
        ("configs/gemma-4-E2B-it.generation_config.json", "generation_config.json"),
        ("templates/official_E2B-E4B.chat_template.20260709.candidate.jinja", "chat_template.jinja"),
    ):
        shutil.copyfile(DATA / source, directory / name)
    codec = TextCodec.from_directory(directory)
    assert codec is not None
    return codec


def _use(codec: TextCodec, template: Path) -> None:
    # Another directory would mean loading the 32 MB tokenizer again.
    codec._tokenizer.chat_template = template.read_text(encoding="utf-8")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat["name"])
def test_chats_give_the_recorded_ids(real: TextCodec, template: Path, chat: dict[str, Any]) -> None:
    _use(real, template)
    ids = real.render(chat["messages"], thinking=chat["thinking"], tools=chat["tools"] or None)
    expected = list(chat["ids"])
    # The larger models' templates start an answer without thinking with an empty thought.
    starts_answer = chat["messages"][-1]["role"] == "user"
    if starts_answer and not chat["thinking"] and EMPTY_THOUGHT in real._tokenizer.decode(ids):
        assert any(size in template.name for size in ("12B", "31B"))
        expected += real.encode(EMPTY_THOUGHT)[1:]
    assert ids == expected
    assert ids.count(2) == 1


def test_stop_ids_are_those_of_the_generation_config(real: TextCodec) -> None:
    assert real.stop_ids == {1, 106, 50}


@pytest.mark.parametrize("case", TOKENS.get("E4B_qat_ct_streams", {}).get("cases", []), ids=lambda c: c["prompt"][:20])
def test_recorded_streams(real: TextCodec, case: dict[str, Any]) -> None:
    _use(real, TEMPLATES[[t.name.startswith("official_E2B") for t in TEMPLATES].index(True)])
    assert real.render([{"role": "user", "content": case["prompt"]}]) == case["prompt_ids"]
    assert real.decode(case["stream"]) == case["stream_text"].removesuffix("<turn|>")
    assert real.split(case["stream"], case["prompt_ids"]) == (real.decode(case["stream"]), None)


@pytest.mark.parametrize("case", TOKENS.get("E2B_mtp_oracle_block3", {}).get("cases", []), ids=lambda c: c["id"])
def test_recorded_answers(real: TextCodec, case: dict[str, Any]) -> None:
    assert real.decode(case["ids"]) == case["text"]
    assert real.encode(case["text"])[1:] == case["ids"]


def test_raw_prompts_get_the_bos_that_the_recorded_ids_lack(real: TextCodec) -> None:
    for text, ids in TOKENS["vllm_metal_test_gemma4_golden"]["prompt_ids_no_bos"].items():
        assert real.encode(text) == [2, *ids] == real.encode(f"<bos>{text}")
        assert real.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
        "  two spaces,\n\n\nnewlines\tand a tab ",
        "家族 👨‍👩‍👧‍👦 𓀀 ༏ ﷽ e\u0301 \u200d \x00",
        'def f(x):\n    return {"a": x ** 2}  # <|"|',
    ],
)
def test_text_survives_the_round_trip_token_by_token(real: TextCodec, text: str) -> None:
    ids = real.encode(text)
    stream = real.detokenizer()
    parts = [*(stream.push(i) for i in ids), stream.flush()]
    assert "".join(parts) == real.decode(ids) == text
    assert not any("\ufffd" in part for part in parts)


def test_a_thought_is_apart(real: TextCodec) -> None:
    ids = real.encode("<|channel>thought\n17 * 23 is 391.\n<channel|>**391**<turn|>")[1:]
    assert ids[:3] == [100, 45518, 107]
    assert real.split(ids) == ("**391**", "17 * 23 is 391.")
