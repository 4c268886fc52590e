r"""The built-in task: multi-step integer arithmetic, one operation a line.

A problem is a chain of operations on one running value, with parentheses only where precedence needs them; a
solution rewrites the expression with its first operation done, until one number is left, and boxes that:

    ((17+25)*2-53)*3+4         the problem
    (42*2-53)*3+4              its solution ...
    (84-53)*3+4
    31*3+4
    93+4
    97
    \boxed{97}

Every line of a right solution has the same value, so the first line whose value differs is where it went wrong:
`first_wrong_line` finds it. The answer alone is graded, by exact match of the last ``\boxed{}``.

    rng = random.Random(1)
    chain = generate(rng)                       # a Chain
    chain.expression, chain.value               # '((17+25)*2-53)*3+4', 97
    solution(chain)                             # the text above
    solution(chain, rng, mistake=0.1)           # the same by a hand that slips (see tenbit.models.pretrain)
    load("arithmetic")                          # the shipped problems: arithmetic, _test, _perfectible

All values stay in 0..99, so operands of + and - are in 1..99, and factors in 2..9. `python -m tenbit.tasks.arithmetic`
writes the two problem sets, `arithmetic.jsonl` and the held-out `arithmetic_test.jsonl`, from their fixed seed.
"""

from __future__ import annotations

import ast
import functools
import json
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tenbit.types import Problem

DATA = Path(__file__).parent / "data"
TEMPLATE = "{problem}\n"
"""How a problem becomes a prompt: the expression and a newline, nothing else."""

LARGEST = 99
OPERATIONS = range(5, 13)
WEIGHTS = (8, 9, 8, 6, 4, 3, 2, 1)
"""How often a problem has 5, 6, ... operations. Long ones are rare: response lengths get a long tail."""
LENGTHS = range(60, 301)
"""Tokens of a solution with its end-of-sequence token, one token a character."""

SEED = 2510
SIZES = {"arithmetic": 512, "arithmetic_test": 256}

_APPLY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Chain:
    """`first`, then operations applied to it one after the other: ``Chain(17, (("+", 25), ("*", 2)))``."""

    first: int
    rest: tuple[tuple[str, int], ...]

    @property
    def expression(self) -> str:
        text, additive = str(self.first), False
        for op, operand in self.rest:
            if op == "*" and additive:
                text = f"({text})"
            text += f"{op}{operand}"
            additive = op != "*"
        return text

    @property
    def values(self) -> list[int]:
        """The running value after each operation."""
        values, value = [], self.first
        for op, operand in self.rest:
            value = _APPLY[op](value, operand)
            values.append(value)
        return values

    @property
    def value(self) -> int:
        return self.values[-1] if self.rest else self.first

    @classmethod
    def parse(cls, expression: str) -> Chain:
        """The chain that is written as `expression`. ValueError if none is."""
        numbers = re.findall(r"([-+*]?)(\d+)", expression.strip())
        if numbers and not numbers[0][0]:
            chain = cls(int(numbers[0][1]), tuple((op, int(n)) for op, n in numbers[1:]))
            if chain.expression == expression.strip():
                return chain
        raise ValueError(
            f"{expression!r} is not an arithmetic problem of this task: write a chain of + - * on one running value, "
            "with parentheses only where precedence needs them, as ((17+25)*2-53)*3"
        )


def generate(rng: random.Random) -> Chain:
    """A random problem whose solution has a length in `LENGTHS`; a function of the generator's state alone."""
    while True:
        chain = draw(rng, rng.choices(OPERATIONS, WEIGHTS)[0])
        if len(solution(chain)) + 1 in LENGTHS:
            return chain


