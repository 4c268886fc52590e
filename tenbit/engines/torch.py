"""The built-in engine: samples from a Hugging Face causal language model in this process, on CPU or CUDA.

    with TorchEngine(config, Precision.parse("fp16")) as engine:
        engine.load_weights(model.named_parameters(), version=0)
        completions = engine.generate([Prompt(ids, seed=0)], Sampling(max_tokens=128))

It holds its own module in the rollout format, made from the configuration alone; weights arrive by `load_weights`,
and every completion says which version drew it. Nothing computed under old weights outlives a load: the cache is
made anew for each call of `generate`. Batching is in `continuous.py`; Llama-like models go through `llama.py`, on
CPUs that have AVX-512 with the compiled kernels of `native.py`, and everything else through `generic.py`.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from tenbit.closing import Closing
from tenbit.engines import compiled, continuous, native
from tenbit.engines import sampling as sampler
from tenbit.engines.generic import GenericRunner
from tenbit.engines.llama import LlamaRunner, unsupported
from tenbit.engines.ops import PlainOps, shape_of
from tenbit.models.fit import fit
from tenbit.models.lora import Adapter, is_adapter
from tenbit.precision import Format, Precision
from tenbit.types import Completion, Overflow, Prompt, Sampling, Share

log = logging.getLogger(__name__)

# Given sequences are scored this many tokens at a time.
SCORE_TOKENS = 8192

Path = Literal["auto", "native", "plain", "generic"]


def _empty_module(config: PreTrainedConfig, precision: Precision, device: torch.device) -> PreTrainedModel:
    """The architecture in the rollout format, with unset weights; buffers such as rotary tables keep their dtype."""

    def make(attention: str) -> PreTrainedModel:
        with no_init_weights(), torch.device(device):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=precision.rollout.dtype, attn_implementation=attention
            )

    try:
        module = make("sdpa")
    except ValueError:  # some architectures (Gemma 2, with its softcap inside attention) refuse it
        module = make("eager")
    module.tie_weights()
    return module.requires_grad_(False).eval()


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class TorchEngine(Closing):
    """An `Engine` over a `transformers` model. `path` forces a way of computing, for tests and comparisons.

    With an `adapter` it computes as the trainer does, W x + s B A x, in the rollout format. Then it `wants` frozen
    weights and adapter apart, and, once it holds the frozen ones, the adapter alone.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        precision: Precision,
        *,
        device: torch.device | str = "cpu",
        max_batch: int = 256,
        pad_token_id: int = 0,
        path: Path = "auto",
        adapter: Adapter | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch = {max_batch}: the engine needs room for at least one sequence.")
        self.device = torch.device(device)
        self.precision, self.max_batch = precision, max_batch
        self.version: int | None = None
        self._module = _empty_module(config, precision, self.device)
        self._adapter, self._has_base = adapter, False
        if adapter is not None:
            adapter.mount(self._module)
            self._module.requires_grad_(False)
        fit(self._module, precision)
        self._text = self._module.config.get_text_config()
        self._draw: continuous.Draw = sampler.draw
        self.path, self._runner = self._make_runner(path, pad_token_id)
        self._named = dict(self._module.named_parameters(remove_duplicate=False))

    def _make_runner(self, path: Path, pad_token_id: int) -> tuple[Path, LlamaRunner | GenericRunner]:
        head = self.precision.head_dtype("rollout")
        reason = unsupported(self._module.config) if self._adapter is None else "it has an adapter"
        reason = reason or ("parts of it are altered by the precision plan" if self.precision.alters else None)
        if path == "generic" or (path == "auto" and reason is not None):
            log.info("sampling through transformers' own forward (%s)", reason or "as asked")
            return "generic", GenericRunner(self._module, self.device, pad_token_id, head)
        if reason is not None:
            raise ValueError(f"path {path!r} does not know this model ({reason}); use 'auto' or 'generic'.")
        runner = functools.partial(LlamaRunner, self._module, self.device, head_dtype=head)
        no_kernels = self._no_kernels()
        if path == "plain" or (path == "auto" and no_kernels):
            log.info("sampling in plain torch (%s)", no_kernels or "as asked")
            return "plain", runner(PlainOps())
        if no_kernels:
            raise ValueError(f"path 'native' cannot be had here ({no_kernels}); use 'auto' or 'plain'.")
        ops = native.NativeOps()
        self._draw = ops.draw
        return "native", runner(ops)

    def _no_kernels(self) -> str:
        """Why the compiled kernels cannot serve this model here; empty if they can."""
        config = self._module.config
        if self.device.type != "cpu":
            return "not on a CPU"
        if not native.fits(shape_of(config), config.hidden_size, config.intermediate_size):
            return "sizes that the kernels do not handle"
        return compiled.why_not()

    # --- weights

    @property
    def wants(self) -> Share:
        return "model" if self._adapter is None else "trained" if self._has_base else "parts"

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies a full state dict in place. Names as in the module's own; of tied weights one name is enough.

        ValueError names what is missing, unknown or of another shape, Overflow what is not finite; the engine then
        refuses to sample until a load succeeds.
        """
        self.version = None
        alone = self.wants == "trained"
        self._has_base = alone
        known = {**dict(self._module.named_buffers()), **self._named}
        filled: dict[int, str] = {}
        unknown: list[str] = []
        with torch.inference_mode():
            for name, tensor in named_tensors:
                own = known.get(name)
                if own is None:
                    unknown.append(name)
                    continue
                if own.shape != tensor.shape:
                    raise ValueError(
                        f"weight {name!r} has shape {list(tensor.shape)}, the engine's model has {list(own.shape)}: "
                        "engine and weights come from different configurations."
                    )
                if id(own) in filled:
                    self._same(name, filled[id(own)], tensor, own)
                    continue
                own.copy_(tensor)
                filled[id(own)] = name
            wanted = {name: own for name, own in self._named.items() if not alone or is_adapter(name)}
            missing = [name for name, own in wanted.items() if id(own) not in filled]
            if unknown or missing:
                raise ValueError(
                    "the weights do not fit the engine's model: "
                    + "; ".join(
                        f"{what}: {_some(names)}"
                        for what, names in (("missing", missing), ("unknown", unknown))
                        if names
                    )
                    + ". Send the full state dict of the same architecture, under its Hugging Face names."
                )
            self._refuse_overflow({name: known[name] for name in filled.values()})
            self._runner.refresh()
        self._has_base = self._adapter is not None
        self.version = version

    def _refuse_overflow(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights may arrive cast already, so an overflow shows in what is held, whatever the dtype that was sent."""
        floats = [(name, t) for name, t in tensors.items() if t.is_floating_point() and t.numel()]
        # NaN goes through both. One reduction a tensor is 15 times cheaper than isfinite, and one wait serves them all.
        ends = torch.stack([end.float() for _, t in floats for end in t.aminmax()]).view(-1, 2)
        bad = [name for (name, _), ok in zip(floats, ends.isfinite().all(-1).tolist(), strict=True) if not ok]
        if not bad:
            return
        rollout = self.precision.rollout
        remedy = "look at the training run's gradient norms, or lower the learning rate"
        if rollout == Format.FP16:
            remedy = (
                f"set precision to 'bf16' or 'fp32', for training and rollout alike; if it happens there too, {remedy}"
            )
        raise Overflow(
            f"weights not finite in the rollout format {rollout.value!r}, which ends at {rollout.largest:.6g}: "
            f"{_some(bad)}. Remedy: {remedy}."
        )

    def _same(self, name: str, other: str, tensor: Tensor, own: Tensor) -> None:
        """Two names of one tied weight must carry one value."""
        if not torch.equal(tensor.to(own), own):
            raise ValueError(
                f"weights {name!r} and {other!r} are tied in the engine's model but differ in what was sent. Set "
                "tie_word_embeddings to false in the model's config.json, or send the tied weight once."
            )

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        """``("rollout", name, tensor)`` for every weight. The fused projections are these very tensors, joined."""
        for name, tensor in self._named.items():
            yield "rollout", name, tensor

    # --- sampling

    def _check(self, prompts: Sequence[tuple[Sequence[int], int]]) -> int:
        """Refuses prompts that cannot be run; `prompts` are ids and how many tokens follow. The version loaded."""
        if self.version is None:
            raise ValueError("the engine has no weights yet, or its last load failed: call load_weights first.")
        context = getattr(self._text, "max_position_embeddings", None)
        for index, (ids, more) in enumerate(prompts):
            if len(ids) == 0:
                raise ValueError(f"prompt {index} is empty: a causal model needs at least one token to start from.")
            if min(ids) < 0 or max(ids) >= self._text.vocab_size:
                raise ValueError(
                    f"prompt {index} holds token id {max(ids) if min(ids) >= 0 else min(ids)}, but the model has "
                    f"{self._text.vocab_size} tokens: the tokenizer and the model do not belong together."
                )
            if context is not None and len(ids) + more > context:
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens, and with {more} tokens of response it exceeds the "
                    f"model's context of {context}. Shorten or drop the prompt, or lower max_tokens to "
                    f"{max(context - len(ids), 0)} or less."
                )
        return self.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order. ValueError on bad input, Overflow on logits that are not finite."""
        sampler.check(sampling)
        version = self._check([(prompt.ids, sampling.max_tokens) for prompt in prompts])
        if not prompts:
            return []
        with torch.inference_mode():
            drawn = continuous.run(
                self._runner,
                prompts,
                sampling,
                max_batch=self.max_batch,
                draw=self._draw,
                uniforms=sampler.uniforms,
                device=self.device,
            )
        return [
            Completion(
                prompt_ids=prompt.ids,
                response_ids=tuple(ids),
                logp=logp,
                finish="stop" if ids[-1] in sampling.stop_token_ids else "length",
                version=version,
                experts=experts,
            )
            for prompt, (ids, logp, experts) in zip(prompts, drawn, strict=True)
        ]

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling) -> list[Tensor]:
        """log mu ``[T]`` of each response's tokens given its prompt, by forward passes over whole sequences.

        A token outside what top-p or top-k leave has log-probability -inf.
        """
        sampler.check(sampling)
        self._check([(prompt, len(response)) for prompt, response in sequences])
        self._check([(response, 0) for _, response in sequences if len(response)])
        out = [torch.empty(len(response)) for _, response in sequences]
        # Similar lengths together, so that little is padded.
        order = sorted((i for i, (_, r) in enumerate(sequences) if len(r)), key=lambda i: sum(map(len, sequences[i])))
        with torch.inference_mode():
            for batch in _under_budget(order, [len(p) + len(r) for p, r in sequences]):
                chosen = [sequences[i] for i in batch]
                targets = pad_sequence([torch.tensor(response) for _, response in chosen], batch_first=True)
                logp = torch.empty(targets.shape)
                for row, place, logits in self._runner.response_logits(chosen):
                    tokens = targets[row, place].to(self.device)
                    logp[row, place] = sampler.log_mu(logits, tokens, sampling).cpu()
                for row, i in enumerate(batch):
                    out[i] = logp[row, : len(sequences[i][1])].clone()
        for index, logp in enumerate(out):
            if bool(logp.isnan().any()):
                raise Overflow(
                    f"sequence {index}: its logits are not finite. The weights or activations have most likely "
                    "overflowed the rollout format: set precision to 'bf16' or 'fp32', or look at the training run's "
                    "gradient norms."
                )
        return out

    # --- context manager

    def members(self) -> Sequence[Self]:
        return [self]

    def rest(self) -> None:
        """Holds the weights only; the cache is made anew for each call and is gone already."""

    def close(self) -> None:
        """Frees the weights. The engine cannot be used afterwards."""
        self.version = None
        self._named.clear()
        del self._runner, self._module


def _under_budget(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cuts indices, sorted by length, into batches whose padded size stays under SCORE_TOKENS."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[index] > SCORE_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
