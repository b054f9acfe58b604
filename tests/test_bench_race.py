"""A race of libraries: who runs when and in which process, and what becomes of it. The libraries are a script."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_gemma_mtp.benchmark import race as module
from mlx_gemma_mtp.benchmark.race import Entrant, Plan, entrants, fit_together, race, same_tokens, summary
from mlx_gemma_mtp.benchmark.workers import Worker, WorkerError

FAKE = """
import json, sys
library, log = sys.argv[1], open({log!r}, "a")
if library == "mlx-vlm":
    print(json.dumps({{"error": "Traceback\\nModuleNotFoundError: No module named 'mlx_vlm'"}}), flush=True)
    sys.exit()
print("started", library, file=log, flush=True)
print(json.dumps({{"versions": {{"mlx": "1.2"}}}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    rows = len(asked["prompts"])
    print(library, asked.get("depth", 0), asked["op"], rows, file=log, flush=True)
    if library == "mlx-lm" and asked["op"] == "batch":
        print(json.dumps({{"error": "no batches"}}), flush=True)
        continue
    part = {{"wall_s": 3.0, "prefill_s": 1.0, "decode_tokens": 10 * rows, "tokens": [[1, 2]] * rows, "cpu_s": 1.0,
            "rounds": 5, "accepted": 4.0, "drafted": 10 if asked.get("depth") else 0, "peak_bytes": 7,
            "by_position": [[3, 1], [5, 5]] if asked.get("depth") else []}}
    print(json.dumps({{"parts": [part]}}), flush=True)
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Ours plain and with 2 drafts, mlx-lm and mlx-vlm; batches of 1 and 3."""
    script = tmp_path / "arms.py"
    script.write_text(FAKE.format(log=str(tmp_path / "log")))
    monkeypatch.setattr(module, "ARMS", script)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9}))
    who = (Entrant("ours", 0), Entrant("ours", 2), Entrant("mlx-lm", 0), Entrant("mlx-vlm", 0))
    return Plan(
        target=tmp_path, drafter=None, dtype="float32", prompts=[[5], [6, 7]], entrants=who, batches=(1, 3),
        new_tokens=4, repeats=2, pause=0.0, together=True, singles=1,
    )  # fmt: skip


def log_of(plan: Plan) -> list[str]:
    return (plan.target / "log").read_text().splitlines()


def test_turns_alternate_and_first_ones_do_not_count(plan: Plan) -> None:
    told: list[tuple[str, float]] = []
    outcome = race(plan, lambda what, share: told.append((what, share)))
    one = ["ours 0 one 1", "ours 0 batch 3", "ours 2 one 1", "ours 2 batch 3"]
    warmed = [line for line in one for _ in (0, 1)]
    back = ["mlx-lm 0 one 1", "ours 2 one 1", "ours 2 batch 3", "ours 0 one 1", "ours 0 batch 3"]
    first = ["mlx-lm 0 one 1", "mlx-lm 0 one 1", "mlx-lm 0 batch 3"]
    assert log_of(plan) == ["started ours", *warmed, "started mlx-lm", *first, *back]
    assert [len(s) for entered in outcome.samples.values() for s in entered.values()] == [2, 2, 2, 2, 2]
    assert len(told) == 2 * 3 * 2 + 2
    assert told[0] == ("repeat 1 of 2: ours, plain, batch 1", 1e-6)
    assert [share for _, share in told] == sorted(share for _, share in told)


def test_who_cannot_run_is_left_out_with_the_reason(plan: Plan) -> None:
    outcome = race(plan)
    missing = "ModuleNotFoundError: No module named 'mlx_vlm'"
    assert outcome.left_out == {"mlx-lm, plain, batch 3": "no batches", "mlx-vlm, plain": missing}


def test_one_process_at_a_time(plan: Plan) -> None:
    race(replace(plan, together=False, batches=(1,), entrants=plan.entrants[:3]))
    once = ["ours 0 one 1"] * 2, ["ours 2 one 1"] * 2, ["mlx-lm 0 one 1"] * 2
    back = ["mlx-lm 0 one 1", "started ours", *once[1], *once[0]]
    assert log_of(plan) == ["started ours", *once[0], *once[1], "started mlx-lm", *once[2], *back]


def test_pauses_come_between_turns(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module, "sleep", slept.append)
    race(replace(plan, pause=4.0))
    assert slept == [4.0] * 6  # mlx-vlm, which can't start, has one turn


def test_what_it_comes_to(plan: Plan) -> None:
    found = summary(race(plan))
    assert list(found) == ["1", "3"]
    drafts, plain = found["3"]["ours, 2 drafts"], found["3"]["ours, plain"]
    assert drafts["decode_tokens_per_second"] == {"median": 15.0, "min": 15.0, "max": 15.0}
    assert drafts["first_token_s"]["median"] == 1.0
    assert drafts["acceptance_by_position"] == [0.6, 0.2]
    assert (drafts["accepted_per_round"], plain["accepted_per_round"]) == (0.8, None)
    assert (drafts["peak_bytes"], plain["acceptance_by_position"]) == (7, [])


def test_other_tokens_are_told(plan: Plan) -> None:
    outcome = race(plan)
    assert same_tokens(outcome) == {"ours, plain": True, "ours, 2 drafts": True, "mlx-lm, plain": True}
    outcome.samples[1]["mlx-lm, plain"][1][0]["tokens"] = [[1, 3]]
    assert same_tokens(outcome)["mlx-lm, plain"] is False


def test_entrants() -> None:
    everyone = [str(e) for e in entrants(("ours", "mlx-lm", "mlx-vlm"), 1, drafter=True)]
    plain = ["ours, plain", "ours, 1 draft", "ours, auto", "mlx-lm, plain", "mlx-vlm, plain", "mlx-vlm, 1 draft"]
    assert everyone == plain
    assert [str(e) for e in entrants(("ours", "mlx-vlm"), 3, drafter=False)] == ["ours, plain", "mlx-vlm, plain"]


def test_what_fits_together(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    half = 8 * 2**20 / 2**30
    assert fit_together(tmp_path, None, 2, half)
    assert not fit_together(tmp_path, None, 3, half)
    assert not fit_together(tmp_path, tmp_path, 2, half)


def test_a_process_that_dies_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"status 3: on its way out"):
        Worker([sys.executable, "-c", "import sys; print('on its way out', file=sys.stderr); sys.exit(3)"])


def test_environment_of_a_process() -> None:
    code = "import json, os; print(json.dumps({'found': os.environ['PYTHONPATH']}))"
    worker = Worker([sys.executable, "-c", code], env={"PYTHONPATH": "/x"})
    worker.close()
    assert worker.about == {"found": "/x"}
