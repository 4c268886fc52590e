"""How the record was sampled: the temperature and the truncation that its log-probabilities are those of.

The recorded tokens are scored under other temperatures, top-p and top-k, first on a coarse grid; then the best is
refined in rounds, each with candidates four times closer around the best so far, one setting moved at a time. Settings
are continuous (0.73, 0.97), and what a grid misses would be blamed on the weights.

Truncation shows without a grid: a renormalised mu is pi over the mass that was kept, so l = log pi - log mu is the log
of that mass, at least log p, and at most 0 for every token. Its low quantiles are tried as top-p.

One forward pass over a part of the record serves each round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tenbit.studies.attribution_bench import Bootstrap, Gap, gap, transformed
from tenbit.studies.attribution_cause import Case, Cause, part, switched
from tenbit.types import Sampling

NAME = "sampling transform"
SEARCHED_TOKENS = 2048  # on which other transforms are tried
SEARCHED_SEQUENCES = 32
HEATS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
TOP_P = (0.99, 0.95, 0.9, 0.8, 0.7)
TOP_K = (20, 50)
LOW = (0.0, 0.001, 0.01, 0.05, 0.2)  # quantiles of l that are tried as log p
ROUNDS = 4
STEPS = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)  # of a round's width
HEAT_WIDTH, TOP_WIDTH, SHRINK = 0.2, 0.7, 4.0  # on the logarithms of temperature, 1 - p and k
MUCH = 0.5  # another transform is believed if it takes off this share of the gap
MENTIONED = 0.05  # and mentioned if this share
AS_GOOD = 1.1  # a rounder number is taken if its KL is at most so many times the best
OUTSIDE = 0.01  # recorded tokens that a truncation may exclude, for rounding at its border


def transform(case: Case) -> tuple[Cause, Case]:
    """Whether the record fits another temperature or truncation than the recipe's."""
    stated = case.bench.sampling
    search = Search(case)
    found = search.best()
    first, last = search.tried[stated], search.tried[found]
    takes_off = 1 - last.value / first.value if first.value else 0.0
    better = takes_off > 0 and (first.value == math.inf or (first - last).interval[0] > 0)
    numbers = {"tried": float(len(search.tried)), "takes_off": takes_off if better else 0.0}
    if not better or takes_off < MUCH:
        note = f"of {len(search.tried)} transforms none fits the record measurably better than {words(stated)}"
        if better and takes_off >= MENTIONED:
            note = f"{words(found)} fits a little better than {words(stated)}: the KL is {takes_off:.0%} smaller"
        what = f"the record compared with pi at other temperatures, top-p and top-k than {words(stated)}"
        return Cause(NAME, what, "nothing to do", note=note, numbers=numbers), case
    settled = replace(case.bench, sampling=found)
    trained = settled.trainer(case.sequences)
    before, after = case.against(case.trained), case.against(trained)
    note = f"the recorded log-probabilities fit {words(found)}, the recipe says {words(stated)}"
    numbers |= {"temperature": found.temperature, "top_p": found.top_p, "top_k": float(found.top_k)}
    what = f"the record compared with pi at {words(found)} instead of {words(stated)}"
    share = part(before, after, case.total)
    cause = switched(NAME, what, _remedy(stated, found), before, after, share, note, numbers)
    return cause, replace(case, bench=settled, trained=trained)


def tried(cause: Cause) -> str:
    """What the search says against another account of the sampling, in words for other causes."""
    settled = cause.share is not None
    count, most = cause.numbers["tried"], cause.numbers["takes_off"]
    head = f"{count:.0f} temperatures (0.5 to 2) and truncations were tried on a part of it"
    if settled:
        return f"{head}, and the best is taken into account"
    return f"{head}, and the best takes off {most:.0%}" if most else f"{head}, and none fits better"


