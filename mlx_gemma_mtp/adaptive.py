"""The depth that pays: expected tokens per second of the whole batch, round by round. Knows no MLX, models or text.

Every few rounds the depth K with the most expected tokens per second is taken: the rows' acceptance rates say how many
tokens, the cost model how many seconds. Other depths are tried where they might be better: never for more than a small
share of the time spent decoding, compilations included, and ever more rarely while trying changes nothing. Depth 0
(parked) is one of the depths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .acceptance import AcceptanceModel, Predictability, Spread
from .costs import DEEPEST, CostModel, Table, contexts
from .depth import DepthChoice, FixedDepth, RoundShape, RowOutcome, RowState
from .depth_view import DEPTHS, View
from .round_clock import RoundClock, Timed

_EVERY, _SELDOM = 8, 16  # rounds from one choice to the next, and at most: doubling while nothing changes
_HARDLY_EVER = 32  # and where no text could change anything
_SOON = 4  # to the next choice where rows or their context have become others
_HOPE, _HOPE_CARRIED = 1024, 128  # rounds after which drafts are tried all the same; where costs come from elsewhere
_TOGETHER = 16  # rounds that are taken in at once, where no choice comes next
_GAIN = 1.015  # how much better another depth has to be, in two choices in a row,
_GAIN_OVER_PLAIN, _GAIN_OF_PLAIN = 1.01, 1.01  # than plain decoding, and plain decoding than it,
_RISK = 0.5  # by how many standard errors of its cost it then has to be better
_MUCH, _CLEARLY = 1.03, 1.25  # better by so much, other depths may be worth trying, or it is taken at once
_PLAIN_AGAIN = 64  # rounds of drafting after which plain decoding is measured again, times the square of the gain,
_PLAIN_LATEST, _PLAIN_LEVEL = 512, 1.3  # but so many at most, and at once when the level has moved so far since
_PLAIN_FAR = 1.5  # gain from which other trials don't wait for it
_CHECKS = 6  # of plain decoding that aren't paid for, while it is hardly known
_PLAIN_SAMPLES, _PLAIN_SOON = 12, 16  # its samples until then, and rounds while there are fewer
_SHARE = 0.004  # of the time spent, for trying other depths,
_WANTED, _WANTED_SHARE = 1.05, 0.008  # and of it where nothing is drafted though it may be so much better,
_FIRST_SHARE, _FIRST_ROUNDS = 0.025, 300  # and of the first rounds,
_FIRST_OF_RATES = 130  # which are fewer where the costs are known and only the texts are not
_CREDIT = 20  # rounds over which a depth that should be better pays for being tried
_BONUS, _LEAST_BONUS = 8.0, 0.25  # plain rounds' worth of it when a text has changed: halving while nothing comes of it
_SAVINGS = 12.0  # plain rounds' worth that can be put by
_HORIZON, _PAYBACK = 64, 2.0  # rounds over which a new shape's compilation has to pay, and how many times over
_OPENING, _OPENING_ROUNDS = 2, 3  # drafts of a pair's first trial, and its rounds
_TRIAL = 3  # rounds at a depth never measured, besides those that compile
_REACH = 3  # drafts beyond the deepest ever measured that a trial may go
_CUT, _UNCUT = 0.2, 0.12  # worth of a draft from which blocks are cut, and below which they no longer are;
_AHEAD = 2.0  # so many times that where others are launched ahead, which hides a tenth of a round (bench/NOTES.md)
_WAIT, _LONGEST_WAIT = 4, 256  # rounds from one trial of a depth to its next: doubling
_UNSEEN = 3  # batches in a row that may begin at the last depth without a look: short ones get no other
_NEWS_WAIT = 16  # rounds after which a new request may be tried for


@dataclass
class _Place:
    """What is chosen for one table; for each depth, when it may be tried again and how long it waits then."""

    depth: int
    level: float  # of the machine when plain decoding was last measured here, or was to be
    rounds: int = 0
    checks: int = 0  # of plain decoding
    again: bool = False  # whether the last one came because plain decoding had just been so much cheaper than expected
    unseen: int = 0  # batches that began at `depth` without a look, since the last one
    rival: int = 0  # whether a deeper (1) or a shallower depth (-1) was better in the last choice
    hope: int = _HOPE  # round at which drafts are tried though no acceptance would make them pay
    due: list[int] = field(default_factory=lambda: [0] * (DEEPEST + 1))
    wait: list[int] = field(default_factory=lambda: [_WAIT] * (DEEPEST + 1))

    def renew(self, longest: int) -> None:
        """What was tried in vain may be worth trying again: after `longest` rounds at most."""
        for k in range(1, DEEPEST + 1):
            self.wait[k] = min(self.wait[k], longest)
            self.due[k] = min(self.due[k], self.rounds + longest)


@dataclass
class _Trial:
    """Another depth for some rounds."""

    table: Table
    depth: int
    left: int


@dataclass
class DepthMemory:
    """What outlives a scheduler: costs, all requests' rates, seconds of a compilation and seconds left for trials."""

    costs: CostModel = field(default_factory=CostModel)
    rates: list[tuple[float, float]] = field(default_factory=list)
    spread: Spread = field(default_factory=Spread)
    trace: float = 0.03
    traced: bool = False
    purse: float = 0.0
    bonus: float = _BONUS
    rounds: int = 0
    places: dict[Table, _Place] = field(default_factory=dict)


