"""Models and tokenizers from Hugging Face folders, as FP32 masters, with what a run must know about them.

A folder is opened once: `Model` holds the module, the tokenizer, the stop tokens and the context length. `model.path =
"builtin"` is the small Qwen2 that comes with the package (`tenbit/models/builtin/README.md`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from tenbit import world
from tenbit.models.logprobs import Head
from tenbit.models.lora import Adapter
from tenbit.precision import Format
from tenbit.recipe import ModelSpec
from tenbit.types import Share

BUILTIN = Path(__file__).parent / "builtin"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A causal language model with FP32 weights, and its tokenizer."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    context: int
    device: torch.device
    adapter: Adapter | None = None  # beside its weights, which are frozen then
    base: str | None = None  # digest of these, where the weights are

    def weights(self, share: Share = "model") -> Iterable[tuple[str, torch.Tensor]]:
        """As an engine wants them: its own, adapters merged in; or all that the module holds, an adapter apart."""
        named = self.module.state_dict().items()
        return named if self.adapter is None or share != "model" else self.adapter.merged(named)

    @property
    def vocabulary(self) -> int:
        """How many tokens the embedding has; ids run below it. Tokenizers may have fewer."""
        embedding: Any = self.module.get_input_embeddings()
        return int(embedding.weight.shape[0])


@dataclass(frozen=True)
class Outline:
    """A model without its weights, small enough to send: all that an engine elsewhere needs to make its own."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    context: int
    adapter: Adapter | None = None  # that engines compute with apart; what is merged is the model's own weights

    @classmethod
    def of(cls, model: Model) -> Outline:
        adapter = model.adapter if model.adapter is not None and model.adapter.apart else None
        numbers = model.stop_token_ids, model.pad_token_id, model.context
        return cls(model.module.config, model.tokenizer, *numbers, adapter)

    def model(self, device: torch.device) -> Model:
        """Its module is on the meta device; `device` is where an engine is to compute."""
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(self.config, dtype=Format.FP32.dtype)
        plain = Model(module, self.tokenizer, self.stop_token_ids, self.pad_token_id, self.context, device)
        return _adapted(plain, self.adapter)


