"""Advantages: how much better a response was than the others to the same prompt.

The paper's Equation 8 subtracts the mean of the *other* G - 1 rewards (leave-one-out, as RLOO does); its
authors' published code subtracts the mean of all G. The two differ by the factor G / (G - 1) and nothing else.
Both are here, leave-one-out is the default, and a run says which one it uses. GRPO's original, DAPO and GSPO
also divide by the group's standard deviation. `reward` is Equation 3 as printed: no baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-6  # added to the standard deviation, as verl and DAPO's code do


@dataclass(frozen=True)
class Advantage:
    """A baseline, and whether to divide by the group's (unbiased) standard deviation."""

    baseline: Literal["others", "group", "none"] = "others"
    divide_by_std: bool = False

    def __call__(self, rewards: Tensor) -> Tensor:
        """[G] rewards of one prompt's responses -> [G] advantages, float64.

        Every response of the group counts in the baseline, also one that a correction will reject later.
        Raises ValueError for a group of one, which has no others to compare with.
        """
        r = rewards.double()
        if self.baseline == "none":
            return r
        g = r.numel()
        if g < 2:
            raise ValueError("rollout.samples: a group baseline needs at least 2 responses per prompt")
        centred = r - r.mean()
        if self.baseline == "others":
            centred = centred * (g / (g - 1))  # R_i - mean of the others
        if self.divide_by_std:
            centred = centred / (r.std() + STD_FLOOR)
        # equal rewards teach nothing; without this, rounding in the mean would
        return torch.where((r == r[0]).all(), torch.zeros_like(r), centred)


ADVANTAGES: dict[str, Advantage] = {
    "leave-one-out": Advantage("others"),
    "leave-one-out-std": Advantage("others", divide_by_std=True),
    "group-mean": Advantage("group"),
    "group-mean-std": Advantage("group", divide_by_std=True),
    "reward": Advantage("none"),
}
