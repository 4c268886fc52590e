"""The canary: a few fixed token sequences that sampler and trainer must agree on after every weight update.

    canary = Canary.of(asked, model, recipe.precision, sampling, longest)
    error = canary.prove(engine, backend)          raises Undelivered

Checksums prove what an engine was given; the canary proves what it computes with, packed layouts and caches included.
Both sides score the same tokens, one sequence being longer than a block of any engine's cache, and the engine draws a
few tokens on top of it. Two things are held against the truth:

    the size      over each sequence, the root mean square of (log pi - log mu) / (1 + |log pi|) stays below 16 times
                  the spacing of the coarser format's numbers around 1, divided by the temperature (measured: 0.1 to 3
                  times), and below 8 times the largest error of the proofs before it
    the movement  since the first proof, log mu must have moved as log pi has: the slope of the one change on the other
                  is 1. A part that is stale moves less. This sees updates smaller than the rounding of one token, as
                  soon as the movement of all tokens together stands out from the rounding

Where training and rollout have different formats, or an adapter is merged into 16-bit weights, small updates may round
away on one side only: then just the first bound holds. In a mixture of experts, where two of them are nearly tied,
rounding may send a token to the other one, on one side, after one update and not after the next. There the size is that
of the three quarters of all tokens that agree best, what was drawn among them (it still varies tenfold from one update
to another, so the errors before count from an eighth of the bound on), and the movement says nothing. A resumed run
begins anew with its first proof.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tenbit import world
from tenbit.backends import Backend
from tenbit.batching import collate, ungraded
from tenbit.engines import Engine
from tenbit.engines.delivery import undelivered
from tenbit.models.experts import is_mixture
from tenbit.models.loading import Model
from tenbit.precision import Format, Precision
from tenbit.prompts import Asked
from tenbit.types import Completion, Prompt, Sampling

LENGTHS = (16, 48, 160)  # vLLM's cache blocks hold 128 tokens on a CPU, 16 on a GPU
DRAWN = 2
ROOM = 16.0  # times the format's spacing
FP32_ROOM = 256.0  # FP32's error is mostly that of the order of summation, which the spacing says less about
JUMP = 8.0  # times the errors before
ROUTED_ROOM = 8.0  # a mixture's errors vary tenfold: those before count from an eighth of the bound on
ROUTED_ALIKE = 0.75  # share of a mixture's tokens that count; at worst a sixth was seen to be routed differently
SLOPE_OFF, SURE = 0.1, 6.0  # how far from 1 a slope may be, besides so many standard errors

Tokens = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Answer:
    """One engine's side of a proof: a response of its own, and log mu ``[T]`` of each sequence."""

    drawn: Completion
    scored: list[Tensor]


@dataclass(frozen=True)
class Expected:
    """The trainer's side: log pi ``[T]`` float64 of each sequence, and of drawn responses."""

    sequences: list[Tensor]
    drawn: dict[tuple[int, ...], Tensor]


