"""The loss scale S of FP16 training: its rules, and S as a run moves it (section 3.2 of arXiv 2510.26788).

scale = Scale(LossScale(initial=65536, limit=2**20))
(loss * scale.value).backward();  scale.update(skipped=norm is not finite)
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST_SCALE = 2.0**127  # the loss and its scale are FP32


class LossScale(BaseModel):
    """Dynamic loss scaling: lowered at once on an overflow, raised after `interval` clean steps, up to `limit`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    initial: float = Field(65536.0, ge=1.0)
    growth: float = Field(2.0, gt=1.0)
    backoff: float = Field(0.5, gt=0.0, lt=1.0)
    interval: int = Field(2000, ge=1)
    limit: float | None = Field(None, ge=1.0, le=LARGEST_SCALE)

    @model_validator(mode="after")
    def _within(self) -> LossScale:
        if self.limit is not None and self.initial > self.limit:
            raise ValueError(
                f"precision.loss_scale.initial = {self.initial:g} is above precision.loss_scale.limit = "
                f"{self.limit:g}. Lower the one or raise the other"
            )
        return self

    def __str__(self) -> str:
        rules = f"{self.initial:g}, ×{self.growth:g} after {self.interval}, ×{self.backoff:g} on overflow"
        return rules if self.limit is None else f"{rules}, at most {self.limit:g}"


class Scale:
    """S by the rules that `torch.amp.GradScaler` has too; without rules it is 1 and stays 1.

    It is given a step's outcome and looks at no gradient: that one overflowed on any rank shows in their common norm,
    which every step needs anyway, so agreeing on it costs nothing and all ranks move alike.
    """

    def __init__(self, rules: LossScale | None) -> None:
        self._rules = rules
        self.value, self.clean_steps = (rules.initial if rules else 1.0), 0

    @property
    def moves(self) -> bool:
        return self._rules is not None

    def update(self, skipped: bool) -> None:
        """Lowered at once when a step was skipped, raised after `interval` that were not."""
        if self._rules is None:
            return
        self.clean_steps = 0 if skipped else self.clean_steps + 1
        if skipped:
            self.value *= self._rules.backoff
        elif self.clean_steps == self._rules.interval:
            # a resumed scale may be above a limit that was lowered since: it is kept, not cut
            raised = min(self.value * self._rules.growth, self._rules.limit or LARGEST_SCALE)
            self.value, self.clean_steps = max(self.value, raised), 0

    def restore(self, value: float, clean_steps: int) -> None:
        """As a checkpoint kept it."""
        if self._rules is not None:
            self.value, self.clean_steps = value, clean_steps
