"""Stop strings: where text is cut, whatever pieces it comes in, and that no part of one is ever shown."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp import Runtime, SamplingParams, SpecStats
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.stops import OutputReader, StopStrings, checked_stops
from mlx_gemma_mtp.text import Piece, TextCodec

from .tiny import write_pair

DEMO = Path(__file__).parents[1] / "mlx_gemma_mtp" / "demo"


def reference(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Where the text ends, and the stop string, found by looking at every prefix of it."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


@st.composite
def texts_of_stops(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Stop strings, and a text that is full of them and of their beginnings, cut anywhere."""
    stops = draw(st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
    pieces = ["a", "b", "x", *stops, *(stop[:-1] for stop in stops)]
    text = "".join(draw(st.lists(st.sampled_from(pieces), max_size=8)))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=5)))
    return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])], stops


@settings(max_examples=500, deadline=None)
@given(texts_of_stops())
@example((["b", "c"], ["a", "bc"]))
def test_any_text_in_any_pieces(case: tuple[list[str], list[str]]) -> None:
    parts, stops = case
    cutter, shown = StopStrings(stops), ""
    expected, matched = reference("".join(parts), stops)
    for part in parts:
        shown += cutter.push(part)
        assert expected.startswith(shown)
    shown += cutter.flush()
    assert (shown, cutter.matched) == (expected, matched)


def test_no_more_is_held_back_than_could_begin_a_stop_string() -> None:
    cutter = StopStrings(["\n\nUser:"])
    assert cutter.push("Hello.\n") == "Hello."
    assert cutter.push("Bye.\n\nUse") == "\nBye."
    assert cutter.push("s it") == "\n\nUses it"
    assert cutter.flush() == ""


@pytest.mark.parametrize("bad", ["", ["a", ""], [3]])
def test_stop_strings_that_cant_be(bad: object) -> None:
    with pytest.raises(ValueError, match="stop has"):
        checked_stops(bad)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    found = TextCodec.from_directory(DEMO)
    assert found is not None
    return found


def ids_of(codec: TextCodec, text: str) -> list[int]:
    found: list[int] = codec._tokenizer.encode(text, add_special_tokens=False)
    return found


class TestReader:
    TEXT = "One two three; four five. Six ☃ seven"

    @pytest.mark.parametrize("stop", [" three", "e t", "; f", "☃", "seven", "O"])
    @pytest.mark.parametrize("size", [1, 3, 50])
    def test_blocks_dont_matter(self, codec: TextCodec, stop: str, size: int) -> None:
        ids, reader = ids_of(codec, self.TEXT), OutputReader(codec.stream(), [stop])
        text, kept = "", 0
        for start in range(0, len(ids), size):
            read = reader.push(ids[start : start + size])
            text, kept = text + "".join(p.text for p in read.pieces), kept + read.kept
        text += "".join(p.text for p in reader.flush())
        assert text == self.TEXT[: self.TEXT.index(stop)]
        assert reader.matched == stop
        # The last token read is the one that completed it.
        assert stop in codec.decode(ids[:kept])
        assert stop not in codec.decode(ids[: kept - 1])

    def test_flags_stay_with_their_text(self, codec: TextCodec) -> None:
        ids = ids_of(codec, "one two")
        reader = OutputReader(codec.stream(), ["one two three"])
        assert all(not reader.push([token], [i % 2 == 1]).pieces for i, token in enumerate(ids))
        shown = reader.flush()
        plain = codec.stream()
        expected = [*plain.push(ids, [i % 2 == 1 for i in range(len(ids))]), *plain.flush()]
        assert list(shown) == expected
        assert len({p.drafted for p in shown}) == 2

    def test_thoughts_are_not_searched(self, codec: TextCodec) -> None:
        marks = [codec._tokenizer.convert_tokens_to_ids(m) for m in ("<|channel>", "<channel|>")]
        ids = [marks[0], *ids_of(codec, "thought\nstop here\n"), marks[1], *ids_of(codec, "now stop")]
        reader = OutputReader(codec.stream(), ["stop"])
        pieces = [*reader.push(ids).pieces, *reader.flush()]
        assert pieces == [Piece(kind="thinking", text="stop here"), Piece(kind="answer", text="now ")]

    def test_a_stop_string_doesnt_reach_across_a_thought(self, codec: TextCodec) -> None:
        marks = [codec._tokenizer.convert_tokens_to_ids(m) for m in ("<|channel>", "<channel|>")]
        ids = [*ids_of(codec, "ab"), marks[0], *ids_of(codec, "thought\nx\n"), marks[1], *ids_of(codec, "cd")]
        reader = OutputReader(codec.stream(), ["bc"])
        pieces = [*reader.push(ids).pieces, *reader.flush()]
        assert "".join(p.text for p in pieces if p.kind == "answer") == "abcd"
        assert [p.kind for p in pieces] == ["answer", "thinking", "answer"]

    def test_without_stop_strings_it_is_the_stream(self, codec: TextCodec) -> None:
        ids, reader, plain = ids_of(codec, self.TEXT), OutputReader(codec.stream()), codec.stream()
        read = reader.push(ids)
        assert read.kept == len(ids)
        assert (read.pieces, reader.flush()) == (plain.push(ids), plain.flush())
        assert reader.matched is None

    def test_text_that_the_end_completes(self, codec: TextCodec) -> None:
        """A byte that begins a character is shown as U+FFFD only at the end."""
        token = codec._tokenizer.convert_tokens_to_ids("<0xE2>")
        reader = OutputReader(codec.stream(), ["\ufffd"])
        assert reader.push([*ids_of(codec, "a"), token]).pieces == (Piece(kind="answer", text="a"),)
        assert reader.flush() == ()
        assert reader.matched == "\ufffd"


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(load_pair("demo"), compiled=False)


