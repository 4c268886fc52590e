"""`[lora]` of a recipe: low-rank adapters beside frozen weights, and what the sampler computes with. See docs/lora.md.

W x + (alpha / rank) B A x        W frozen, A [rank, in] and B [out, rank] trained
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ALL_LINEAR = "all-linear"


class LoraSpec(BaseModel):
    """Low-rank adapters. There is no dropout: the sampler has none, so it would be another policy."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(32, ge=1, le=512)
    alpha: float = Field(64.0, gt=0, description="the product of the two factors is multiplied by alpha / rank")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        ALL_LINEAR, description="'all-linear', or ends of layers' names, such as q_proj; never the head"
    )
    rollout: Literal["merged", "adapter"] = Field(
        "merged",
        description="the engine's weights: merged afresh from FP32 at every update, or the base and the adapter apart",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _some(cls, value: object) -> object:
        if isinstance(value, str) and value != ALL_LINEAR:
            raise ValueError(f"lora.targets = {value!r}: write '{ALL_LINEAR}', or a list of names: [{value!r}]")
        if isinstance(value, list | tuple) and not value:
            raise ValueError(f"lora.targets = []: nothing would be trained. Write '{ALL_LINEAR}', or names of layers")
        return value

    @property
    def scaling(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def refuse(self, engine: str, tensor: object = 1, rounded: bool = False) -> None:
        """Raises ValueError where an engine of this kind, alone or in a pool, cannot sample from the adapter itself.

        `tensor` is vLLM's tensor parallelism; `rounded`: the plan rounds weights before they are rolled out.
        """
        if self.rollout == "merged":
            return
        why, remedy = "lora.rollout = 'adapter'", "Set lora.rollout = 'merged'"
        if rounded:
            raise ValueError(f"{why}: precision rounds what is rolled out, and that has to be whole weights. {remedy}")
        if engine == "torch":
            return
        if math.frexp(self.scaling)[0] != 0.5:
            raise ValueError(
                f"{why}: vLLM multiplies B by lora.alpha / lora.rank = {self.scaling:g} in 16 bits, which is exact for "
                f"powers of two only. Choose lora.alpha so. Or: {remedy}"
            )
        if tensor != 1:
            raise ValueError(
                f"{why}: with rollout.vllm.options.tensor_parallel_size = {tensor} vLLM holds parts of the adapter, "
                f"which cannot be held against what was sent. {remedy}"
            )
