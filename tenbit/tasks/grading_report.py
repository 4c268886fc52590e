r"""What the `math` grader makes of the shipped reference answers: ``python -m tenbit.tasks.grading_report``.

Three questions for each answer. Written as ``\boxed{answer}``, is it correct against itself? Is a different one
wrong: the answer of a later row, and this one with its first digit changed? And does Math-Verify understand it, or is
it compared as text alone, so that only its own spelling counts? Prints the table that `docs/data.md` holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tenbit.tasks.answers import normalise, numeral, references, same
from tenbit.tasks.datasets import load_problems, shipped
from tenbit.tasks.grading import MathGrader
from tenbit.tasks.worker_pool import Pool
from tenbit.types import Problem


@dataclass(frozen=True)
class Examined:
    r"""One set. `self_wrong`: ids of problems of which some accepted answer is wrong against itself. `other_right` and
    `altered_right`: (id, reference, different answer that is taken for it). `text_only`: (id, reference) that
    Math-Verify cannot read."""

    name: str
    rows: int
    self_wrong: tuple[str, ...]
    other_right: tuple[tuple[str, str, str], ...]
    altered_right: tuple[tuple[str, str, str], ...]
    text_only: tuple[tuple[str, str], ...]


def boxed(answer: str) -> str:
    return rf"The answer is \boxed{{{answer}}}."


def altered(answer: str) -> str | None:
    """The answer with its first digit changed, so that it is another one; None where it has no digit."""
    for place, sign in enumerate(answer):
        if sign in "0123456789":
            return f"{answer[:place]}{(int(sign) + 1) % 10}{answer[place + 1 :]}"
    return None


def different(problems: Sequence[Problem], index: int) -> str | None:
    """The first accepted answer of the next row that accepts nothing that this row does; None if there is none."""
    mine = {_identity(r) for r in references(problems[index].answer)}
    for step in range(1, len(problems)):
        theirs = references(problems[(index + step) % len(problems)].answer)
        if not mine & {_identity(r) for r in theirs}:
            return theirs[0]
    return None


def _identity(answer: str) -> str:
    value = numeral(normalise(answer))
    return normalise(answer) if value is None else str(value.normalize())


def examine(name: str, grader: MathGrader, pool: Pool, every: int = 1) -> Examined:
    """Asks the three questions of a shipped set. `pool` is one of Math-Verify's workers, asked without our own rules.

    Of the different answers that only Math-Verify can tell apart, one in `every` is tried: the rest cost nothing.
    """
    problems = load_problems(name)
    pairs = [(problem, reference) for problem in problems for reference in references(problem.answer)]
    own = grader.grade([(replace(p, answer=r), boxed(r)) for p, r in pairs])
    others = [(p, said) for i, p in enumerate(problems) if (said := different(problems, i)) is not None]
    changed = [(replace(p, answer=r), said) for p, r in pairs if (said := altered(r)) is not None]
    symbolic = [(p, r) for p, r in pairs if numeral(normalise(r)) is None]
    read = pool.run([{"reference": r} for _, r in symbolic])

    def taken(asked: list[tuple[Problem, str]]) -> tuple[tuple[str, str, str], ...]:
        told = [all(same(r, said) is not None for r in references(p.answer)) for p, said in asked]
        hard = [i for i, plain in enumerate(told) if not plain][::every]
        chosen = [asked[i] for i in sorted({*hard, *(i for i, plain in enumerate(told) if plain)})]
        grades = grader.grade([(problem, boxed(said)) for problem, said in chosen])
        return tuple((p.id, p.answer, said) for (p, said), g in zip(chosen, grades, strict=True) if g.correct)

    return Examined(
        name,
        len(problems),
        tuple(dict.fromkeys(p.id for (p, _), g in zip(pairs, own, strict=True) if not g.correct)),
        taken(others),
        taken(changed),
        tuple((p.id, r) for (p, r), o in zip(symbolic, read, strict=True) if not (o.reply or {}).get("reward")),
    )


def table(results: Sequence[Examined]) -> str:
    """The Markdown table of `docs/data.md`."""
    head = (
        "| set | rows | wrong against itself | correct against another row's | correct with a digit changed "
        "| compared as text alone |\n|---|---|---|---|---|---|"
    )
    rows = [
        f"| `{r.name}` | {r.rows:,} | {len(r.self_wrong)} | {len(r.other_right)} | {len(r.altered_right)} "
        f"| {len(r.text_only)} |"
        for r in results
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tenbit.tasks.grading_report", description=__doc__)
    parser.add_argument("sets", nargs="*", help="shipped sets; all of them by default")
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    with MathGrader(workers=chosen.workers) as grader:
        pool = Pool({"grader": "math"}, chosen.workers, 5.0)
        results = [examine(name, grader, pool) for name in chosen.sets or shipped()]
        pool.close()
    print(table(results))
    for result in results:
        print(f"\n{result.name}")
        for problem_id in result.self_wrong:
            print(f"  wrong against itself: {problem_id}")
        for problem_id, reference, said in result.other_right + result.altered_right:
            print(f"  {problem_id}: {reference!r} accepts {said!r}")
        for problem_id, reference in result.text_only:
            print(f"  as text alone: {problem_id}: {reference!r}")


if __name__ == "__main__":
    main()