def draw(rng: random.Random, operations: int) -> Chain:
    """A random chain of so many operations, of any length."""
    value = first = rng.randint(1, 99)
    rest: list[tuple[str, int]] = []
    for _ in range(operations):
        ops = ["+"] * (value < LARGEST) + ["-"] * (value > 0)
        # Products only with room to spare, so that values do not pile up at either end.
        ops += ["*"] * (0 < value <= LARGEST // 2)
        op = rng.choice(ops)
        most = {"+": min(99, LARGEST - value), "-": min(99, value), "*": min(9, LARGEST // max(value, 1))}[op]
        operand = rng.randint(2 if op == "*" else 1, most)
        rest.append((op, operand))
        value = _APPLY[op](value, operand)
    return Chain(first, tuple(rest))


def solution(chain: Chain, rng: random.Random | None = None, mistake: float = 0.0) -> str:
    r"""The worked solution, ``\boxed{}`` last, without the end-of-sequence token.

    With probability `mistake` an operation's result is written with one digit off by one, and the solution
    carries on from it consistently. Slips that would drive a later value out of 0..99 are not made.
    """
    lines: list[str] = []
    while chain.rest:
        (op, operand), rest = chain.rest[0], chain.rest[1:]
        chain = Chain(_APPLY[op](chain.first, operand), rest)
        if rng is not None and rng.random() < mistake:
            chain = _slip(chain, rng)
        lines.append(chain.expression)
    return "\n".join([*lines, f"\\boxed{{{chain.first}}}"])


def _slip(chain: Chain, rng: random.Random) -> Chain:
    """`chain` with one digit of its first number off by one; unchanged if every such slip leaves the range."""
    places = range(len(str(chain.first)))
    slips = [Chain(chain.first + sign * 10**place, chain.rest) for place in places for sign in (-1, 1)]
    possible = [s for s in slips if all(0 <= v <= LARGEST for v in (s.first, *s.values))]
    return rng.choice(possible) if possible else chain


def evaluate(expression: str) -> int | None:
    """The value of an expression of integers, + - * and parentheses; None if it is not one."""

    def value(node: ast.AST) -> int:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int(n)):
                return n
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise SyntaxError

    try:
        return value(ast.parse(expression.strip(), mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # a model wrote it: anything may be in there


def is_correct(problem: Problem, response: str) -> bool:
    r"""Whether the last ``\boxed{}`` of the response holds the answer."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", response)
    return bool(boxes) and boxes[-1].strip() == problem.answer


def first_wrong_line(expression: str, response: str) -> int | None:
    """The first line of a response, counted from 1, whose value is not the problem's; None if all are right.

    A line that is no expression counts as wrong, and so does a missing box (one line past the end).
    """
    right = evaluate(expression)
    lines = response.strip().split("\n")
    for number, line in enumerate(lines, 1):
        boxed = re.fullmatch(r"\\boxed\{(-?\d+)\}", line.strip())
        if evaluate(boxed.group(1) if boxed else line) != right:
            return number
        if boxed:
            return None
    return len(lines) + 1


def problem_sets() -> dict[str, list[Chain]]:
    """The problems of `SIZES` from the fixed seed; no two have the same expression."""
    rng, seen = random.Random(SEED), set[str]()
    sets: dict[str, list[Chain]] = {}
    for name, size in SIZES.items():
        sets[name] = []
        while len(sets[name]) < size:
            chain = generate(rng)
            if chain.expression not in seen:
                seen.add(chain.expression)
                sets[name].append(chain)
    return sets


def is_held_out(chain: Chain) -> bool:
    """Whether the chain is one of the shipped problems, which no pre-training may see."""
    return chain.expression in _shipped()


@functools.cache
def _shipped() -> frozenset[str]:
    return frozenset(chain.expression for chains in problem_sets().values() for chain in chains)


def load(name: str) -> list[Problem]:
    """The rows of ``tasks/data/{name}.jsonl``."""
    path = DATA / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Problem(row["problem"], row["answer"], f"{path.name}:{i}") for i, row in enumerate(rows, 1)]


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, chains in problem_sets().items():
        path = DATA / f"{name}.jsonl"
        rows = (json.dumps({"problem": c.expression, "answer": str(c.value)}) for c in chains)
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(chains)} problems")


if __name__ == "__main__":
    main()
