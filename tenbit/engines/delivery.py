"""Proof that weights arrived: a checksum of every tensor as it was sent against the tensor as it was installed.

    with Arrivals() as arrivals:                      in the engine's process
        load(arrivals.watch(named))                   whatever the engine's own loader does with them
    report = arrivals.report(model, dtype)
    compare(sent, [report], tied)                     in the trainer's; raises Undelivered, naming the tensor

A loader may fuse tensors (q, k and v into one), cut them (tensor parallelism), or defer the copy. `Arrivals` therefore
does not ask the loader: it watches the copies themselves, by a dispatch mode, and follows a tensor that was sent into
the memory that the model computes with. There its bits are read back. Where an engine replaces the memory by a packed
layout of its own (vLLM on CPUs), the last readable copy is taken, and the canary of `tenbit/canary.py` proves the rest.

The checksum is a sum of (bits of element p) x w(p) modulo 2^64, with odd pseudo-random weights w over the positions in
the tensor *as sent*. So one changed element is always seen, whatever the change (an odd number is invertible), moved
elements are seen, and the sums of disjoint parts add up to the sum of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tenbit.precision import Format
from tenbit.types import Undelivered

_BLOCK = 1 << 18  # elements that are summed at a time; also the period of the table of weights
_TOGETHER = 32  # blocks, so that a GPU is not kept waiting
_GOLDEN, _MIX = -7046029254386353131, -4658895280553007687  # SplitMix64's constants, as signed 64-bit integers
_MASK = (1 << 64) - 1
_tables: dict[torch.device, Tensor] = {}

Part = tuple[tuple[int, ...], tuple[int, ...], int]
"""Which elements of a tensor as sent: size, stride and offset of a view of it."""


@dataclass(frozen=True)
class Sent:
    """What left the trainer: the checksum of a tensor in the engine's format, and how many elements it has."""

    checksum: int
    numel: int


@dataclass(frozen=True)
class Installed:
    """A part of a sent tensor as the engine holds it; `packed` if the engine went on to another layout.

    `dtype` is that of the weight it was first copied to.
    """

    part: Part
    checksum: int
    numel: int
    dtype: str
    packed: bool


