r"""Grading: whether a response is right, and the reward it earns. Nothing a model writes can stop a run.

    with open_grader("math") as grader:
        grades = grader.grade([(problem, text), ...])       one Grade each, in order
        grader.failures                                     Counter({"timeout": 3}): what went wrong so far

Three kinds, by name:

    exact             the last \boxed{...} against the answer, as normalised text or numeral; in this process
    math              the same where that settles it, Math-Verify (sympy) where it does not; in worker processes
    module:function   your own `function(problem, text) -> reward`; in worker processes

Math-Verify runs a parser and an algebra system on what a model wrote, and a user's function may do anything. So
both run in processes that can be killed, each item under a wall-clock limit that needs no signal and works in any
thread. An item that hangs, crashes its worker or raises is a wrong answer with `failed_reward`, is counted by kind
("timeout", "crash", "error") with the message kept in its grade, and the rest of the batch is graded all the same.
The one thing that does stop a run is a reward that is no finite number: that is a mistake in the function.
"""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from tenbit.closing import Closing
from tenbit.tasks.answers import final_answer, last_boxed, references, same
from tenbit.tasks.worker_pool import Outcome, Pool
from tenbit.types import Problem

CORRECT_ABOVE = 0.5  # a user's reward beyond this counts as a correct answer in accuracies

# Longer than this, a final answer is not handed to Math-Verify: no reference is, and sympy's time grows fast.
LONGEST_ANSWER = 1000

NAMES = ("exact", "math")
_HELP = "write 'exact', 'math', or your own function as 'module:function' (or 'file.py:function')"


@dataclass(frozen=True)
class Grade:
    """`reward` is what is optimised, `correct` what accuracy counts. `failure` is None, or the kind of failure and
    its message: ``timeout: ...``, ``crash: ...``, ``error: ...``."""

    reward: float
    correct: bool
    failure: str | None = None


