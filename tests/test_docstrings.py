"""The calls that module docstrings show can be made: the module has these functions, and they take these arguments."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tenbit"
FILES = sorted(p for p in ROOT.rglob("*.py") if ast.get_docstring(ast.parse(p.read_text())))
SHORTENED = {"Ahead(k)"}  # words about an object, not a call


def signatures(tree: ast.Module) -> dict[tuple[str, str], ast.FunctionDef]:
    """("", function), ("", class: its __init__) and (".", method) -> definition; `self` is not taken off yet."""
    found: dict[tuple[str, str], ast.FunctionDef] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found["", node.name] = node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found["", node.name] = inner if inner.name == "__init__" else found.get(("", node.name), inner)
                    found.setdefault((".", inner.name), inner)
            if found.get(("", node.name)) is not None and found["", node.name].name != "__init__":
                del found["", node.name]
    return found


def shown_calls(docstring: str) -> Iterator[ast.Call]:
    """Of its indented lines, up to the remark that follows after four spaces."""
    for line in docstring.splitlines():
        code = re.split(r"\s{4,}", line.strip())[0]
        if not line.startswith("    ") or not re.match(r"(with |for |\w[\w., ]* = |[\w.]+\()", code):
            continue
        try:
            tree = ast.parse(code + " pass" if code.endswith(":") else code.replace(": ...", ": pass"))
        except SyntaxError:
            continue  # prose
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def parameters(function: ast.FunctionDef) -> inspect.Signature:
    """Its parameters without `self` or `cls`."""
    kinds, given = inspect.Parameter, function.args
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    plain = [*given.posonlyargs, *given.args]
    empty = [kinds.empty] * (len(plain) - len(given.defaults))
    listed = [
        kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=d)
        for a, d in zip(plain, [*empty, *given.defaults], strict=True)
    ]
    listed = listed[1:] if plain and plain[0].arg in ("self", "cls") and not static else listed
    listed += [kinds(given.vararg.arg, kinds.VAR_POSITIONAL)] if given.vararg else []
    for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        listed.append(kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if d is None else d))
    listed += [kinds(given.kwarg.arg, kinds.VAR_KEYWORD)] if given.kwarg else []
    return inspect.Signature(listed)


def wrong_calls(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    known = signatures(tree)
    for call in shown_calls(ast.get_docstring(tree, clean=False) or ""):
        name = ("", call.func.id) if isinstance(call.func, ast.Name) else (".", getattr(call.func, "attr", ""))
        left_out = any(isinstance(a, ast.Starred) or getattr(a, "value", None) is ... for a in call.args)
        if name not in known or left_out or ast.unparse(call) in SHORTENED:
            continue
        try:
            parameters(known[name]).bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})
        except TypeError as error:
            yield f"{ast.unparse(call)}: {error}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_calls_that_a_module_shows_can_be_made(path):
    assert not list(wrong_calls(path.read_text()))


@pytest.mark.parametrize("line", ["made = f(1)", "with C(2) as c:", "c.m()", "f(1, 2, z=3)"])
def test_a_wrong_call_is_found(line):
    code = "def f(x, y): ...\nclass C:\n    def __init__(self): ...\n    def m(self, x): ...\n"
    assert len(list(wrong_calls(f'"""Words.\n\n    {line}        what it is\n"""\n{code}'))) == 1
    assert not list(wrong_calls(f'"""Words.\n\n    f(1, y=2)\n    C().m(1)\n"""\n{code}'))