@dataclass(frozen=True)
class Report:
    """What one worker says: parts by the name they were sent under, and its weights that nothing was written to."""

    parts: dict[str, list[Installed]] = field(default_factory=dict)
    unwritten: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Lists, numbers and text only, to cross a process border."""
        rows = {
            name: [[*map(list, p.part[:2]), p.part[2], f"{p.checksum:x}", p.numel, p.dtype, p.packed] for p in parts]
            for name, parts in self.parts.items()
        }
        return {"parts": rows, "unwritten": self.unwritten}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Report:
        parts = {
            name: [
                Installed((tuple(size), tuple(stride), offset), int(checksum, 16), numel, dtype, packed)
                for size, stride, offset, checksum, numel, dtype, packed in rows
            ]
            for name, rows in plain["parts"].items()
        }
        return cls(parts, list(plain["unwritten"]))


def checksum(tensor: Tensor, part: Part | None = None) -> int:
    """Of `tensor`'s bits, at the positions 0, 1, ... or at those that `part` has in the tensor as sent."""
    bits = tensor.detach()
    if bits.dtype == torch.bool:
        bits = bits.to(torch.uint8)
    bits = bits.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    if part is not None and not _in_order(part):
        return _scattered(bits.reshape(-1), part)
    flat, table, first = bits.reshape(-1), _table(tensor.device), part[2] if part is not None else 0
    if first % _BLOCK:
        assert part is not None
        return _scattered(flat, part)
    total = torch.zeros((), dtype=torch.long, device=flat.device)  # 64-bit integers wrap, which is the modulus
    for start in range(0, flat.numel(), _TOGETHER * _BLOCK):
        some = flat[start : start + _TOGETHER * _BLOCK]
        whole = some.numel() // _BLOCK
        turns = 2 * torch.arange(whole + 1, device=flat.device) + (2 * ((first + start) // _BLOCK) + 1)
        blocks = some[: whole * _BLOCK].view(whole, _BLOCK)
        total += ((blocks.long() * table).sum(-1) * turns[:whole]).sum()
        rest = some[whole * _BLOCK :]
        total += (rest.long() * table[: rest.numel()]).sum() * turns[whole]
    return int(total) & _MASK


def _scattered(flat: Tensor, part: Part) -> int:
    """The same sum over elements at any positions, in the order of the view `part`."""
    size, stride, offset = part
    positions = torch.full((1,) * len(size), offset, dtype=torch.long, device=flat.device)
    for axis, (n, step) in enumerate(zip(size, stride, strict=True)):
        shape = [1] * len(size)
        shape[axis] = n
        positions = positions + (torch.arange(n, device=flat.device) * step).view(shape)
    positions = positions.expand(size).reshape(-1)
    weights = _table(flat.device)[positions % _BLOCK] * (2 * (positions // _BLOCK) + 1)
    return int((flat.long() * weights).sum()) & _MASK


def _table(device: torch.device) -> Tensor:
    """[_BLOCK] odd 64-bit weights; the p-th of block b is table[p] x (2b + 1)."""
    if device not in _tables:
        x = torch.arange(1, _BLOCK + 1, dtype=torch.long) * _GOLDEN
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX
        _tables[device] = (x ^ ((x >> 31) & 0x1FFFFFFFF) | 1).to(device)
    return _tables[device]


def _in_order(part: Part) -> bool:
    """Whether the view's elements follow each other in the tensor as sent."""
    expected = 1
    for n, step in zip(reversed(part[0]), reversed(part[1]), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


@dataclass
class _Landing:
    """A part of a sent tensor that lies in `target`. `dtype` is that of the weight it was first copied to."""

    name: str
    part: Part
    target: Tensor
    dtype: torch.dtype


class Arrivals(TorchDispatchMode):
    """Follows the tensors that `watch` passes on through every copy made while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self._sent: dict[int, tuple[str, Tensor]] = {}
        self._left: dict[int, int] = {}  # elements that have not landed yet
        self._at: dict[int, list[_Landing]] = {}
        self._repacked: set[int] = set()

    def watch(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes weights on and remembers them by their storage, until they have landed."""
        for name, tensor in named:
            self._release_abandoned()
            own = tensor.contiguous()
            if own.untyped_storage().nbytes() != own.numel() * own.element_size() or _storage(own) in self._sent:
                own = own.clone()  # a view into something larger, or a tied weight under its second name
            self._remember(name, own)
            yield name, own

    def _remember(self, name: str, tensor: Tensor) -> None:
        self._sent[_storage(tensor)] = (name, tensor.detach())  # our own handle, so that others' can be counted
        self._left[_storage(tensor)] = tensor.numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and not args[0].is_meta:
            self._copied(args[0], args[1])
        elif func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default) and not out.is_meta:
            self._recast(out, args[0])
        return out

    def _recast(self, out: Tensor, source: Tensor) -> None:
        """Another device or format on the way, or after it (vLLM's packed layers hold their biases in FP32)."""
        known = self._sent.get(_storage(source))
        if known is not None and source.numel() == known[1].numel() and out.is_contiguous():
            self._remember(known[0], out)
        elif _storage(source) in self._at:
            self._follow(out, source, leaves=False)

    def _copied(self, target: Tensor, source: Tensor) -> None:
        known = self._sent.get(_storage(source))
        if known is not None:
            name, _ = known
            part = (tuple(source.shape), tuple(source.stride()), int(source.storage_offset()))
            if source.shape != target.shape:  # broadcast while copying: not a plain installation
                return
            self._at.setdefault(_storage(target), []).append(_Landing(name, part, target, target.dtype))
            self._release(source, target.numel())
            return
        self._follow(target, source, leaves=True)

    def _release(self, source: Tensor, numel: int) -> None:
        """Forgets a sent tensor that has landed whole, so that its memory can go before the next ones come."""
        storage = _storage(source)
        self._left[storage] -= numel
        if self._left[storage] <= 0:
            del self._sent[storage], self._left[storage]

    def _follow(self, target: Tensor, source: Tensor, leaves: bool) -> None:
        """What landed in `source` is now in `target` too; it `leaves` if the loader gives up the source."""
        landed = self._at.get(_storage(source))
        if landed and source.shape == target.shape and source.is_contiguous() and target.is_contiguous():
            moved = [_Landing(x.name, x.part, _same_view(x.target, source, target), x.dtype) for x in landed]
            if leaves:
                del self._at[_storage(source)]
            self._at[_storage(target)] = moved
        elif leaves:
            self._repacked.add(_storage(target))  # from memory that is not known: the engine's own layout, perhaps

    def _release_abandoned(self) -> None:
        """The same for tensors of which the loader took a part only (tensor parallelism) and gave up the rest."""
        mine = 2  # the handle that is kept here, and its storage's Python object
        for storage, (_, tensor) in list(self._sent.items()):
            if torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= mine:
                del self._sent[storage], self._left[storage]

    def report(self, model: nn.Module, dtype: torch.dtype) -> Report:
        """Reads back what was installed, in the engine's format `dtype`. Call it outside the mode, after loading.

        A copy in the model's live memory stands for one that was made on the way to it.
        """
        live = {_storage(p): (name, p) for name, p in model.named_parameters() if p.numel() and not p.is_meta}
        parts: dict[str, list[Installed]] = {}
        for (name, part), (x, packed) in self._last(live).items():
            value = checksum(x.target.to(dtype) if x.target.is_floating_point() else x.target, part)
            shown = str(x.dtype).removeprefix("torch.")
            parts.setdefault(name, []).append(Installed(part, value, x.target.numel(), shown, packed))
        unwritten = [name for storage, (name, p) in live.items() if self._missing(model, name, p, storage)]
        return Report(parts, unwritten)

    def _last(self, live: Mapping[int, object]) -> dict[tuple[str, Part], tuple[_Landing, bool]]:
        """Every part at its best known place: in live memory, else (True) in the last copy before it was packed."""
        found: dict[tuple[str, Part], tuple[_Landing, bool]] = {}
        for storage, landings in self._at.items():
            packed = storage not in live
            for x in landings:
                if not packed or (x.name, x.part) not in found:
                    found[x.name, x.part] = (x, packed)
        return found

    def _missing(self, model: nn.Module, name: str, parameter: Tensor, storage: int) -> bool:
        """Whether elements of a live weight were not written. Rows that only pad the vocabulary need not be."""
        written = sum(x.target.numel() for x in {(x.name, x.part): x for x in self._at.get(storage, [])}.values())
        owner = model.get_submodule(name.rpartition(".")[0])
        rows = getattr(owner, "org_vocab_size", None)
        rows = getattr(getattr(owner, "shard_indices", None), "num_org_elements", rows)  # of this worker's part
        if storage in self._repacked and storage not in self._at:
            return False
        if rows is not None and written >= rows * parameter[0].numel():
            return False
        return written < parameter.numel()


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # no storage to point at
        return 0


def _same_view(view: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`view` lies in `source`; the same place in `target`, which has the same layout."""
    offset = view.storage_offset() - source.storage_offset() + target.storage_offset()
    return target.detach().as_strided(view.shape, view.stride(), offset)


def compare(sent: Mapping[str, Sent], reports: Sequence[Report], tied: Mapping[str, str]) -> None:
    """Holds what the workers installed against what was sent. Raises Undelivered naming the first tensor.

    `tied` names, for a weight that an engine may hold under another name only, that other name.
    """
    unwritten = [name for report in reports for name in report.unwritten]
    for name, tensor in sent.items():
        parts = {p.part: p for report in reports for p in report.parts.get(name, [])}
        twice = [p for report in reports for p in report.parts.get(name, []) if p.checksum != parts[p.part].checksum]
        if twice:
            raise _undelivered(name, "two workers hold different copies of it")
        if not parts:
            other = tied.get(name)
            if other is not None and sent[other] == tensor:
                continue
            raise _undelivered(name, "it was sent, but the engine installed it nowhere, so the engine's copy is stale")
        arrived = sum(p.numel for p in parts.values())
        if arrived != tensor.numel:
            raise _undelivered(name, f"only {arrived:,} of its {tensor.numel:,} elements were installed")
        if sum(p.checksum for p in parts.values()) & _MASK != tensor.checksum:
            raise _undelivered(name, "the engine holds other numbers than were sent")
    extra = sorted({name for report in reports for name in report.parts} - sent.keys())
    if extra:
        raise _undelivered(extra[0], "the engine received it, but it was never sent")
    if unwritten:
        raise _undelivered(unwritten[0], "a weight of the engine's model was not written (its name in the engine)")


def formats(reports: Iterable[Report]) -> Iterator[tuple[str, Tensor]]:
    """(name, empty tensor of its shape and dtype) of all that was installed: an engine may pack the values.

    vLLM's CPU kernels add biases in FP32; such a bias holds the numbers of the rollout format and is left out.
    """
    wider = str(Format.FP32.dtype).removeprefix("torch.")
    for report in reports:
        for name, parts in report.parts.items():
            for part in parts:
                if not (name.endswith("bias") and part.dtype == wider):
                    yield name, torch.empty(part.part[0], dtype=getattr(torch, part.dtype), device="meta")


def _undelivered(name: str, what: str) -> Undelivered:
    return undelivered(f"{name!r}: {what}")


def undelivered(what: str) -> Undelivered:
    """The error of an update that could not be proven, with the remedy."""
    return Undelivered(
        f"weight update: {what}. The sampler no longer runs the policy that is trained, so the run stops. "
        "Resume from the last checkpoint; if it happens again, rollout.engine = 'torch' samples without this engine"
    )
