"""Proof that weights arrived, without any engine: checksums; loaders that fuse, cut, cast, pack, drop and corrupt."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from tenbit.engines.delivery import Arrivals, Report, Sent, checksum, compare
from tenbit.types import Undelivered

FORMATS = [torch.float16, torch.bfloat16, torch.float32]


def by_hand(tensor: torch.Tensor) -> int:
    """The definition in Python's integers: the sum of bits x odd weight modulo 2^64."""
    block = 1 << 18
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = 0
    for p, bits in enumerate(tensor.contiguous().view(width).flatten().tolist()):
        x = ((p % block + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        weight = (x ^ (x >> 31)) | 1
        total += bits * weight * (2 * (p // block) + 1)
    return total % 2**64


@pytest.mark.parametrize("dtype", [*FORMATS, torch.int64, torch.uint8])
def test_checksum_is_its_definition(dtype):
    values = (torch.randn(37, 11) * 50).to(dtype)
    assert checksum(values) == by_hand(values)


def test_checksum_goes_on_over_the_end_of_a_block():
    values = torch.randn(2**18 + 5).half()
    assert checksum(values) == by_hand(values)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_changed_bit_of_every_element_is_seen(dtype):
    values = torch.randn(64).to(dtype)
    width = torch.int16 if dtype.itemsize == 2 else torch.int32
    before = checksum(values)
    for element in range(64):
        for bit in range(8 * dtype.itemsize - 1):
            bits = values.clone().view(width)
            bits[element] ^= 1 << bit
            assert checksum(bits.view(dtype)) != before


def test_moved_elements_are_seen():
    values = torch.arange(1, 101.0)
    seen = {checksum(values)}
    for i in range(99):
        swapped = values.clone()
        swapped[[i, i + 1]] = swapped[[i + 1, i]]
        seen.add(checksum(swapped))
        seen.add(checksum(values.roll(i + 1)))
    assert len(seen) == 1 + 99 + 99


def test_disjoint_parts_add_up_whatever_way_they_are_cut():
    values = torch.randn(24, 40).half()
    whole = checksum(values)
    for axis, cuts in ((0, [5, 19]), (0, [24]), (1, [8, 8, 24])):
        parts = values.split(cuts, axis)
        sums = [checksum(p.clone(), (tuple(p.shape), tuple(p.stride()), p.storage_offset())) for p in parts]
        assert sum(sums) % 2**64 == whole


class Fused(nn.Module):
    """What engines do: q, k and v in one weight, a vocabulary padded to a multiple of 64, a bias, a norm."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(40, 16, dtype=dtype))
        self.embed = nn.Embedding(64, 16, dtype=dtype)
        self.embed.org_vocab_size = 50
        self.norm = nn.Parameter(torch.zeros(16, dtype=dtype))

    def load(self, named):
        places = {"q": (0, 24), "k": (24, 8), "v": (32, 8)}
        for name, tensor in named:
            if name in places:
                self.qkv.data.narrow(0, *places[name]).copy_(tensor)
            elif name == "embed":
                self.embed.weight.data[: len(tensor)].copy_(tensor)
            elif name == "norm":
                self.norm.data.copy_(tensor)


def weights() -> dict[str, torch.Tensor]:
    shapes = {"q": (24, 16), "k": (8, 16), "v": (8, 16), "embed": (50, 16), "norm": (16,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator).half() for name, shape in shapes.items()}


def sent(named) -> dict[str, Sent]:
    return {name: Sent(checksum(t.half()), t.numel()) for name, t in named.items()}


def deliver(named, load=None, model=None, dtype=torch.float16) -> Report:
    model = model or Fused(dtype)
    arrivals = Arrivals()
    with arrivals, torch.no_grad():
        (load or model.load)(arrivals.watch(named.items()))
    return Report.of(arrivals.report(model, torch.float16).plain())


def test_fused_and_padded_weights_pass():
    named = weights()
    report = deliver(named)
    compare(sent(named), [report], {})
    assert not any(p.packed for parts in report.parts.values() for p in parts)


def test_weights_sent_wider_are_held_against_what_they_are_cast_to():
    named = {name: t.float() * 1.0001 for name, t in weights().items()}
    compare(sent(named), [deliver(named)], {})


@pytest.mark.parametrize("name", ["q", "v", "embed", "norm"])
def test_one_flipped_element_is_named(name):
    named = weights()
    before = sent(named)
    place = random.Random(name).randrange(named[name].numel())
    named[name].view(torch.int16).view(-1)[place] ^= 1
    with pytest.raises(Undelivered, match=f"'{name}': the engine holds other numbers"):
        compare(before, [deliver(named)], {})


@pytest.mark.parametrize("name", ["k", "embed", "norm"])
def test_a_dropped_tensor_is_named(name):
    named = weights()
    left = {n: t for n, t in named.items() if n != name}
    with pytest.raises(Undelivered, match=f"'{name}': it was sent, but the engine installed it nowhere"):
        compare(sent(named), [deliver(left)], {})


def test_a_tensor_that_the_loader_passes_over_is_named():
    named = {**weights(), "head": torch.randn(50, 16).half()}
    with pytest.raises(Undelivered, match=r"'head'.*stale"):
        compare(sent(named), [deliver(named)], {})


def test_a_tied_weight_may_be_held_under_its_other_name_if_it_is_the_same():
    named = weights()
    named["head"] = named["embed"].clone()
    compare(sent(named), [deliver(named)], {"head": "embed", "embed": "head"})
    named["head"] = named["embed"] + 1
    with pytest.raises(Undelivered, match="'head'"):
        compare(sent(named), [deliver(named)], {"head": "embed", "embed": "head"})


def test_a_tensor_nobody_sent_is_named():
    named = weights()
    with pytest.raises(Undelivered, match="'norm': the engine received it, but it was never sent"):
        compare({n: s for n, s in sent(named).items() if n != "norm"}, [deliver(named)], {})


def test_a_weight_of_the_engine_that_nothing_was_written_to_is_named():
    model = Fused()
    model.register_parameter("extra", nn.Parameter(torch.ones(3, dtype=torch.float16)))
    named = weights()
    with pytest.raises(Undelivered, match="'extra': a weight of the engine's model was not written"):
        compare(sent(named), [deliver(named, model=model)], {})


def test_half_a_tensor_is_not_enough():
    named, model = weights(), Fused()

    def load(watched):
        for name, tensor in watched:
            model.load([(name, tensor if name != "norm" else tensor[:8])]) if name != "norm" else model.norm.data[
                :8
            ].copy_(tensor[:8])

    with pytest.raises(Undelivered, match="'norm': only 8 of its 16 elements"):
        compare(sent(named), [deliver(named, load, model)], {})


def test_a_weight_that_is_changed_after_it_was_copied_is_seen():
    named, model = weights(), Fused()

    def load(watched):
        model.load(watched)
        model.norm.data[3] += 1

    with pytest.raises(Undelivered, match="'norm': the engine holds other numbers"):
        compare(sent(named), [deliver(named, load, model)], {})


def test_copies_over_a_staging_buffer_and_packed_layouts_are_followed():
    named, model = weights(), Fused()
    packed = []

    def load(watched):
        for name, tensor in watched:
            if name == "norm":
                staging = torch.empty(16, dtype=torch.float16)
                staging.copy_(tensor)
                model.norm.data.copy_(staging)
            elif name in "qkv":
                staging = torch.empty_like(tensor)
                staging.copy_(tensor)
                packed.append(staging.t().contiguous())
            else:
                model.load([(name, tensor)])
        model.qkv = nn.Parameter(torch.empty(0, dtype=torch.float16), requires_grad=False)

    report = deliver(named, load, model)
    compare(sent(named), [report], {})
    assert {name: parts[0].packed for name, parts in report.parts.items()} == {
        "q": True, "k": True, "v": True, "embed": False, "norm": False,
    }  # fmt: skip


def test_parts_on_several_workers_add_up_and_replicas_must_agree():
    named = weights()

    def worker(rank: int, spoil: bool = False) -> Report:
        model = nn.Module()
        model.q = nn.Parameter(torch.zeros(12, 16, dtype=torch.float16))
        model.norm = nn.Parameter(torch.zeros(16, dtype=torch.float16))

        def load(watched):
            for name, tensor in watched:
                if name == "q":
                    model.q.data.copy_(tensor.narrow(0, 12 * rank, 12))
                elif name == "norm":
                    model.norm.data.copy_(tensor)
            if spoil:
                model.norm.data[0] += 1

        return deliver({n: named[n] for n in ("q", "norm")}, load, model)

    before = {n: s for n, s in sent(named).items() if n in ("q", "norm")}
    compare(before, [worker(0), worker(1)], {})
    with pytest.raises(Undelivered, match="'q': only 192 of its 384"):
        compare(before, [worker(0), worker(0)], {})
    with pytest.raises(Undelivered, match="'norm': two workers hold different copies"):
        compare(before, [worker(0), worker(1, spoil=True)], {})


def test_checksum_of_more_than_is_summed_at_once():
    """40 blocks: the sums of two parts, each small enough to be taken at once, are the sum of the whole."""
    block = 1 << 18
    values = torch.randn(40 * block + 3, generator=torch.Generator().manual_seed(0)).half()
    cut = 17 * block
    first, second = values[:cut], values[cut:]
    whole = checksum(first) + checksum(second, ((len(second),), (1,), cut))
    assert checksum(values) == whole % 2**64
    values[33 * block + 5] += 1
    assert checksum(values) != whole % 2**64
