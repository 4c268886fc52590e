r"""Which of the responses to one problem give the same answer: the votes of a majority vote (maj@k).

    answer_of(grader, text)            the answer that a response votes for, or None: it does not vote
    classes(grader, [ballot, ...])     for each problem, each response's class as a number, or None

Extraction is the grader's own: the last ``\boxed{...}`` for `exact`, `final_answer` for `math` and for functions of
the user. Two answers are one when they are the same text or numeral (`answers.same`); with the `math` grader also when
Math-Verify says so. That grader finds an answer right when it equals the reference, so two right answers to a problem
with one reference are one, and a right and a wrong one never are: neither needs Math-Verify. A user's function may
accept different answers for reasons of its own, so its verdict decides nothing here, and a vote never learns from the
reference which of several answers is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tenbit.tasks.answers import ALTERNATIVES, final_answer, last_boxed, normalise, references, same
from tenbit.tasks.grading import LONGEST_ANSWER, ExactGrader, Grader, MathGrader
from tenbit.types import Problem

Class = int | None
Pair = tuple[str, str]


@dataclass(frozen=True)
class Ballot:
    """The graded answers to one problem, in order. `failed`: grading it hung, crashed or raised."""

    problem: Problem
    answers: Sequence[str | None]
    correct: Sequence[bool]
    failed: Sequence[bool]


def answer_of(grader: Grader, text: str) -> str | None:
    """The answer a response states, as its grader reads it; None where there is none or an empty one."""
    found = last_boxed(text) if isinstance(grader, ExactGrader) else final_answer(text)
    return found if found is not None and normalise(found) else None


def classes(grader: Grader, ballots: Sequence[Ballot]) -> list[list[Class]]:
    """Class numbers, 0, 1, ... in order of appearance within each problem; None for a response that does not vote."""
    polls = [_Poll(ballot, by_reference=isinstance(grader, ExactGrader | MathGrader)) for ballot in ballots]
    if isinstance(grader, MathGrader):
        asked = [(poll, pair) for poll in polls for pair in poll.open_pairs()]
        # Math-Verify's grading is a comparison with a reference; here one answer stands in the reference's place.
        verdicts = grader.grade([(Problem("", a, poll.ballot.problem.id), _boxed(b)) for poll, (a, b) in asked])
        for (poll, pair), verdict in zip(asked, verdicts, strict=True):
            if verdict.correct:
                poll.join(*pair)
    return [poll.numbers() for poll in polls]


class _Poll:
    """The different spellings in one problem's answers, joined into classes (a union-find over their normal forms)."""

    def __init__(self, ballot: Ballot, by_reference: bool) -> None:
        self.ballot = ballot
        self._forms = [None if a is None else normalise(a) for a in ballot.answers]
        self._parent: dict[str, str] = {}
        self._right: dict[str, bool] = {}
        self._hopeless: set[str] = set()  # grading it has hung or crashed once already
        for form, correct, failed in zip(self._forms, ballot.correct, ballot.failed, strict=True):
            if form is None:
                continue
            self._parent.setdefault(form, form)
            self._right[form] = self._right.get(form, False) or correct
            if failed:
                self._hopeless.add(form)
        self._one_reference = by_reference and len(references(ballot.problem.answer)) == 1
        if self._one_reference:
            right = [form for form, is_right in self._right.items() if is_right]
            for form in right[1:]:
                self.join(right[0], form)
        for a, b in combinations(self._parent, 2):
            if same(a, b) and same(b, a):  # a whole number is equal to less in one order than in the other
                self.join(a, b)

    def join(self, a: str, b: str) -> None:
        self._parent[self._root(b)] = self._root(a)

    def _root(self, form: str) -> str:
        while self._parent[form] != form:
            form = self._parent[form]
        return form

    def open_pairs(self) -> list[Pair]:
        """One spelling of each class against one of each other class, where only algebra can tell."""
        forms = [f for f in self._parent if self._root(f) == f and f not in self._hopeless and _comparable(f)]
        return [(a, b) for a, b in combinations(forms, 2) if same(a, b) is None and not self._settled(a, b)]

    def _settled(self, a: str, b: str) -> bool:
        """Whether the reference tells them apart: by it one is right and the other wrong."""
        return self._one_reference and self._right[a] != self._right[b]

    def numbers(self) -> list[Class]:
        seen: dict[str, int] = {}
        return [None if f is None else seen.setdefault(self._root(f), len(seen)) for f in self._forms]


def _comparable(answer: str) -> bool:
    """Whether an answer can stand where a reference does, and be compared in good time."""
    return len(answer) <= LONGEST_ANSWER and not any(mark in answer for mark in (ALTERNATIVES.strip(), "####", "boxed"))


def _boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"
