"""A run's whole configuration, one frozen value: read from TOML, overridden by key=value, written back as resolved.

    recipe = Recipe.load("recipes/demo.toml", ["precision=bf16", "optim.lr=2e-5"])
    recipe.dump(folder / "recipe.toml")

Unknown keys are refused with the nearest known one; every message names the file, the key and the remedy.
A recipe holds no derived state: `recipe.algorithm.build()` and `recipe.sampling(...)` make the values that
the run works with.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tenbit.advantages import ADVANTAGES
from tenbit.algorithms import ALGORITHMS, CISPO, PG, Algorithm, Reduction
from tenbit.keys import explain, one_of, override
from tenbit.lora_spec import LoraSpec
from tenbit.precision import Precision
from tenbit.signals import WatchSpec
from tenbit.types import Sampling


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(_Section):
    """Which model, and how it is held while training."""

    path: str = Field("builtin", description="a Hugging Face model folder or name; 'builtin' is the one in the package")
    pad_token: str | None = Field(None, description="for tokenizers that have none")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention while training")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    device: str = Field("auto", description="'cuda' where there is one, else 'cpu'")


class TaskSpec(_Section):
    """Problems, how they are put to the model, and how answers are judged."""

    data: str = Field(
        "arithmetic_perfectible", description="a shipped set's name, a .jsonl or .parquet file, a dataset"
    )
    problem_key: str = "problem"
    answer_key: str = "answer"
    split: str = Field("train", description="of a Hugging Face dataset")
    limit: int | None = Field(None, ge=1, description="use only the first so many problems")
    template: str = Field("plain", description="plain, chat, r1-distill, qwen-math, ... or a text with {problem}")
    drop_long_prompts: bool = Field(
        False, description="leave out prompts that do not fit the context, instead of failing"
    )
    grader: str = Field("math", description="math (Math-Verify), exact, or your own module:function")
    grade_workers: int = Field(2, ge=1)
    grade_timeout: float = Field(5.0, gt=0, description="seconds for one answer; longer counts as wrong")
    failed_reward: float = Field(0.0, description="of an answer whose grading hangs, crashes or raises")


class VllmSpec(_Section):
    """How vLLM is started, for rollout.engine = "vllm". Everything else it is told follows from the recipe."""

    memory: float = Field(0.4, gt=0, lt=1, description="share of the GPU's memory for weights and cache")
    cache_gib: float | None = Field(
        None, gt=0, description="the cache for keys and values; None: by `memory` on a GPU, 1 GiB on a CPU"
    )
    eager: bool = Field(False, description="no CUDA graphs: a faster start, slower sampling")
    sleep: bool = Field(True, description="free the GPU's memory while training (vLLM's sleep and wake)")
    own_process: bool = Field(False, description="run the engine in a process of its own")
    options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="more arguments of vllm.LLM, such as tensor_parallel_size"
    )

    def parallel(self, kind: Literal["tensor", "pipeline", "data"]) -> int:
        """Over how many workers one engine is spread in this way."""
        return int(self.options.get(f"{kind}_parallel_size", 1))


class RaySpec(_Section):
    """The pool of engines behind rollout.engine = "ray". The cluster is RAY_ADDRESS's, or a local one."""

    engine: Literal["torch", "vllm"] = Field("vllm", description="what the pool is made of")
    engines: int | None = Field(None, ge=1, description="how many; None: as many as the cluster has room for")
    gpus: float | None = Field(None, ge=0, description="for each; None: what tensor parallelism needs, 0 without GPUs")
    cpus: float = Field(1.0, ge=0, description="for each")
    chunk: int | None = Field(None, ge=1, description="prompts handed out at a time; None: a quarter of an even share")
    restarts: int = Field(8, ge=0, description="engines that may die and be replaced in one run")


