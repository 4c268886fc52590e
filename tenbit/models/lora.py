"""LoRA by PEFT: which layers get an adapter, the rounded base, and the merge of both in FP32.

    adapter = Adapter(LoraSpec(rank=32, alpha=64), seed=0, base=Format.FP16)
    adapter.inject(module)                          trained: A and B, FP32; all else frozen, values of `base`
    for name, tensor in adapter.merged(named): ...  W + (alpha / rank) B A, under the model's own names

The base is rounded once, when a model is opened, to the format that training computes in: the trainer, the merge and
the engine then start from the very same numbers, and the adapter corrects the base that it is used with. It is never
written again. Merged weights are made afresh from it for every update, so nothing can drift (docs/lora.md).

PEFT's injection leaves the model what it is, a causal language model of transformers with its own head; a layer becomes
PEFT's, with the old one in it as `base_layer`, and `lora_A.default` and `lora_B.default` beside it. Of a family that it
knows, PEFT takes the names of targets for those of an older release and puts adapters elsewhere, on the experts; so it
is given a holder of the model, which is of no family.

An adapter belongs to one base. `digest` tells two bases apart; a run's checkpoints hold it, and its exported adapter.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tenbit.lora_spec import ALL_LINEAR, LoraSpec
from tenbit.models.experts import is_mixture
from tenbit.models.fit import all_routers
from tenbit.precision import Format
from tenbit.recipe import Recipe
from tenbit.types import Overflow

PEFT, HELD = "base_model.model.", "held"
BASE, A, B = ".base_layer", ".lora_A.default", ".lora_B.default"
# a mixture's: which experts compute, or how much of one counts. What is in a module of this name belongs to it
ROUTERS = {"gate", "router", "shared_expert_gate", "router_gate"}
EXPERTS = "experts"  # the routed ones
STATE_SPACE = ("A_log", "D")  # of Mamba's mixers, whose kernels take the weights of all layers but the first themselves


@dataclass(frozen=True)
class Adapter:
    """The adapter of a run. `base` is the format of the frozen weights' values; `seed` decides A's first values."""

    spec: LoraSpec
    seed: int
    base: Format

    @classmethod
    def of(cls, recipe: Recipe) -> Adapter | None:
        """None where all weights are trained."""
        return None if recipe.lora is None else cls(recipe.lora, recipe.seed, recipe.precision.compute)

    @property
    def apart(self) -> bool:
        """Whether engines compute with the adapter itself, beside the base."""
        return self.spec.rollout == "adapter"

    def inject(self, module: Any) -> str | None:
        """Puts an adapter beside each target, in place; on meta, too. Raises ValueError for unknown targets.

        Returns the digest of the rounded base, taken on the way; None on meta.
        """
        self._inject(module)
        base = ((plain_name(n), p) for n, p in module.named_parameters() if not is_adapter(n))
        return _digest(((n, self._round(n, p)) for n, p in base if not p.is_meta), module, self.base)

    def mount(self, module: Any) -> None:
        """The same layers for a module whose weights are set or imagined by others, in its own format."""
        self._inject(module, values=False)

    def _inject(self, module: Any, values: bool = True) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # takes two seconds

        names = targets(module, self.spec.targets)
        dtype = module.get_input_embeddings().weight.dtype
        inside = [f"{HELD}.{name}" for name in names]
        config = LoraConfig(
            r=self.spec.rank, lora_alpha=self.spec.alpha, target_modules=inside, lora_dropout=0.0, bias="none",  # pyright: ignore
            init_lora_weights=False,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # PEFT's own first values are replaced
            inject_adapter_in_model(config, nn.ModuleDict({HELD: module}))
        if adapted(module) != set(names):
            odd = ", ".join(sorted(adapted(module) ^ set(names))[:3])
            raise ValueError(
                f"lora.targets: PEFT puts adapters on other layers of model_type {module.config.model_type!r} than it "
                f"was asked to ({odd}). Leave these out of lora.targets, or train all weights: lora = 'none'"
            )
        for name in names:  # a module that computes in FP32 must not get its input rounded to its weights' format
            module.get_submodule(name).cast_input_dtype_enabled = False
        for name, p in module.named_parameters():
            if A in name or B in name:
                p.data = p.data.to(dtype)
                if values and not p.is_meta:
                    self._start(name, p)

    @torch.no_grad()
    def _start(self, name: str, p: Tensor) -> None:
        """A as PEFT and the paper of LoRA have it, uniform in +-sqrt(1 / in); B zero: the adapter begins as nothing."""
        if B in name:
            p.zero_()
            return
        digest = hashlib.sha256(f"{self.seed}/lora/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        p.copy_(nn.init.kaiming_uniform_(torch.empty(p.shape), a=math.sqrt(5), generator=generator))

    @torch.no_grad()
    def _round(self, name: str, p: Tensor) -> Tensor:
        rounded = p.to(self.base.dtype)
        if not all(bool(end.isfinite()) for end in rounded.aminmax()):
            raise Overflow(
                f"model.path: the weight {name!r} does not fit {self.base.value!r}, which ends at "
                f"{self.base.largest:.6g}. Set precision to 'bf16' or 'fp32'"
            )
        p.copy_(rounded)
        return rounded

    @torch.no_grad()
    def merged(
        self, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under the model's own names, FP32 or rounded once to `dtype`; adapters stay behind.

        `named` holds the base and FP32 factors, a layer's tensors one after another. Merging is in FP32, into a new
        tensor, one layer at a time.
        """
        waiting: tuple[str, Tensor] | None = None
        a: Tensor | None = None
        for name, tensor in named:
            if A in name:
                assert waiting is not None, f"{name} without its base"
                a = tensor
            elif B in name:
                assert waiting is not None, f"{name} without its base"
                assert a is not None, f"{name} without A"
                yield waiting[0], self.merge(waiting[1], a, tensor, dtype)
                waiting = a = None
            elif name.endswith(f"{BASE}.weight"):
                waiting = plain_name(name), tensor
            else:
                cast = dtype is not None and tensor.is_floating_point()
                yield plain_name(name), tensor.to(dtype) if cast else tensor
        assert waiting is None, f"{waiting[0]} without its adapter" if waiting else ""

    def merge(self, base: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """W + (alpha / rank) B A in FP32, then rounded once. `base` is read only."""
        full = base.float() + (b.float() @ a.float()) * self.spec.scaling
        return full if dtype is None else full.to(dtype)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is one of an adapter's factors."""
    return A in name or B in name


def plain_name(name: str) -> str:
    """A frozen weight's name in the model without adapters."""
    return name.replace(BASE, "")


def plain(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights of a model under its own names."""
    return ((plain_name(name), tensor) for name, tensor in named if not is_adapter(name))


def described(module: Any, spec: LoraSpec) -> str:
    """How large a module's adapter is, where, and what the engine computes with; in one line, for the screen."""
    size = sum(p.numel() for name, p in module.named_parameters() if is_adapter(name))
    layers = [name.removesuffix(BASE) for name, _ in module.named_modules() if name.endswith(BASE)]
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    bare = "; its routed experts have none" if is_mixture(module.config) else ""
    return (
        f"{size:,} parameters, rank {spec.rank}, alpha {spec.alpha:g}, on {len(layers)} layers ({kinds}){bare}; "
        f"rollouts: {spec.rollout}"
    )


def adapted(module: Any) -> set[str]:
    """Names of the layers that have an adapter."""
    return {name for name, part in module.named_modules() if hasattr(part, "lora_A")}


def linears(module: Any) -> list[str]:
    """Names of the layers that can have an adapter: all linear ones but the head, a mixture's routers and experts."""
    head, shut = module.get_output_embeddings(), _shut(module)
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part is not head and not any(_within(name, other) for other in shut)
    ]


def _shut(module: Any) -> set[str]:
    """Parts whose linear layers get no adapter."""
    found: set[str] = set()
    if is_mixture(module.config):
        found |= all_routers(module).keys()
        found |= {name for name, _ in module.named_modules() if name.rpartition(".")[2] in {*ROUTERS, EXPERTS}}
    for name, part in module.named_modules():
        if all(hasattr(part, own) for own in STATE_SPACE):
            found |= {f"{name}.{own}" for own, _ in part.named_children() if own != "in_proj"}
    return found


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def targets(module: Any, wanted: str | Sequence[str]) -> list[str]:
    """The layers that `lora.targets` names. Raises ValueError for a name that ends none of them."""
    known = linears(module)
    if not known:
        raise ValueError(
            f"lora: model_type {module.config.model_type!r} has no linear layer (torch.nn.Linear) that could have an "
            "adapter. Train all weights: remove the section, or lora = 'none'"
        )
    if wanted == ALL_LINEAR:
        return known
    ends = [w for w in wanted if not any(_ends(name, w) for name in known)]
    if ends:
        last = sorted({name.rpartition(".")[2] for name in known})
        raise ValueError(
            f"lora.targets: {', '.join(map(repr, ends))}: no linear layer of this model is called so. There are: "
            f"{', '.join(last)} (the head, embeddings, routers and a mixture's routed experts have no adapter), or "
            f"'{ALL_LINEAR}' for all of them"
        )
    return [name for name in known if any(_ends(name, w) for w in wanted)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def peft_name(name: str) -> str:
    """A factor's name in PEFT's files."""
    return PEFT + name.replace(".default", "")


def plain_layer(name: str) -> str:
    """The layer that a factor of this name, in a module or in PEFT's files, belongs to."""
    return name.removeprefix(PEFT).partition(".lora_")[0]


def peft_config(spec: LoraSpec, names: Iterable[str], path: str = "", misread: Collection[str] = ()) -> dict[str, Any]:
    """PEFT's ``adapter_config.json`` for factors of these names, on the base model at `path`.

    Layers that PEFT would take for others (`misread`) are named by their weights, which it takes as they are.
    """
    from peft import LoraConfig, TaskType

    layers = {plain_layer(name) for name in names}
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=sorted(layers.difference(misread)), lora_dropout=0.0,  # pyright: ignore
        target_parameters=[f"{layer}.weight" for layer in sorted(misread)] or None, bias="none",
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=path, inference_mode=True,
    )  # fmt: skip
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return {k: getattr(v, "value", v) for k, v in plain.items()}


def misread_by_peft(config: Any, spec: LoraSpec, names: Iterable[str]) -> set[str]:
    """Layers of a model of this configuration beside which PEFT would put no adapter if it read their names."""
    from peft import LoraConfig, inject_adapter_in_model

    if not is_mixture(config):  # it renames those of mixtures
        return set()
    layers = {plain_layer(name) for name in names}
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            inject_adapter_in_model(LoraConfig(r=spec.rank, target_modules=sorted(layers)), module)
        except ValueError:  # it wants others beside them
            return layers
    return layers - adapted(module)


def base_digest(module: nn.Module, form: Format) -> str | None:
    """Tells a base from any other by its weights, rounded to `form`, and their names. Of a model with its adapter, too.

    SHA-256 of each tensor's bytes, then of all these; so it takes about as long as rounding does. None on meta.
    """
    base = ((plain_name(n), p) for n, p in module.named_parameters() if not is_adapter(n))
    return _digest(((n, p.to(form.dtype)) for n, p in base if not p.is_meta), module, form)


@torch.no_grad()
def _digest(rounded: Iterable[tuple[str, Tensor]], module: nn.Module, form: Format) -> str | None:
    """Of these parameters, and of the buffers that a state dict holds (biases of DeepSeek's routers)."""
    lines = [_line(name, tensor) for name, tensor in rounded]
    if not lines:
        return None
    saved = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in saved:
            lines.append(_line(name, buffer.to(form.dtype) if buffer.is_floating_point() else buffer))
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _line(name: str, tensor: Tensor) -> str:
    flat: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{name} {list(tensor.shape)} {tensor.dtype} {hashlib.sha256(flat).hexdigest()}"
