"""The command line, on a scripted runtime: what it prints where, how it fails, what it does not import."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from typer.testing import CliRunner, Result

from mlx_gemma_mtp.cli import app
from mlx_gemma_mtp.constraints import JsonSchema, Lark, Regex
from mlx_gemma_mtp.request import FinishReason, SamplingParams
from mlx_gemma_mtp.stats import SpecStats
from mlx_gemma_mtp.text import Piece
from tests.test_text import write_tokenizer
from tests.tiny import write_pair

ROOT = Path(__file__).parents[1]
HEAVY = ["mlx", "mlx_lm", "transformers", "tokenizers", "huggingface_hub", "numpy", "rich", "jinja2"]


class Codec:
    """Stands for a TextCodec: an id for each character."""

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template
        self.rendered: list[tuple[list[Mapping[str, str]], bool]] = []

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def render(self, messages: Sequence[Mapping[str, str]], *, thinking: bool) -> list[int]:
        self.rendered.append((list(messages), thinking))
        return self.encode(messages[-1]["content"])


@dataclass
class Clock:
    """Stands for a Timing."""

    prompt_tokens: int = 4
    reused_tokens: int = 1
    prefill_rate: float = 40.0
    decode_rate: float = 12.5
    peak_memory: int = 3 * 2**29
    depth: object = "2 drafts (2.1 tokens for 1.4 steps)"

    def to_dict(self) -> dict[str, float]:
        return {"prompt_tokens": self.prompt_tokens, "decode_tokens_per_second": self.decode_rate}


@dataclass
class Fake:
    """Stands for a Runtime that says `script`, whatever it is asked; `fail_at` raises before that step."""

    script: list[tuple[Literal["answer", "thinking"], str, bool]] = field(
        default_factory=lambda: [("answer", "Par", False), ("answer", "is", True), ("answer", ".", False)]
    )
    text: Codec | None = field(default_factory=Codec)
    drafter_config: object | None = object()
    failure: BaseException | None = None
    fail_at: int = 1
    loads: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[list[int], dict[str, Any]]] = field(default_factory=list)

    def load(self, path: str, **options: Any) -> Fake:
        self.loads.append({"path": path, **options})
        if path == "missing":
            raise FileNotFoundError("no such\nmodel")
        return self

    def keep_prefixes(self, limit: int) -> None:
        """A chat asks for it."""

    @property
    def generation_defaults(self) -> SamplingParams:
        return SamplingParams(temperature=1.0, top_k=64, top_p=0.95)

    @property
    def stats(self) -> SpecStats:
        stats = SpecStats(prefills=1)
        stats.add_round(drafted=2, accepted=1)
        return stats

    def stream(self, prompt: list[int], **options: Any) -> Iterator[SimpleNamespace]:
        self.calls.append((prompt, options))
        for i, (kind, text, drafted) in enumerate(self.script):
            if self.failure is not None and i == self.fail_at:
                raise self.failure
            last: FinishReason | None = "length" if i == len(self.script) - 1 else None
            yield SimpleNamespace(
                tokens=(100 + i,),
                drafted=(drafted,),
                pieces=(Piece(kind=kind, text=text, drafted=drafted),) if self.text else (),
                finish_reason=last,
                stats=self.stats,
                timing=Clock(),
            )

    def generate(self, prompt: list[int], **options: Any) -> SimpleNamespace:
        steps = list(self.stream(prompt, **options))
        said = {kind: "".join(text for k, text, _ in self.script if k == kind) for kind in ("answer", "thinking")}
        return SimpleNamespace(
            tokens=[t for step in steps for t in step.tokens],
            text=said["answer"] if self.text else "",
            thinking=said["thinking"] or None,
            finish_reason="length",
            stop=None,
            contract="exact",
            bitwise=False,
            differing_shapes=("1x4",),
            stats=self.stats,
            timing=Clock(),
        )

    def info(self) -> dict[str, Any]:
        return {
            "model": {"path": "[red]/m", "layers": {"total": 6}, "bytes": 3 * 2**20, "shared": False},
            "drafter": {"path": "/m/drafter", "reads": [4, 5]} if self.drafter_config else None,
            "parts": [{"name": "a", "window": 16}, {"name": "b"}],
            "skipped": {},
            "dtype": "float32",
        }


Run = Callable[..., Result]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "mlx_gemma_mtp.runtime", SimpleNamespace(load=fake.load))
    for name in ("NO_COLOR", "FORCE_COLOR", "MLX_GEMMA_MTP_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def run(fake: Fake) -> Run:
    return lambda *args, **more: CliRunner().invoke(app, list(args), **more)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run with all three streams on a terminal; `lines` are typed at its prompts."""

    def run(*args: str, lines: Sequence[str | BaseException] = ()) -> tuple[int, str, str]:
        typed = iter(lines)

        def ask(prompt: str) -> str:
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        out, err = Terminal(), Terminal()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("builtins.input", ask)
        for name, stream in (("stdin", Terminal()), ("stdout", out), ("stderr", err)):
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as stop:
            app(list(args))
        assert isinstance(stop.value.code, int)
        return stop.value.code, out.getvalue(), err.getvalue()

    return run