class RolloutSpec(_Section):
    """Sampling under mu. `prompts` x `samples` responses make one step's batch."""

    engine: Literal["torch", "vllm", "ray"] = Field("torch", description="the built-in engine, vLLM, or a pool of them")
    vllm: VllmSpec = Field(default_factory=lambda: VllmSpec.model_validate({}))
    ray: RaySpec = Field(default_factory=lambda: RaySpec.model_validate({}))
    ahead: int = Field(0, ge=0, description="steps that sampling may be ahead of training; 0: strictly on-policy")
    rescored: int = Field(16, ge=1, description="with ahead: responses a step scored again under the weights they had")
    replay: bool = Field(False, description="a mixture's experts as chosen at sampling are used again in training")
    prompts: int = Field(64, ge=1)
    samples: int = Field(8, ge=1, description="G, responses per prompt")
    max_tokens: int = Field(ge=1, description="the longest response; Dr.GRPO's constant")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    stop_tokens: tuple[str, ...] = Field((), description="besides the model's own end-of-sequence tokens")
    max_batch: int = Field(256, ge=1, description="sequences that the engine decodes at a time")
    dynamic_sampling: bool | None = Field(None, description="drop groups of equal rewards; None: as the algorithm says")
    max_rounds: int = Field(10, ge=1, description="generation batches that dynamic sampling may use for one step")
    overlong_buffer: int | None = Field(None, ge=0, description="DAPO's soft punishment; None: as the algorithm says")
    overlong_penalty: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _untruncated(self) -> RolloutSpec:
        if self.top_p < 1 or self.top_k > 0:
            raise ValueError(
                f"rollout.top_p = {self.top_p}, rollout.top_k = {self.top_k}: a truncated distribution is not the "
                "policy that is trained; its log-probabilities cannot be compared with the trainer's. Use top_p = 1 "
                "and top_k = 0 here (evaluation may truncate: eval.top_p)"
            )
        if self.overlong_buffer is not None and self.overlong_buffer > self.max_tokens:
            raise ValueError(f"rollout.overlong_buffer = {self.overlong_buffer} is longer than rollout.max_tokens")
        return self

    @property
    def kind(self) -> str:
        """What samples in the end: "torch" or "vllm", in a pool, too."""
        return self.ray.engine if self.engine == "ray" else self.engine