class Grader(Protocol):
    """Grades responses. A context manager; `close` ends its processes. `failures` counts by kind."""

    failures: Counter[str]

    def grade(self, answered: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """One grade per (problem, response text), in order."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ExactGrader(Closing):
    r"""Right when the last closed ``\boxed{...}`` is an accepted answer, as normalised text or numeral."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()

    def grade(self, answered: Sequence[tuple[Problem, str]]) -> list[Grade]:
        return [_plain_grade(self._correct(problem, text)) for problem, text in answered]

    @staticmethod
    def _correct(problem: Problem, text: str) -> bool:
        boxed = last_boxed(text)
        return boxed is not None and any(same(reference, boxed) for reference in references(problem.answer))


class MathGrader(Closing):
    """Right when the response's `final_answer` is an accepted answer: equal as text, as a numeral, or to Math-Verify.

    Only what text cannot settle reaches a worker, and the same question only once per call.
    """

    def __init__(self, *, workers: int = 2, timeout: float = 5.0, failed_reward: float = 0.0) -> None:
        self.failures: Counter[str] = Counter()
        self._failed_reward = failed_reward
        self._pool = Pool({"grader": "math"}, workers, timeout)

    def grade(self, answered: Sequence[tuple[Problem, str]]) -> list[Grade]:
        questions: list[list[tuple[str, str]]] = []
        known: dict[tuple[str, str], Grade] = {}
        for problem, text in answered:
            candidate = final_answer(text)
            asked = [] if candidate is None else [(reference, candidate) for reference in references(problem.answer)]
            questions.append(asked)
            for pair in asked:
                if pair not in known:
                    verdict = same(*pair)
                    if verdict is None and len(pair[1]) > LONGEST_ANSWER:
                        verdict = False
                    if verdict is not None:
                        known[pair] = _plain_grade(verdict)
        # A response that is right by one reference needs no answer about the others.
        open_ = {
            pair: None
            for asked in questions
            if not any(pair in known and known[pair].correct for pair in asked)
            for pair in asked
            if pair not in known
        }
        outcomes = self._pool.run([{"reference": reference, "candidate": said} for reference, said in open_])
        for pair, outcome in zip(open_, outcomes, strict=True):
            known[pair] = self._grade_of(outcome)
        grades = [self._best([known[pair] for pair in asked if pair in known]) for asked in questions]
        self.failures.update(_kinds(grades))
        return grades

    def _grade_of(self, outcome: Outcome) -> Grade:
        failure = _failure(outcome)
        if failure is not None:
            return Grade(self._failed_reward, False, failure)
        assert outcome.reply is not None
        return _plain_grade(outcome.reply["reward"] > CORRECT_ABOVE)

    @staticmethod
    def _best(grades: list[Grade]) -> Grade:
        """Correct by any reference; a failure only where nothing was found correct."""
        order = sorted(grades, key=lambda g: (not g.correct, g.failure is None))
        return order[0] if order else _plain_grade(False)

    def close(self) -> None:
        self._pool.close()


class FunctionGrader(Closing):
    """A user's ``module:function``, imported once per worker and called as ``function(problem, text)``.

    Raises ValueError when it cannot be imported, and when it returns something that is no finite number.
    """

    def __init__(self, name: str, *, workers: int = 2, timeout: float = 5.0, failed_reward: float = 0.0) -> None:
        self.failures: Counter[str] = Counter()
        self._name = name
        self._failed_reward = failed_reward
        self._pool = Pool({"grader": name, "path": sys.path}, workers, timeout)
        try:
            self._pool.check()
        except ValueError as error:
            self._pool.close()
            raise ValueError(
                f"grader {name!r} cannot be used: {error}. {_HELP.capitalize()}; a module must be importable from "
                "the folder that tenbit is started in."
            ) from error

    def grade(self, answered: Sequence[tuple[Problem, str]]) -> list[Grade]:
        requests: list[dict[str, Any]] = [
            {"prompt": problem.prompt, "answer": problem.answer, "id": problem.id, "text": text}
            for problem, text in answered
        ]
        outcomes = self._pool.run(requests)
        grades = [self._grade_of(problem, outcome) for (problem, _), outcome in zip(answered, outcomes, strict=True)]
        self.failures.update(_kinds(grades))
        return grades

    def _grade_of(self, problem: Problem, outcome: Outcome) -> Grade:
        failure = _failure(outcome)
        if failure is not None:
            return Grade(self._failed_reward, False, failure)
        assert outcome.reply is not None
        if "invalid" in outcome.reply:
            raise ValueError(
                f"grader {self._name!r} returned {outcome.reply['invalid']} for problem {problem.id}: a reward must be "
                "a finite number. Return 0.0 for answers that it cannot judge, or raise an exception, which counts "
                "as a wrong answer."
            )
        reward = float(outcome.reply["reward"])
        return Grade(reward, reward > CORRECT_ABOVE)

    def close(self) -> None:
        self._pool.close()


def open_grader(
    name: str, *, workers: int = 2, timeout: float = 5.0, failed_reward: float = 0.0
) -> ExactGrader | MathGrader | FunctionGrader:
    """The grader of that name.

    `workers` processes at most, `timeout` seconds of wall clock for each item, `failed_reward` for items that
    hang, crash or raise: give it the lowest reward of a scale that goes below 0, or failing will pay.
    """
    if workers < 1:
        raise ValueError(f"grading: workers = {workers}, but at least 1 is needed")
    if not timeout > 0:
        raise ValueError(f"grading: timeout = {timeout} s leaves no time to grade; write a positive number of seconds")
    if name == "exact":
        return ExactGrader()
    if name == "math":
        return MathGrader(workers=workers, timeout=timeout, failed_reward=failed_reward)
    module, colon, function = name.rpartition(":")
    if not (module and colon and function):
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no grader {name!r}{hint}: {_HELP}")
    return FunctionGrader(name, workers=workers, timeout=timeout, failed_reward=failed_reward)


def _plain_grade(correct: bool) -> Grade:
    return Grade(1.0 if correct else 0.0, correct)


def _failure(outcome: Outcome) -> str | None:
    if outcome.reply is None:
        return f"{outcome.failure}: {outcome.message}"
    return f"error: {outcome.reply['error']}" if "error" in outcome.reply else None


def _kinds(grades: Sequence[Grade]) -> list[str]:
    return [grade.failure.partition(":")[0] for grade in grades if grade.failure is not None]
