"""How far apart are sampler and trainer, on the same weights? Section 3.5 and Figure 2 of the paper, offline.

    tenbit probe MODEL --precision fp16,bf16,bf16/fp16 --out runs/probe
    tenbit probe --from rollouts.jsonl --out runs/probe          what another framework recorded

Responses are sampled once for each rollout format, at temperature 1 unless told otherwise, and scored by the training
backend once for each pair of formats. What comes out is a `Study`: a value from which `probe.json`, the terminal's
table and the page are made. The tokens with both log-probabilities are kept (`probe.jsonl.gz`), so that everything
can be computed again: `tenbit probe --from OUT/probe.jsonl.gz`.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenbit.compare import LENGTHS
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.recipe import Recipe
from tenbit.rollout import seed_of
from tenbit.scoring import Scored, sample, score, train_logps
from tenbit.studies.folders import Note
from tenbit.studies.probe_measures import LEVEL, Measure, Table, finite, ratios, resamples, worst
from tenbit.studies.probe_rows import Recorded
from tenbit.types import Completion, Overflow, Prompt, merge

SCHEMA = "tenbit.probe/1"
WORST, BEFORE = 20, 40  # tokens that are listed, and tokens of context before each
RECORDED = "recorded"
SAME_TRAINER = 0.1  # of the gap: two trainers that differ by no more give the same attribution


class Unmeasurable(ValueError):
    """Not one token of a pair has both log-probabilities."""


@dataclass(frozen=True)
class Pair:
    """One pair of formats, measured. `train` and `rollout` are format names, or "recorded"."""

    name: str
    train: str
    rollout: str
    table: Table
    measures: dict[str, Measure]
    by_length: dict[str, dict[str, Any]]
    by_version: dict[str, dict[str, Any]]
    left_out: int  # tokens without a finite log-probability
    truncated: float | None = None  # share of the responses that were cut off at the limit
    seconds: dict[str, float] = field(default_factory=dict)
    precision: Precision | None = None

    @property
    def tokens(self) -> int:
        return int(self.table.tokens.sum())

    @classmethod
    def of(cls, name: str, scored: Sequence[Scored], cap: float, seed: int, **more: Any) -> Pair:
        """Raises Unmeasurable if no token of the responses can be measured."""
        table = Table.of(scored)
        if not len(table):
            raise Unmeasurable(f"{name}: not one token has a finite log-probability on both sides")
        lost = sum(int((~s.measurable).sum()) for s in scored)
        measures = table.measures(cap, resamples(len(table), seed))
        lengths, versions = table.by_length(LENGTHS, seed), _by_version(table, cap, seed)
        return cls(name, table=table, measures=measures, by_length=lengths, by_version=versions, left_out=lost, **more)

    @property
    def routing(self) -> dict[str, float]:
        """Of a mixture of experts: the shares that `routing.py` defines, without their prefix. Else empty."""
        found = merge(s.routing for s in self.table.scored)
        return {name.removeprefix("routing/"): stat.mean for name, stat in found.items()}

    def worst(self, tokenizer: Any | None) -> list[dict[str, Any]]:
        """The tokens that lie furthest apart, with the text before them; ids where there is no tokenizer."""
        return [_told(self.table.scored[i], i, t, tokenizer) for i, t in worst(self.table.scored, WORST)]

    def as_dict(self, tokenizer: Any | None) -> dict[str, Any]:
        return {
            "precision": self.name,
            "train": self.train,
            "rollout": self.rollout,
            "sequences": len(self.table),
            "tokens": self.tokens,
            "left_out_tokens": self.left_out,
            "truncated": self.truncated,
            "measures": {key: measure.as_dict() for key, measure in self.measures.items()},
            "routing": self.routing,
            "by_length": self.by_length,
            "by_version": self.by_version,
            "half_ess_tokens": self.table.half_ess_tokens(),
            "worst": self.worst(tokenizer),
            "seconds": self.seconds,
        }


@dataclass
class Study:
    """Everything a probe found. `settings` says what was done to what; `notes` what a reader must know."""

    settings: dict[str, Any]
    cap: float
    seed: int
    pairs: list[Pair] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # precision -> why it could not be measured
    notes: list[str] = field(default_factory=list)
    attribution: dict[str, Any] = field(default_factory=dict)  # precision -> Attribution
    tokenizer: Any | None = None

    def ratios(self) -> list[tuple[Pair, Pair, dict[str, Measure]]]:
        """Every other pair over FP16, and FP16 over FP32."""
        by_name = {p.name: p for p in self.pairs}
        fp16, fp32 = by_name.get("fp16"), by_name.get("fp32")
        wanted = [(p, fp16) for p in self.pairs if fp16 and p.name not in ("fp16", "fp32")]
        wanted += [(fp16, fp32)] if fp16 and fp32 else []
        return [(a, b, self._ratio(a, b)) for a, b in wanted if a and b]

    def _ratio(self, a: Pair, b: Pair) -> dict[str, Measure]:
        chosen = resamples(len(a.table), self.seed), resamples(len(b.table), self.seed)
        return ratios(a.table, b.table, chosen, self.cap, (a.measures, b.measures))

    def as_dict(self) -> dict[str, Any]:
        """What probe.json holds; docs/probe.md describes it."""
        return {
            "schema": SCHEMA,
            **self.settings,
            "bootstrap": {"level": LEVEL, "unit": "sequence", "seed": self.seed},
            "cap": self.cap,
            "precisions": [p.as_dict(self.tokenizer) for p in self.pairs],
            "ratios": [
                {"of": a.name, "to": b.name, "measures": {k: m.as_dict() for k, m in found.items()}}
                for a, b, found in self.ratios()
            ],
            "left_out": self.left_out,
            "notes": self.notes,
            "attribution": {name: clean(found.as_dict()) for name, found in self.attribution.items()},
        }


def chosen_prompts(recipe: Recipe, asked: Sequence[Asked]) -> list[Prompt]:
    """`rollout.samples` prompts, each with its own seed, for `rollout.prompts` problems drawn from all by the seed."""
    places = list(range(len(asked)))
    if len(asked) > recipe.rollout.prompts:
        shuffled = random.Random(seed_of(recipe.seed, "probe", "problems"))
        places = sorted(shuffled.sample(places, recipe.rollout.prompts))
    return [
        Prompt(asked[place].ids, seed_of(recipe.seed, "probe", place, n))
        for place in places
        for n in range(recipe.rollout.samples)
    ]


def probe(
    study: Study, recipe: Recipe, model: Model, precisions: Sequence[Precision], prompts: Sequence[Prompt], note: Note
) -> Iterable[Pair]:
    """Measures every pair, one at a time. A format that the model overflows is left out, and the study says why."""
    for _, group in itertools.groupby(
        sorted(precisions, key=lambda p: [q.rollout for q in precisions].index(p.rollout)), key=lambda p: p.rollout
    ):
        pairs = list(group)
        began = time.perf_counter()
        note(f"sampling {len(prompts)} responses in {pairs[0].rollout.value}")
        try:
            completions = sample(recipe, model, pairs[0], prompts)
        except Overflow as error:
            study.left_out |= {p.name: str(error) for p in pairs}
            continue
        seconds = {"sample": round(time.perf_counter() - began, 3)}
        for precision in pairs:
            note(f"scoring {sum(c.length for c in completions):,} tokens in {precision.compute.value}")
            pair = _scored_pair(study, recipe, model, precision, completions, seconds)
            if pair is not None:
                yield pair


def _scored_pair(
    study: Study,
    recipe: Recipe,
    model: Model,
    precision: Precision,
    completions: Sequence[Completion],
    seconds: dict[str, float],
) -> Pair | None:
    began = time.perf_counter()
    try:
        scored = score(recipe, model, precision, completions)
    except Overflow as error:
        study.left_out[precision.name] = str(error)
        return None
    return Pair.of(
        precision.name,
        scored,
        study.cap,
        study.seed,
        train=precision.compute.value,
        rollout=precision.rollout.value,
        truncated=sum(c.finish == "length" for c in completions) / len(completions),
        seconds=seconds | {"score": round(time.perf_counter() - began, 3)},
        precision=precision,
    )


def recorded_pairs(study: Study, rows: Sequence[Recorded]) -> Iterable[Pair]:
    """Rows that hold both log-probabilities, by what they are listed under."""
    both = [r for r in rows if r.logp_train is not None]
    for name in dict.fromkeys(r.precision or RECORDED for r in both):
        own = [r for r in both if (r.precision or RECORDED) == name]
        train, rollout = _formats(name)
        scored = [r.scored() for r in own]
        try:
            pair = Pair.of(name, scored, study.cap, study.seed, train=train, rollout=rollout)
        except Unmeasurable as error:
            study.left_out[name] = str(error)
            continue
        yield pair


def rescored_pairs(
    study: Study,
    rows: Sequence[Recorded],
    recipe: Recipe,
    model: Model,
    precisions: Sequence[Precision],
    note: Note,
) -> Iterable[Pair]:
    """Every row scored by our training backend, at the temperature it was sampled at, against recorded log mu."""
    for precision in precisions:
        name, began = f"{precision.compute.value}/{RECORDED}", time.perf_counter()
        note(f"scoring {sum(len(r.response_ids) for r in rows):,} recorded tokens in {precision.compute.value}")
        scored: dict[int, Scored] = {}
        try:
            for heat in dict.fromkeys(r.temperature for r in rows):
                places = [i for i, r in enumerate(rows) if r.temperature == heat]
                asked = [(rows[i].prompt_ids, rows[i].response_ids) for i in places]
                logps = train_logps(model, precision, recipe, asked, heat)
                scored |= {i: rows[i].scored(logp) for i, logp in zip(places, logps, strict=True)}
            pair = Pair.of(
                name,
                [scored[i] for i in range(len(rows))],
                study.cap,
                study.seed,
                train=precision.compute.value,
                rollout=RECORDED,
                seconds={"score": round(time.perf_counter() - began, 3)},
                precision=precision,
            )
        except (Overflow, Unmeasurable) as error:
            study.left_out[name] = str(error)
            continue
        yield pair


def _by_version(table: Table, cap: float, seed: int) -> dict[str, dict[str, Any]]:
    """KL (k3) and counts for each version of the weights that responses were sampled with, where there are several."""
    versions = sorted({s.version for s in table.scored if s.version is not None})
    if len(versions) < 2:
        return {}
    out = {}
    for version in versions:
        own = Table.of([s for s in table.scored if s.version == version])
        kl = own.measures(cap, resamples(len(own), seed))["kl_k3"].as_dict()
        out[str(version)] = {"sequences": len(own), "tokens": int(own.tokens.sum()), "kl_k3": kl}
    return out


def with_one_temperature(scored: Sequence[Scored], default: float) -> tuple[float, list[Scored]]:
    """The temperature that most responses were sampled at, and those. `default` stands for one that is not known."""
    heats = [default if s.temperature is None else s.temperature for s in scored]
    heat = max(dict.fromkeys(heats), key=heats.count)
    return heat, [s for s, h in zip(scored, heats, strict=True) if h == heat]


def same_trainer(recorded: Pair, rescored: Pair) -> bool:
    """Whether the recorded trainer is ours but for rounding that is small beside the gap, on the same responses."""
    ours = {id(s.logp_rollout): s for s in rescored.table.scored}
    apart = gap = 0.0
    for s in recorded.table.scored:
        if id(s.logp_rollout) not in ours:
            return False
        fine = s.measurable
        apart += float((s.logp_train.double() - ours[id(s.logp_rollout)].logp_train.double())[fine].abs().sum())
        gap += float(s.logratio[fine].abs().sum())
    return apart <= SAME_TRAINER * gap


def _formats(name: str) -> tuple[str, str]:
    """``bf16/fp16`` -> training, rollout; a name that says no formats -> recorded, recorded."""
    train, _, rollout = name.partition("/")
    known = {"fp16", "bf16", "fp32", RECORDED}
    return (train, rollout or train) if {train, rollout or train} <= known else (RECORDED, RECORDED)


def _told(s: Scored, sequence: int, at: int, tokenizer: Any | None) -> dict[str, Any]:
    before = (*s.prompt_ids, *s.response_ids[:at])[-BEFORE:]
    pi, mu = float(s.logp_train[at]), float(s.logp_rollout[at])
    return {
        "sequence": sequence,
        "position": at,
        "length": s.length,
        "token_id": s.response_ids[at],
        "token": _text([s.response_ids[at]], tokenizer),
        "context": _text(before, tokenizer),
        "pi": float(s.logp_train[at].double().exp()),
        "mu": float(s.logp_rollout[at].double().exp()),
        "logp_train": pi,
        "logp_rollout": mu,
        "logratio": pi - mu,
    }


def _text(ids: Sequence[int], tokenizer: Any | None) -> str:
    """Decoded, special tokens included; the ids themselves without a tokenizer that knows them."""
    if tokenizer is not None:
        try:
            return str(tokenizer.decode(list(ids)))
        except (OverflowError, TypeError, ValueError, IndexError):  # ids of another model than the one named
            pass
    return " ".join(map(str, ids))


def clean(value: Any) -> Any:
    """Nested values as JSON can hold them: infinities and NaN become null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return finite(value) if isinstance(value, float) else value