class AlgorithmSpec(_Section):
    """A published algorithm by name; every other key changes one of its parts."""

    name: str = "pg-is"
    cap: float | None = Field(None, gt=0, le=1e8, description="C, the correction's threshold")
    floor: float | None = Field(None, ge=0, description="the lower threshold of a mask")
    clip_low: float | None = Field(None, ge=0, le=1)
    clip_high: float | None = Field(None, ge=0)
    clip_dual: float | None = Field(None, gt=1)
    advantage: str | None = Field(None, description=", ".join(ADVANTAGES))
    reduction: Reduction | None = Field(None, description=", ".join(get_args(Reduction)))

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return one_of("algorithm.name", name, ALGORITHMS)

    @field_validator("advantage")
    @classmethod
    def _known_advantage(cls, name: str | None) -> str | None:
        return name if name is None else one_of("algorithm.advantage", name, ADVANTAGES)

    @model_validator(mode="after")
    def _applies(self) -> AlgorithmSpec:
        self.build()
        return self

    def build(self) -> Algorithm:
        """The algorithm with its changed parts. Raises ValueError for a key that the algorithm has no use for."""
        algorithm = ALGORITHMS[self.name]
        objective = algorithm.objective
        bounds = _given(cap=self.cap, floor=self.floor)
        if bounds:
            correction = None if isinstance(objective, CISPO) else objective.correction
            if isinstance(objective, CISPO) or correction is None or correction.beyond == "keep":
                raise ValueError(f"algorithm.{next(iter(bounds))}: {self.name!r} has no threshold. Remove the key")
            if "floor" in bounds and correction.beyond != "mask":
                raise ValueError(f"algorithm.floor: {self.name!r} truncates and has no floor. Remove the key")
            if bounds.get("floor", correction.floor) >= bounds.get("cap", correction.cap):
                raise ValueError("algorithm.floor is not below algorithm.cap: every response would be rejected")
            objective = replace(objective, correction=replace(correction, **bounds))
        clips = _given(low=self.clip_low, high=self.clip_high, dual=self.clip_dual)
        if clips:
            if isinstance(objective, PG):
                raise ValueError(f"algorithm.clip_{next(iter(clips))}: {self.name!r} does not clip. Remove the key")
            if "dual" in clips and isinstance(objective, CISPO):
                raise ValueError(f"algorithm.clip_dual: {self.name!r} drops no gradient. Remove the key")
            objective = replace(objective, clip=replace(objective.clip, **clips))
        parts = _given(advantage=self.advantage, reduction=self.reduction)
        return replace(algorithm, objective=objective, **parts)


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSpec(_Section):
    """AdamW on the FP32 masters, and how a step's rollouts are cut into gradient steps and micro-batches."""

    lr: float = Field(1e-6, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0, description="gradient steps from 0 to lr")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after warm-up, down to 0")
    max_grad_norm: float = Field(1.0, gt=0)
    updates: int = Field(4, ge=1, description="gradient steps on one step's rollouts")
    token_budget: int = Field(8192, ge=1, description="padded tokens in one micro-batch")

    def lr_at(self, update: int, total: int) -> float:
        """Learning rate of gradient step `update` (0, 1, ...; skipped steps do not count) of `total`."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (update - self.warmup) / max(1, total - self.warmup))
        return self.lr * (1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class BackendSpec(_Section):
    """What trains: one process, or the processes that torchrun started."""

    name: Literal["auto", "single", "fsdp", "deepspeed"] = Field(
        "auto", description="auto: single in one process, fsdp in several"
    )
    stage: Literal[1, 2, 3] = Field(2, description="deepspeed: what ZeRO shards; 3 shards all")
    reshard: bool = Field(
        True, description="fsdp: free a layer's gathered weights after each use; else they stay until the step"
    )
    offload: bool = Field(False, description="keep masters and AdamW's moments in the CPU's memory")


class EvalSpec(_Section):
    """Evaluation during training, on the engine: avg@k and pass@k."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: never")
    data: tuple[str, ...] = Field((), description="sets, as in task.data")
    problem_key: str | None = Field(None, description="None: as in task; shipped sets have their own")
    answer_key: str | None = None
    split: str | None = Field(None, description="of Hugging Face datasets; None: as in task")
    limit: int | None = Field(None, ge=1)
    samples: int = Field(1, ge=1, description="k")
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, description="None: as in rollout")


class CheckpointSpec(_Section):
    """Checkpoints for --resume."""

    every: int = Field(10, ge=0, description="steps between checkpoints; 0: only at the end and on Ctrl-C")
    keep: int = Field(2, ge=1, description="the newest so many stay")


class CompareSpec(_Section):
    """Before training starts: the mismatch of several formats, measured on the same weights."""

    precisions: tuple[str, ...] = Field((), description="such as fp16, bf16")
    prompts: int = Field(32, ge=1)
    samples: int = Field(4, ge=1)