class TestGenerate:
    def test_the_answer_is_on_stdout_and_the_summary_on_stderr(self, run: Run, fake: Fake) -> None:
        result = run("generate", "hi", "--model", "m")
        assert (result.exit_code, result.stdout) == (0, "Paris.\n")
        for part in (
            "3 tokens",
            "12.5 tokens/s",
            "40.0 tokens/s",
            "1.00 drafts",
            "1: █ 100%  2: ▁ 0%",
            "1.5 GiB",
        ):
            assert part in result.stderr
        assert "\x1b" not in result.output
        free = {"progress": None, "bitwise": False, "max_batch": 8}
        assert fake.loads == [{"path": "m", "drafter": "auto", "dtype": None, "revision": None, **free}]

    def test_options_reach_the_runtime(self, run: Run, fake: Fake) -> None:
        model = ["--model", "m", "--drafter", "none", "--revision", "r", "--dtype", "float32"]
        sampled = ["--temperature", "0.7", "--top-k", "20", "--seed", "5", "--stop", "\n\n", "--stop", "END"]
        run("generate", "-p", "hi", *model, "-n", "8", "--depth", "4", "--ignore-eos", *sampled)
        assert fake.loads[0] == {
            "path": "m", "drafter": None, "revision": "r", "dtype": "float32", "progress": None, "bitwise": False,
            "max_batch": 8,
        }  # fmt: skip
        sampling = SamplingParams(temperature=0.7, top_k=20, seed=5)
        expected = {"max_tokens": 8, "depth": 4, "ignore_eos": True, "sampling": sampling, "stop": ("\n\n", "END")}
        assert fake.calls == [([104, 105], expected)]

    def test_options_go_before_the_models_own_sampling(self, run: Run, fake: Fake) -> None:
        run("generate", "hi", "--model-sampling", "--top-p", "0.5")
        assert fake.calls[0][1]["sampling"] == SamplingParams(temperature=1.0, top_k=64, top_p=0.5)

    def test_constraints_reach_the_runtime(self, run: Run, fake: Fake, tmp_path: Path) -> None:
        schema, grammar = tmp_path / "s.json", tmp_path / "g.lark"
        schema.write_text('{"type": "object"}')
        grammar.write_text('start: "yes"')
        for option, value in (("--json-schema", str(schema)), ("--regex", "a+"), ("--grammar", str(grammar))):
            assert run("generate", "-m", "m", option, value, "hi").exit_code == 0
        given = [options["sampling"].constraint for _, options in fake.calls]
        assert given == [JsonSchema({"type": "object"}), Regex("a+"), Lark('start: "yes"')]
        both = run("generate", "--regex", "a", "--grammar", str(grammar), "hi")
        assert (both.exit_code, both.stderr) == (2, "error: --regex and --grammar can't be given together\n")
        schema.write_text("{")
        assert run("generate", "--json-schema", str(schema), "hi").exit_code == 2
        assert run("generate", "--grammar", str(tmp_path / "none"), "hi").exit_code == 2

    def test_bitwise_serving_is_for_all_rows(self, run: Run, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("far enough")

        monkeypatch.setattr("mlx_gemma_mtp.serve_cli.open_socket", lambda _: None)
        monkeypatch.setattr("mlx_gemma_mtp.serve_cli.open_engine", fail)
        assert "far enough" in run("serve", "--bitwise", "--max-batch", "3").stderr
        assert (fake.loads[0]["bitwise"], fake.loads[0]["max_batch"]) == (True, 3)

    def test_bitwise_is_for_one_row(self, run: Run, fake: Fake) -> None:
        run("generate", "hi", "--bitwise")
        assert (fake.loads[0]["bitwise"], fake.loads[0]["max_batch"]) == (True, 1)

    def test_an_empty_stop_string_is_refused(self, run: Run) -> None:
        result = run("generate", "hi", "--stop", "")
        assert result.exit_code == 2
        assert "--stop" in result.stderr

    def test_the_demo_pair_says_what_it_is(self, run: Run, fake: Fake) -> None:
        result = run("generate", "hi")
        assert fake.loads[0]["path"] == "demo"
        assert "demo pair" in result.stderr
        assert "--model google/gemma-4-E4B-it" in result.stderr
        assert result.stdout == "Paris.\n"

    @pytest.mark.parametrize("args", [["hi"], ["--prompt", "hi"], []])
    def test_a_prompt_comes_from_three_places(self, run: Run, fake: Fake, args: list[str]) -> None:
        run("generate", *args, input="hi\n")
        assert fake.text is not None
        assert fake.text.rendered == [([{"role": "user", "content": "hi"}], False)]

    def test_system_and_thinking_reach_the_template(self, run: Run, fake: Fake) -> None:
        run("generate", "hi", "--system", "Be terse.", "--thinking")
        assert fake.text is not None
        messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "hi"}]
        assert fake.text.rendered == [(messages, True)]

    @pytest.mark.parametrize(("args", "template"), [(["--raw"], True), ([], False)])
    def test_raw_text(self, run: Run, fake: Fake, args: list[str], template: bool) -> None:
        fake.text = Codec(has_chat_template=template)
        result = run("generate", "hi", *args)
        assert fake.calls[0][0] == [104, 105]
        assert not fake.text.rendered
        assert ("no chat template" in result.stderr) is not template

    def test_without_a_tokenizer_ids_are_shown(self, run: Run, fake: Fake) -> None:
        fake.text = None
        result = run("generate", "--tokens", "5, 9,11")
        assert (result.exit_code, result.stdout) == (0, "100 101 102\n")
        assert fake.calls[0][0] == [5, 9, 11]

    def test_a_thought_is_apart(self, run: Run, fake: Fake) -> None:
        fake.script = [("thinking", "Hm", False), ("thinking", "…", True), ("answer", "Yes", False)]
        result = run("generate", "hi", "--thinking")
        assert result.stdout == "Yes\n"
        assert "Hm…\n\n" in result.stderr

    def test_without_a_drafter_nothing_breaks(self, run: Run, fake: Fake) -> None:
        fake.drafter_config = None
        assert json.loads(run("generate", "hi", "--json").stdout)["drafter"] is None


