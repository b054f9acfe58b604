"""Text in and out, on a small tokenizer of Gemma's kind that is made here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.text import Piece, TextCodec

SPECIAL = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool_response>", "<|think|>"),
    *("<|channel>", "<channel|>", "<|turn>", "<turn|>"),
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
    "<turn|>\n{% endfor %}{% if tools %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|turn>model\n{% if enable_thinking %}<|channel>thought\n{% endif %}"
)
BOS, CHANNEL, CHANNEL_END, TURN_END = (SPECIAL.index(s) for s in ("<bos>", "<|channel>", "<channel|>", "<turn|>"))


def write_tokenizer(directory: Path, template: str | None = TEMPLATE) -> Path:
    """Byte-fallback BPE with Gemma's normalizer, decoder and special tokens; under 512 ids, without gaps."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁\nabcdefghijklmnopqrstuvwxyzTA.,!é€"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "u"), ("h", "t"), ("ou", "g"), ("\n", "\n")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


def load(directory: Path) -> TextCodec:
    codec = TextCodec.from_directory(directory)
    assert codec is not None
    return codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


any_case = settings(deadline=None, max_examples=200)
# The tokenizer writes a space as "▁", so it reads that back as a space; brackets could spell a special token.
plain = st.text().map(lambda s: s.translate({ord("▁"): " ", ord("<"): None, ord(">"): None}))


class TestDetokenizer:
    @any_case
    @given(text=plain)
    def test_pushes_and_flush_give_the_text(self, codec: TextCodec, text: str) -> None:
        ids = codec.encode(text)
        stream = codec.detokenizer()
        parts = [*(stream.push(i) for i in ids), stream.flush()]
        assert "".join(parts) == codec.decode(ids) == text
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(parts)

    @any_case
    @given(ids=st.lists(st.integers(-1, 400)))
    def test_any_ids_have_a_text(self, codec: TextCodec, ids: list[int]) -> None:
        stream = codec.detokenizer()
        parts = [*(stream.push(i) for i in ids), stream.flush()]
        assert "".join(parts) == codec.decode(ids)
        assert not any(s in "".join(parts) for s in SPECIAL)

    def test_an_unfinished_character_waits(self, codec: TextCodec) -> None:
        ids = codec.encode("a🎉")[1:]
        stream = codec.detokenizer()
        assert [stream.push(i) for i in ids] == ["a", "", "", "", "🎉"]
        assert [stream.push(i) for i in ids[:3]] == ["a", "", ""]
        assert stream.flush() == "\ufffd"
        assert stream.flush() == ""

    def test_a_special_token_ends_what_was_held_back(self, codec: TextCodec) -> None:
        stream = codec.detokenizer()
        broken = codec.encode("🎉")[1:3]
        assert [stream.push(i) for i in [*broken, TURN_END]] == ["", "", "\ufffd"]

    def test_streams_do_not_share_state(self, codec: TextCodec) -> None:
        first, second = codec.detokenizer(), codec.detokenizer()
        first.push(codec.encode("é🎉")[2])
        assert second.push(codec.encode("a")[1]) == "a"


class TestEncode:
    @any_case
    @given(text=plain, written=st.integers(0, 3))
    def test_bos_exactly_once(self, codec: TextCodec, text: str, written: int) -> None:
        ids = codec.encode("<bos>" * written + text)
        assert ids == codec.encode(text)
        assert ids[0] == BOS
        assert ids.count(BOS) == 1

    def test_special_tokens_written_out_are_read(self, codec: TextCodec) -> None:
        assert codec.encode("<bos>a<bos>")[2:] == [BOS]
        assert codec.decode(codec.encode("a<turn|>b")) == "ab"

    def test_a_lone_surrogate_is_refused(self, codec: TextCodec) -> None:
        with pytest.raises(ValueError, match="lone surrogate at 1"):
            codec.encode("a\ud800")