class TestRuntime:
    PROMPTS = ("Name three colours.", "Write a short poem.")

    def middle(self, runtime: Runtime, prompt: str) -> tuple[str, str]:
        """A greedy answer, and a piece of it that begins within a token and is found nowhere before."""
        text = runtime.generate(prompt, max_tokens=60, depth=0, ignore_eos=True).text
        at = next(i for i in range(len(text) // 3, len(text)) if text.index(text[i : i + 6]) == i)
        return text, text[at : at + 6]

    @pytest.mark.parametrize("depth", [0, 2, 5])
    def test_the_output_is_the_same_at_every_depth(self, runtime: Runtime, depth: int) -> None:
        for prompt in self.PROMPTS:
            text, stop = self.middle(runtime, prompt)
            plain, out = (
                runtime.generate(prompt, max_tokens=60, depth=d, ignore_eos=True, stop=["no such text", stop])
                for d in (0, depth)
            )
            assert out.text == text[: text.index(stop)]
            assert (out.finish_reason, out.stop) == ("stop", stop)
            assert str(out.timing.depth).endswith("(fixed)")
            assert out.tokens == plain.tokens
            assert len(out.drafted) == len(out.tokens) == out.stats.tokens
            assert out.stats.tokens == out.stats.prefills + out.stats.accepted + out.stats.rounds - out.stats.cut

    def test_rows_of_a_batch_stop_by_themselves(self, runtime: Runtime) -> None:
        found = [self.middle(runtime, prompt) for prompt in self.PROMPTS]
        requests = [
            runtime.request(p, max_tokens=60, ignore_eos=True, stop=stop)
            for p, (_, stop) in zip(self.PROMPTS, found, strict=True)
        ]
        free = runtime.request(self.PROMPTS[0], max_tokens=60, ignore_eos=True)
        first, second, last = runtime.decode([*requests, free], depth=4)
        assert (last.text, last.finish_reason, last.stop) == (found[0][0], "length", None)
        for out, (text, stop) in ((first, found[0]), (second, found[1])):
            assert (out.text, out.stop) == (text[: text.index(stop)], stop)
            assert out.stats.tokens == len(out.tokens) < 60
        total = SpecStats.total(out.stats for out in (first, second, last))
        assert total.tokens == sum(len(out.tokens) for out in (first, second, last))

    def test_a_stream_never_shows_any_of_it(self, runtime: Runtime) -> None:
        text, stop = self.middle(runtime, self.PROMPTS[0])
        shown, last = "", None
        for last in runtime.stream(self.PROMPTS[0], max_tokens=60, depth=3, ignore_eos=True, stop=stop):
            shown += last.text
            assert text[: text.index(stop)].startswith(shown)
        assert last is not None
        assert (shown, last.finish_reason) == (text[: text.index(stop)], "stop")

    def test_logprobs_are_cut_with_the_tokens(self, runtime: Runtime) -> None:
        _, stop = self.middle(runtime, self.PROMPTS[0])
        params = SamplingParams(logprobs=2)
        out = runtime.generate(self.PROMPTS[0], max_tokens=60, depth=5, ignore_eos=True, stop=stop, sampling=params)
        assert out.logprobs is not None
        assert [entry.token for entry in out.logprobs] == out.tokens

    def test_min_tokens_come_before_any_stop_string(self, runtime: Runtime) -> None:
        prompt, most = self.PROMPTS[0], 20
        params = SamplingParams(min_tokens=10)
        out = runtime.generate(prompt, max_tokens=most, ignore_eos=True, stop=[" ", "e"], sampling=params)
        assert len(out.tokens) > 10
        assert out.stop in (" ", "e")

    def test_stop_ids_of_a_request_hold_even_where_the_models_own_are_ignored(self, runtime: Runtime) -> None:
        tokens = runtime.generate(self.PROMPTS[0], max_tokens=20, depth=0, ignore_eos=True).tokens
        at = next(i for i in range(5, 20) if tokens[i] not in tokens[:i])
        for depth in (0, 4):
            out = runtime.generate(self.PROMPTS[0], max_tokens=20, depth=depth, ignore_eos=True, stop_ids=[tokens[at]])
            assert (out.tokens, out.finish_reason, out.stop) == (tokens[:at], "stop", None)

    def test_without_a_tokenizer_stop_strings_are_refused(self, tmp_path: Path) -> None:
        write_pair(tmp_path, "unified", seed=3)
        runtime = Runtime(load_pair(str(tmp_path)), compiled=False)
        with pytest.raises(ValueError, match="stop is 'x', but this checkpoint has no tokenizer"):
            runtime.generate([5], stop="x")

    def test_the_makers_defaults_are_there_for_the_asking(self, runtime: Runtime) -> None:
        assert runtime.generation_defaults == SamplingParams(temperature=1.0, top_k=64, top_p=0.95)
        assert runtime.generate([5, 6], max_tokens=4).contract == "exact"
