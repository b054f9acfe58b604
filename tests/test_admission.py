"""Memory and reuse: what waits, what is sent back, what is computed once, and who goes first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest

from mlx_gemma_mtp import Request, cache
from mlx_gemma_mtp.cache import planned_bytes
from mlx_gemma_mtp.depth import FixedDepth
from mlx_gemma_mtp.request import TokenEvent
from mlx_gemma_mtp.scheduler import Scheduler
from mlx_gemma_mtp.speculative import Shapes

from .fakes import SPEC, VOCAB, expected, fake_speculator


@pytest.fixture(autouse=True)
def _small_steps() -> Iterator[None]:
    with patch.object(cache, "_STEP", 16):
        yield


def _scheduler(**options: Any) -> Scheduler:
    settings: dict[str, Any] = {"vocab_size": VOCAB, "max_positions": 10_000, "depth": FixedDepth(3), **options}
    return Scheduler(fake_speculator(), **settings)


def _prompt(length: int, seed: int = 1) -> list[int]:
    return [(i * i + seed * i) % VOCAB for i in range(length)]


def _run(scheduler: Scheduler) -> dict[int, list[int]]:
    got: dict[int, list[int]] = {}
    for event in _events(scheduler):
        got.setdefault(event.request_id, []).extend(event.tokens)
    return got


def _events(scheduler: Scheduler) -> Iterator[TokenEvent]:
    while scheduler.busy:
        yield from scheduler.step()


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    budget = planned_bytes(SPEC, [100])
    scheduler = _scheduler(kv_budget=budget)
    scheduler.add(Request(prompt=_prompt(60), max_tokens=40))
    with pytest.raises(ValueError, match=f"200 tokens and need {planned_bytes(SPEC, [200])} .* kv_budget = {budget}"):
        scheduler.add(Request(prompt=_prompt(60), max_tokens=140))
    assert scheduler.stats().waiting == 1


def test_one_that_does_not_fit_now_waits_and_nobody_overtakes_it() -> None:
    scheduler = _scheduler(kv_budget=planned_bytes(SPEC, [150]))
    for length in (100, 100, 90):
        scheduler.add(Request(prompt=_prompt(length), max_tokens=20))
    ended = [e.request_id for e in _events(scheduler) if e.finish_reason]
    assert ended == [0, 1, 2]
    assert scheduler.stats().preemptions == 0


def test_a_short_prompt_that_would_fit_does_not_overtake_a_long_one() -> None:
    scheduler = _scheduler(kv_budget=planned_bytes(SPEC, [130]) + planned_bytes(SPEC, [40]))
    for length in (100, 100, 20):
        scheduler.add(Request(prompt=_prompt(length), max_tokens=20))
    begun = list(dict.fromkeys(e.request_id for e in _events(scheduler)))
    assert begun == [0, 1, 2]


def test_rows_that_outgrow_the_budget_send_the_newest_back_and_it_goes_on_where_it_was() -> None:
    budget = planned_bytes(SPEC, [30, 30, 30])
    scheduler = _scheduler(kv_budget=budget)
    for seed in range(3):
        scheduler.add(Request(prompt=_prompt(20, seed), max_tokens=100))
    got: dict[int, list[int]] = {}
    ended = []
    for event in _events(scheduler):
        got.setdefault(event.request_id, []).extend(event.tokens)
        ended += [event.request_id] if event.finish_reason else []
        assert scheduler.stats().kv_bytes <= budget
    assert scheduler.stats().preemptions >= 2
    assert ended[0] == 0, "the oldest is never sent back"
    assert got == {n: expected(_prompt(20, n), 100) for n in range(3)}


def test_who_was_sent_back_goes_on_before_younger_ones_and_reuses_nothing_of_others() -> None:
    scheduler = _scheduler(kv_budget=planned_bytes(SPEC, [30, 30]), max_batch=2, prefix_cache=1 << 20)
    asked = [(20, 60), (20, 60), (4, 2)]
    stats = [scheduler.add(Request(prompt=_prompt(n, i), max_tokens=m))[1] for i, (n, m) in enumerate(asked)]
    events = list(_events(scheduler))
    assert scheduler.stats().preemptions > 0
    begun = next(i for i, e in enumerate(events) if e.request_id == 2)
    assert any(e.finish_reason for e in events[:begun]), "2 would fit beside 0, but 1, which doesn't, is before it"
    # What it goes on from is its own.
    assert [s.reused for s in stats] == [0, 0, 0]


def test_a_prompt_that_will_not_fit_beside_the_rows_is_not_begun_again_and_again() -> None:
    # 7 rows lie in arrays of 8: one more fits in as a row, but not beside them while it is prefilled.
    scheduler = _scheduler(kv_budget=planned_bytes(SPEC, [*[20] * 7, 400]), prefill_budget=40, depth=FixedDepth(0))
    for seed in range(7):
        scheduler.add(Request(prompt=_prompt(10, seed), max_tokens=13))
    while scheduler.running < 7:
        scheduler.step()
    scheduler.add(Request(prompt=_prompt(390), max_tokens=10))
    got = _run(scheduler)
    assert got[7] == expected(_prompt(390), 10)
    assert scheduler.stats().prefilled_tokens == 7 * 10 + 390
    assert scheduler.stats().preemptions == 0


def test_bytes_of_rows_that_are_over_serve_those_that_wait() -> None:
    budget = planned_bytes(SPEC, [220] * 5) + planned_bytes(SPEC, [400])
    scheduler = _scheduler(kv_budget=budget, prefill_budget=200, chunk=200)
    for seed in range(5):
        scheduler.add(Request(prompt=_prompt(180, seed), max_tokens=40))
    for _ in range(2):
        scheduler.add(Request(prompt=_prompt(390), max_tokens=2))
    ended = [e.request_id for e in _events(scheduler) if e.finish_reason]
    # Arrays of 6 rows are kept for 5; what the first long one had there isn't.
    assert ended[:2] == [5, 6]
    assert scheduler.stats().prefilled_tokens == 5 * 180 + 2 * 390


def test_who_is_sent_back_does_not_depend_on_what_was_drafted() -> None:
    # Else drafts would be dropped for what they are, and the law of sampled tokens be another.
    scheduler = _scheduler(kv_budget=planned_bytes(SPEC, [10, 10]), depth=FixedDepth(0), pipelined="none")
    for seed in (1, 2):
        scheduler.add(Request(prompt=_prompt(10, seed), max_tokens=40))
    given = 0
    while not scheduler.stats().preemptions:
        given += sum(len(e.tokens) for e in scheduler.step() if e.request_id == 0)
    # Rows of 32 places: at 24 tokens there is no room for the longest block any more.
    assert 10 + given <= 24 + 2


def test_the_next_turn_of_a_chat_computes_only_what_is_new() -> None:
    scheduler = _scheduler(prefix_cache=1 << 20)
    turn = _prompt(40)
    scheduler.add(Request(prompt=turn, max_tokens=10))
    answer = _run(scheduler)[0]
    before = scheduler.stats().prefilled_tokens
    longer = [*turn, *answer, *_prompt(8, 3)]
    scheduler.add(Request(prompt=longer, max_tokens=10))
    assert _run(scheduler)[1] == expected(longer, 10)
    # The answer's last token may not have been computed with.
    assert scheduler.stats().prefilled_tokens - before in (8, 9)
    assert scheduler.stats().prefix_hits == 1


def test_a_turn_that_parts_before_the_answer_goes_on_from_a_checkpoint_past_the_window() -> None:
    scheduler = _scheduler(prefix_cache=1 << 20)
    prompt = _prompt(300)
    scheduler.add(Request(prompt=prompt, max_tokens=60, checkpoints=(297,)))
    _run(scheduler)
    # The rings have forgotten position 297 (they hold 32), the checkpoint has not.
    other = [*prompt[:297], *[(t + 1) % VOCAB for t in prompt[291:300]]]
    assert other[297] != prompt[297]
    before = scheduler.stats().prefilled_tokens
    scheduler.add(Request(prompt=other, max_tokens=20))
    assert _run(scheduler)[1] == expected(other, 20)
    assert scheduler.stats().prefilled_tokens - before == 9
    # Without one, all is computed anew.
    third = [*prompt[:200], 3, 4]
    before = scheduler.stats().prefilled_tokens
    scheduler.add(Request(prompt=third, max_tokens=20))
    assert _run(scheduler)[2] == expected(third, 20)
    assert scheduler.stats().prefilled_tokens - before == 202


def _computed(scheduler: Scheduler, prompt: list[int], **options: Any) -> int:
    """Prompt tokens that a request costs; its output has to be right."""
    before = scheduler.stats().prefilled_tokens
    number, _ = scheduler.add(Request(prompt=prompt, max_tokens=1, **options))
    assert _run(scheduler)[number] == expected(prompt, 1)
    return scheduler.stats().prefilled_tokens - before


def _parting(prompt: list[int], at: int) -> list[int]:
    """A prompt that begins with the first `at` tokens of another, and has two more."""
    return [*prompt[:at], (prompt[at] + 1) % VOCAB, 5]


def test_of_several_checkpoints_the_furthest_is_gone_on_from() -> None:
    scheduler, prompt = _scheduler(prefix_cache=1 << 20), _prompt(300)
    scheduler.add(Request(prompt=prompt, max_tokens=60, checkpoints=(100, 200)))
    _run(scheduler)
    assert _computed(scheduler, _parting(prompt, 250)) == 52
    assert _computed(scheduler, _parting(prompt, 150)) == 52


def test_the_longest_beginning_is_reused_and_not_the_latest() -> None:
    scheduler, prompt = _scheduler(prefix_cache=1 << 20), _prompt(100)
    assert _computed(scheduler, prompt) == 100
    assert _computed(scheduler, _parting(prompt, 20)) == 22
    assert _computed(scheduler, [*prompt, 1, 2]) == 2


def test_prompts_that_begin_alike_share_an_entry_and_its_lengths() -> None:
    scheduler, prompt = _scheduler(prefix_cache=1 << 20), _prompt(300)
    for length, new in ((200, 200), (300, 100), (100, 100)):
        assert _computed(scheduler, prompt[:length]) == new
        assert scheduler.stats().prefix_entries == 1
    for length in (100, 200, 298):
        assert _computed(scheduler, _parting(prompt, length)) == 2


def test_of_the_last_entry_the_shortest_lengths_are_given_up_first() -> None:
    whole = SPEC.ring_bytes() + 360 * SPEC.bytes_per_token() + 360 * 4
    scheduler, prompt = _scheduler(prefix_cache=whole + SPEC.ring_bytes() + 10), _prompt(300)
    scheduler.add(Request(prompt=prompt, max_tokens=60, checkpoints=(100, 200)))
    _run(scheduler)
    assert scheduler.stats().prefix_entries == 1
    assert _computed(scheduler, _parting(prompt, 250)) == 52


def test_a_request_cancelled_at_a_checkpoint_leaves_what_was_prefilled() -> None:
    scheduler, prompt = _scheduler(prefix_cache=1 << 20, chunk=16, prefill_budget=16), _prompt(200)
    scheduler.add(Request(prompt=[1, 2], max_tokens=100))
    scheduler.step()
    number, _ = scheduler.add(Request(prompt=prompt, max_tokens=5, checkpoints=(64,)))
    while scheduler.stats().prefilled_tokens < 2 + 64:
        scheduler.step()
    assert scheduler.stats().prefilled_tokens == 2 + 64
    assert scheduler.cancel(number)
    assert _computed(scheduler, prompt) == 200 - 64


def test_where_shapes_are_restricted_prompts_are_computed_alone_in_whole_chunks() -> None:
    speculator = fake_speculator()
    speculator.shapes = Shapes(least=1, longest={1: 9, 2: 9, 3: 9, 4: 9}, free=False)
    scheduler = Scheduler(
        speculator, vocab_size=VOCAB, max_positions=10_000, depth=FixedDepth(3), chunk=16, prefill_budget=64
    )
    prompts, forwards, rows = [_prompt(n, n) for n in (40, 5, 16, 33)], [], []
    prefill, first = speculator.prefill_together, speculator.first

    def noted_prefill(chunks: Any) -> Any:
        forwards.append([len(tokens) for _, tokens in chunks])
        return prefill(chunks)

    def noted_first(cache: Any, hidden: Any, *args: Any, **options: Any) -> Any:
        rows.append(hidden.shape[0])
        return first(cache, hidden, *args, **options)

    with patch.multiple(speculator, prefill_together=noted_prefill, first=noted_first):
        for prompt in prompts:
            scheduler.add(Request(prompt=prompt, max_tokens=8))
        got = _run(scheduler)
    assert got == {n: expected(p, 8) for n, p in enumerate(prompts)}
    assert forwards == [[16], [16], [8], [5], [16], [16], [16], [1]]
    assert rows == [1, 1, 1, 1]


def test_a_shared_beginning_is_computed_once_for_all_rows() -> None:
    scheduler = _scheduler(prefix_cache=1 << 20, chunk=64, prefill_budget=64)
    system = _prompt(200)
    prompts = [[*system, *_prompt(5 + i, i + 2)] for i in range(6)]
    for prompt in prompts:
        scheduler.add(Request(prompt=prompt, max_tokens=12))
    got = _run(scheduler)
    assert got == {n: expected(p, 12) for n, p in enumerate(prompts)}
    alone = sum(len(p) for p in prompts)
    shared = alone - 5 * 200
    # They may share a few tokens more than the system prompt.
    assert shared - 20 <= scheduler.stats().prefilled_tokens <= shared


def test_choices_of_one_prompt_compute_it_once() -> None:
    scheduler = _scheduler(prefix_cache=1 << 20)
    for choice in range(4):
        scheduler.add(Request(prompt=_prompt(100), max_tokens=5, choice=choice))
    got = _run(scheduler)
    assert list(got.values()) == [expected(_prompt(100), 5)] * 4
    assert scheduler.stats().prefilled_tokens == 100 + 3


def test_what_was_prefilled_of_a_cancelled_request_is_reused() -> None:
    scheduler = _scheduler(prefix_cache=1 << 20, chunk=16, prefill_budget=16)
    scheduler.add(Request(prompt=[1, 2], max_tokens=100))
    scheduler.add(Request(prompt=_prompt(200), max_tokens=5))
    for _ in range(9):
        scheduler.step()
    assert scheduler.cancel(1)
    done = scheduler.stats().prefilled_tokens - 2
    assert done >= 32
    scheduler.add(Request(prompt=_prompt(200), max_tokens=5))
    assert _run(scheduler)[2] == expected(_prompt(200), 5)
    assert scheduler.stats().prefilled_tokens == 2 + 200


def test_the_least_recently_used_prefix_goes_first() -> None:
    one = SPEC.ring_bytes() + 40 * SPEC.bytes_per_token() + 40 * 4
    scheduler = _scheduler(prefix_cache=2 * one + 10)
    for seed in (1, 2):
        scheduler.add(Request(prompt=_prompt(40, seed), max_tokens=1))
        _run(scheduler)
    assert scheduler.stats().prefix_entries == 2
    for seed in (1, 3, 1, 2):
        scheduler.add(Request(prompt=_prompt(40, seed), max_tokens=1))
        _run(scheduler)
        assert scheduler.stats().prefix_bytes <= 2 * one + 10
    # 1 was used when 3 came, so 2 had to go.
    assert scheduler.stats().prefix_hits == 2


def test_a_prefix_that_a_running_row_uses_is_not_the_least_recently_used() -> None:
    one = SPEC.ring_bytes() + 40 * SPEC.bytes_per_token() + 40 * 4
    scheduler = _scheduler(prefix_cache=2 * one + 10)
    for seed in (1, 2):
        assert _computed(scheduler, _prompt(40, seed)) == 40
    scheduler.add(Request(prompt=[*_prompt(40, 1), 3, 4], max_tokens=300))
    other, _ = scheduler.add(Request(prompt=_prompt(40, 3), max_tokens=1))
    while other in scheduler:
        scheduler.step()
    _, stats = scheduler.add(Request(prompt=[*_prompt(40, 1), 5], max_tokens=1))
    _run(scheduler)
    assert stats.reused == 40


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = _scheduler(chunk=32, prefill_budget=32)
    scheduler.add(Request(prompt=_prompt(900), max_tokens=2))
    for n in range(3):
        scheduler.add(Request(prompt=_prompt(10 + n), max_tokens=2))
    ended = [e.request_id for e in _events(scheduler) if e.finish_reason]
    assert ended == [1, 2, 3, 0]


def test_a_long_prompt_gets_its_half_while_short_ones_keep_coming() -> None:
    scheduler = _scheduler(chunk=32, prefill_budget=32, max_batch=4)
    long, _ = scheduler.add(Request(prompt=_prompt(320), max_tokens=2))
    steps = 0
    while long in scheduler:
        scheduler.add(Request(prompt=_prompt(30), max_tokens=1))
        scheduler.step()
        steps += 1
    assert steps <= 2 * (320 // 16) + 2


def test_running_rows_wait_for_one_prefill_step_at_most() -> None:
    scheduler = _scheduler(chunk=32, prefill_budget=32)
    first, _ = scheduler.add(Request(prompt=_prompt(4), max_tokens=200))
    scheduler.step()
    scheduler.add(Request(prompt=_prompt(500), max_tokens=2))
    silent = 0
    while first in scheduler:
        got = any(e.request_id == first for e in scheduler.step())
        silent = 0 if got else silent + 1
        assert silent <= 1


@pytest.mark.parametrize("failing", ["prefill", "first", "round"])
def test_after_a_failed_step_only_its_requests_are_lost(failing: str) -> None:
    speculator = fake_speculator()
    scheduler = Scheduler(speculator, vocab_size=VOCAB, max_positions=10_000, depth=FixedDepth(3), prefill_budget=16)
    scheduler.add(Request(prompt=_prompt(5), max_tokens=60))
    scheduler.step()
    scheduler.step()
    scheduler.add(Request(prompt=_prompt(7), max_tokens=60))
    scheduler.add(Request(prompt=_prompt(70), max_tokens=6))
    name = {"prefill": "prefill_together", "first": "first", "round": "land"}[failing]
    with patch.object(speculator, name, side_effect=RuntimeError("out of memory")):
        raised = _until_it_raises(scheduler)
    assert raised == "out of memory"
    lost = scheduler.abort()
    assert lost == {"prefill": [1, 2], "first": [1], "round": [0, 1]}[failing]
    assert scheduler.abort() == []
    survivors = [n for n in range(3) if n in scheduler]
    assert survivors == [n for n in range(3) if n not in lost]
    number, _ = scheduler.add(Request(prompt=_prompt(9), max_tokens=20))
    got = _run(scheduler)
    assert got[number] == expected(_prompt(9), 20)
    assert all(n in got for n in survivors)


def _until_it_raises(scheduler: Scheduler) -> str:
    try:
        for _ in range(100):
            scheduler.step()
    except RuntimeError as error:
        return str(error)
    return "nothing"