class Recipe(_Section):
    """Everything that determines a run."""

    name: str = Field("run", pattern=r"^\w[\w.-]*$", description="names the run folder")
    seed: int = Field(0, ge=0)
    steps: int = Field(ge=1, description="policy iterations: sample, grade, update")
    log_samples: int = Field(4, ge=0, description="responses written to samples.jsonl at every step")
    precision: Precision = Field(default_factory=lambda: Precision.parse("fp16"))
    model: ModelSpec = Field(default_factory=lambda: ModelSpec.model_validate({}))
    lora: LoraSpec | None = Field(None, description="low-rank adapters; None, or 'none': all weights are trained")
    task: TaskSpec = Field(default_factory=lambda: TaskSpec.model_validate({}))
    rollout: RolloutSpec
    algorithm: AlgorithmSpec = Field(default_factory=lambda: AlgorithmSpec.model_validate({}))
    optim: OptimSpec = Field(default_factory=lambda: OptimSpec.model_validate({}))
    backend: BackendSpec = Field(default_factory=lambda: BackendSpec.model_validate({}))
    eval: EvalSpec = Field(default_factory=lambda: EvalSpec.model_validate({}))
    checkpoint: CheckpointSpec = Field(default_factory=lambda: CheckpointSpec.model_validate({}))
    compare: CompareSpec = Field(default_factory=lambda: CompareSpec.model_validate({}))
    watch: WatchSpec = Field(default_factory=lambda: WatchSpec.model_validate({}))

    @field_validator("precision", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return {"preset": value} if isinstance(value, str) else value

    @field_validator("lora", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value  # TOML has no null, and a command line should be able to drop it

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        baseline = ADVANTAGES[self.algorithm.build().advantage].baseline
        if self.rollout.samples < 2 and baseline != "none":
            raise ValueError(
                f"rollout.samples = {self.rollout.samples}: {self.algorithm.name!r} compares responses to one prompt "
                "with each other. Use at least 2, or algorithm.advantage = 'reward'"
            )
        if self.optim.updates > self.rollout.prompts:
            raise ValueError(
                f"optim.updates = {self.optim.updates} gradient steps cannot be made from rollout.prompts = "
                f"{self.rollout.prompts} groups. Lower the one or raise the other"
            )
        if self.rollout.ahead and self.rollout.engine != "ray":
            raise ValueError(
                f"rollout.ahead = {self.rollout.ahead}: rollout.engine = {self.rollout.engine!r} samples where "
                "training runs, so neither could go on while the other works. Set rollout.engine = 'ray', or "
                "rollout.ahead = 0"
            )
        if self.eval.every and not self.eval.data:
            raise ValueError(
                f"eval.every = {self.eval.every}, but eval.data names no set. Add one, or set eval.every = 0"
            )
        plans = [self.precision, *map(Precision.parse, self.compare.precisions)]
        if self.lora is not None:
            rollout, rounded = self.rollout, any(plan.rounds_weights for plan in plans)
            self.lora.refuse(rollout.kind, rollout.vllm.options.get("tensor_parallel_size", 1), rounded)
        return self

    @property
    def dynamic_sampling(self) -> bool:
        chosen = self.rollout.dynamic_sampling
        return self.algorithm.build().dynamic_sampling if chosen is None else chosen

    @property
    def overlong_buffer(self) -> int:
        chosen = self.rollout.overlong_buffer
        share = self.algorithm.build().overlong_share
        return int(share * self.rollout.max_tokens) if chosen is None else chosen

    def sampling(self, stop_token_ids: Sequence[int]) -> Sampling:
        """How training samples."""
        r = self.rollout
        return Sampling(r.max_tokens, r.temperature, r.top_p, r.top_k, tuple(stop_token_ids), experts=True)

    def eval_sampling(self, stop_token_ids: Sequence[int]) -> Sampling:
        """How evaluation samples."""
        e = self.eval
        return Sampling(e.max_tokens or self.rollout.max_tokens, e.temperature, e.top_p, 0, tuple(stop_token_ids))

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads a TOML file and applies ``key=value`` overrides (``optim.lr=2e-5``). Raises ValueError."""
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"{file}: there is no such recipe. `tenbit recipes FOLDER` lists those in a folder")
        try:
            tree = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not valid TOML: {error}") from None
        for item in overrides:
            override(tree, item)
        return cls.of(tree, str(file))

    @classmethod
    def of(cls, tree: dict[str, Any], source: str = "recipe") -> Recipe:
        """A recipe from nested dictionaries. Raises ValueError with the source, the key and the remedy."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ValueError("\n".join(f"{source}: {explain(e, cls)}" for e in error.errors())) from None

    def tree(self) -> dict[str, Any]:
        """Nested dictionaries without what is None (TOML has no null)."""
        return self.model_dump(mode="json", exclude_none=True)

    def dump(self, path: Path) -> None:
        """Writes the recipe as resolved: reading it again gives an equal recipe."""
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(tomli_w.dumps(self.tree()), encoding="utf-8")
        draft.replace(path)  # a killed run must leave a whole recipe, or none


def _given(**values: Any) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}