@dataclass
class Canary:
    """`sequences` are (first token, the rest), scored by both sides; the engine goes on from `prompt`.

    `bound` is of the relative error. Remembers the proofs before.
    """

    sequences: tuple[Tokens, ...]
    prompt: tuple[int, ...]
    sampling: Sampling
    bound: float
    same_format: bool
    pad_token_id: int
    routed: bool = False  # a mixture of experts
    _first: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _noise: float = 0.0
    _largest: float = 0.0

    @classmethod
    def of(cls, asked: Sequence[Asked], model: Model, precision: Precision, sampling: Sampling, longest: int) -> Canary:
        """From the run's own prompts, one after another. `longest` is what the engine can hold."""
        text = list(itertools.islice(itertools.chain.from_iterable(a.ids for a in asked), max(LENGTHS)))
        text = list(itertools.islice(itertools.cycle(text), max(LENGTHS)))
        lengths = sorted({max(2, min(n, longest - DRAWN)) for n in LENGTHS})
        spacing = precision.spacing
        room = FP32_ROOM if spacing == Format.FP32.epsilon else ROOM
        plain = Sampling(max(1, min(DRAWN, longest - lengths[-1])), sampling.temperature)
        bound = room * spacing / min(1.0, sampling.temperature)
        sequences = tuple(((text[0],), tuple(text[1:n])) for n in lengths)
        prompt = tuple(text[: min(lengths[-1], longest - plain.max_tokens)])
        merged = model.adapter is not None and model.adapter.spec.rollout == "merged"
        same = precision.compute == precision.rollout and not precision.rounds_weights
        same = same and not (merged and precision.rollout != Format.FP32)
        mixture = is_mixture(model.module.config)
        return cls(sequences, prompt, plain, bound, same, model.pad_token_id, mixture)

    def prove(self, engine: Engine, backend: Backend) -> float:
        """The relative error of the engine's current weights, of all its members. Raises Undelivered on every rank if
        on any of them it is no rounding error.
        """
        answers = world.together(lambda: self.ask(engine))
        drawn = list(dict.fromkeys(a.drawn.response_ids for rank in world.gather(answers) for a in rank))
        pi = self.expect(backend, drawn)
        return world.together(lambda: self.judge(answers, pi))

    def ask(self, engine: Engine) -> list[Answer]:
        """The sampler's side: what each member draws after the prompt, and its scores of the sequences."""
        found = []
        for member in engine.members():
            (drawn,) = member.generate([Prompt(self.prompt, seed=0)], self.sampling)  # first: nothing may be cached yet
            found.append(Answer(drawn, member.score(self.sequences, self.sampling)))
        return found

    def expect(self, backend: Backend, drawn: Sequence[tuple[int, ...]] = ()) -> Expected:
        """The trainer's side: log pi of the sequences, and of what was drawn. Every rank asks for the same."""
        tokens = [*self.sequences, *((self.prompt, response) for response in drawn)]
        rows = [ungraded(Completion(p, r, torch.zeros(len(r)), "length")) for p, r in tokens]
        batch = collate(rows, self.pad_token_id)
        pi = [p[m].double() for p, m in zip(backend.logprobs(batch).cpu(), batch.mask, strict=True)]
        n = len(self.sequences)
        return Expected(pi[:n], dict(zip(drawn, pi[n:], strict=True)))

    def judge(self, answers: Sequence[Answer], pi: Expected) -> float:
        """Holds the two sides against each other. What was drawn counts where the trainer has scored it."""
        return max((self._judge_one(answer, pi) for answer in answers), default=0.0)

    def _judge_one(self, answer: Answer, pi: Expected) -> float:
        pairs = [*zip(pi.sequences, (mu.double() for mu in answer.scored), strict=True)]
        fixed = torch.cat([p for p, _ in pairs]), torch.cat([q for _, q in pairs])
        drawn = pi.drawn.get(answer.drawn.response_ids)
        if drawn is not None:
            pairs.append((drawn, answer.drawn.logp.double()))
        if self.routed:  # one token of two may be routed differently, one fifth of hundreds is not
            pairs = [(torch.cat([p for p, _ in pairs]), torch.cat([q for _, q in pairs]))]
        errors = [_relative(p, q, ROUTED_ALIKE if self.routed else 1.0) for p, q in pairs]
        error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
        bound = self._bound_now()
        if not error <= bound:  # NaN included
            far = errors.index(error)
            what = f"canary of {len(pairs[far][0])} tokens" + (
                " drawn by the engine" if far >= len(self.sequences) else ""
            )
            raise undelivered(
                f"{what}: the log-probabilities of sampler and trainer differ by {error:.2g} (relative, root mean "
                f"square); rounding explains at most {bound:.2g}"
            )
        if self._first is None:
            self._first = fixed
        if self.same_format and not self.routed:
            self._refuse_other_movement(fixed, self._first)
        self._largest = max(self._largest, error)
        return error

    def _bound_now(self) -> float:
        """`bound`, lowered by the errors that were seen before; never far, for a few tokens may agree by luck."""
        if not self._largest or not self.same_format:
            return self.bound
        return min(self.bound, max(JUMP * self._largest, self.bound / (ROUTED_ROOM if self.routed else ROOM)))

    def _refuse_other_movement(self, now: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor]) -> None:
        moved_pi, moved_mu = now[0] - first[0], now[1] - first[1]
        size = float(moved_pi.square().sum())
        noise = float((now[0] - now[1]).square().mean())
        if size > 0 and self._noise > 0:
            self._judge_slope(float((moved_pi * moved_mu).sum()) / size, size, len(moved_pi))
        self._noise = max(self._noise, noise)  # of accepted proofs: a stale part must not excuse itself

    def _judge_slope(self, slope: float, size: float, tokens: int) -> None:
        # rounding blurs the slope, and, being part of the trainer's movement too, draws it towards 0
        unsure = SURE * math.sqrt(2 * self._noise / size) + 2 * tokens * self._noise / size
        if abs(slope - 1) > SLOPE_OFF + unsure:
            raise undelivered(
                f"canary: since the run began the trainer's log-probabilities moved by {math.sqrt(size / tokens):.2g} "
                f"(root mean square), the sampler's by {slope:.2f} of that: a part of its weights is stale"
            )


def _relative(pi: Tensor, mu: Tensor, counted: float = 1.0) -> float:
    squares = ((pi - mu) / (1 + pi.abs())).square()
    if not bool(squares.isfinite().all()):
        return math.nan
    return float(squares.sort().values[: math.ceil(counted * len(squares))].mean().sqrt())