class TestRender:
    def test_the_template_writes_the_only_bos(self, codec: TextCodec) -> None:
        ids = codec.render([{"role": "user", "content": "the"}])
        assert ids == codec.encode("<|turn>user\nthe<turn|>\n<|turn>model\n")
        assert ids.count(BOS) == 1

    def test_roles_have_the_names_that_templates_expect(self, codec: TextCodec) -> None:
        turns = [("developer", "a"), ("user", "b"), ("model", "c"), ("user", "d")]
        ids = codec.render([{"role": role, "content": text} for role, text in turns])
        expected = "<|turn>system\na<turn|>\n<|turn>user\nb<turn|>\n<|turn>model\nc<turn|>\n<|turn>user\nd<turn|>\n"
        assert ids == codec.encode(expected + "<|turn>model\n")

    def test_text_parts(self, codec: TextCodec) -> None:
        parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "!"}]
        assert codec.render([{"role": "user", "content": parts}]) == codec.render([{"role": "user", "content": "the!"}])

    @pytest.mark.parametrize(
        ("messages", "complaint"),
        [
            ([], "messages is empty"),
            ("hello", "expected a list"),
            (["hello"], r"messages\[0\] is str"),
            ([{"role": "bot", "content": "a"}], r"messages\[0\]: role is 'bot'"),
            ([{"content": "a"}], "role is None"),
            ([{"role": "user"}], "content is NoneType"),
            ([{"role": "user", "content": 3}], "content is int"),
            ([{"role": "user", "content": "\udcff"}], "lone surrogate"),
            (
                [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
                "part 0 is 'image_url'",
            ),
            ([{"role": "user", "content": [{"type": "input_audio"}]}], "part 0 is 'input_audio'"),
            ([{"role": "user", "content": [{"type": "text"}]}], "part 0 has no 'text'"),
            ([{"role": "user", "content": ["a"]}], "part 0 is 'str'"),
            ([{"role": "tool", "content": "18"}], "has to follow an assistant message"),
        ],
    )
    def test_what_it_can_not_read_is_refused_by_name(self, codec: TextCodec, messages: Any, complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            codec.render(messages)

    def test_a_refusal_of_the_template_is_a_value_error(self, codec: TextCodec) -> None:
        with pytest.raises(ValueError, match="refused the messages: no tools here"):
            codec.render([{"role": "user", "content": "a"}], tools=[{"type": "function"}])

    def test_without_a_template(self, tmp_path: Path) -> None:
        codec = load(write_tokenizer(tmp_path, template=None))
        assert not codec.has_chat_template
        with pytest.raises(ValueError, match="no chat template"):
            codec.render([{"role": "user", "content": "a"}])


def _joined(pieces: Sequence[Piece], kind: str) -> str:
    return "".join(p.text for p in pieces if p.kind == kind)


class TestThinking:
    @any_case
    @given(thought=plain, answer=plain, cuts=st.lists(st.integers(0, 200)))
    def test_a_thought_is_apart_in_any_chunking(
        self, codec: TextCodec, thought: str, answer: str, cuts: list[int]
    ) -> None:
        ids = codec.encode(f"<|channel>thought\n{thought}\n<channel|>{answer}<turn|>")[1:]
        stream, pieces, start = codec.stream(), list[Piece](), 0
        for end in [*sorted(c for c in cuts if c < len(ids)), len(ids)]:
            pieces += stream.push(ids[start:end])
            start = end
        pieces += stream.flush()
        assert _joined(pieces, "thinking") == thought
        assert _joined(pieces, "answer") == answer
        assert codec.split(ids) == (answer, thought or None)

    @any_case
    @given(thought=plain, answer=plain, data=st.data())
    def test_a_thought_that_the_prompt_opened(
        self, codec: TextCodec, thought: str, answer: str, data: st.DataObject
    ) -> None:
        opening = codec.encode("<|turn>model\n<|channel>thought\n")
        body = codec.encode(thought)[1:]
        ids = [*opening, *body, CHANNEL_END, *codec.encode(answer)[1:]]
        cut = data.draw(st.integers(opening.index(CHANNEL) + 1, len(opening)))
        assert codec.split(ids[cut:], prompt=ids[:cut]) == (answer, thought.removesuffix("\n") or None)

    def test_a_thought_that_is_never_closed(self, codec: TextCodec) -> None:
        ids = codec.encode("<|channel>thought\nthe\n")[1:]
        assert codec.split(ids) == ("", "the\n")
        assert codec.split(codec.encode("<|channel>thou")[1:]) == ("", "thou")

    def test_an_empty_thought_is_none(self, codec: TextCodec) -> None:
        for text in (
            "<|channel>thought\n<channel|>a",
            "<|channel>thought<channel|>a",
            "<|channel><channel|>a",
        ):
            assert codec.split(codec.encode(text)[1:]) == ("a", None)

    def test_a_channel_without_the_usual_header_loses_nothing(self, codec: TextCodec) -> None:
        assert codec.split(codec.encode("<|channel>the\nthe<channel|>a")[1:]) == ("a", "the\nthe")

    def test_a_closed_or_ended_thought_in_the_prompt_is_not_open(self, codec: TextCodec) -> None:
        for prompt in ("<|channel>thought\n<channel|>", "<|channel>thought\na<turn|>\n<|turn>model\n"):
            assert codec.split(codec.encode("a")[1:], prompt=codec.encode(prompt)) == ("a", None)

    def test_the_prompts_own_newline_is_not_output(self, codec: TextCodec) -> None:
        prompt = codec.encode("<|channel>thought\nthe\n")
        assert codec.split(codec.encode("a")[1:], prompt=prompt) == ("", "a")

    def test_rendered_with_thinking_a_prompt_can_end_in_an_open_thought(self, codec: TextCodec) -> None:
        prompt = codec.render([{"role": "user", "content": "the"}], thinking=True)
        output = [*codec.encode("a")[1:], CHANNEL_END, *codec.encode("b")[1:]]
        assert codec.split(output, prompt=prompt) == ("b", "a")

    def test_pieces_carry_who_proposed_them(self, codec: TextCodec) -> None:
        ids = codec.encode("ab🎉c")[1:]
        flags = [True, True, False, True, True, False, False]
        assert codec.stream().push(ids, flags) == (
            Piece(kind="answer", text="ab", drafted=True),
            Piece(kind="answer", text="🎉c", drafted=False),
        )
        with pytest.raises(ValueError, match="1 flags for 7 tokens"):
            codec.stream().push(ids, [True])


class TestDirectory:
    def test_no_tokenizer_is_none(self, tmp_path: Path) -> None:
        assert TextCodec.from_directory(tmp_path) is None

    @pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"version": "1.0", "added_tokens": []}'])
    def test_a_broken_tokenizer_is_a_value_error(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="can't load the tokenizer in"):
            TextCodec.from_directory(tmp_path)

    def test_code_in_a_directory_is_not_run(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path)
        (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
        config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="custom code"):
            TextCodec.from_directory(tmp_path)

    def test_without_configs_the_tokenizer_names_the_stops(self, codec: TextCodec) -> None:
        assert codec.stop_ids == {SPECIAL.index("<eos>"), TURN_END}


def test_importing_is_cheap() -> None:
    heavy = ["mlx", "mlx_lm", "transformers", "tokenizers", "huggingface_hub", "jinja2", "numpy"]
    code = f"import mlx_gemma_mtp.text, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
