"""The values that travel through a run: what is asked, what was sampled, what is trained on.

    Problem -> Prompt -> Completion -> Rollout -> Batch

Token ids and the sampler's log-probabilities travel together from `Completion` to `Batch`; text is never
tokenised a second time on the way. Everything here is a frozen value. Shapes: ``B`` rows (sequences),
``L`` tokens of prompt and response together, ``T`` response tokens, all padded on the right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Finish = Literal["stop", "length"]

Share = Literal["model", "parts", "trained"]
"""Which weights: the model's own, adapters merged in; frozen ones and adapters apart; those that are trained alone.
Where all weights are trained the three are the same. An engine says by `wants` which it takes next."""


@dataclass(frozen=True)
class Problem:
    """One row of a data set. `id` says where it came from, as ``file.jsonl:12``, for messages and samples."""

    prompt: str
    answer: str
    id: str


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `top_k` 0 and `top_p` 1 truncate nothing.

    A response ends with the first of `stop_token_ids`, which belongs to the response and has a log-probability
    like any other token, or after `max_tokens` tokens. `experts` asks a mixture's engine which experts each token took.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    experts: bool = False

    @property
    def truncated(self) -> bool:
        """Whether the sampled distribution is renormalised over a part of the vocabulary."""
        return self.top_p < 1.0 or self.top_k > 0


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and the seed of the one response that is drawn for it.

    The response is a function of weights, ids and seed, not of the other prompts in the same call.
    """

    ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What an engine drew for one prompt.

    `response_ids` holds T ids, a stop token included; `logp` is ``[T]`` float32 on the CPU: log mu of each of
    them under the distribution that was sampled from (temperature and truncation applied). `version` counts the
    weight updates the engine had received, `repaired` the tokens whose log-probability was not finite and was scored
    again. `experts` are those that a mixture's routers chose, ``[tokens, layers, k]`` int16 on the CPU, for the prompt
    and the response but its last token, which was never an input; None where nobody asked, or the engine cannot say.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logp: Tensor
    finish: Finish
    version: int = 0
    repaired: int = 0
    experts: Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.response_ids)


@dataclass(frozen=True)
class Rollout:
    """A graded completion. `reward` is what is optimised, `correct` what accuracy counts."""

    problem: Problem
    completion: Completion
    text: str
    reward: float
    correct: bool
    group: int


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together.

    tokens          [B, L] int64, prompt then response then padding
    prompt_length   [B]    int64; response token t of row b is ``tokens[b, prompt_length[b] + t]``
    mask            [B, T] bool, true on response tokens (the stop token is one)
    logp_rollout    [B, T] float32, log mu(y_t | theta'), 0 outside the mask
    advantage       [B]    float32
    logp_old        [B, T] float32, log pi(y_t | theta'), or None for objectives that do not need it
    experts         [B, L, layers, k] int16, those that each token took at sampling, -1 where unknown; or None
    """

    tokens: Tensor
    prompt_length: Tensor
    mask: Tensor
    logp_rollout: Tensor
    advantage: Tensor
    logp_old: Tensor | None = None
    experts: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> Tensor:
        """[B] int64: tokens of prompt and response, without padding."""
        return self.prompt_length + self.mask.sum(-1)

    def to(self, device: torch.device | str) -> Batch:
        moved = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)

    def with_old(self, logp_old: Tensor) -> Batch:
        return replace(self, logp_old=logp_old)


@dataclass(frozen=True)
class Totals:
    """What a loss is divided by: counts over the *whole* batch of one gradient step, on all ranks.

    Losses that arrive already divided by these only ever add up, over micro-batches and over ranks.
    """

    sequences: int
    tokens: int
    max_response_length: int


@dataclass(frozen=True)
class Stat:
    """A sum that can be merged: over micro-batches, then over ranks. Empty statistics merge to nothing."""

    total: float = 0.0
    count: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, values: Tensor) -> Stat:
        if values.numel() == 0:
            return cls()
        v = values.detach().double()
        return cls(float(v.sum()), float(v.numel()), float(v.min()), float(v.max()))

    def __add__(self, other: Stat) -> Stat:
        return Stat(
            self.total + other.total,
            self.count + other.count,
            min(self.low, other.low),
            max(self.high, other.high),
        )

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


Stats = dict[str, Stat]


def merge(parts: Iterable[Mapping[str, Stat]]) -> Stats:
    """Adds up statistics by name."""
    out: Stats = {}
    for part in parts:
        for name, stat in part.items():
            out[name] = out[name] + stat if name in out else stat
    return out


class Overflow(RuntimeError):
    """A model's numbers left the range of the format it runs in. The message says where, and what to do."""


class EngineFailed(RuntimeError):
    """An engine stopped working in the middle of a run. The message holds the cause; no weights were changed."""


class Undelivered(EngineFailed):
    """An engine does not hold the weights that were sent to it. The message names the tensor, or the canary."""