def resolve_device(name: str) -> torch.device:
    """'auto' -> CUDA where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"model.device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def load_tokenizer(spec: ModelSpec) -> Any:
    """Raises ValueError if there is none at `model.path`, or if it has no pad token."""
    path = model_folder(spec.path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # damaged files raise a dozen kinds, of which the text is what helps
        raise ValueError(f"{_where(spec)}: no tokenizer could be loaded: {_first_line(error)}") from error
    if spec.pad_token is not None:
        unknown = {None, tokenizer.unk_token_id} if spec.pad_token != tokenizer.unk_token else {None}
        if tokenizer.convert_tokens_to_ids(spec.pad_token) in unknown:
            raise ValueError(f"model.pad_token = {spec.pad_token!r} is not in the tokenizer's vocabulary")
        tokenizer.pad_token = spec.pad_token
    if tokenizer.pad_token_id is None:
        hint = tokenizer.eos_token or "<|endoftext|>"
        raise ValueError(
            f"model.path = {spec.path!r}: its tokenizer has no pad token. Name one of its tokens in the recipe, "
            f"for example model.pad_token = {hint!r}"
        )
    return tokenizer


def load(
    spec: ModelSpec, extra_stop_tokens: tuple[str, ...] = (), *, shared: bool = False, adapter: Adapter | None = None
) -> Model:
    """Opens a model for training: FP32 weights on its device. Raises ValueError with the key and the remedy.

    `shared`: the run has several ranks, and its backend gives each its part. Then the weights stay in the host's
    memory, on rank 0 alone; elsewhere the module is on the meta device.
    """
    if not shared:
        return _adapted(_open(spec, extra_stop_tokens), adapter)
    weights: Literal["host", "none"] = "host" if world.is_first() else "none"
    model = world.together(lambda: _adapted(_open(spec, extra_stop_tokens, weights), adapter))
    # the generation config comes with the weights
    return replace(model, stop_token_ids=world.first(lambda: model.stop_token_ids))


def load_outline(spec: ModelSpec, extra_stop_tokens: tuple[str, ...] = (), adapter: Adapter | None = None) -> Model:
    """The same without weights, its module on the meta device: what can be checked without reading gigabytes."""
    return _adapted(_open(spec, extra_stop_tokens, "none"), adapter)


def _adapted(model: Model, adapter: Adapter | None) -> Model:
    """With an adapter beside its weights."""
    return model if adapter is None else replace(model, adapter=adapter, base=adapter.inject(model.module))


def _open(
    spec: ModelSpec, extra_stop_tokens: tuple[str, ...], weights: Literal["device", "host", "none"] = "device"
) -> Model:
    disable_progress_bar()  # a bar for reading 26 tensors says less than it hides
    device = resolve_device(spec.device)
    tokenizer = load_tokenizer(spec)
    module: Any = _without_weights(spec) if weights == "none" else _with_weights(spec)
    _refuse_strange_tokenizer(module, tokenizer, spec)
    _make_savable(module, spec)
    if weights == "device":
        module.to(device)
    if spec.gradient_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    _refuse_dropout(module, spec)
    if weights != "none":
        _check_head(module)
    stop = _stop_tokens(module, tokenizer, extra_stop_tokens)
    context = getattr(module.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return Model(module, tokenizer, stop, int(tokenizer.pad_token_id), context, device)


def _with_weights(spec: ModelSpec) -> PreTrainedModel:
    path = model_folder(spec.path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=AutoConfig.from_pretrained(path),
            dtype=Format.FP32.dtype,
            attn_implementation=spec.attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(spec, error) from error
    module, found = loaded
    _refuse_gaps(found["missing_keys"], spec)
    return module


def _without_weights(spec: ModelSpec) -> PreTrainedModel:
    """The same module on the meta device."""
    try:
        config = AutoConfig.from_pretrained(model_folder(spec.path))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=Format.FP32.dtype, attn_implementation=spec.attention)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _not_loaded(spec, error) from error


def _not_loaded(spec: ModelSpec, error: Exception) -> ValueError:
    remedy = ". Set model.attention = 'eager'" if "attention implementation" in str(error) else ""
    return ValueError(f"{_where(spec)} could not be loaded: {_first_line(error)}{remedy}")


def model_folder(path: str) -> str:
    """'builtin' -> the package's own folder; a path that looks like a folder must be there."""
    if path == "builtin":
        return str(BUILTIN)
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).expanduser().is_dir():
        raise ValueError(f"model.path = {path!r}: there is no such folder")
    here = Path(path).expanduser()
    if (here / "adapter_config.json").is_file() and not (here / "config.json").is_file():
        raise ValueError(f"model.path = {path!r} is an adapter. The whole model of a run is in model/, beside adapter/")
    return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path


def first_names(module: torch.nn.Module) -> dict[str, str]:
    """Tied weights: each further name of a parameter, with its first one."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a state dict holds besides parameters."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: t for name, t in module.state_dict().items() if name not in parameters}


def _where(spec: ModelSpec) -> str:
    """The key; for a name that was looked for on the hub, also that there is no such folder."""
    here = spec.path == "builtin" or Path(spec.path).expanduser().is_dir()
    return f"model.path = {spec.path!r}" + ("" if here else " (there is no such folder here, so it is taken as a name)")


def _refuse_gaps(missing: Iterable[str], spec: ModelSpec) -> None:
    """The library fills weights that are not in the files with random numbers, and only says so in passing."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"model.path = {spec.path!r}: its files lack the weights {', '.join(names[:3])}{more}, which would be "
            "random. Complete the download, or correct config.json"
        )


