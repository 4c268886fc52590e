"""What the studies' commands share: options are turned into a recipe, and its messages back into options."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def said_in_options(options: Mapping[str, str]) -> Iterator[None]:
    """Messages about keys that options have set speak of the options: ``{"rollout.samples": "--samples"}``."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for key, option in options.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(key)}(?![\w.])", option, text)
        raise ValueError(text) from error
