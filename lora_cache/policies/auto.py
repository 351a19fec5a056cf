"""Learns from the traffic which adapter is wanted last, and is never much worse than LRU."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from random import Random

import numpy as np
from numpy.typing import NDArray

from lora_cache.errors import ConfigError
from lora_cache.key import AdapterKey
from lora_cache.policies.base import RemovalReason

_Array = NDArray[np.float64]

# What is known about an adapter: one list, or one column of a matrix, of these rows.
_LAST = 0  #: time of the last use
_GAP = 1  #: mean logarithm of the gaps between uses
_COUNTS = slice(2, 6)  #: logarithms of its decayed counts of uses, as of the last use
_WORTH = 6  #: logarithm of seconds to reload per byte
_ROWS = 7

#: Time constants of the counts, seconds.  They only have to span what may matter: the learner
#: weighs them, and three or six of them do as well.
_TAUS = (10.0, 100.0, 1_000.0, 10_000.0)
_DECAY = 1.0 / np.array(_TAUS)[:, None]
_OVERDUE = np.array((0.0, 2.0))[:, None]  #: at once, and e^2 = 7 times beyond the mean gap
_FEATURES = 4 + len(_TAUS)

_EPS_S = 0.05  #: shorter gaps are all the same
_UNKNOWN_GAP = 8.0  #: stands for the gap of what was used only once: e^8 s are 50 minutes
_GAP_SHARE = 0.1  #: of the newest gap in the mean
_NOTHING = math.log(0.1)  #: counts below a tenth are all the same
_FORGET = 0.9998  #: AdaGrad's memory: steps do not shrink for ever, as traffic drifts
_QUESTIONS = 4  #: open at most, per slot
_ASK_EVERY = 8  #: uses; so that it learns while there are few misses, too
_CREDIT = 10.0  #: misses per slot: what a lead over LRU counts for at most


def _features(known: _Array, now: float) -> _Array:
    """What the score weighs: one row per feature, one column per adapter."""
    out = np.empty((_FEATURES, known.shape[1]))
    age = now - known[_LAST]
    log_age = np.log(age + _EPS_S, out=out[0])
    out[1] = gap = known[_GAP]
    # Overdue: usually used again by now.  Either a burst has ended, or its turn comes nearer.
    np.maximum((log_age - gap) - _OVERDUE, 0.0, out=out[2:4])
    np.maximum(known[_COUNTS] - age * _DECAY, _NOTHING, out=out[4:])
    return out


def _used(known: list[float], now: float) -> list[float]:
    """`known`, after one more use at `now`."""
    last, gap, *counts, worth = known
    age = now - last
    if counts[0] > -math.inf:  # not the first use
        new = math.log(age + _EPS_S)
        gap = new if gap == _UNKNOWN_GAP else gap + _GAP_SHARE * (new - gap)
    counts = [math.log1p(math.exp(c - age / tau)) for c, tau in zip(counts, _TAUS, strict=True)]
    return [now, gap, *counts, worth]


class Auto:
    """Evicts what a ranking, learned online, expects to be asked for last.

    **Score.**  Eight features of an adapter are weighed into one number, the logarithm of how
    soon it will be asked for: its age, its mean gap, how far overdue it is (two of them), and its
    decayed counts over 10 s to 3 h.  All are logarithms, so a weight is an exponent: -1 on the
    age alone is LRU, 1 on one count alone is LFU with ageing, and a positive one on the age finds
    out a loop.  What is known of an adapter outlives its eviction.

    **Learning.**  At each eviction (and at some uses) a question is noted: of these two adapters,
    which will be asked for first?  The traffic answers, and a step of logistic regression on the
    difference of their features follows.  An eviction needs to know no more than the order, so
    no rate, no time and no threshold has to be calibrated.  Open questions are overwritten at
    random: most look about one turnover of the cache ahead, a few much further.  (Pairwise
    learning to rank: RankNet, Burges et al., ICML 2005; learning Belady's order from features
    such as these: LRB, Song et al., NSDI 2020; steps: AdaGrad, Duchi et al., JMLR 2011.)

    **Guard.**  A shadow of LRU is kept, of the same capacity.  While our misses, plus what the
    shadow holds and we do not (each may become a miss), stay within `slack` and `grace` of the
    shadow's misses, the score rules.  Otherwise we evict what the shadow does not hold, or, when
    we hold the same, what it would evict.  That never raises the sum.  So, for copies of equal
    size and without leases: misses <= (1 + slack) * LRU's + grace, whatever the traffic.  A lead
    counts only up to 10 misses per slot, so that good times do not pay for long bad ones.
    (Switching between policies at the price of what they do not share: Blum & Burch, COLT 1997.)

    **Cost.**  A score is the logarithm of a rate; log(seconds to reload / bytes) is added to it,
    as in GDSF (Cherkasova 1998).

    Time: O(residents) in numpy per miss, O(1) per hit.  Memory: O(residents + `history`).

    Args:
        slack: share of LRU's misses that may be lost to it at worst.
        grace: misses that may be lost to it besides.
        history: adapters remembered after eviction (at least four times the residents).
        rate: step size of the learner.
        seed: of the random choice of questions.  The same calls give the same decisions.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        *,
        slack: float = 0.02,
        grace: float = 8.0,
        history: int = 1024,
        rate: float = 0.05,
        seed: int = 0,
    ) -> None:
        if slack < 0 or grace < 0 or history < 0 or not rate > 0:
            raise ConfigError("slack, grace and history must not be negative, rate be positive")
        self._slack, self._grace, self._history, self._rate = slack, grace, history, rate
        self._random = Random(seed)
        # Column i of the matrix belongs to `_keys[i]`: the residents, in no order.  After them
        # comes the victim, until a newcomer takes its column.
        self._keys: list[AdapterKey] = []
        self._column: dict[AdapterKey, int] = {}
        self._matrix = np.zeros((_ROWS, 8))
        self._known: dict[AdapterKey, list[float]] = {}  # the same, without promised uses
        self._ghosts: OrderedDict[AdapterKey, list[float]] = OrderedDict()  # first evicted first
        # The learner, which starts as LRU.
        self._weights = np.zeros(_FEATURES)
        self._weights[0] = -1.0
        self._squares = np.ones(_FEATURES)
        self._questions: list[tuple[AdapterKey, AdapterKey, _Array] | None] = []
        self._asked: dict[AdapterKey, set[int]] = {}  # the questions that wait for a key
        self._victim: AdapterKey | None = None  # since the last insert
        self._uses = 0
        # The guard.
        self._capacity = 0
        self._shadow: OrderedDict[AdapterKey, None] = OrderedDict()  # oldest first
        self._missing = 0  # keys of the shadow that are not resident
        self._credit = 0.0  # (1 + slack) * the shadow's misses - ours

    def on_insert(self, key: AdapterKey, nbytes: int, cost_s: float, now: float) -> None:
        # Our capacity is what we hold when something has to go for a newcomer.
        evicted = self._victim is not None
        if evicted:
            self._ask(now)
            self._victim = None

        worth = math.log(max(cost_s, 1e-3) / max(nbytes, 1))
        known = self._ghosts.pop(key, None)
        if known is None:
            known = [now, _UNKNOWN_GAP, *(-math.inf for _ in _TAUS), worth]
        else:
            known[_WORTH] += 0.3 * (worth - known[_WORTH])  # one slow load is not the rule
        self._known[key] = known
        column = self._column[key] = len(self._keys)
        self._keys.append(key)
        if column == self._matrix.shape[1]:
            self._matrix = np.concatenate((self._matrix, np.zeros_like(self._matrix)), axis=1)
        # A prefetched adapter is a promise of use: it ranks as if used now.
        self._matrix[:, column] = _used(known, now)

        self._capacity = len(self._keys) if evicted else max(self._capacity, len(self._keys))
        self._credit -= 1.0
        self._missing -= key in self._shadow
        self._touch_shadow(key)

    def on_access(self, key: AdapterKey, now: float) -> None:
        if key in self._asked:
            self._learn(key)
        self._known[key] = known = _used(self._known[key], now)
        self._matrix[:, self._column[key]] = known
        self._touch_shadow(key)
        self._uses += 1
        if self._uses % _ASK_EVERY == 0:
            self._ask(now)

    def on_remove(self, key: AdapterKey, reason: RemovalReason) -> None:
        column = self._column.pop(key)
        if reason is RemovalReason.EVICTED:
            self._victim = key
            self._missing += key in self._shadow
        else:
            self._shadow.pop(key, None)  # LRU would have lost it as well
            self._victim = None  # its column is about to be taken
        moved = self._keys.pop()
        last = len(self._keys)
        if column != last:  # swap it with the last one
            self._keys[column] = moved
            self._column[moved] = column
            self._matrix[:, (column, last)] = self._matrix[:, (last, column)]
        self._ghosts[key] = self._known.pop(key)
        if len(self._ghosts) > max(self._history, 4 * self._capacity):
            self._ghosts.popitem(last=False)

    def rank_victims(self, now: float) -> Iterator[AdapterKey]:
        known = self._matrix[:, : len(self._keys)]
        scores = self._weights @ _features(known, now) + known[_WORTH]
        order = np.argsort(scores, kind="stable").tolist()
        if self._missing + 1 <= self._credit + self._grace:
            return (self._keys[column] for column in order)
        return self._rank_towards_lru([self._keys[column] for column in order])

    def explain(self, key: AdapterKey, now: float) -> str:
        known = self._matrix[:, self._column[key]]
        words = f"last used {now - known[_LAST]:.3g} s ago"
        if known[_GAP] != _UNKNOWN_GAP:
            words += f", usually {math.exp(known[_GAP]):.3g} s apart"
        if self._missing + 1 > self._credit + self._grace:
            words += "; the guard keeps to LRU"
        return words

    def _rank_towards_lru(self, by_score: list[AdapterKey]) -> Iterator[AdapterKey]:
        yield from (key for key in by_score if key not in self._shadow)
        yield from (key for key in self._shadow if key in self._column)

    def _touch_shadow(self, key: AdapterKey) -> None:
        """What LRU would do with this use."""
        if key in self._shadow:
            self._shadow.move_to_end(key)
        else:
            self._shadow[key] = None
            self._credit = min(self._credit + 1.0 + self._slack, _CREDIT * self._capacity)
        while len(self._shadow) > self._capacity:
            dropped, _ = self._shadow.popitem(last=False)
            self._missing -= dropped not in self._column

    def _ask(self, now: float) -> None:
        """Note which of two residents, and of the victim and a resident, will be used first."""
        residents = len(self._keys)
        if not residents:
            return
        draw = self._random.random
        columns = [int(draw() * residents) for _ in range(3)]
        keys = [self._keys[column] for column in columns]
        if self._victim is not None:
            columns.append(residents)
            keys.append(self._victim)
        rows = _features(self._matrix.take(columns, axis=1), now).T
        self._questions += [None] * (_QUESTIONS * self._capacity - len(self._questions))
        for one, other in ((0, 1), (2, 3))[: len(keys) - 2]:
            if keys[one] != keys[other]:
                self._note(keys[one], keys[other], rows[one] - rows[other])

    def _note(self, one: AdapterKey, other: AdapterKey, difference: _Array) -> None:
        number = int(self._random.random() * len(self._questions))
        self._close(number)
        self._questions[number] = (one, other, difference)
        for key in (one, other):
            self._asked.setdefault(key, set()).add(number)

    def _close(self, number: int) -> None:
        question, self._questions[number] = self._questions[number], None
        for key in question[:2] if question else ():
            self._asked[key].discard(number)
            if not self._asked[key]:
                del self._asked[key]

    def _learn(self, key: AdapterKey) -> None:
        """`key` is asked for, and so answers the questions that wait for it."""
        for number in sorted(self._asked[key]):
            question = self._questions[number]
            assert question is not None
            self._close(number)
            difference = question[2] if question[0] == key else -question[2]
            margin = float(self._weights @ difference)
            step = difference / (1.0 + math.exp(min(margin, 50.0)))  # of log P(key comes first)
            self._squares = _FORGET * self._squares + step * step
            self._weights += self._rate * step / np.sqrt(self._squares)
