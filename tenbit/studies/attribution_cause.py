"""A cause of the gap, as a value, and the case that is being investigated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tenbit.studies.attribution_bench import Bench, Bootstrap, Gap, Ids, gap
from tenbit.types import Overflow


@dataclass(frozen=True)
class Cause:
    """One switch: KL per token before and after it, and what it takes off in units of the whole gap.

    `share` is None where the cause could not be measured or shows no sign of being there; `note` says why. `numbers`
    holds what else was measured, in words.
    """

    name: str
    what: str
    remedy: str
    kl_before: float | None = None
    kl_after: float | None = None
    share: float | None = None
    interval: tuple[float, float] | None = None
    note: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """The samples: the record, and pi of the same tokens as far as the record's own errors are cleared up.

    `total` is the gap as it came.
    """

    bench: Bench
    sequences: Sequence[Ids]
    recorded: Sequence[Tensor]
    trained: Sequence[Tensor]
    bootstrap: Bootstrap
    total: Gap

    def against(self, pi: Sequence[Tensor]) -> Gap:
        """The record against another pi."""
        return gap(self.recorded, pi, self.bootstrap)


def switched(
    name: str,
    what: str,
    remedy: str,
    before: Gap,
    after: Gap,
    share: Gap,
    note: str = "",
    numbers: Mapping[str, float] | None = None,
) -> Cause:
    return Cause(name, what, remedy, before.value, after.value, share.value, share.interval, note, dict(numbers or {}))


def part(before: Gap, after: Gap, total: Gap) -> Gap:
    """The share of the total that a switch on the recorded tokens takes off.

    An earlier switch may have made the gap larger than it came; then a share is one of that larger gap, for nothing
    takes off more than there is.
    """
    return (before - after).over(before.larger(total))


def scaled(before: Gap, after: Gap, genuine: Gap, total: Gap) -> Gap:
    """The same for a switch on the control's tokens: its effect there, times what a genuine record has of the total."""
    return (before - after).over(before) * genuine.over(genuine.larger(total))


def attempt(name: str, what: str, remedy: str, measure: Callable[[], Cause]) -> Cause:
    """A cause that may not be measurable here (no memory for FP32, an overflow, an engine that cannot)."""
    try:
        return measure()
    except (ValueError, Overflow, NotImplementedError) as error:
        return Cause(name, what, remedy, note=f"not measured: {str(error).splitlines()[0] if str(error) else error!r}")
