"""Run by torchrun: the same few steps on a backend named in the arguments, in every way the test asks for.

    torchrun ... ranks_of_backends.py '{"name": "fsdp"}' '{"name": "fsdp", "offload": true}'
"""

from __future__ import annotations

import json
import sys

import ranks
import torch
from common_training import fresh_backend, trajectory

from tenbit import world

torch.set_num_threads(1)
with world.joined():
    found = {}
    for text in sys.argv[1:]:
        how = json.loads(text)
        budget = how.pop("budget", 64)
        found[text] = trajectory(fresh_backend(**how), budget)
    ranks.report(found)
