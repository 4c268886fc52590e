"""What a model weighs, found without its weights: parameters on the meta device, activations on fake tensors.

    shape = Shape.of(find_config(recipe.model))        14.77e9 parameters, 40 layers, 160 KiB of cache a token
    use = measure(config, precision, spec, 22528, True)    bytes that one micro-batch's forward and backward need

Parameters are counted exactly: the architecture's own class is made on the meta device. Activations are not a formula
either: the same class runs a micro-batch forward and backward in torch's FakeTensorMode, which carries shapes and
dtypes but no numbers, and what autograd keeps is summed. The kernels are those that torch chooses for attention without
an L x L matrix; a GPU's fused kernels may keep a little less.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tenbit.backends.scorer import decoder_layers
from tenbit.models.loading import model_folder
from tenbit.models.logprobs import CHUNK_ELEMENTS, Head
from tenbit.models.lora import Adapter
from tenbit.precision import Format, Precision
from tenbit.recipe import ModelSpec
from tenbit.rehearsal import out_of_reach

SHAPES = Path(__file__).parents[1] / "models" / "shapes"
# Under sdpa's own name the library would make an L x L mask here: it cannot look into fake tensors to see that training
# needs none. A name that it has no masks for gets none.
CAUSAL = "tenbit-causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def shipped() -> dict[str, Path]:
    """The configurations that come with tenbit, by the last part of the model's name."""
    return {file.stem: file for file in sorted(SHAPES.glob("*.json"))}


def find_config(path: str) -> tuple[Any, str]:
    """(configuration, where it is from): a folder, the local cache of the hub, a shipped shape, or the hub itself."""
    shape = shipped().get(Path(path).name)
    try:
        place = model_folder(path)
    except ValueError:
        if shape is None:
            raise
        place = ""  # a folder that has still to be downloaded
    if place and Path(place).is_dir():
        return _read(place, path), place
    with contextlib.suppress(OSError, ValueError):
        if place:
            return AutoConfig.from_pretrained(place, local_files_only=True), f"{path}, from the local cache"
    if shape is not None:
        return _read(str(shape), path), f"the shape of {shape.stem} that comes with tenbit"
    if why := out_of_reach(place):
        raise _not_read(path, f"the hub cannot be reached: {why}")
    return _read(place, path), f"{path}, from the hub"


def _read(place: str, path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError, ImportError) as error:
        raise _not_read(path, str(error).strip().splitlines()[0]) from None


def _not_read(path: str, why: str) -> ValueError:
    return ValueError(
        f"model.path = {path!r}: no config.json could be read there ({why}). Name a model folder, a model of the "
        f"Hugging Face hub, or one whose shape comes with tenbit: {', '.join(shipped())}"
    )


@dataclass(frozen=True)
class Shape:
    """Counts of numbers, not of bytes. `layer` is the largest block that a sharding backend gathers at a time.

    With an adapter, `adapter` counts it, and `adapter_layer` its part of one block; all else is of the model alone.
    """

    config: Any
    parameters: int
    layers: int
    layer: int
    outside: int
    head: int
    largest: int
    largest_name: str
    cache_per_token: int
    kv_heads: int
    hidden: int
    vocabulary: int
    context: int
    active: int
    adapter: int = 0
    adapter_layer: int = 0

    @property
    def trained(self) -> int:
        return self.adapter or self.parameters

    @property
    def frozen(self) -> int:
        return self.parameters if self.adapter else 0

    @property
    def arriving(self) -> tuple[int, int, int]:
        """Whose gradients may come at once: a block's, the head's, all that lies outside of blocks."""
        return (self.adapter_layer, 0, 0) if self.adapter else (self.layer, self.head, self.outside)

    @classmethod
    def of(cls, config: Any, adapter: Adapter | None = None) -> Shape:
        """Raises ValueError for an architecture that is not a causal language model with a linear head."""
        module = _on_meta(config)
        head = Head.of(module, Format.FP32.dtype).weight
        text = config.get_text_config()
        named = dict(module.named_parameters())
        blocks = decoder_layers(module)
        inside = {id(p) for block in blocks for p in block.parameters()}
        name, largest = max(named.items(), key=lambda item: item[1].numel())
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        total = _count(named.values())
        experts = sum(p.numel() for n, p in named.items() if ".experts." in n)
        count = _experts(config)
        chosen = getattr(text, "num_experts_per_tok", None) or count
        layer, outside = max(map(_size, blocks)), _count(p for p in named.values() if id(p) not in inside)
        if adapter is not None:
            adapter.mount(module)
        return cls(
            config=config,
            parameters=total,
            layers=len(blocks),
            layer=layer,
            outside=outside,
            head=head.numel(),
            largest=largest.numel(),
            largest_name=name,
            cache_per_token=2 * text.num_hidden_layers * kv_heads * head_dim,
            kv_heads=kv_heads,
            hidden=text.hidden_size,
            vocabulary=head.shape[0],
            context=getattr(text, "max_position_embeddings", None) or 1 << 30,
            active=total - experts + experts * chosen // count,
            adapter=_size(module) - total,
            adapter_layer=max(map(_size, blocks)) - layer,
        )


def _experts(config: Any) -> int:
    text = config.get_text_config()
    return getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1


