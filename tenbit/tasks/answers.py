r"""Final answers as text: where a response states one, and when two of them are plainly the same.

    final_answer(response)          what stands in the last \boxed{...}, or the other two forms below
    references(problem.answer)      the answers a problem accepts
    same(reference, candidate)      True, False, or None where only a computer-algebra system can tell

Nothing here can hang: every function is linear in the length of its text, so it runs in the caller's own process
on whatever a model wrote. `same` settles numerals exactly and equal spellings at once; the rest is Math-Verify's
(`tenbit.tasks.grading`).

A problem with several accepted answers holds them in one text, joined by `ALTERNATIVES`.
"""

from __future__ import annotations

import re
from decimal import Decimal

ALTERNATIVES = " ||| "

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(
    r"^[ \t*#>-]{0,16}(?:final )?answer[ \t*]{0,8}:[ \t*]{0,8}(\S[^\n]*)$", re.IGNORECASE | re.MULTILINE
)


def last_boxed(text: str) -> str | None:
    r"""What stands inside the last ``\boxed{...}`` (or ``\fbox``) that is closed; None where there is none.

    One pass with a stack, so text full of boxes that never close costs no more than any other. Escaped braces
    (``\{``) are characters of the answer and count as nothing.
    """
    stack: list[tuple[int, int] | None] = []
    best: tuple[int, int, int] | None = None
    for token in _BOX_OR_BRACE.finditer(text):
        found = token.group()
        if found == "}":
            opened = stack.pop() if stack else None
            if opened is not None and (best is None or opened[0] > best[0]):
                best = (*opened, token.start())
        elif found == "{":
            stack.append(None)
        elif found.endswith("{") and len(found) > 2:
            stack.append((token.start(), token.end()))
    return None if best is None else text[best[1] : best[2]].strip()


def final_answer(response: str) -> str | None:
    r"""The answer that a response states, or None.

    Thoughts are not answers: what comes before the last ``</think>`` is dropped. In the rest the last closed
    ``\boxed{...}`` counts; without one the last ``<answer>...</answer>``; without that the last line that reads
    ``Answer: ...``. A number somewhere in the text is nobody's answer.
    """
    said = response.rpartition("</think>")[2]
    boxed = last_boxed(said)
    if boxed is not None:
        return boxed
    before, closed, _ = said.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if opened and closed:
        return tagged.strip()
    lines = _ANSWER_LINE.findall(said)
    return lines[-1].strip().strip("*").strip() if lines else None


def references(answer: str) -> tuple[str, ...]:
    r"""The accepted answers of a problem: split at `ALTERNATIVES`, each reduced to its final answer.

    A whole solution may stand as the answer: of MATH's the ``\boxed{...}`` counts, of GSM8K's what follows ``####``.
    """
    reduced = []
    for part in answer.split(ALTERNATIVES):
        boxed = last_boxed(part) if "boxed" in part else None
        reduced.append((boxed if boxed is not None else part.rpartition("####")[2]).strip())
    return tuple(reduced)


_WRAPPED = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![a-zA-Z])")
_SPACES = re.compile(r"\\(?:[,;:> ]|q?quad(?![a-zA-Z]))|~")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|\\circ\b")
_DOLLAR = re.compile(r"\\?\$")
_LOOSE_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?")
_CHOICE = re.compile(r"\(([A-Za-z])\)")


def normalise(answer: str) -> str:
    r"""One spelling for what differs only in typesetting: spaces, ``$``, ``\left``, ``\dfrac``, ``\text``, commas of
    thousands, a full stop at the end. Two answers of the same normal form are the same answer."""
    text = _DOLLAR.sub("", answer)
    text = text.replace(r"\!", "").replace("{,}", ",").replace("−", "-")
    text = _SPACES.sub(" ", _SIZES.sub("", text))
    text = _WRAPPED.sub(r" \1 ", text)
    text = _DEGREES.sub("°", _FRACTIONS.sub(r"\\frac", text))
    text = text.replace(r"\%", "%").strip()
    if not text.endswith("..."):
        text = text.rstrip(".").rstrip()
    text = _LOOSE_SPACE.sub("", text)  # "1 1/2" keeps its space: it is not 11/2
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    choice = _CHOICE.fullmatch(text)
    return choice.group(1) if choice else text


_DECIMAL = r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
_PLAIN = re.compile(_DECIMAL)
_SCIENTIFIC = re.compile(
    rf"({_DECIMAL})[eE]([+-]?\d{{1,4}})"
    rf"|(?:({_DECIMAL})(?:\\times|\\cdot|×|\*))?([+-]?)10\^(?:\{{([+-]?\d{{1,4}})\}}|([+-]?\d))"
)


def numeral(normal: str) -> Decimal | None:
    r"""The value of a normal form that is one numeral: ``25``, ``025``, ``.5``, ``4.5e33``, ``7 \times 10^{-3}``."""
    if _PLAIN.fullmatch(normal):
        return Decimal(normal)
    found = _SCIENTIFIC.fullmatch(normal)
    if found is None:
        return None
    coefficient, exponent, factor, sign, braced, digit = found.groups()
    if coefficient is not None:
        return Decimal(coefficient).scaleb(int(exponent))
    if factor is not None and sign:
        return None
    return Decimal(factor or f"{sign}1").scaleb(int(braced or digit))


# Between two decimals that are not both whole: what rounding in the sixth significant digit explains.
_TOLERANCE = Decimal("1e-6")


def same(reference: str, candidate: str) -> bool | None:
    """Whether two answers are the same, as far as their text tells: None where algebra would have to decide.

    Numerals are decided here: a whole number only by the same number, others to one part in a million, so
    that 0.333333 and 0.3333333 agree and 3.61e-10 and 3.62e-10 do not.
    """
    left, right = normalise(reference), normalise(candidate)
    if left == right:
        return bool(left)
    a, b = numeral(left), numeral(right)
    if a is None or b is None:
        return None if right else False
    if a == b or (_PLAIN.fullmatch(left) is not None and a == a.to_integral_value()):
        return a == b
    return abs(a - b) <= _TOLERANCE * max(abs(a), abs(b))
