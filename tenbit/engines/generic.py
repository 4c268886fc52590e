"""Any architecture of `transformers`, through its own forward pass and a `DynamicCache`.

Rows are padded on the left to one length, as the library's own generation has it, so that every row's newest token
is in the last column. A finished row is dropped from the cache; when the longest row leaves, the columns that only
padded are dropped too. New rows join with padding of their own. It is the path for what `llama.py` does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

# Logits of a chunk of tokens held at a time when given tokens are scored, in numbers.
LOGITS_AT_ONCE = 1 << 25

_KeysValues = list[tuple[Tensor, Tensor]]


def _stateless(module: PreTrainedModel) -> None:
    """Refuses architectures whose memory is not a cache of keys and values only."""
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or ["full_attention"])
    other = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if other or getattr(module, "_is_stateful", False):
        raise ValueError(
            f"model_type {module.config.model_type!r} keeps a recurrent state ({', '.join(sorted(other)) or 'stateful'}"
            "), which the built-in engine cannot move between rows. Use another engine for it."
        )


class _WideHead:
    """Makes a module multiply by its output head in a wider dtype than it holds the weights in."""

    def __init__(self, module: PreTrainedModel, dtype: torch.dtype) -> None:
        head = module.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        self.head, self.dtype = head, dtype
        # Only this instance: a tied embedding keeps its own forward.
        head.forward = self.multiply  # pyright: ignore[reportAttributeAccessIssue]

    def refresh(self) -> None:
        self.weight = self.head.weight.to(self.dtype)
        self.bias = None if self.head.bias is None else self.head.bias.to(self.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight, self.bias)


class GenericRunner:
    """A `continuous.Runner` over a causal language model's own forward."""

    def __init__(
        self, module: PreTrainedModel, device: torch.device, pad_token_id: int, head_dtype: torch.dtype
    ) -> None:
        _stateless(module)
        self.module = module
        self._wide_head = _WideHead(module, head_dtype) if head_dtype != module.dtype else None
        self.device = device
        self.pad_token_id = pad_token_id
        self._positions = "position_ids" in inspect.signature(module.forward).parameters
        self._layers: _KeysValues = []
        self._mask = torch.zeros(0, 0, dtype=torch.int64, device=device)

    def refresh(self) -> None:
        """Rebuilds what is derived from the weights."""
        if self._wide_head is not None:
            self._wide_head.refresh()

    def reserve(self, rows: int, length: int) -> None:
        self._layers = []
        self._mask = torch.zeros(0, 0, dtype=torch.int64, device=self.device)

    def _forward(self, ids: Tensor, mask: Tensor, layers: _KeysValues) -> tuple[Tensor, _KeysValues]:
        """Logits ``[n, V]`` after the last column of ids ``[n, t]``, and the grown cache."""
        cache = DynamicCache(layers) if layers else DynamicCache()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = self.module(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], [(layer.keys, layer.values) for layer in cache.layers]  # pyright: ignore

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[Any, Tensor]]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        logits, layers = self._forward(ids.to(self.device), mask.to(self.device), [])
        out = []
        for row, prompt in enumerate(prompts):
            own = [(k[row : row + 1, :, -len(prompt) :], v[row : row + 1, :, -len(prompt) :]) for k, v in layers]
            out.append((own, logits[row : row + 1]))
        return out

    def admit(self, prefilled: Sequence[tuple[Any, int]]) -> None:
        width = max(self._mask.shape[1], *(own[0][0].shape[2] for own, _ in prefilled))
        parts = [self._layers] if self._layers else []
        masks = [F.pad(self._mask, (width - self._mask.shape[1], 0))] if self._layers else []
        for own, copies in prefilled:
            length = own[0][0].shape[2]
            parts.append([(k.expand(copies, -1, -1, -1), v.expand(copies, -1, -1, -1)) for k, v in own])
            masks.append(F.pad(self._mask.new_ones(copies, length), (width - length, 0)))

        def joined(layer: int, which: int) -> Tensor:
            tensors = [part[layer][which] for part in parts]
            return torch.cat([F.pad(t, (0, 0, width - t.shape[2], 0)) for t in tensors])

        self._layers = [(joined(i, 0), joined(i, 1)) for i in range(len(parts[0]))]
        self._mask = torch.cat(masks)

    def keep(self, rows: Sequence[int]) -> None:
        if not rows:
            self.reserve(0, 0)
            return
        index = torch.tensor(rows, device=self.device)
        mask = self._mask[index]
        unused = int(mask.argmax(-1).min())
        self._mask = mask[:, unused:]
        self._layers = [(k[index, :, unused:], v[index, :, unused:]) for k, v in self._layers]

    def decode(self, tokens: Tensor) -> Tensor:
        self._mask = F.pad(self._mask, (0, 1), value=1)
        logits, self._layers = self._forward(tokens[:, None], self._mask, self._layers)
        return logits

    def response_logits(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of (row ``[m]``, place in the response ``[m]``, logits ``[m, V]``) over (prompt, response) pairs.

        Padding is on the right, where a causal model needs no mask. Each chunk continues from the cache of the one
        before, so only its own logits are held.
        """
        prompt = torch.tensor([len(p) for p, _ in sequences])
        total = torch.tensor([len(p) + len(r) for p, r in sequences])
        ids = torch.full((len(sequences), int(total.max())), self.pad_token_id, dtype=torch.int64)
        for row, (p, r) in enumerate(sequences):
            ids[row, : int(total[row])] = torch.tensor([*p, *r])
        columns = max(1, LOGITS_AT_ONCE // (len(sequences) * self.module.config.get_text_config().vocab_size))
        cache = DynamicCache()
        for start in range(0, ids.shape[1] - 1, columns):
            chunk = ids[:, start : start + columns]
            # Column c predicts column c + 1, which is response token c + 1 - prompt of its row.
            place = torch.arange(start, start + chunk.shape[1])[None] + 1 - prompt[:, None]
            wanted = (place >= 0) & (place < (total - prompt)[:, None])
            keep = 0 if bool(wanted.any()) else 1
            out = self.module(
                input_ids=chunk.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=keep
            )
            if keep == 0:
                row, column = wanted.nonzero(as_tuple=True)
                yield row, place[row, column], out.logits[row.to(self.device), column.to(self.device)]