class Search:
    """KL of the record, on a part of its sequences, under every transform that was tried."""

    def __init__(self, case: Case):
        self.case = case
        some = _some(case)
        self.sequences = [case.sequences[i] for i in some]
        self.recorded = [case.recorded[i] for i in some]
        self.bootstrap = Bootstrap.of(len(some), "transform")
        self.vocabulary = case.bench.model.module.config.vocab_size
        self.tried: dict[Sampling, Gap] = {}
        self.low: dict[float, list[float]] = {}  # temperature -> log p that l suggests there

    def best(self) -> Sampling:
        self.look(self._grid())
        heats, tops = HEAT_WIDTH, TOP_WIDTH
        for _ in range(ROUNDS):
            self.look(self._around(self._nearest(), heats, tops))
            heats, tops = heats / SHRINK, tops / SHRINK
        return self._rounded(self._nearest())

    def look(self, candidates: Iterable[Sampling]) -> None:
        """Scores the candidates that are new."""
        new = [s for s in dict.fromkeys(candidates) if s not in self.tried]
        bench = self.case.bench
        scored = transformed(bench.model, bench.precision, bench.recipe, self.sequences, new) if new else []
        for sampling, logps in zip(new, scored, strict=True):
            self.tried[sampling] = _distance(self.recorded, logps, self.bootstrap)
            if not sampling.truncated:
                mass = torch.cat([p.double() - m.double() for p, m in zip(logps, self.recorded, strict=True)])
                self.low[sampling.temperature] = mass.quantile(torch.tensor(LOW, dtype=mass.dtype)).tolist()

    def _nearest(self) -> Sampling:
        return min(self.tried, key=lambda s: self.tried[s].value)

    def _grid(self) -> list[Sampling]:
        """The stated transform first; then temperatures, and truncations at the likely ones."""
        stated, recipe = self.case.bench.sampling, self.case.bench.recipe
        plain = replace(stated, top_p=1.0, top_k=0)
        likely = list(dict.fromkeys(t for t in (stated.temperature, 1.0, recipe.eval.temperature) if t > 0))
        found = [stated, *(replace(plain, temperature=t) for t in dict.fromkeys([*likely, *HEATS]))]
        top_p = dict.fromkeys([*(p for p in (recipe.eval.top_p, stated.top_p) if p < 1), *TOP_P])
        top_k = dict.fromkeys([*(k for k in (stated.top_k,) if k), *TOP_K])
        for t in likely:
            found += [replace(plain, temperature=t, top_p=p) for p in top_p]
            found += [replace(plain, temperature=t, top_k=k) for k in top_k if k < self.vocabulary]
        return found

    def _around(self, best: Sampling, heats: float, tops: float) -> list[Sampling]:
        """Each setting moved a little; and truncations that l suggests at the temperatures near by."""
        found = [replace(best, temperature=best.temperature * math.exp(heats * x)) for x in STEPS]
        if best.top_p < 1:
            found += [replace(best, top_p=1 - min(0.9, (1 - best.top_p) * math.exp(tops * x))) for x in STEPS]
        if best.top_k:
            found += [replace(best, top_k=max(1, round(best.top_k * math.exp(tops * x)))) for x in STEPS]
        suggested = [math.exp(low) for low in self.low.get(best.temperature, []) if math.log(0.1) < low < 0]
        if not best.top_k:
            found += [replace(best, top_p=p) for p in suggested if p < 1]
        return found

    def _rounded(self, best: Sampling) -> Sampling:
        """The roundest setting that fits about as well as the best: nobody sets 0.7301."""
        rounder = [
            replace(best, temperature=round(best.temperature, a), top_p=round(best.top_p, b))
            for a, b in ((1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 3))
        ]
        rounder = [s for s in rounder if s.temperature > 0 and s.top_p > 0]
        self.look(rounder)
        stated = self.case.bench.sampling
        for s in [stated, *rounder]:
            if self.tried[s].value <= AS_GOOD * self.tried[best].value:
                return s
        return best


def _some(case: Case) -> list[int]:
    """Sequences on which transforms are tried: evenly spaced, under a budget of tokens."""
    n = len(case.sequences)
    chosen: list[int] = []
    tokens = 0
    for i in range(0, n, max(1, n // SEARCHED_SEQUENCES)):
        length = len(case.sequences[i][1])
        if chosen and tokens + length > SEARCHED_TOKENS:
            break
        chosen.append(i)
        tokens += length
    return chosen


def _distance(mu: Sequence[Tensor], pi: Sequence[Tensor], bootstrap: Bootstrap) -> Gap:
    """KL over the tokens that pi does not exclude; infinite where it excludes more than rounding could."""
    inside = [p.isfinite() for p in pi]
    kept = sum(int(i.sum()) for i in inside) / sum(len(i) for i in inside)
    if kept < 1 - OUTSIDE:
        return Gap(math.inf, torch.full((len(bootstrap.counts),), math.inf, dtype=torch.float64))
    return gap(
        [m[i] for m, i in zip(mu, inside, strict=True)], [p[i] for p, i in zip(pi, inside, strict=True)], bootstrap
    )


def words(sampling: Sampling) -> str:
    parts = [f"temperature {sampling.temperature:.3g}"]
    if sampling.top_p < 1:
        parts.append(f"top-p {sampling.top_p:.3g}")
    if sampling.top_k:
        parts.append(f"top-k {sampling.top_k}")
    return ", ".join(parts)


def _remedy(stated: Sampling, found: Sampling) -> str:
    if found.truncated and not stated.truncated:
        return "sample without truncation: rollout.top_p = 1, rollout.top_k = 0 (vLLM: top_p=1, top_k=0)"
    if found.temperature == 1.0 != stated.temperature:
        return (
            "record log-probabilities after the temperature (vLLM: logprobs_mode='processed_logprobs'), or sample with "
            "rollout.temperature = 1"
        )
    if found.temperature != stated.temperature:
        return f"set rollout.temperature = {found.temperature:.3g}, as it was sampled with"
    return "give rollout.top_p and rollout.top_k the values that the samples were drawn with"
