"""How large and how small gradients get, module by module, and the loss scales at which none of them is lost.

    backward = Backward(module, Format.FP16)
    with backward.watching():
        loss.backward()
        backward.see_parameters()
    found = backward.histograms()           {Place("model.layers.0.mlp", "output"): Histogram, ...}
    found[place].at(2.0**16)                what FP16 would flush, hold as subnormals, overflow at that loss scale

Gradients are FP32 and unscaled; multiplying by a power of two moves exponents only. So a histogram over exponents,
with the few counts that say what happens at a format's edges, tells *exactly* what a cast after scaling by any power of
two does: `tests/test_audit.py` scales, casts and counts. Sums of squares per exponent tell what that is worth.

`input` is the gradient that goes through that module alone, before it meets the one around it (the residual stream's);
`output` is all that arrives; `weight` is that of a parameter in one micro-batch, as 16-bit training holds it before it
is added to FP32 sums.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tenbit.models.logprobs import CHUNK_ELEMENTS, Head
from tenbit.precision import Format
from tenbit.studies.audit_forward import NOT_ACTIVATIONS, Place, tensors_in, watched_modules

LOWEST, HIGHEST = -149, 128  # exponents of FP32 by frexp: x = m * 2^e, 0.5 <= m < 1
BINS = HIGHEST - LOWEST + 1
ROWS = ("count", "exact", "to_normal", "to_inf", "squares")


@dataclass(frozen=True)
class Bin:
    """Values with one exponent e: 2^(e-1) <= |x| < 2^e.

    Of `count`, `exact` are 2^(e-1) itself; `to_normal` are so near to 2^e that subnormal rounding takes them there;
    `to_inf` so near that they would round beyond the largest number, were it of this exponent. `squares`: sum of m^2.
    """

    count: int
    exact: int
    to_normal: int
    to_inf: int
    squares: float


@dataclass(frozen=True)
class Lost:
    """What a cast after scaling does to the values of a histogram. Shares are of the values that are not zero."""

    scale: float
    flushed: int
    subnormal: int
    overflowed: int
    values: int
    flushed_share: float
    squares_share: float  # of the squared norm, carried by values that are flushed

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


@dataclass(frozen=True)
class Histogram:
    """|g| by exponent, exactly. `zeros` are in no bin, nor are the `not_finite`."""

    format: Format
    bins: dict[int, Bin]
    zeros: int
    not_finite: int
    largest: float
    smallest: float  # above zero; inf where all are zero

    @property
    def values(self) -> int:
        return sum(b.count for b in self.bins.values())

    @property
    def norm(self) -> float:
        return math.sqrt(sum(math.ldexp(b.squares, 2 * e) for e, b in self.bins.items()))

    def __add__(self, other: Histogram) -> Histogram:
        assert self.format == other.format
        none = Bin(0, 0, 0, 0, 0.0)
        joined = {}
        for e in sorted(self.bins.keys() | other.bins.keys()):
            a, b = self.bins.get(e, none), other.bins.get(e, none)
            joined[e] = Bin(*(x + y for x, y in zip(vars(a).values(), vars(b).values(), strict=True)))
        return Histogram(
            self.format, joined, self.zeros + other.zeros, self.not_finite + other.not_finite,
            max(self.largest, other.largest), min(self.smallest, other.smallest),
        )  # fmt: skip

    def at(self, scale: float) -> Lost:
        """What casting g * scale to the format does. `scale` is a power of two."""
        shift = _exponent(scale)
        first = _exponent(self.format.smallest_subnormal)  # 2^first is the smallest number that is there
        normal, top = _exponent(self.format.smallest_normal), _exponent(self.format.largest) + 1
        flushed = subnormal = overflowed = 0
        lost = 0.0
        for e, b in self.bins.items():
            at = e + shift  # scaled values are in [2^(at-1), 2^at)
            if at < first:
                flushed, lost = flushed + b.count, lost + math.ldexp(b.squares, 2 * e)
            elif at == first:  # half of the smallest number, and more: the half itself is a tie, and goes to zero
                flushed, lost = flushed + b.exact, lost + math.ldexp(0.25 * b.exact, 2 * e)
                subnormal += b.count - b.exact
            elif at < normal:
                subnormal += b.count
            elif at == normal:
                subnormal += b.count - b.to_normal
            elif at == top:
                overflowed += b.to_inf
            elif at > top:
                overflowed += b.count
        whole = sum(math.ldexp(b.squares, 2 * e) for e, b in self.bins.items())
        n = self.values
        share = lost / whole if whole else 0.0
        return Lost(scale, flushed, subnormal, overflowed, n, flushed / n if n else 0.0, share)

    def as_dict(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "zeros": self.zeros,
            "not_finite": self.not_finite,
            "largest": self.largest,
            "smallest": None if math.isinf(self.smallest) else self.smallest,
            "norm": self.norm,
            "exponents": {str(e - 1): b.count for e, b in self.bins.items()},  # of the lower edge: 2^k <= |g| < 2^(k+1)
        }


def _exponent(power: float) -> int:
    """k of the largest 2^k <= power."""
    return math.frexp(power)[1] - 1


@dataclass(frozen=True)
class Window:
    """Loss scales, powers of two: below `low` more than a share of a place's squared norm is flushed, above `high` a
    value overflows. `low_at` and `high_at` are the places that decide; None where no place has a gradient."""

    low: float
    high: float
    low_at: Place | None
    high_at: Place | None

    @property
    def empty(self) -> bool:
        return self.low > self.high


def window(found: dict[Place, Histogram], share: float) -> Window:
    low, high, low_at, high_at = 0.0, math.inf, None, None
    for place, histogram in found.items():
        if not histogram.values:
            continue
        top = highest_scale(histogram)
        if top < high:
            high, high_at = top, place
        bottom = lowest_scale(histogram, share)
        if bottom > low:
            low, low_at = bottom, place
    return Window(low, high, low_at, high_at)


def highest_scale(histogram: Histogram) -> float:
    """The largest power of two at which nothing overflows."""
    k = _exponent(histogram.format.largest) - _exponent(histogram.largest) + 1
    while histogram.at(2.0**k).overflowed:
        k -= 1
    return 2.0**k


def lowest_scale(histogram: Histogram, share: float) -> float:
    """The smallest power of two at which no more than `share` of the squared norm is flushed."""
    low = _exponent(histogram.format.smallest_subnormal) - _exponent(histogram.largest) - 2  # all is flushed
    high = _exponent(histogram.format.smallest_normal) - _exponent(histogram.smallest)  # nothing is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if histogram.at(2.0**middle).squares_share <= share else (middle, high)
    return 2.0**high


def strict_scale(histogram: Histogram) -> float:
    """The smallest power of two at which not one value that is not zero is flushed."""
    k = _exponent(histogram.format.smallest_subnormal) - _exponent(histogram.smallest) - 2
    while histogram.at(2.0**k).flushed:
        k += 1
    return 2.0**k


class _Seen:
    """A histogram as running counts on the device."""

    def __init__(self, format: Format, device: torch.device) -> None:
        self.format = format
        self.rows = torch.zeros(len(ROWS), BINS, dtype=torch.float64, device=device)  # counts are exact up to 2^53
        self.zeros, self.not_finite = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.largest = torch.zeros((), dtype=torch.float64, device=device)
        self.smallest = torch.full((), math.inf, dtype=torch.float64, device=device)

    def add(self, g: Tensor) -> None:
        for part in g.detach().reshape(-1).split(CHUNK_ELEMENTS):
            self._add(part.float().abs())

    def _add(self, size: Tensor) -> None:
        finite = size.isfinite()
        self.not_finite += (~finite).sum()
        self.zeros += (size == 0).sum()
        size = size[finite & (size > 0)]
        if not size.numel():
            return
        self.largest = torch.maximum(self.largest, size.max().double())
        self.smallest = torch.minimum(self.smallest, size.min().double())
        m, e = torch.frexp(size)
        e = e.long() - LOWEST
        u = self.format.epsilon / 2
        for row, chosen in enumerate((None, m == 0.5, m >= 1 - u, m >= 1 - u / 2)):
            self.rows[row] += torch.bincount(e if chosen is None else e[chosen], minlength=BINS)
        self.rows[4] += torch.bincount(e, weights=m.double().square(), minlength=BINS)

    def histogram(self) -> Histogram:
        rows = self.rows.cpu()
        bins = {}
        for i in rows[0].nonzero().flatten().tolist():
            count, exact, to_normal, to_inf, squares = rows[:, i].tolist()
            bins[i + LOWEST] = Bin(int(count), int(exact), int(to_normal), int(to_inf), squares)
        return Histogram(
            self.format, bins, int(self.zeros), int(self.not_finite), float(self.largest), float(self.smallest)
        )


class Backward:
    """Watches a model's gradients. The model computes what it computes without."""

    def __init__(self, model: Any, format: Format) -> None:
        self._model, self._format = model, format
        self._seen: dict[Place, _Seen] = {}
        self._names = [name for name, _ in model.named_modules()]
        self._scaled = {name for name, m in model.named_modules() if m._forward_pre_hooks}  # by `models/fit.py`

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in watched_modules(self._model):
            # where the plan scales an input, its gradient is seen on either side of that
            for first in (True, False) if name in self._scaled else (False,):
                hook = self._before(name)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first))
            handles.append(module.register_forward_hook(self._after(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def see(self, place: Place, g: Tensor) -> None:
        if place not in self._seen:
            self._seen[place] = _Seen(self._format, g.device)
        self._seen[place].add(g)

    def await_gradient(self, place: Place, x: Tensor) -> None:
        if x.requires_grad:
            x.register_hook(lambda g: self.see(place, g))

    def see_parameters(self, sums: dict[str, Tensor] | None = None) -> None:
        """Takes the gradients of a micro-batch off the parameters, and adds them to `sums`."""
        for name, p in self._model.named_parameters():
            if p.grad is not None:
                self.see(Place(name, "weight"), p.grad)
                if sums is not None:
                    sums[name] = sums[name].add_(p.grad) if name in sums else p.grad
                p.grad = None

    def see_logits(
        self, hidden: Tensor, head: Head, targets: Tensor, temperature: float, grad: Tensor, name: str
    ) -> None:
        """The gradient of the head's product, [N, V], from that of the log-probabilities, [N]; in chunks."""
        bare = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.dtype)
        rows = max(1, CHUNK_ELEMENTS // len(head.weight))
        for h, t, g in zip(hidden.detach().split(rows), targets.split(rows), grad.split(rows), strict=True):
            product = bare.logits(h).requires_grad_()
            z = product if head.softcap is None else head.softcap * torch.tanh(product / head.softcap)
            logp = (z * head.scale / temperature).log_softmax(-1).gather(-1, t[:, None])
            self.see(Place(name, "logits"), torch.autograd.grad(logp, product, g[:, None])[0])

    def not_finite(self) -> Iterator[Place]:
        """Places with an inf or NaN, in the order in which gradients arrived."""
        return (place for place, seen in self._seen.items() if bool(seen.not_finite))

    def histograms(self) -> dict[Place, Histogram]:
        """In the order of the model's modules, each module's parameters after it."""
        order = {name: i for i, name in enumerate(self._names)}

        def key(place: Place) -> tuple[int, bool]:
            module = place.module.rpartition(".")[0] if place.kind == "weight" else place.module
            return order.get(module, len(order)), place.kind == "weight"

        return {place: self._seen[place].histogram() for place in sorted(self._seen, key=key)}

    def _before(self, name: str) -> Callable[..., Any]:
        """Hands the module views of its inputs, so that the gradients that come back are its own alone."""

        def view(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad:
                own = value.view_as(value)
                self.await_gradient(Place(name, "input"), own)
                return own
            return value

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            passed = {k: v if k in NOT_ACTIVATIONS else view(v) for k, v in kwargs.items()}
            return tuple(view(x) for x in args), passed

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for x in tensors_in(output):
                self.await_gradient(Place(name, "output"), x)

        return hook