def _size(module: Any) -> int:
    return _count(module.parameters())


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _on_meta(config: Any) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=Format.FP32.dtype)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"model.path: {config.model_type!r} cannot be planned for: {str(error).strip().splitlines()[0]}"
        ) from None


@dataclass(frozen=True)
class Use:
    """Bytes on one device for a micro-batch of `tokens` padded tokens.

    `kept` lies between the forward and the backward pass; `work` is what the backward pass of one layer (with
    checkpointing: after computing it again) or of the output head needs on top, gradients of parameters left out.
    """

    tokens: int
    kept: int
    work: int

    @property
    def peak(self) -> int:
        return self.kept + self.work


def measure(
    config: Any, precision: Precision, spec: ModelSpec, tokens: int, checkpointing: bool, adapter: Adapter | None = None
) -> Use:
    """Runs the architecture on fake tensors: the whole model forward, one layer of it forward and backward."""
    times, plan = 1, precision
    if _experts(config) > 1 and precision.copy_format == Format.FP32:
        # Fake tensors know the experts' grouped product in one 16-bit format only: twice what that needs.
        times, plan = 2, Precision.parse(Format.BF16.value)
    way = (plan, spec, checkpointing, adapter)
    one = _kept(_shortened(config, 1), tokens, *way)
    every = _kept(config, tokens, *way)
    layer = _peak(_shortened(config, 1), tokens, *way) - one
    kept = times * every + head_kept(config, precision, tokens)
    return Use(tokens, kept, max(times * layer, head_work(config, precision, tokens, adapter is None)))


def head_kept(config: Any, precision: Precision, tokens: int) -> int:
    """Of the output head: its weight, where it is cast, and logits if they fit one chunk."""
    text = config.get_text_config()
    dtype = Format.of(precision.head_dtype("train"))
    cast = dtype.bytes * text.vocab_size * text.hidden_size if dtype != precision.copy_format else 0
    elements = tokens * text.vocab_size
    return cast + (elements * Format.FP32.bytes if elements <= CHUNK_ELEMENTS else 0)


def head_work(config: Any, precision: Precision, tokens: int, trained: bool = True) -> int:
    """The output head's backward pass: chunks of FP32 logits, the FP32 sum of its gradient, the hidden states'."""
    text = config.get_text_config()
    dtype = Format.of(precision.head_dtype("train"))
    weight, rows = text.vocab_size * text.hidden_size * trained, max(1, CHUNK_ELEMENTS // text.vocab_size)
    copies = 3 if tokens > rows else 2  # logits, probabilities, their gradient; `head_kept` has counted kept ones
    chunk = min(rows, tokens) * text.vocab_size * (copies * Format.FP32.bytes + dtype.bytes)
    return chunk + Format.FP32.bytes * weight + tokens * text.hidden_size * precision.compute.bytes


def _shortened(config: Any, layers: int) -> Any:
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


@contextlib.contextmanager
def _fake(
    config: Any, precision: Precision, spec: ModelSpec, checkpointing: bool, adapter: Adapter | None
) -> Iterator[Any]:
    """The module on fake tensors, in the format that training holds it in."""
    # Fake tensors know grouped products (mixtures of experts) in one 16-bit format only; the bytes are the same.
    form = Format.BF16 if precision.copy_format.bytes == Format.BF16.bytes else precision.copy_format
    attention = "eager" if spec.attention == "eager" else CAUSAL  # a flash kernel keeps what sdpa's keeps
    make = partial(AutoModelForCausalLM.from_config, config, dtype=form.dtype, attn_implementation=attention)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module: Any = make() if adapter is None else _imagined(make, adapter)
        if checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        yield module.train()


def _imagined(make: Callable[[], Any], adapter: Adapter) -> Any:
    """A module with an adapter, on the fake tensors of the mode around it. PEFT can mount on meta, but not on those."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = make()
        adapter.mount(module)
    made: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                here = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), p.requires_grad)
                part._parameters[name] = made.setdefault(id(p), here)  # a tied one stays tied
        for name, b in part._buffers.items():
            part._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype, device="cpu")
    return module


def _forward(module: Any, precision: Precision, tokens: int) -> torch.Tensor:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with precision.autocast("cpu"):
        return module.base_model(input_ids=ids, use_cache=False).last_hidden_state


def _kept(
    config: Any, tokens: int, precision: Precision, spec: ModelSpec, checkpointing: bool, adapter: Adapter | None
) -> int:
    """Bytes that autograd holds after the forward pass, each storage once, parameters left out."""
    with _fake(config, precision, spec, checkpointing, adapter) as module:
        parameters = {p.untyped_storage()._cdata for p in module.parameters()}
        held: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                held[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = _forward(module, precision, tokens)
        note(hidden)  # the head keeps it
        return sum(storage.nbytes() for storage in held.values())


def _peak(
    config: Any, tokens: int, precision: Precision, spec: ModelSpec, checkpointing: bool, adapter: Adapter | None
) -> int:
    """Most bytes at a time over forward and backward, parameters and their gradients left out."""
    with _fake(config, precision, spec, checkpointing, adapter) as module:
        module.requires_grad_(True)  # the tracker wants it so; beside an adapter that is a little more than is needed
        tracker = MemTracker()
        tracker.track_external(module)
        with tracker:
            torch.sum(_forward(module, precision, tokens)).backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return sum(size for kind, size in peak.items() if str(getattr(kind, "value", kind)) in ("Activation", "Temp"))