class TestJson:
    def test_one_object_alone(self, run: Run, fake: Fake) -> None:
        fake.script.insert(0, ("thinking", "Hm", False))
        result = run("generate", "hi", "--depth", "2", "--json")
        assert json.loads(result.stdout) == {
            "model": "demo",
            "drafter": "/m/drafter",
            "depth": 2,
            "tokens": [100, 101, 102, 103],
            "text": "Paris.",
            "thinking": "Hm",
            "finish_reason": "length",
            "stop": None,
            "contract": "exact",
            "bitwise": False,
            "differing_shapes": ["1x4"],
            "stats": fake.stats.to_dict(),
            "timing": Clock().to_dict(),
        }
        assert result.stderr == ""

    def test_no_thought_no_key(self, run: Run) -> None:
        assert "thinking" not in json.loads(run("generate", "hi", "--json").stdout)

    def test_without_a_tokenizer_the_text_is_empty(self, run: Run, fake: Fake) -> None:
        fake.text = None
        result = run("generate", "--tokens", "5,9,11", "--max-tokens", "8", "--ignore-eos", "--json")
        assert json.loads(result.stdout)["text"] == ""

    @pytest.mark.parametrize(
        ("args", "kind", "code", "message"),
        [
            (["hi", "--model", "missing"], "failure", 1, "no such model"),
            (["hi", "--nope"], "usage", 2, "--nope"),
            (["hi", "--highlight"], "usage", 2, "--highlight and --json can't be given together"),
            (["--tokens", "1,x"], "usage", 2, "no list of token ids"),
        ],
    )
    def test_errors(self, run: Run, args: list[str], kind: str, code: int, message: str) -> None:
        result = run("generate", *args, "--json")
        assert (result.exit_code, result.stdout) == (code, "")
        error = json.loads(result.stderr)["error"]
        assert error["type"] == kind
        assert message in error["message"]

    def test_a_prompt_that_looks_like_the_option(self, run: Run, fake: Fake) -> None:
        fake.failure = ValueError("no")
        assert run("generate", "--", "--json").stderr.endswith("error: no\n")


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["bogus"], "bogus"),
            (["generate", "a", "--prompt", "b"], "PROMPT and --prompt can't"),
            (["generate", "--prompt", "a", "--tokens", "1"], "--prompt and --tokens can't"),
            (["generate", "--tokens", "1", "--raw"], "--tokens and --raw can't"),
            (["generate", "--tokens", "1", "--system", "s"], "--tokens and --system can't"),
            (["generate", "a", "--raw", "--thinking"], "--raw and --thinking can't"),
            (["generate", "--tokens", ""], "no list of token ids"),
            (["generate", "--tokens", "-1"], "no list of token ids"),
            (["generate"], "stdin is empty"),
            (["generate", "a", "--max-tokens", "0"], "--max-tokens"),
            (["generate", "a", "--depth", "-1"], "--depth"),
            (["generate", "a", "--depth", "99"], "--depth"),
            (["chat", "--depth", "deep"], "--depth"),
        ],
    )
    def test_usage(self, run: Run, fake: Fake, args: list[str], message: str) -> None:
        result = run(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        assert not fake.loads

    def test_text_for_a_model_without_a_tokenizer(self, run: Run, fake: Fake) -> None:
        fake.text = None
        result = run("generate", "hi", "--model", "m")
        assert (result.exit_code, result.stderr) == (
            2,
            "error: this model has no tokenizer: give its prompt as ids, with --tokens\n",
        )

    @pytest.mark.parametrize(
        ("failure", "code", "line"),
        [
            (ValueError("bad\nprompt"), 1, "error: bad prompt"),
            (KeyError("x"), 1, "error: KeyError: 'x'"),
            (KeyboardInterrupt(), 130, ""),
            (BrokenPipeError(), 141, ""),
        ],
    )
    def test_failures_while_streaming(self, run: Run, fake: Fake, failure: BaseException, code: int, line: str) -> None:
        fake.failure = failure
        result = run("generate", "hi", "--model", "m")
        assert (result.exit_code, result.stdout) == (code, "Par\n")
        assert result.stderr == (f"{line}\n" if line else "")

    def test_debugging_shows_the_traceback(self, run: Run, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
        fake.failure = ValueError("bad")
        monkeypatch.setenv("MLX_GEMMA_MTP_DEBUG", "1")
        assert run("generate", "hi").exception is fake.failure

    def test_a_terminal_without_a_prompt_does_not_wait(self, on_terminal: Any) -> None:
        code, out, err = on_terminal("generate")
        assert (code, out) == (2, "")
        assert "there is no prompt" in err

    def test_a_closed_pipe_is_quiet(self) -> None:
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "mlx_gemma_mtp", "--help"]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b"")


