"""Any architecture of `transformers`, through its own forward pass and a `DynamicCache`.

Rows are padded on the left to one length, as the library's own generation has it, so that every row's newest token
is in the last column. A finished row is dropped from the cache; when the longest row leaves, the columns that only
padded are dropped too. New rows join with padding of their own. It is the path for what `llama.py` does not know.

Of a mixture of experts it keeps, beside the cache, which experts each token took, if it is asked to.

The library's forward runs up to the last hidden state only. From there on the trainer's own `Head` takes over, so
that a softcap or a scale of the logits is applied in FP32 on both sides, not in 16 bits on one of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tenbit.models.experts import UNKNOWN, routed, routers
from tenbit.models.logprobs import Head, response_hidden

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


class GenericRunner:
    """A `continuous.Runner` over a causal language model's own forward."""

    def __init__(
        self, module: PreTrainedModel, device: torch.device, pad_token_id: int, head_dtype: torch.dtype
    ) -> None:
        _stateless(module)
        self.module, self.device, self.pad_token_id = module, device, pad_token_id
        self._head_source = self._head = Head.of(module, head_dtype)
        self._head_agrees = False
        self._positions = "position_ids" in inspect.signature(module.base_model.forward).parameters
        self._routers = routers(module)
        self._record = False
        self._clear()

    def refresh(self) -> None:
        """Rebuilds what is derived from the weights: the head, where it is multiplied in a wider format."""
        source, dtype = self._head_source, self._head_source.dtype
        bias = None if source.bias is None else source.bias.to(dtype)
        self._head = replace(source, weight=source.weight.to(dtype), bias=bias)
        if not self._head_agrees:
            self._compare_head()
            self._head_agrees = True

    def _compare_head(self) -> None:
        """Refuses a module that does more to its logits than `Head` knows of: both sides would train another model."""
        ids = torch.full((1, 1), self.pad_token_id, device=self.device)
        ours = self._head.logits(self.module.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
        theirs = self.module(input_ids=ids, use_cache=False).logits[:, -1].float()
        tolerance = 16 * torch.finfo(self.module.dtype).eps * float(theirs.abs().max())
        if bool(ours.isfinite().all()) and float((ours - theirs).abs().max()) > tolerance:
            raise ValueError(
                f"model_type {self.module.config.model_type!r} does something to its logits that tenbit does not "
                "know (it knows final_logit_softcapping, logits_scaling and logit_scale). Use another architecture."
            )

    def reserve(self, rows: int, length: int, experts: bool = False) -> None:
        self._record = experts and bool(self._routers)
        self._clear()

    def _clear(self) -> None:
        self._layers: _KeysValues = []
        self._mask = torch.zeros(0, 0, dtype=torch.int64, device=self.device)
        self._experts: Tensor | None = None  # [rows, columns, layers, k], padded like the mask

    def _forward(self, ids: Tensor, mask: Tensor, layers: _KeysValues) -> tuple[Tensor, _KeysValues, Tensor | None]:
        """Logits ``[n, V]`` after the last column of ids ``[n, t]``, the grown cache, the experts of ids."""
        cache = DynamicCache(layers) if layers else DynamicCache()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with routed(self._routers if self._record else []) as routes:
            out = self.module.base_model(**inputs, past_key_values=cache, use_cache=True)
        logits = self._head.logits(out.last_hidden_state[:, -1])
        chosen = None if routes.chosen is None else routes.chosen.unflatten(0, ids.shape)
        return logits, [(layer.keys, layer.values) for layer in cache.layers], chosen  # pyright: ignore

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[Any, Tensor]]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        logits, layers, chosen = self._forward(ids.to(self.device), mask.to(self.device), [])
        out = []
        for row, prompt in enumerate(prompts):
            own = [(k[row : row + 1, :, -len(prompt) :], v[row : row + 1, :, -len(prompt) :]) for k, v in layers]
            experts = None if chosen is None else chosen[row : row + 1, -len(prompt) :]
            out.append(((own, experts), logits[row : row + 1]))
        return out

    def admit(self, prefilled: Sequence[tuple[Any, int]]) -> None:
        width = max(self._mask.shape[1], *(own[0][0].shape[2] for (own, _), _ in prefilled))
        parts = [self._layers] if self._layers else []
        masks = [F.pad(self._mask, (width - self._mask.shape[1], 0))] if self._layers else []
        chosen = [self._experts] if self._experts is not None else []
        for (own, experts), copies in prefilled:
            length = own[0][0].shape[2]
            parts.append([(k.expand(copies, -1, -1, -1), v.expand(copies, -1, -1, -1)) for k, v in own])
            masks.append(F.pad(self._mask.new_ones(copies, length), (width - length, 0)))
            chosen += [] if experts is None else [experts.expand(copies, -1, -1, -1)]

        def joined(layer: int, which: int) -> Tensor:
            tensors = [part[layer][which] for part in parts]
            return torch.cat([F.pad(t, (0, 0, width - t.shape[2], 0)) for t in tensors])

        self._layers = [(joined(i, 0), joined(i, 1)) for i in range(len(parts[0]))]
        self._mask = torch.cat(masks)
        columns = [F.pad(t, (0, 0, 0, 0, width - t.shape[1], 0), value=UNKNOWN) for t in chosen]
        self._experts = torch.cat(columns) if columns else None

    def keep(self, rows: Sequence[int]) -> None:
        if not rows:
            self._clear()
            return
        index = torch.tensor(rows, device=self.device)
        mask = self._mask[index]
        unused = int(mask.argmax(-1).min())
        self._mask = mask[:, unused:]
        self._layers = [(k[index, :, unused:], v[index, :, unused:]) for k, v in self._layers]
        if self._experts is not None:
            self._experts = self._experts[index, unused:]

    def decode(self, tokens: Tensor) -> Tensor:
        self._mask = F.pad(self._mask, (0, 1), value=1)
        logits, self._layers, chosen = self._forward(tokens[:, None], self._mask, self._layers)
        if self._experts is not None and chosen is not None:
            self._experts = torch.cat([self._experts, chosen], 1)
        return logits

    def experts(self, row: int) -> Tensor | None:
        return None if self._experts is None else self._experts[row][self._mask[row].bool()].cpu()

    def response_logits(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of (row ``[m]``, place in the response ``[m]``, logits ``[m, V]``) over (prompt, response) pairs.

        Padded on the right and without a cache, as in training: the hidden states are made by the trainer's function.
        """
        prompt = torch.tensor([len(p) for p, _ in sequences])
        response = torch.tensor([len(r) for _, r in sequences])
        ids = torch.full((len(sequences), int((prompt + response).max())), self.pad_token_id, dtype=torch.int64)
        for row, (p, r) in enumerate(sequences):
            ids[row, : len(p) + len(r)] = torch.tensor([*p, *r])
        mask = torch.arange(int(response.max())) < response[:, None]
        inputs = (x.to(self.device) for x in (ids, prompt, mask))
        hidden = response_hidden(self.module, *inputs)
        row, place = mask.nonzero(as_tuple=True)
        size = max(1, LOGITS_AT_ONCE // len(self._head.weight))
        for part in zip(row.split(size), place.split(size), hidden.split(size), strict=True):
            yield part[0], part[1], self._head.logits(part[2])
