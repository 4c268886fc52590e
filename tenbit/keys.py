"""Keys of a recipe as text: setting one from the command line, and what to say of one that is wrong."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel


def one_of(key: str, name: str, known: dict[str, Any]) -> str:
    if name not in known:
        raise ValueError(f"{key} = {name!r} is not known{near(name, known)}There are: {', '.join(known)}")
    return name


def near(name: str, known: Any) -> str:
    """How a sentence about a wrong name ends, before the next one: with the name that may have been meant, if any."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}? " if close else ". "


def override(tree: dict[str, Any], item: str) -> None:
    """Sets ``a.b=value`` in place. The value is read as TOML, or else as plain text."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{item!r}: an override is written key=value, such as optim.lr=2e-5")
    try:
        value: Any = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    node = tree
    for part in path:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            if part != "precision":
                raise ValueError(f"{item!r}: {part!r} is a value, not a table")
            child = node[part] = {"preset": child}  # precision = "fp16" with one part of it changed
        node = child
    node[last] = value


def explain(error: Any, root: type[BaseModel]) -> str:
    """One pydantic error in our words."""
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        *section, key = error["loc"]
        return f"there is no key {where!r}{near(str(key), keys_of(root, section))}Remove or correct it"
    if error["type"] == "missing":
        return f"the key {where!r} is missing. Add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"{where} = {error['input']!r}: {message}"


def keys_of(root: type[BaseModel], section: Sequence[Any]) -> list[str]:
    model: Any = root
    for part in section:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        inside = [t for t in get_args(field.annotation) if hasattr(t, "model_fields")]  # of an optional section
        model = inside[0] if inside else field.annotation
    return list(getattr(model, "model_fields", {}))