def _refuse_strange_tokenizer(module: PreTrainedModel, tokenizer: Any, spec: ModelSpec) -> None:
    """Padding goes through the embedding like any token, so its id must be one of the model's."""
    embedding: Any = module.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if tokenizer.pad_token_id >= rows:
        hint = tokenizer.eos_token or "..."
        raise ValueError(
            f"model.path = {spec.path!r}: the pad token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, but "
            f"the model has {rows} tokens. Name another one in the recipe, for example model.pad_token = {hint!r}"
        )


def _make_savable(module: PreTrainedModel, spec: ModelSpec) -> None:
    """Drops sampling settings from a greedy generation config, as many published models have them.

    The library ignores them when it generates and refuses to save them, which would be at the very end of a run.
    """
    config = module.generation_config
    if config is None:
        return
    if not config.do_sample:
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, key, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"model.path = {spec.path!r}: correct its generation_config.json: {error}") from None


def _refuse_dropout(module: PreTrainedModel, spec: ModelSpec) -> None:
    """The engine samples without dropout; a trainer with it would be another policy."""
    config = module.config.get_text_config()
    for key, value in vars(config).items():
        # GPT-2 writes resid_pdrop; a classifier's or a summary's dropout is not on the way to the next token
        applies = "drop" in key and not key.startswith(("classifier", "summary"))
        if applies and isinstance(value, float) and value > 0:
            raise ValueError(
                f"model.path = {spec.path!r}: its config has {key} = {value}, but the sampler uses no dropout, so the "
                f"two would be different policies. Set {key} to 0 in its config.json"
            )


def _refuse_not_finite(module: PreTrainedModel) -> None:
    """An inf or NaN in the files makes NaN of everything, wherever it is; with its name it can be repaired."""
    bad = [name for name, p in module.named_parameters() if p.numel() and not _is_finite(p)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"model.path: inf or NaN in the weights {', '.join(bad[:3])}{more}, as they are in the files. Take another "
            "checkpoint, or repair these tensors"
        )


@torch.no_grad()
def _is_finite(tensor: torch.Tensor) -> bool:
    """Without a mask of the tensor's size: the smallest and the largest value are NaN if any is."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@torch.no_grad()
def _check_head(module: PreTrainedModel) -> None:
    """Our logits from hidden states must be the architecture's own, or training would optimise another policy."""
    _refuse_not_finite(module)
    embedding: Any = module.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    ids = torch.arange(1, 9, device=module.device).remainder(vocabulary)[None]
    theirs = module(input_ids=ids, use_cache=False).logits.float()
    if not bool(theirs.isfinite().all()):
        raise ValueError(
            "model.path: its logits are inf or NaN in FP32, though no weight is: an activation passes 3.4e38. No "
            "format can hold it; take another checkpoint"
        )
    hidden = module.base_model(input_ids=ids, use_cache=False).last_hidden_state
    ours = Head.of(module, Format.FP32.dtype).logits(hidden)
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max().clamp(min=1))):
        raise ValueError(
            f"model.path: {module.config.model_type} does something to its logits that tenbit does not know; "
            "its log-probabilities would be wrong"
        )


def _stop_tokens(module: PreTrainedModel, tokenizer: Any, extra: tuple[str, ...]) -> tuple[int, ...]:
    """End-of-sequence tokens of the generation config and of the tokenizer, and the recipe's."""
    ids: list[int] = []
    declared = getattr(module.generation_config, "eos_token_id", None)
    for value in (declared if isinstance(declared, list) else [declared], [tokenizer.eos_token_id]):
        ids += [v for v in value if v is not None]
    for token in extra:
        number = tokenizer.convert_tokens_to_ids(token)
        if number is None or number == tokenizer.unk_token_id:
            raise ValueError(f"rollout.stop_tokens: {token!r} is not a token of the model's vocabulary")
        ids.append(number)
    if not ids:
        log.warning("the model names no end-of-sequence token: every response will run to rollout.max_tokens")
    return tuple(dict.fromkeys(ids))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
