"""A grader that fails on most of what it is given: found while sampling, and said, instead of scored as wrong answers.

    gradings = Gradings("file.py:reward", problems=500)
    gradings = gradings.chunk()                      before each chunk
    gradings.hear([("p1", None), ("p2", "error: ZeroDivisionError: ...")])        raises ValueError once most failed

One response that hangs a grader, or one problem whose answer it cannot read, must not stop a study; so it takes two
problems at least, where there are two, and more than half of the gradings of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Gradings:
    """The gradings of a chunk, and of the chunk of a single problem before it. `problems` are all there are."""

    grader: str
    problems: int
    _failures: list[tuple[str, str | None]] = field(default_factory=list)

    def chunk(self) -> Gradings:
        """For the next chunk. A grader may break at any time: what went well long ago says nothing about it."""
        one = len({problem for problem, _ in self._failures}) == 1
        return Gradings(self.grader, self.problems, self._failures if one else [])

    def hear(self, failures: Iterable[tuple[str, str | None]]) -> None:
        """A problem's id and what went wrong, or None, for each graded response. Raises ValueError if most failed."""
        self._failures += failures
        failed = [failure for _, failure in self._failures if failure is not None]
        tried = {problem for problem, _ in self._failures}
        if 2 * len(failed) > len(self._failures) and len(tried) >= min(2, self.problems):
            slow = " or raise task.grade_timeout" if failed[0].startswith("timeout") else ""
            raise ValueError(
                f"--grader {self.grader}: {len(failed):,} of {len(self._failures):,} gradings failed, the first one "
                f"with {failed[0]!r}. They would count as wrong answers. Mend the grader{slow}, then go on with "
                "--resume"
            )
