"""Which problems are perfectible, and when a problem's verdict is settled before all its responses are sampled.

    rule = Rule.of(samples=40, low=0.2, high=0.8)      kept: 8 to 32 of 40 responses are right
    rule.verdict(8)                                    "kept": 8 of 40 is 20%, and 20% is inside
    rule.settled(sampled=16, correct=8)                "kept": whatever the other 24 are, 8 to 32 will be right
    rule.more(sampled=20, correct=2)                   6: no verdict can be settled by fewer

A perfectible problem is solvable, and not solved (section 4 of the paper): the share of right responses lies in
[low, high]. Shares are compared as whole numbers of right responses, so a border is where it is written.

**Stopping early.** After n of N responses with c right, the final number lies in [c, c + N - n]. Once every number in
that range has one verdict, the rest cannot change it and is not sampled. Each round samples as many responses as it
takes at least until some verdict could be settled, so nothing is sampled that full sampling would not have needed;
`least` bounds rounds from below, for engines that are slow with a few responses at a time. The first round is the same
for all problems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Verdict = Literal["kept", "too easy", "unsolvable"]
VERDICTS: tuple[Verdict, ...] = ("kept", "too easy", "unsolvable")


@dataclass(frozen=True)
class Rule:
    """`fewest` to `most` right responses of `samples` keep a problem."""

    samples: int
    fewest: int
    most: int

    @classmethod
    def of(cls, samples: int, low: float, high: float) -> Rule:
        """Raises ValueError for borders that are none, or that no number of right responses lies between."""
        if samples < 1:
            raise ValueError(f"--samples {samples}: write a positive number of responses")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"--low {low:g} --high {high:g}: write two shares with 0 <= low <= high <= 1")
        # a border is the decimal that was written, 1/5 and not the double nearest to 0.2
        fewest, most = math.ceil(Fraction(repr(low)) * samples), math.floor(Fraction(repr(high)) * samples)
        if fewest > most:
            raise ValueError(
                f"--samples {samples}: no number of right responses is between {low:g} and {high:g} of {samples}. "
                "Ask for more samples, or move --low and --high apart"
            )
        return cls(samples, fewest, most)

    def verdict(self, correct: int) -> Verdict:
        """Of all responses."""
        if correct > self.most:
            return "too easy"
        return "kept" if correct >= self.fewest else "unsolvable"

    def settled(self, sampled: int, correct: int) -> Verdict | None:
        """The verdict that every continuation has, or None where they differ. Nothing is settled unsampled."""
        worst, best = self.verdict(correct), self.verdict(correct + self.samples - sampled)
        return worst if worst == best and sampled else None

    def more(self, sampled: int, correct: int, least: int = 1) -> int:
        """Responses of the next round of a problem that is not settled: as many as a verdict takes at least."""
        wrong = sampled - correct
        soonest = min(
            self.most + 1 - correct,  # too easy: all right
            self.samples + 1 - self.fewest - wrong,  # unsolvable: all wrong
            max(0, self.fewest - correct) + max(0, self.samples - self.most - wrong),  # kept: enough of both
        )
        return min(max(1, soonest, least), self.samples - sampled)
