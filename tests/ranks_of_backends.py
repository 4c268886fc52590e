"""Run by torchrun: the same few steps on a backend named in the arguments, in every way the test asks for.

torchrun ... ranks_of_backends.py '{"name": "fsdp"}' '{"name": "fsdp", "offload": true}'
"""

from __future__ import annotations

import json
import sys

import ranks
import torch
from common_training import fixed_rows, fresh_backend, trajectory

from tenbit import world
from tenbit.backends import Backend
from tenbit.batching import collate


def _steady(backend: Backend) -> bool:
    """Whether the weights that are handed out are the masters, after a forward pass as before it."""
    before = {name: t.clone() for name, t in backend.weights()}
    backend.logprobs(collate(fixed_rows(2), 257))
    return all(torch.equal(t, before[name]) for name, t in backend.weights())


torch.set_num_threads(1)
with world.joined():
    found = {}
    for text in sys.argv[1:]:
        how = json.loads(text)
        budget, spoilt = how.pop("budget", 64), how.pop("spoilt", None)
        backend = fresh_backend(**how)
        found[text] = trajectory(backend, budget, spoilt=tuple(spoilt) if spoilt else None)
        found[text] |= {
            "scale_now": backend.state().counts["loss_scale"],
            "updates": backend.state().counts["updates"],
            "tensors": sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel()
                           for t in backend.state().tensors.values()),
            "dtypes": sorted({(part, str(t.dtype)) for part, _, t in backend.live()}),
            "steady": _steady(backend),
            "tied": len({id(p) for n, p in backend._module.named_parameters(remove_duplicate=False)
                         if "embed_tokens" in n or "lm_head" in n}) if hasattr(backend, "_module") else None,
        }  # fmt: skip
    ranks.report(found)
