"""Precision is one value. Every dtype of a run, on both sides, is derived from it, here and nowhere else.

    Precision.parse("fp16")           training and rollout in FP16, FP32 master weights, dynamic loss scaling
    Precision.parse("bf16/fp32")      training / rollout, as in the paper's ablation (section 4.4, Figure 5)
    Precision.parse({"preset": "fp16", "casting": "autocast"})      the table form reaches the parts

A plan that could disagree with itself (an export in another format than was rolled out, 16-bit logits, FP16
without loss scaling) is refused when it is made. `rows` prints it, `verify` holds it against live tensors.
Formats are Table 1 of arXiv 2510.26788; the loss scale's rules are its section 3.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor


class Format(StrEnum):
    """A floating-point format. All its numbers follow from two bit counts (Table 1)."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"

    @property
    def exponent_bits(self) -> int:
        return {"fp16": 5, "bf16": 8, "fp32": 8}[self.value]

    @property
    def mantissa_bits(self) -> int:
        return {"fp16": 10, "bf16": 7, "fp32": 23}[self.value]

    @property
    def bytes(self) -> int:
        return (1 + self.exponent_bits + self.mantissa_bits) // 8

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger number."""
        return 2.0**-self.mantissa_bits

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (2 - 2 ** (self.exponent_bits - 1))

    @property
    def smallest_subnormal(self) -> float:
        return self.smallest_normal * self.epsilon

    @property
    def largest(self) -> float:
        return (2.0 - self.epsilon) * 2.0 ** (2 ** (self.exponent_bits - 1) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.value]

    @classmethod
    def of(cls, dtype: torch.dtype) -> Format:
        return next(f for f in cls if f.dtype == dtype)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


LARGEST_SCALE = 2.0**127  # the loss and its scale are FP32


class LossScale(_Value):
    """Dynamic loss scaling (section 3.2): lowered at once on an overflow, raised after `interval` clean steps."""

    initial: float = Field(65536.0, ge=1.0)
    growth: float = Field(2.0, gt=1.0)
    backoff: float = Field(0.5, gt=0.0, lt=1.0)
    interval: int = Field(2000, ge=1)


class Scale:
    """The loss scale S as a run moves it, by the rules that `torch.amp.GradScaler` has too.

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
            self.value, self.clean_steps = min(self.value * self._rules.growth, LARGEST_SCALE), 0

    def restore(self, value: float, clean_steps: int) -> None:
        """As a checkpoint kept it."""
        if self._rules is not None:
            self.value, self.clean_steps = value, clean_steps


_PRESET_HELP = "write 'fp16', 'bf16', 'fp32', a training/rollout pair such as 'bf16/fp32', or a table with a 'preset'"


