"""Precision is one value. Every dtype of a run, on both sides, is derived from it, here and nowhere else.

    Precision.parse("fp16")           training and rollout in FP16, FP32 master weights, dynamic loss scaling
    Precision.parse("bf16/fp32")      training / rollout, as in the paper's ablation (section 4.4, Figure 5)
    Precision.parse("fp16/fp8")       the weights that are rolled out rounded to FP8; all computing in FP16
    Precision.parse({"preset": "fp16", "casting": "autocast"})      the table form reaches the parts

A plan that could disagree with itself (an export in another format than was rolled out, 16-bit logits, FP16
without loss scaling) is refused when it is made. `rows` prints it, `verify` holds it against live tensors.
What it says about a model's inside (`router`, `fp32`, `residual_scale`) is done by `models/fit.py`, on both sides.
Formats are Table 1 of arXiv 2510.26788; the loss scale's rules are in `loss_scale.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from tenbit.loss_scale import LossScale, Scale
from tenbit.rounding import FP8_SPACING, is_linear, to_bits, to_fp8


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


FP8 = "fp8"  # e4m3, for weights only: what engines quantise to
_SMALLEST_RESIDUAL = 2.0**-24  # by which FP16's own range shrinks to its smallest number

UNUSUAL = ("rollout_bits", "rollout_weights", "fp32", "residual_scale")

_PRESET_HELP = (
    "write 'fp16', 'bf16', 'fp32', a training/rollout pair such as 'bf16/fp32' or 'fp16/fp8', or a table with a "
    "'preset'"
)


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
    rollout_weights: Literal["fp8"] | None = Field(
        None, description="linear layers' weights are rounded to FP8 (e4m3, a scale per row) before they are rolled out"
    )
    router: Literal["fp32", "model"] = Field(
        "fp32", description="a mixture's choice of experts: in FP32 on both sides, or in the format of its side"
    )
    fp32: tuple[str, ...] = Field(
        (), description="modules that compute in FP32 on both sides, such as model.layers.3.mlp"
    )
    residual_scale: float = Field(
        1.0, gt=0, le=1, description="the residual stream is carried times this, on both sides; the function stays"
    )
    sync: Format = Field(description="weights on their way to the engine")
    export: Format = Field(description="the model folder a run ends with")
    loss_scale: LossScale | None = Field(None, description="for FP16 gradients only")

    @field_validator("fp32", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

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
            rollout = f"{train}~{FP8}" if rollout == FP8 else rollout
            rollout, coarse, bits = rollout.partition("~")
            if coarse:
                plan.setdefault("rollout_weights" if bits == FP8 else "rollout_bits", bits)
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
        if self.export != self.rollout:
            raise ValueError(
                f"precision.export = {self.export.value!r}, but the policy that was rolled out and trained for is in "
                f"{self.rollout.value!r}: exporting another format reopens the gap. Remove the key."
            )
        return self

    @model_validator(mode="after")
    def _agree_inside(self) -> Precision:
        """The same of what is done to weights and inside the model."""
        if self.rollout_bits is not None and self.rollout_bits >= self.rollout.mantissa_bits:
            raise ValueError(
                f"precision.rollout_bits = {self.rollout_bits}: {self.rollout.value!r} has no more than "
                f"{self.rollout.mantissa_bits} mantissa bits, so nothing would be rounded. Lower it, or remove the key."
            )
        if self.rollout_bits is not None and self.rollout_weights is not None:
            raise ValueError(
                "precision.rollout_bits and precision.rollout_weights both round weights. Remove one of them."
            )
        if self.residual_scale < _SMALLEST_RESIDUAL:
            raise ValueError(
                f"precision.residual_scale = {self.residual_scale:g}: what is so small vanishes in 16 bits. Take "
                f"{_SMALLEST_RESIDUAL:g} or more; `tenbit audit` finds what a model needs."
            )
        if math.frexp(self.residual_scale)[0] != 0.5:
            raise ValueError(
                f"precision.residual_scale = {self.residual_scale:g}: only a power of two (0.5, 0.25, ...) changes no "
                f"number's mantissa. Take {2.0 ** math.floor(math.log2(self.residual_scale)):g}."
            )
        if self.fp32 and self.compute == self.rollout == Format.FP32:
            raise ValueError(f"precision.fp32 = {list(self.fp32)}: everything is computed in FP32. Remove the key.")
        return self

    @classmethod
    def parse(cls, value: str | dict[str, Any] | Precision) -> Precision:
        return value if isinstance(value, Precision) else cls.model_validate(value)

    @property
    def name(self) -> str:
        """``fp16`` or ``bf16/fp32``: training, then rollout if it differs; rounded: ``fp16/fp16~4``, ``fp16/fp8``."""
        rounded = self.rollout_weights or self.rollout_bits
        train, rollout = self.compute.value, self.rollout.value
        if rounded is None:
            return train if train == rollout else f"{train}/{rollout}"
        return f"{train}/{rounded}" if rounded == FP8 and train == rollout else f"{train}/{rollout}~{rounded}"

    @property
    def rounds_weights(self) -> bool:
        """Whether other weights are rolled out than are trained, beyond the cast."""
        return self.rollout_bits is not None or self.rollout_weights is not None

    @property
    def alters(self) -> bool:
        """Whether a dense model computes otherwise than its own code says, apart from its head."""
        return bool(self.fp32) or self.residual_scale != 1

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
            held = self.rolled_out(name, tensor)
            yield name, held.to(self.sync.dtype) if held.is_floating_point() else held

    def asked(self, form: Format) -> torch.dtype | None:
        """The dtype to ask `Backend.weights` for; None: FP32 masters, because the plan has yet to round them."""
        return None if self.rounds_weights else form.dtype

    def rolled_out(self, name: str, tensor: Tensor) -> Tensor:
        """A master as the rollout policy has it, before the cast; ``[..., out, in]`` for linear layers and experts."""
        tensor = tensor.detach()
        if not tensor.is_floating_point() or not self.rounds_weights:
            return tensor
        exact = tensor.to(self.master.dtype)
        if self.rollout_bits is not None:
            return to_bits(exact, self.rollout_bits).to(tensor.dtype)
        return to_fp8(exact).to(tensor.dtype) if is_linear(name, tensor) else tensor

    @property
    def spacing(self) -> float:
        """From 1 to the next larger number, in the coarser of the two sides' formats: the size of one rounding."""
        coarse = 2.0**-self.rollout_bits if self.rollout_bits is not None else 0.0
        if self.rollout_weights is not None:
            coarse = FP8_SPACING
        return max(self.compute.epsilon, self.rollout.epsilon, coarse)

    def rows(self) -> list[tuple[str, str, str]]:
        """(part, format, what it is) for the table printed at start; what is rarely set only where it is."""
        fields = type(self).model_fields
        table = []
        for key in fields:
            value = getattr(self, key)
            if key in UNUSUAL and value == fields[key].default:
                continue
            shown = ", ".join(value) if isinstance(value, tuple) else str(getattr(value, "value", value))
            shown = "none" if value is None or value == () else shown
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
