"""The house's rules, read from the source: floors, one place for dtypes, sizes, docstrings.

Each rule is a function of source text; the tests plant a violation first, so that a rule that sees nothing fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tenbit"
FILES = sorted(p for p in ROOT.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FLOORS: list[set[str]] = [
    {"types", "world", "native", "vigil", "blame", "closing"},
    {"precision", "rounding", "loss_scale", "algorithms", "advantages", "mismatch", "routing", "batching"},
    {"keys", "signals", "lora_spec", "recipe", "models", "tasks"},
    {"engines", "backends"},
    {
        "canary",
        "rollout",
        "loop",
        "checkpoint",
        "runlog",
        "evaluate",
        "compare",
        "clock",
        "console",
        "run",
        "folder",
        "prompts",
        "rehearsal",
        "scoring",
        "sampler",
        "export",
        "outcome",
        "trackers",
        "watch",
    },
    {"report", "studies"},
    {"cli", "listings", "__init__", "__main__"},
]
MATHEMATICS = {
    "types",
    "precision",
    "rounding",
    "loss_scale",
    "algorithms",
    "advantages",
    "mismatch",
    "routing",
    "batching",
}
SYSTEMS = {"transformers", "datasets", "peft", "tokenizers", "vllm", "ray", "deepspeed", "torch.distributed"}
IN_ONE_FILE = ("vllm", "ray", "deepspeed")

MAX_FILE, MAX_FUNCTION = 400, 60
LONG_FILES: dict[str, str] = {}  # "loop.py": "why it is one file"
LONG_FUNCTIONS: dict[str, str] = {}  # "loop.py:train": "why it is one function"


def part_of(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def floor_of(part: str) -> int:
    for level, parts in enumerate(FLOORS):
        if part in parts:
            return level
    raise AssertionError(f"tenbit/{part} has no floor: add it to FLOORS here and to docs/architecture.md")


def imports(source: str, package: str = "tenbit") -> Iterator[str]:
    """Every imported module by its full name, also inside functions, under TYPE_CHECKING and by import_module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield base
            yield from (f"{base}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def imported_at_once(path: Path) -> set[str]:
    """What importing a file imports."""
    eager = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return {name for node in eager for name in imports(ast.unparse(node))}


def own_parts(path: Path) -> set[str]:
    """Top-level parts of tenbit that a file imports from, other than its own."""
    package = ".".join(["tenbit", *path.relative_to(ROOT).parts[:-1]])
    found = set()
    for name in imports(path.read_text(), package):
        parts = name.split(".")
        if parts[0] != "tenbit" or len(parts) < 2:
            continue
        is_module = (ROOT / parts[1]).is_dir() or (ROOT / f"{parts[1]}.py").exists()
        found.add(parts[1] if is_module else "__init__")
    return found - {part_of(path)}


def outside(source: str) -> set[str]:
    return {name for name in imports(source) if not name.startswith("tenbit")}


DTYPE_NAMES = {"float16", "bfloat16", "half", "HalfTensor", "BFloat16Tensor"}
DTYPE_TEXT = re.compile(r"(torch\.|np\.|numpy\.)?(float16|bfloat16|half|fp16_enabled)")


def docstrings(tree: ast.AST) -> set[int]:
    """ids of the nodes that are strings standing alone: docstrings and the notes under attributes."""
    return {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


def dtype_literals(source: str) -> list[int]:
    """Lines on which a 16-bit dtype is written: as an attribute, a cast's method, an imported name, or text."""
    tree = ast.parse(source)
    ignored = docstrings(tree)
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr | ast.stmt):
            continue
        named = (
            (isinstance(node, ast.Attribute) and node.attr in DTYPE_NAMES)
            or (isinstance(node, ast.ImportFrom) and any(a.name in DTYPE_NAMES for a in node.names))
            or (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in ignored
                and DTYPE_TEXT.fullmatch(node.value) is not None
            )
        )
        if named:
            lines.append(node.lineno)
    return lines


def long_functions(source: str, limit: int = MAX_FUNCTION) -> list[str]:
    """Functions with more lines than the limit; their docstrings do not count, for those are meant to teach."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if lines > limit:
                out.append(node.name)
    return out


def test_the_rules_see_what_they_look_for():
    assert set(imports("def f():\n    from ..engines import torch\n    import ray.util", "tenbit.models.x")) >= {
        "tenbit.models.engines",
        "ray.util",
    }
    assert set(imports("from . import world\nfrom .types import Batch", "tenbit")) >= {"tenbit.world", "tenbit.types"}
    assert "vllm" in set(imports("import importlib\nx = importlib.import_module('vllm')"))
    for text in (
        "x = torch.float16",
        "y = x.half()",
        "y = x.bfloat16()",
        "d = 'bfloat16'",
        "d = {'dtype': 'torch.float16'}",
        "from torch import float16",
        "getattr(torch, 'half')",
    ):
        assert dtype_literals(f"import torch\n{text}") == [2], text
    harmless = '"""float16"""\ndef f():\n    """bfloat16"""\n    half = n // 2\n    return torch.float32'
    assert dtype_literals(harmless) == []
    assert long_functions("def f():\n" + "    x = 1\n" * 60) == ["f"]
    assert long_functions('def f():\n    """a\n    b"""\n' + "    x = 1\n" * 59) == []
    with pytest.raises(AssertionError, match="has no floor"):
        floor_of("utils")
    assert len(FILES) >= 8


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_imports_only_from_its_own_floor_or_lower(path: Path):
    own = floor_of(part_of(path))
    too_high = {part for part in own_parts(path) if floor_of(part) > own}
    assert not too_high, f"{relative(path)} (floor {own}) imports from higher floors: {sorted(too_high)}"


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in ("engines", "backends")], ids=relative)
def test_engines_and_backends_never_import_each_other(path: Path):
    other = {"engines": "backends", "backends": "engines"}[part_of(path)]
    assert other not in own_parts(path)


@pytest.mark.parametrize("path", [p for p in FILES if part_of(p) in MATHEMATICS], ids=relative)
def test_mathematics_never_imports_systems(path: Path):
    found = {s for s in SYSTEMS for name in outside(path.read_text()) if name == s or name.startswith(f"{s}.")}
    assert not found
    assert own_parts(path) <= MATHEMATICS, "mathematics knows only mathematics: no ranks, no recipes"


@pytest.mark.parametrize("library", IN_ONE_FILE)
def test_heavy_libraries_are_imported_beside_what_drives_them_and_only_when_asked_for(library: str):
    users = [p for p in FILES if any(n.split(".")[0] == library for n in outside(p.read_text()))]
    for path in users:
        assert path.stem == library or path.stem.startswith(f"{library}_")
        assert part_of(path) in ("engines", "backends")
        if not any(n.split(".")[0] == library for n in imported_at_once(path)):
            continue
        module = path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".")
        for other in set(FILES) - set(users):
            assert module not in imported_at_once(other), f"{other} would load {library} on import"


@pytest.mark.parametrize("path", [p for p in FILES if p != ROOT / "precision.py"], ids=relative)
def test_pitfall_15_no_dtype_is_written_outside_precision(path: Path):
    lines = dtype_literals(path.read_text())
    assert not lines, f"{relative(path)} lines {lines}: take the dtype from Precision or Format"


def test_precision_is_where_dtypes_are_written():
    assert dtype_literals((ROOT / "precision.py").read_text())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_and_functions_keep_their_size(path: Path):
    name, source = relative(path), path.read_text()
    lines = len(source.splitlines())
    assert lines <= MAX_FILE or name in LONG_FILES, f"{name} has {lines} lines: it wants to be two"
    too_long = [f for f in long_functions(source) if f"{name}:{f}" not in LONG_FUNCTIONS]
    assert not too_long, f"{name}: {too_long} have more than {MAX_FUNCTION} lines"


def test_exceptions_are_still_needed():
    for name in LONG_FILES:
        assert len((ROOT / name).read_text().splitlines()) > MAX_FILE, f"{name} is short enough: take it off the list"
    for entry in LONG_FUNCTIONS:
        name, function = entry.split(":")
        assert function in long_functions((ROOT / name).read_text()), f"{entry}: take it off the list"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_module_opens_with_a_docstring(path: Path):
    source = path.read_text()
    if source.strip():  # an empty __init__.py only marks a package
        assert ast.get_docstring(ast.parse(source)), f"{relative(path)} says nothing about itself"


SHORT = {"A": "tests/test_algorithms.py", "P": "tests/test_precision.py", "M": "tests/test_mismatch.py"}


def test_the_paper_index_names_what_exists():
    """Every file, test and algorithm in docs/paper_index.md is there under that name, and no algorithm is left out."""
    from tenbit.algorithms import ALGORITHMS

    top = ROOT.parent
    text = (top / "docs" / "paper_index.md").read_text()
    for path in set(re.findall(r"`((?:tenbit|tests|recipes|docs)/[\w./]+\.\w+)", text)):
        assert (top / path).exists(), path
    references = re.findall(r"`(A|P|M|tests/\w+\.py)::(\w+)`", text)
    assert len(references) > 30
    for file, name in references:
        assert f"def {name}(" in (top / SHORT.get(str(file), str(file))).read_text(), f"{file}::{name}"
    listed = set(re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE))
    assert listed == set(ALGORITHMS)