class TestTerminal:
    def test_accepted_drafts_are_coloured_and_explained(self, on_terminal: Any) -> None:
        code, out, err = on_terminal("generate", "hi", "--highlight")
        assert (code, out) == (0, "Par\x1b[32mis\x1b[0m.\n")
        assert "\x1b[32mcoloured\x1b[0m: drafted and accepted" in err

    def test_without_highlight_the_answer_is_plain(self, on_terminal: Any) -> None:
        assert on_terminal("generate", "hi")[1] == "Paris.\n"

    def test_a_thought_is_dimmed(self, on_terminal: Any, fake: Fake) -> None:
        fake.script = [("thinking", "Hm", False), ("answer", "Yes", False)]
        _, out, err = on_terminal("generate", "hi")
        assert out == "Yes\n"
        assert "\x1b[2mHm\x1b[0m\n\n" in err

    def test_output_can_not_control_the_terminal(self, on_terminal: Any, fake: Fake) -> None:
        fake.script = [("answer", "a\x1b]0;b\x07\r\x9bc\td\n", False)]
        assert on_terminal("generate", "hi")[1] == "a]0;bc\td\n"

    def test_no_color(self, on_terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NO_COLOR", "1")
        _, out, err = on_terminal("generate", "hi", "--highlight")
        assert "\x1b" not in out + err
        assert "nothing is coloured" in err

    def test_ids_are_coloured_too(self, on_terminal: Any, fake: Fake) -> None:
        fake.text = None
        assert on_terminal("generate", "--tokens", "1", "--highlight")[1] == "100\x1b[32m 101\x1b[0m 102\n"

    def test_loading_shows_progress(self, on_terminal: Any, fake: Fake) -> None:
        on_terminal("generate", "hi")
        report = fake.loads[0]["progress"]
        assert report is not None


class TestChat:
    def test_a_conversation_keeps_its_history(self, on_terminal: Any, fake: Fake) -> None:
        code, out, err = on_terminal("chat", lines=["one", "", "two"])
        assert fake.text is not None
        assert (code, out) == (0, "Paris.\nParis.\n")
        assert fake.text.rendered[1][0] == [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "two"},
        ]
        assert "3 tokens, cut at --max-tokens, 12.5 tokens/s, 1.00 accepted per round" in err

    def test_commands(self, on_terminal: Any, fake: Fake) -> None:
        lines = [
            "/help",
            "one",
            "/clear",
            "/system Be terse.",
            "/nope",
            "two",
            "/system",
            "three",
            "/exit",
            "x",
        ]
        code, _, err = on_terminal("chat", "--system", "old", lines=lines)
        assert fake.text is not None
        sent = [[(m["role"], m["content"]) for m in messages] for messages, _ in fake.text.rendered]
        assert code == 0
        assert sent == [
            [("system", "old"), ("user", "one")],
            [("system", "Be terse."), ("user", "two")],
            [("user", "two"), ("assistant", "Paris."), ("user", "three")],
        ]
        assert "/system TEXT" in err
        assert "/nope is no command" in err

    def test_ctrl_c_stops_the_answer_alone(self, on_terminal: Any, fake: Fake) -> None:
        fake.failure = KeyboardInterrupt()
        code, out, err = on_terminal("chat", lines=["one", KeyboardInterrupt(), "two"])
        assert fake.text is not None
        assert (code, out) == (0, "Par\nPar\n")
        assert fake.text.rendered[1][0][1] == {"role": "assistant", "content": "Par"}
        assert err.count("stopped") == 2
        assert "Ctrl-D or /exit leaves" in err

    def test_a_turn_that_fails_is_forgotten(self, on_terminal: Any, fake: Fake) -> None:
        fake.failure, fake.fail_at = ValueError("too long"), 0
        code, _, err = on_terminal("chat", lines=["one", "two"])
        assert fake.text is not None
        assert code == 0
        assert fake.text.rendered[1][0] == [{"role": "user", "content": "two"}]
        assert "error: too long" in err

    def test_lines_from_a_pipe(self, run: Run) -> None:
        result = run("chat", "--model", "m", input="one\ntwo\n")
        assert (result.exit_code, result.stdout) == (0, "Paris.\nParis.\n")

    @pytest.mark.parametrize(("codec", "lack"), [(None, "tokenizer"), (Codec(has_chat_template=False), "template")])
    def test_what_it_needs(self, run: Run, fake: Fake, codec: Codec | None, lack: str) -> None:
        fake.text = codec
        result = run("chat", "--model", "m")
        assert result.exit_code == 1
        assert f"{lack}, which a conversation needs" in result.stderr


