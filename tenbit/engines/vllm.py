"""vLLM as the rollout policy: what people deploy, and the paper's mu.

    with VllmEngine(model, Precision.parse("fp16"), recipe.rollout) as engine:
        engine.load_weights(precision.to_engine(backend.weights(share=engine.wants)), version=0)
        completions = engine.generate([Prompt(ids, seed=0)], Sampling(max_tokens=128))

It starts with random weights, made from the configuration that the trainer has in memory, so the only weights it can
ever sample from are those it was sent. They are installed in the live engine without touching the disk, every tensor's
checksum is read back (`delivery.py`), and the prefix cache is emptied, which is tried out, not assumed.

Token ids go in and come out; there is no tokenizer inside. Log-probabilities are those of the distribution that was
sampled from ("processed": after temperature and truncation). vLLM runs in this process, or in one of its own
(`rollout.vllm.own_process`), where weights travel through shared memory.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from tenbit import world
from tenbit.closing import Closing
from tenbit.engines import sampling as sampler
from tenbit.engines import vllm_fit
from tenbit.engines.delivery import Report, Sent, checksum, compare, formats
from tenbit.engines.vllm_experts import Routing
from tenbit.engines.vllm_lora import Apart
from tenbit.engines.vllm_ranks import Team, as_if_alone, executor, is_guest, team_size
from tenbit.engines.vllm_start import (
    arguments,
    captured_errors,
    deaf_children,
    environment,
    explain,
    refuse_differences,
    refuse_gaps,
    refuse_shared_classes,
    refuse_tokens,
    root_cause,
    shared_file,
    tied_names,
    unfit,
)
from tenbit.engines.vllm_watch import Watch
from tenbit.models.loading import Model
from tenbit.models.lora import plain
from tenbit.precision import Precision
from tenbit.recipe import RolloutSpec
from tenbit.types import Completion, EngineFailed, Overflow, Prompt, Sampling, Share, Undelivered

_NOT_FOLLOWED = (
    ". This was the first update: vLLM's loader may do something with this architecture that is not known here. "
    "rollout.engine = 'torch' knows them all"
)
_in_this_process: set[VllmEngine] = set()


class VllmEngine(Closing):
    """An `Engine` over vLLM. `longest` is the longest prompt and response together that it must hold."""

    def __init__(
        self, model: Model, precision: Precision, rollout: RolloutSpec, seed: int = 0, longest: int | None = None
    ) -> None:
        adapter = model.adapter if model.adapter is not None and model.adapter.apart else None
        vllm_fit.refuse(precision, model.module, adapter is not None)
        self.precision, self.version = precision, None
        self._spec = rollout.vllm
        self._context = min(longest or model.context, model.context)
        self._vocabulary = model.vocabulary
        self._names = {name: t.shape for name, t in plain(model.module.state_dict().items())}
        self._tied, self._routing = tied_names(model), Routing(model)
        self._apart = Apart(model, adapter, precision) if adapter is not None else None
        self._gpu = model.device.type == "cuda"
        self._asleep = False
        self._team = Team(team_size(self._spec))
        workers = self._spec.parallel("tensor") * self._spec.parallel("pipeline")
        within = self._team.size > 1 or workers == 1  # one worker, in this process
        self._remote = self._spec.own_process or not within
        self._installed: list[Report] = []
        self._dead: str | None = None
        self._llm, self._params = _start(model, precision, rollout, seed, self._context, self._team)
        self._watch = Watch(self._llm.llm_engine.engine_core) if self._spec.own_process else None
        if not self._spec.own_process:
            _in_this_process.add(self)
        self._config = self._llm.llm_engine.vllm_config
        self._block = int(self._config.cache_config.block_size)
        try:
            self._refuse_differences()
        except ValueError:
            self.close()
            raise

    def _refuse_differences(self) -> None:
        """What vLLM made of its arguments and of the model, held against the plan. Raises ValueError."""
        if not self._remote:
            refuse_shared_classes(self._config, self._llm.collective_rpc("tenbit_model_module")[0])
        refuse_differences(self._config, self.precision, self._vocabulary)

    # --- weights

    @property
    def wants(self) -> Share:
        return "model" if self._apart is None else "trained" if self._apart.has_base else "parts"

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Installs a full state dict, or an adapter, in place and proves that it arrived.

        Raises ValueError on missing or unknown names, Overflow on weights that are not finite in the rollout format,
        Undelivered if the engine holds anything else than was sent; it then refuses to sample until a load succeeds.
        """
        self.version = None
        first = not self._installed
        self._wake("weights")
        if not self._asleep and not first:
            self._marker()  # fills the cache under the old weights, for the trial below
        refused: list[Exception] = []
        named = iter(named_tensors) if self._apart is None else self._apart.divert(named_tensors, refused)
        installed = self._installed if self.wants == "trained" else self._whole(named, refused, first)
        list(named)  # an adapter that comes alone
        if refused:
            raise refused[0]
        if self._apart is not None:
            self._apart.install(self._call, self._llm, importlib.import_module("vllm.lora.request").LoRARequest)
        self._wake("kv_cache")
        self._asleep = False
        self._forget()
        self._installed = installed
        self.version = version

    def _whole(self, named: Iterator[tuple[str, Tensor]], refused: list[Exception], first: bool) -> list[Report]:
        """All weights of the model, proven to be there."""
        sent: dict[str, Sent] = {}
        installed = self._team.reports(lambda: self._install(self._checked(named, sent, refused)), named)
        if refused:
            raise refused[0]
        refuse_gaps(sent, self._names, self._tied)
        try:
            compare(sent, installed, self._tied)
        except Undelivered as error:
            raise Undelivered(f"{error}{_NOT_FOLLOWED}" if first else str(error)) from None
        return installed

    def _checked(
        self, named: Iterable[tuple[str, Tensor]], sent: dict[str, Sent], refused: list[Exception]
    ) -> Iterator[tuple[str, Tensor]]:
        """Passes weights on and notes their checksums; ends at the first that does not fit, with the reason noted.

        Raising here would leave vLLM's model in pieces; ended early, it is whole, and the next load can mend it.
        """
        for name, tensor in named:
            held = tensor.to(self.precision.rollout.dtype) if tensor.is_floating_point() else tensor
            refused += unfit(name, held, self._names, self.precision.rollout)
            if refused:
                return
            sent[name] = Sent(checksum(held), held.numel())
            yield name, tensor

    def _install(self, named: Iterator[tuple[str, Tensor]]) -> list[Report]:
        doing = "a weight update"
        if not self._remote:
            return [Report.of(r) for r in self._call(doing, self._llm.collective_rpc, "tenbit_install", args=(named,))]
        with shared_file() as file:
            save_file({name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in named}, file)
            found = self._call(doing, self._llm.collective_rpc, "tenbit_install_file", args=(str(file),))
            return [Report.of(r) for r in found]

    def _forget(self) -> None:
        """Empties the prefix cache, then asks for a prompt that was in it: none of it may come from there."""
        emptied = self._call("a weight update", self._llm.reset_prefix_cache)
        kept = self._marker()
        if not emptied or kept:
            raise Undelivered(
                f"weight update: the prefix cache was not emptied ({kept} tokens of a trial prompt were still there): "
                "responses would mix keys and values of old weights with the new ones. Set "
                "rollout.vllm.options.enable_prefix_caching = false"
            )

    def _marker(self) -> int:
        """Runs a prompt of more than two cache blocks; says how many of its tokens came from the cache."""
        length = min(2 * self._block + 1, self._context - 1)
        ids = [(7 * i) % self._vocabulary for i in range(length)]
        asked = self._params(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
        (out,) = self._generate("a weight update", [{"prompt_token_ids": ids}], asked)
        return int(out.num_cached_tokens or 0)

    def members(self) -> Sequence[Self]:
        return [self]

    def rest(self) -> None:
        """Gives the GPU's memory back until the next `load_weights`; on a CPU there is nothing to give back."""
        if self._gpu and self._spec.sleep and not self._asleep:
            self.version = None
            # the weights will be sent anew, so they need not be kept; but a base is sent once
            self._call("going to sleep", self._llm.sleep, level=2 if self._apart is None else 1)
            self._asleep = True

    def _wake(self, what: str) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # what training has freed, its allocator still holds
            self._call("waking up", self._llm.wake_up, tags=[what])

    def live(self) -> Iterator[tuple[str, str, Tensor]]:
        """What was installed last, as empty tensors of its shape and dtype."""
        yield from (("rollout", name, empty) for name, empty in formats(self._installed))
        yield from self._apart.live() if self._apart is not None else ()

    # --- sampling

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in order. ValueError on bad input, Overflow on logits that are not finite."""
        sampler.check(sampling)
        version = self._check([(p.ids, sampling.max_tokens) for p in prompts])
        if not prompts:
            return []
        rpc = partial(self._call, "sampling", self._llm.collective_rpc)
        more = self._routing.begin(sampling, rpc)
        asked = [self._asked(sampling, seed=p.seed, **more) for p in prompts]
        outs = self._generate("sampling", [{"prompt_token_ids": list(p.ids)} for p in prompts], asked)
        every = zip(prompts, outs, self._routing.end(sampling, outs, rpc), strict=True)
        drawn = [self._completion(p, out.outputs[0], sampling, version, experts) for p, out, experts in every]
        return self._repaired(drawn, sampling)

    def _asked(self, sampling: Sampling, **more: Any) -> Any:
        return self._params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # what ends a response is in stop_token_ids, on both sides
            detokenize=False,
            logprobs=0,
            flat_logprobs=True,
            **more,
        )

    def _completion(self, prompt: Prompt, drawn: Any, sampling: Sampling, version: int, experts: Any) -> Completion:
        ids = tuple(drawn.token_ids)
        values = drawn.logprobs.logprobs
        if len(values) != len(ids) or not ids:
            raise EngineFailed(f"vLLM returned {len(values)} log-probabilities for {len(ids)} tokens")
        # at temperature 0 the distribution is a point mass; vLLM reports the untempered one
        logp = torch.zeros(len(ids)) if sampling.temperature == 0 else torch.tensor(values)
        finish = "stop" if ids[-1] in sampling.stop_token_ids else "length"
        return Completion(prompt.ids, ids, logp, finish, version, experts=experts)

    def _repaired(self, drawn: list[Completion], sampling: Sampling) -> list[Completion]:
        """Log-probabilities that are not finite are scored again, and counted; if they stay so, that is an overflow."""
        bad = [i for i, c in enumerate(drawn) if not bool(c.logp.isfinite().all())]
        if not bad:
            return drawn
        scores = self.score([(drawn[i].prompt_ids, drawn[i].response_ids) for i in bad], sampling)
        for i, logp in zip(bad, scores, strict=True):
            broken = ~drawn[i].logp.isfinite()
            if not bool(logp[broken].isfinite().all()):
                raise Overflow(
                    f"prompt {i}: vLLM gave tokens that it drew a probability of zero. Weights or activations have "
                    "most likely overflowed the rollout format: set precision to 'bf16' or 'fp32'"
                )
            fixed = torch.where(broken, logp, drawn[i].logp)
            drawn[i] = replace(drawn[i], logp=fixed, repaired=int(broken.sum()))
        return drawn

    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling) -> list[Tensor]:
        """log mu ``[T]`` of each response's tokens given its prompt, as vLLM's prefill computes it."""
        sampler.check(sampling)
        self._check([(prompt, len(response)) for prompt, response in sequences])
        self._check([(response, 0) for _, response in sequences if len(response)])
        asked = self._params(temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        out = [torch.empty(len(response)) for _, response in sequences]
        places = [i for i, (_, response) in enumerate(sequences) if len(response)]
        texts = [{"prompt_token_ids": [*sequences[i][0], *sequences[i][1]]} for i in places]
        if not texts:
            return out
        how = (sampling.temperature, sampling.top_p, sampling.top_k)
        self._call("scoring", self._llm.collective_rpc, "tenbit_begin_scoring", args=how)
        scored = self._generate("scoring", texts, asked)
        self._call("scoring", self._llm.collective_rpc, "tenbit_end_scoring")
        for i, result in zip(places, scored, strict=True):
            values = result.prompt_logprobs.logprobs
            out[i] = torch.tensor(values[len(values) - len(sequences[i][1]) :])
            if bool(out[i].isnan().any()):
                raise Overflow(
                    f"sequence {i}: its logits are not finite. The weights or activations have most likely overflowed "
                    "the rollout format: set precision to 'bf16' or 'fp32'"
                )
        return out

    def _check(self, asked: Iterable[tuple[Sequence[int], int]]) -> int:
        """Refuses calls without weights, ids outside the vocabulary, and what exceeds the context; the version."""
        if self.version is None:
            raise ValueError("the engine has no weights, or is asleep: call load_weights before it samples or scores.")
        refuse_tokens(asked, self._vocabulary, self._context)
        return self.version

    # --- life and death

    def _generate(self, doing: str, texts: list[Any], asked: Any) -> list[Any]:
        adapter = self._apart.request if self._apart is not None else None
        with self._team.shared_fate():
            return self._call(doing, self._llm.generate, texts, asked, use_tqdm=False, lora_request=adapter)

    def _call(self, doing: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Every call into vLLM: whatever it dies of becomes one error with its cause, and it is not called again.

        An engine that failed half-way, or was stopped by Ctrl-C, keeps requests that would go on in the next call.
        """
        if self._dead is not None:
            raise EngineFailed(f"vLLM is not called again after it stopped working: {self._dead}")
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            ended = self._watch.cause if self._watch is not None else None
            self.version, self._dead = None, ended or f"{type(error).__name__}: {root_cause(error)}"
            if not isinstance(error, Exception):
                raise
            hint = "" if self._installed else _NOT_FOLLOWED
            raise EngineFailed(f"vLLM stopped working during {doing}: {self._dead}{hint}") from error

    def close(self) -> None:
        """Stops vLLM and frees its memory. The engine cannot be used afterwards."""
        self.version = None
        llm = self.__dict__.pop("_llm", None)
        if llm is None:
            return
        if self._watch is not None:
            self._watch.close()
        _in_this_process.discard(self)
        with contextlib.suppress(Exception):  # it may have died already
            if self._spec.own_process or not (_in_this_process or is_guest()):
                llm.llm_engine.engine_core.shutdown()
            else:  # a full shutdown would take down the process group that others here use
                llm.llm_engine.engine_core._finalizer.detach()
                llm.collective_rpc("shutdown")
        del llm
        gc.collect()
        if self._gpu:
            torch.cuda.empty_cache()


def _start(
    model: Model, precision: Precision, rollout: RolloutSpec, seed: int, context: int, team: Team
) -> tuple[Any, Any]:
    """vLLM with random weights, made from the trainer's own configuration; and its class of sampling parameters."""
    own = rollout.vllm.own_process
    if team.size > 1 and _in_this_process:
        raise ValueError(
            "rollout.vllm.options.tensor_parallel_size: a second vLLM beside one that is spread over ranks (for "
            "compare.precisions, say) would need all of them. Set compare.precisions = [], or tensor_parallel_size = 1"
        )
    # the first engine of a process makes groups, which takes all ranks; later ones use them
    fate = Team(1 if own or _in_this_process else world.size()).shared_fate()
    with fate, tempfile.TemporaryDirectory(prefix="tenbit-vllm-") as folder:
        config = copy.deepcopy(model.module.config)
        config.architectures = [type(model.module).__name__]
        config.save_pretrained(folder)
        told = arguments(folder, model, precision, rollout, seed, context)
        if own:
            with as_if_alone(model.device.type == "cuda"):
                return _opened(told, model, rollout)
        return _opened(told, model, rollout, team if world.size() > 1 else None)


def _opened(told: dict[str, Any], model: Model, rollout: RolloutSpec, team: Team | None = None) -> tuple[Any, Any]:
    environment(own_process=rollout.vllm.own_process)
    set_threads = torch.set_num_threads  # vLLM's CPU worker puts a function in its place that does nothing
    with captured_errors() as said, deaf_children():
        try:
            vllm: Any = importlib.import_module("vllm")
            vllm_fit.register()
            if team is not None:
                uniproc = importlib.import_module("vllm.v1.executor.uniproc_executor")
                told = told | {"distributed_executor_backend": executor(uniproc, team)}
            with vllm_fit.fp16_allowed(told):
                return vllm.LLM(**told), vllm.SamplingParams
        except Exception as error:  # of a dozen kinds, of which the text is what helps
            if not (rollout.vllm.own_process or _in_this_process) and "vllm" in sys.modules:
                # else its groups, which depend on the architecture, would meet the next engine of this process
                importlib.import_module("vllm.distributed.parallel_state").destroy_model_parallel()
            raise ValueError(explain(error, said(), rollout, model)) from error
        finally:
            torch.set_num_threads = set_threads