class AdaptiveDepth:
    """The depth policy of one scheduler; see `DepthPolicy`. `clock`: seconds, never falling.

    `ahead`: whether the scheduler launches rounds with drafts ahead, which it can't where blocks are cut.
    """

    def __init__(
        self,
        memory: DepthMemory | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        ahead: bool = False,
    ) -> None:
        self._memory = DepthMemory() if memory is None else memory
        self._ahead = _AHEAD if ahead else 1.0
        self._costs, self._rounds = self._memory.costs, RoundClock(clock)
        self._acceptance = AcceptanceModel(self._memory.rates, self._memory.spread)
        self._predictability = Predictability()
        self._places = self._memory.places
        self._running: dict[int, int] = {}  # drafts that could be of use to each request when it joined
        self._ended: list[int] = []
        self._trial: _Trial | None = None
        self._depth, self._chosen = 0, 0  # of the block planned, and without trials
        self._asked: int | None = None  # where every row says what it wants
        self._wait, self._every = 0, _EVERY  # rounds to the next choice, and from the last one to it
        self._news, self._cut, self._hopeless, self._saving = False, False, False, False
        self._moved = False  # to another table, since the last choice
        self._table: Table | None = None
        self._width, self._contexts = 0, range(0)  # of the table
        self._place_before: _Place | None = None
        self._view: View | None = None
        self._latest: tuple[Sequence[RowState], Table] | None = None  # what was chosen without a view

    @property
    def min_chain(self) -> float:
        """See `DepthPolicy`."""
        return self._view.worth(self._depth) if self._cut and self._view is not None else 0.0

    def plan(self, rows: Sequence[RowState], *, width: int, context: int, compiled: Callable[[int], bool]) -> list[int]:
        """See `DepthPolicy`."""
        running = self._running
        fresh = not running
        if fresh:
            self._rounds.clear()
        new = least = most = 0
        asked = False
        for request, cap, fixed in rows:
            if request not in running:
                running[request] = cap
                new += 1
            if fixed is None:
                most = cap if cap > most else most
            elif cap:
                least, asked = max(least, fixed), True
        self._news |= new > 0
        if most or asked:
            self._asked = None if most else least
        joining = not fresh and new == len(rows)
        calm = self._wait > 1 and not self._news and self._trial is None
        if most and calm and not fresh and width == self._width and context in self._contexts:
            self._wait -= 1
            self._depth = max(self._chosen, least)
        elif most and not joining:
            table = self._costs.table(width, context)
            self._width, self._contexts = width, contexts(table.bucket)
            self._depth = self._next_depth(rows, table, compiled, least, most, fresh=fresh)
        depth = self._depth
        return [0 if cap == 0 else depth if fixed is None else fixed for _, cap, fixed in rows]

    def begin(self) -> None:
        """See `DepthPolicy`."""
        self._rounds.begin()

    def meanwhile(self) -> None:
        """See `DepthPolicy`."""
        # Many together: between rounds, what is read for it has left the processor's caches.
        if len(self._rounds) >= _TOGETHER or self._wait == 1:
            self._learn()

    def observe(self, shape: RoundShape, outcomes: Sequence[RowOutcome]) -> None:
        """See `DepthPolicy`."""
        self._rounds.end(shape, outcomes)
        if not self._running:
            self._learn()

    def _learn(self) -> None:
        """Take in the rounds that are over."""
        taken = self._rounds.take()
        for timed in taken:
            self._take_in(timed)
        if taken:
            self._acceptance.tick(len(taken))
            self._memory.rates = self._acceptance.rates
        for request in self._ended:
            self._acceptance.forget(request)
            self._predictability.forget(request)
        self._ended.clear()

    def _take_in(self, timed: Timed) -> None:
        costs, (rows, verified, drafted, context, settled) = self._costs, timed.shape
        table = costs.table(rows, context)
        expected = costs.level * table.seconds(verified, drafted)
        new = not settled or (verified, drafted) not in table.seen
        fair = settled and timed.fair
        costs.observe_in(table, verified, drafted, timed.seconds, settled=fair)
        if fair and verified == drafted == 0 and table in self._places:
            self._places[table].level = costs.level
        if costs.measured:
            self._earn(timed.shape, timed.seconds, expected, new=new)
        for request, offered, accepted, tokens in timed.outcomes:
            if request in self._running:
                self._acceptance.observe(request, offered, accepted)
                self._predictability.observe(request, tokens)
            else:
                self._acceptance.observe(None, offered, accepted)

    def forget(self, request: int) -> None:
        """See `DepthPolicy`."""
        self._running.pop(request, None)
        self._ended.append(request)
        if not self._running:
            self._learn()

    def abort(self) -> None:
        """See `DepthPolicy`."""
        self._rounds.clear()

    def describe(self) -> DepthChoice:
        """What is chosen now, and why."""
        if self._asked is not None:
            return DepthChoice(depth=self._asked, reason="asked for by the requests")
        view = self._view
        if self._latest is not None:
            view = self._look(*self._latest)
            view.depth = self._chosen
        if view is None:
            return DepthChoice(depth=self._depth, reason="nothing was decoded yet")
        return view.describe()

    def _earn(self, shape: RoundShape, seconds: float, expected: float, *, new: bool) -> None:
        """Put by a share of a round's time; note what a compilation took."""
        memory = self._memory
        if new:
            memory.traced |= not shape.settled
            step = 0.1 if shape.settled and memory.traced else 0.3
            memory.trace += step * (min(max(seconds - expected, 0.0), 3.0 * memory.trace) - memory.trace)
        memory.rounds += 1
        first = _FIRST_OF_RATES if memory.costs.stored else _FIRST_ROUNDS
        share = _FIRST_SHARE if memory.rounds <= first else _WANTED_SHARE if self._saving else _SHARE
        most = _SAVINGS * expected + 4.0 * memory.trace
        if shape.verified not in (0, self._chosen) and 2.0 * seconds < expected:
            # A trial was paid for, and cost less.
            memory.purse = min(memory.purse + expected - seconds, max(most, memory.purse))
        memory.purse = min(memory.purse + share * min(seconds, 3.0 * expected), max(most, memory.purse))

    def _next_depth(
        self,
        rows: Sequence[RowState],
        table: Table,
        compiled: Callable[[int], bool],
        least: int,
        most: int,
        *,
        fresh: bool,
    ) -> int:
        """The depth for the free rows: that of a trial, the last choice, or, every few rounds, a new one.

        `least`: depth that another row asks for. `most`: drafts that could be of use to the free rows.
        """
        moved, self._table = table is not self._table, table
        trial = self._trial
        if trial is not None and trial.table is table and trial.left > 1 and most >= trial.depth >= least:
            trial.left -= 1
            return trial.depth
        self._trial = None
        self._wait -= 1
        if not fresh and (most < DEEPEST or (not (moved or self._news) and self._wait > 0)):
            return max(self._chosen, least)
        place = self._places.get(table)
        if not fresh and self._wait > 0 and least == 0 and place is not None and place.unseen < _UNSEEN:
            # The batch or the bucket of its context is another: what was chosen last for it goes on for a few rounds.
            skipped = max(self._wait - _SOON, 0)
            self._wait, self._every = self._wait - skipped, self._every - skipped
            self._place_before, self._chosen = place, place.depth
            if moved:
                place.unseen += 1
                self._moved, self._view, self._latest = True, None, (rows, table)
            return self._chosen
        if fresh and most >= DEEPEST and least == 0 and place is not None and place.unseen < _UNSEEN:
            # Nothing is known of these requests yet: what was chosen last here goes on for some rounds.
            place.unseen += 1
            self._place_before = place
            place.rounds += self._every - max(self._wait, 0)
            place.renew(_NEWS_WAIT)
            self._news = False
            self._wait = self._every = _EVERY
            self._chosen, self._view, self._latest = place.depth, None, (rows, table)
            return self._chosen
        self._learn()
        if not any(table.known(k) for k in DEPTHS):
            return least
        return self._choose(rows, table, compiled, least, fresh=fresh, moved=moved or self._moved, most=most)

    def _choose(
        self,
        rows: Sequence[RowState],
        table: Table,
        compiled: Callable[[int], bool],
        least: int,
        *,
        fresh: bool,
        moved: bool,
        most: int,
    ) -> int:
        """The depth of the best rate, or that of a trial."""
        view = self._view = self._look(rows, table, least)
        self._latest, self._moved = None, False
        place = self._place(table, view, compiled, fresh=fresh)
        place.unseen = 0
        changed = place.depth == 0 and most >= DEEPEST and self._predictability.changed()
        news = self._news
        if news or changed:
            place.renew(_WAIT if changed else _NEWS_WAIT)
            self._news = False
        if changed:
            self._acceptance.doubt()
            memory = self._memory
            limit = max(_SAVINGS * view.seconds[0], memory.purse)
            memory.purse = min(memory.purse + memory.bonus * view.seconds[0], limit)
            memory.bonus = max(0.5 * memory.bonus, _LEAST_BONUS)
        current = max(place.depth if fresh or moved else self._chosen, least)
        best = max(
            (k for k in view.depths if table.measured(k) or k in (0, current, least)), key=view.rates.__getitem__
        )
        better = view.rates[best] / view.rates[current] if table.known(current) else _CLEARLY + 1.0
        if current == 0 < best:
            # Plain decoding is left for what is better, not for what may be.
            better *= 1.0 - _RISK * view.error(best, 0)
        gain = _GAIN_OVER_PLAIN if current == 0 else _GAIN_OF_PLAIN if best == 0 else _GAIN
        rival = (best > current) - (best < current) if better > gain else 0
        sure = better > _CLEARLY or fresh or moved or rival == place.rival
        place.rival = rival
        saved = (better - 1.0) * min(_HORIZON, 8 * most) * view.seconds[current]
        if rival and sure and saved >= _PAYBACK * self._traces(compiled, current, best):
            if current == 0:
                self._memory.bonus = _BONUS
            current, place.rival = best, 0
            if better > _MUCH:
                place.renew(16 * _WAIT)
        self._chosen = view.depth = current
        if least == 0:
            place.depth = current
        self._cut = self._cuts(view, current)
        place.rounds += self._every - max(self._wait, 0)
        self._trial = self._next_trial(view, table, compiled, place, current) if most >= DEEPEST and not fresh else None
        settled = not (fresh or moved or news or changed or place.rival or self._trial)
        seldom = _HARDLY_EVER if current == 0 and self._hopeless else _SELDOM
        self._every = self._wait = min(2 * self._every, seldom) if settled else _EVERY
        return current if self._trial is None else self._trial.depth

    def _look(self, rows: Sequence[RowState], table: Table, least: int = 0) -> View:
        return View.of(rows, table, self._acceptance, self._costs.level, least, self._running)

    def _cuts(self, view: View, depth: int) -> bool:
        """Whether blocks are cut: where a draft more is dear, and the shapes of short blocks soon pay."""
        dear = view.worth(depth) >= (_UNCUT if self._cut else _CUT) * self._ahead
        return dear and self._memory.trace <= (0.7 if self._cut else 0.35) * view.seconds[depth]

    def _place(self, table: Table, view: View, compiled: Callable[[int], bool], *, fresh: bool) -> _Place:
        """What is chosen for a table: at first the best of the depths well known here, if possible a compiled one."""
        if table not in self._places:
            known = [k for k in DEPTHS if table.known(k)]
            known = [k for k in known if table.measured(k) or (k == self._chosen and not fresh)] or known
            start = max([k for k in known if compiled(k)] or known, key=view.rates.__getitem__)
            # Costs were carried over, too: plain decoding was measured where they come from.
            level = view.level if self._place_before is None else self._place_before.level
            self._places[table] = _Place(start, level, hope=_HOPE_CARRIED if table.carried else _HOPE)
        self._place_before = self._places[table]
        return self._places[table]

    def _next_trial(
        self, view: View, table: Table, compiled: Callable[[int], bool], place: _Place, current: int
    ) -> _Trial | None:
        """Another depth that may well be better, if it can be paid for."""
        rate = view.rates[current]
        self._hopeless = current == 0 and not self._acceptance.unknown and view.hopeless
        self._saving = False
        if self._hopeless and place.rounds >= place.hope:
            # What is held against drafts may have been measured at a bad time.
            place.hope, k = place.rounds + _HOPE, view.best_hope
            return _Trial(table, k, 2 if (k, k) in table.seen else 4)
        if self._hopeless:
            return None
        # If it was only drafts that have become so much dearer, plain decoding may pay by now.
        moved = view.level / place.level > max(_PLAIN_LEVEL, rate / view.rates[0])
        belied = table.belied and not place.again
        if current > 0 and view.least == 0 and (moved or belied or place.due[0] <= place.rounds):
            # Costs that grow with the context, say, would else go unseen: all depths' look alike from within.
            doubtful = belied or table.samples[0] < _PLAIN_SAMPLES or not table.measured(0)
            # The first plain rounds behind others are not launched ahead, which the usual ones may be.
            rounds = 3 if doubtful else 1 if {(current, 0), (0, current)} <= table.seen else 2
            # By what is known of a level that is over, or by a profile that is off, it might never be worth its price:
            # then it has none.
            free = moved or belied or (doubtful and place.checks < _CHECKS)
            loss = 0.0 if free else max(self._loss(view, table, compiled, current, 0, rounds), 0.0)
            again = min(int(_PLAIN_AGAIN * (rate / view.rates[0]) ** 2), _PLAIN_LATEST)
            if loss <= self._memory.purse:
                self._memory.purse -= loss
                place.level, place.again = view.level, belied
                place.checks += not belied
                place.due[0] = place.rounds + (min(_PLAIN_SOON, again) if doubtful else again)
                return _Trial(table, 0, rounds)
            if not doubtful and rate < _PLAIN_FAR * view.rates[0]:
                return None  # this is saved up for
        if current == 0 and self._acceptance.unknown:
            # Once per process, and not paid for: no reckoning finds depths that pay without any drafts.
            return _Trial(table, _OPENING, _OPENING_ROUNDS)
        deepest = max(k for k in range(DEEPEST + 1) if table.known(k))
        due = [k for k in view.depths if 0 < k <= deepest + _REACH and k != current and place.due[k] <= place.rounds]
        # A deeper round does for the change to a shallower depth and back, and then tells nothing of it.
        lasting = [1 if k > current or (current, k) in table.seen else 2 for k in range(DEEPEST + 1)]
        lasting = [n if table.known(k) else _TRIAL for k, n in enumerate(lasting)]
        losses = {k: self._loss(view, table, compiled, current, k, lasting[k]) for k in due}
        offers = []
        if losses and (current == 0 or min(losses.values()) <= self._memory.purse):
            hopes = view.hopes(self._acceptance)
            for k, loss in losses.items():
                if hopes[k] > _GAIN * rate:
                    value = (hopes[k] / rate - _GAIN) / (max(loss, 0.0) + 0.1 * view.seconds[current])
                    offers.append((value, loss, k, lasting[k]))
            self._saving = current == 0 and max(hopes[k] for k in losses) > _WANTED * rate
            # What can never be saved up for would keep back all that can be.
            offers = [offer for offer in offers if offer[1] <= _SAVINGS * view.seconds[0]]
        offers.sort(reverse=True)
        if current == 0 and self._acceptance.stale and (not offers or offers[0][1] > self._memory.purse):
            # Few drafts tell whether the text has changed, at the least cost, though it may not pay itself.
            k = next((k for k in (1, _OPENING) if compiled(k)), 1)
            offers = [(0.0, self._loss(view, table, compiled, 0, k, 1), k, 1)] if place.due[k] <= place.rounds else []
        if not offers or offers[0][1] > self._memory.purse:
            return None
        _, loss, k, rounds = offers[0]
        self._memory.purse -= max(loss, 0.0)
        place.due[k] = place.rounds + place.wait[k]
        place.wait[k] = min(2 * place.wait[k], _LONGEST_WAIT)
        return _Trial(table, k, rounds)

    def _loss(
        self, view: View, table: Table, compiled: Callable[[int], bool], current: int, k: int, rounds: int
    ) -> float:
        """Seconds that some rounds of another depth are expected to lose, compilations included."""
        lost = rounds * max(view.seconds[k] - view.tokens[k] / view.rates[current], 0.0)
        if not {(current, k), (k, current)} <= table.seen:
            lost += abs(view.seconds[k] - view.seconds[current])  # a round of the deeper one does for the change
        gain = 0.0 if table.known(k) else max(view.rates[k] / view.rates[current] - 1.0, 0.0)
        return lost + self._traces(compiled, current, k) - gain * _CREDIT * view.seconds[current]

    def _traces(self, compiled: Callable[[int], bool], before: int, after: int) -> float:
        """Seconds to compile what a change of depth brings, and staying would not."""
        more = (not compiled(after)) - (not compiled(before))
        return max(more, 0) * self._memory.trace


def parse_depth(
    depth: int | str, memory: DepthMemory | None = None, *, ahead: bool = False
) -> FixedDepth | AdaptiveDepth:
    """The policy for a caller's `depth`: a count, or "auto", which learns into `memory`. Raises ValueError.

    `ahead`: see `AdaptiveDepth`.
    """
    if depth == "auto":
        return AdaptiveDepth(memory, ahead=ahead)
    if isinstance(depth, int) and not isinstance(depth, bool) and 0 <= depth <= DEEPEST:
        return FixedDepth(depth)
    raise ValueError(f'depth is {depth!r}, expected "auto" or a whole number from 0 to {DEEPEST}')