class TestInfo:
    def test_tables(self, run: Run) -> None:
        out = run("info", "--model", "m").stdout
        for part in ("[red]/m", "layers total", "3.0 MiB", "4, 5", "window", "float32", "no"):
            assert part in out
        assert "skipped" not in out

    def test_json(self, run: Run, fake: Fake) -> None:
        result = run("info", "--json")
        assert json.loads(result.stdout) == fake.info()
        assert result.stderr == ""


class TestProgram:
    @pytest.mark.parametrize("args", [[], ["--help"]])
    def test_help(self, run: Run, args: list[str]) -> None:
        result = run(*args)
        assert result.exit_code == 0
        assert all(command in result.stdout for command in ("generate", "chat", "info"))

    def test_version(self, run: Run) -> None:
        from mlx_gemma_mtp import __version__

        assert run("--version").stdout == f"mlx-gemma-mtp {__version__}\n"

    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys\nfrom mlx_gemma_mtp.cli import app\n"
            "try: app(['generate', '--help'])\n"
            f"except SystemExit: print([m for m in {HEAVY} if m in sys.modules])"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert out.stdout.splitlines()[-1] == "[]"

    def test_the_launcher_of_a_checkout(self) -> None:
        command = [sys.executable, str(ROOT / "cli.py"), "--version"]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        assert out.stdout.startswith("mlx-gemma-mtp ")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"), "dense")[0]


class TestRealRuntime:
    def test_ids_without_a_tokenizer(self, pair: Path) -> None:
        given = ["--model", str(pair), "--drafter", str(pair / "drafter"), "--tokens", "5,9,11"]
        result = CliRunner().invoke(app, ["generate", *given, "-n", "8", "--depth", "4", "--ignore-eos", "--json"])
        record = json.loads(result.stdout)
        assert result.stderr == ""
        assert len(record["tokens"]) == record["stats"]["tokens"] == 8
        assert (record["text"], record["depth"], record["finish_reason"]) == ("", 4, "length")
        assert record["drafter"] == str(pair / "drafter")

    def test_text_streamed_is_text_generated(self, tmp_path: Path) -> None:
        model = str(write_tokenizer(write_pair(tmp_path, "dense")[0]))
        given = ["generate", "the", "--model", model, "-n", "16", "--ignore-eos"]
        streamed, whole = CliRunner().invoke(app, given), CliRunner().invoke(app, [*given, "--json"])
        assert streamed.exit_code == whole.exit_code == 0
        assert streamed.stdout.removesuffix("\n") == json.loads(whole.stdout)["text"].removesuffix("\n")