class Precision(_Value):
    """The plan. Every key may be set in a recipe's `[precision]` table; what is not set follows from the preset."""

    master: Format = Field(Format.FP32, description="the weights that the optimiser updates")
    optimizer: Format = Field(Format.FP32, description="AdamW's moments")
    compute: Format = Field(description="forward and backward in training")
    casting: Literal["whole", "autocast"] = Field(
        "whole", description="16-bit compute by a copy of the weights, or by autocast over the masters"
    )
    reduce: Format = Field(Format.FP32, description="gradients, as they add up over micro-batches and ranks")
    head: Literal["model", "fp32"] = Field(
        "model", description="the output head's product: in the format of its side, or FP32 on both sides"
    )
    logits: Format = Field(Format.FP32, description="what log-softmax is taken of")
    rollout: Format = Field(description="weights, cache and compute of the engine")
    rollout_bits: int | None = Field(
        None, ge=1, description="weights are rounded to so many mantissa bits before they are rolled out; for studies"
    )
    sync: Format = Field(description="weights on their way to the engine")
    export: Format = Field(description="the model folder a run ends with")
    loss_scale: LossScale | None = Field(None, description="for FP16 gradients only")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, value: Any) -> Any:
        """Turns a preset or a table with gaps into the full plan."""
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict):
            return value
        plan = dict(value)
        preset = plan.pop("preset", None)
        if preset is not None:
            train, _, rollout = str(preset).partition("/")
            rollout, coarse, bits = rollout.partition("~")
            if coarse:
                plan.setdefault("rollout_bits", bits)
            known = [f.value for f in Format]
            for part in (train, rollout or train):
                if part not in known:
                    raise ValueError(f"precision {preset!r}: there is no format {part!r}; {_PRESET_HELP}")
            plan.setdefault("compute", train)
            plan.setdefault("rollout", rollout or train)
        if "compute" not in plan or "rollout" not in plan:
            raise ValueError(f"precision: a table needs 'preset', or both 'compute' and 'rollout'; {_PRESET_HELP}")
        plan.setdefault("sync", plan["rollout"])
        plan.setdefault("export", plan["rollout"])
        if plan["compute"] == Format.FP16:
            plan.setdefault("loss_scale", {})
        return plan

    @model_validator(mode="after")
    def _agree(self) -> Precision:
        """Refuses every plan whose parts disagree, with the remedy."""
        fp32 = Format.FP32
        if self.master != fp32:
            raise ValueError(
                f"precision.master = {self.master.value!r}: the masters must be 'fp32'. Updates of 1e-6 vanish in "
                "16-bit weights, and the loss scaler refuses 16-bit gradients. Remove the key."
            )
        if self.optimizer != self.master:
            raise ValueError(
                f"precision.optimizer = {self.optimizer.value!r}: the optimiser's state has the masters' format, "
                "'fp32'. Remove the key."
            )
        if self.logits != fp32:
            raise ValueError(
                f"precision.logits = {self.logits.value!r}: log-probabilities are taken of FP32 logits on both sides. "
                "Remove the key."
            )
        if self.compute == Format.FP16 and self.loss_scale is None:
            raise ValueError(
                "precision.loss_scale: FP16 training without loss scaling loses most of its gradients to underflow. "
                "Remove the key for the dynamic default."
            )
        if self.compute != Format.FP16 and self.loss_scale is not None:
            raise ValueError(
                f"precision.loss_scale is for FP16, but precision.compute is {self.compute.value!r}. "
                "Remove one of them."
            )
        if self.casting == "autocast" and self.compute == fp32:
            raise ValueError(
                "precision.casting = 'autocast' does nothing when precision.compute is 'fp32'. Remove the key."
            )
        if self.casting == "autocast" and self.reduce != fp32:
            raise ValueError(
                f"precision.reduce = {self.reduce.value!r}: under autocast gradients arrive in FP32. Remove the key."
            )
        if self.reduce not in (fp32, self.compute):
            raise ValueError(
                f"precision.reduce = {self.reduce.value!r}: gradients are reduced in 'fp32' or in the format they were "
                f"computed in, {self.compute.value!r}."
            )
        if self.sync not in (self.rollout, fp32):
            raise ValueError(
                f"precision.sync = {self.sync.value!r} would round the weights to another format than the engine's "
                f"{self.rollout.value!r}; set it to {self.rollout.value!r} or 'fp32'."
            )
        if self.rollout_bits is not None and self.rollout_bits >= self.rollout.mantissa_bits:
            raise ValueError(
                f"precision.rollout_bits = {self.rollout_bits}: {self.rollout.value!r} has no more than "
                f"{self.rollout.mantissa_bits} mantissa bits, so nothing would be rounded. Lower it, or remove the key."
            )
        if self.export != self.rollout:
            raise ValueError(
                f"precision.export = {self.export.value!r}, but the policy that was rolled out and trained for is in "
                f"{self.rollout.value!r}: exporting another format reopens the gap. Remove the key."
            )
        return self

    @classmethod
    def parse(cls, value: str | dict[str, Any] | Precision) -> Precision:
        return value if isinstance(value, Precision) else cls.model_validate(value)

    @property
    def name(self) -> str:
        """``fp16`` or ``bf16/fp32``: training, then rollout where it differs; ``fp16/fp16~4``: rounded to 4 bits."""
        coarse = f"~{self.rollout_bits}" if self.rollout_bits is not None else ""
        train, rollout = self.compute.value, self.rollout.value + coarse
        return train if train == rollout else f"{train}/{rollout}"

    @property
    def has_copy(self) -> bool:
        """Whether training computes with a cast copy of the weights next to the masters."""
        return self.casting == "whole" and self.compute != self.master

    @property
    def copy_format(self) -> Format:
        """The format in which the trained module holds its weights: cast whole, or the masters themselves."""
        return self.compute if self.has_copy else self.master

    def head_dtype(self, side: Literal["train", "rollout"]) -> torch.dtype:
        """The dtype in which a side multiplies by the output head. Its result is then taken to FP32."""
        if self.head == "fp32":
            return Format.FP32.dtype
        return (self.compute if side == "train" else self.rollout).dtype

    def autocast(self, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
        """The context that training's forward pass runs in."""
        if self.casting == "autocast":
            return torch.autocast(torch.device(device).type, dtype=self.compute.dtype)
        return contextlib.nullcontext()

    def fsdp(self) -> dict[str, Any]:
        """For FSDP2's MixedPrecisionPolicy: the formats that weights are gathered in and gradients summed in."""
        return {"param_dtype": self.copy_format.dtype, "reduce_dtype": self.reduce.dtype}

    def deepspeed(self) -> dict[str, Any]:
        """The sections of a DeepSpeed configuration that set formats. Raises ValueError for a plan it cannot follow.

        The loss scale there is a fixed one: `backends/deepspeed.py` moves it by this plan's rules.
        """
        if self.casting == "autocast":
            raise ValueError(
                "precision.casting = 'autocast': DeepSpeed computes with a 16-bit copy of the weights. Remove the key, "
                "or set backend.name = 'fsdp' or 'single'"
            )
        sums = self.reduce.value
        sections: dict[str, Any] = {"communication_data_type": sums, "data_types": {"grad_accum_dtype": sums}}
        if self.has_copy:
            sections[self.compute.value] = {"enabled": True}
        if self.loss_scale is not None:
            sections[self.compute.value]["loss_scale"] = self.loss_scale.initial
        return sections

    def scaler(self) -> Scale:
        """The loss scale at its start; without rules it is 1 and stays 1."""
        return Scale(self.loss_scale)

    def to_engine(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Casts master weights once, to the format they travel in."""
        for name, tensor in named:
            yield name, self.rolled_out(tensor).to(self.sync.dtype) if tensor.is_floating_point() else tensor.detach()

    def rolled_out(self, tensor: Tensor) -> Tensor:
        """A weight as the rollout policy has it, before the cast: rounded to `rollout_bits`, half to even, if set."""
        if self.rollout_bits is None or not tensor.is_floating_point():
            return tensor.detach()
        mantissa, exponent = torch.frexp(tensor.detach().to(self.master.dtype))  # 0.5 <= |mantissa| < 1
        unit = 2.0 ** (self.rollout_bits + 1)
        return torch.ldexp(torch.round(mantissa * unit) / unit, exponent).to(tensor.dtype)

    @property
    def spacing(self) -> float:
        """Of the numbers around 1, in the coarsest format that either policy computes with."""
        coarse = 2.0**-self.rollout_bits if self.rollout_bits is not None else 0.0
        return max(self.compute.epsilon, self.rollout.epsilon, coarse)

    def rows(self) -> list[tuple[str, str, str]]:
        """(part, format, what it is) for the table printed at start."""
        fields = type(self).model_fields
        table = []
        for key in fields:
            value = getattr(self, key)
            if isinstance(value, LossScale):
                shown = f"{value.initial:g}, ×{value.growth:g} after {value.interval}, ×{value.backoff:g} on overflow"
            else:
                shown = "none" if value is None else str(getattr(value, "value", value))
            table.append((key, shown, fields[key].description or ""))
        return table

    def verify(self, live: Iterable[tuple[str, str, Tensor]]) -> dict[str, int]:
        """Holds the plan against live tensors, ``(part, name, tensor)``; returns how many were seen of each part.

        Parts: master, optimizer, copy, gradient, logits, rollout. Raises ValueError naming the first tensor
        whose dtype is not the plan's.
        """
        expected = {
            "master": self.master,
            "optimizer": self.optimizer,
            "copy": self.copy_format,
            "gradient": self.reduce,
            "logits": self.logits,
            "rollout": self.rollout,
        }
        seen: dict[str, int] = {}
        for part, name, tensor in live:
            want = expected[part].dtype
            if tensor.is_floating_point() and tensor.dtype != want:
                raise ValueError(
                    f"precision plan {self.name!r}: {part} tensor {name!r} is {tensor.dtype}, the plan says {want}. "
                    "Something cast it after the plan was applied; tenbit refuses to train two policies."
                )
            seen[part] = seen.get(part, 0) + 1
        return seen
