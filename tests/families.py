"""Each model family through a run of its own, and the table of what came of it: docs/families.md.

    python tests/families.py            every family, format and engine: writes the table (some four minutes)

`tests/test_families.py` runs the same cells and holds them against the table.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer, small_module
from rich.console import Console
from transformers import AutoModelForCausalLM

from tenbit import train
from tenbit.recipe import Recipe
from tenbit.types import EngineFailed, Overflow

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
FAMILIES = {
    "qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3", "llama": "Llama 3", "mistral": "Mistral", "gemma": "Gemma",
    "gemma2": "Gemma 2", "gemma3_text": "Gemma 3", "olmo": "OLMo", "olmo2": "OLMo 2", "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
}  # fmt: skip
FORMATS = ("fp16", "bf16", "fp32")
ENGINES = ("torch", "vllm")
BOUND = {"fp16": 3e-5, "bf16": 1e-3, "fp32": 1e-8}  # KL k3: what rounding explains, in models this small
ROUTED = 30.0  # times that, where rounding decides between experts
OWN_PROCESS = (
    "olmo",
    "olmo2",
)  # vLLM runs them by transformers' classes, which it changes: not in the trainer's process
REWARD = "def reward(problem, text):\n    b = text.encode()\n    return sum(x % 2 == 0 for x in b) / max(1, len(b))\n"
YES = "yes"
BEGIN, END = "<!-- families -->", "<!-- end -->"


def make_folder(family: str, where: Path) -> Path:
    """A small random model; heads of 32, which vLLM's CPU kernels take."""
    changes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    if family.startswith(("qwen3", "gemma")):
        changes["head_dim"] = 32
    if family == "mixtral":
        changes |= {"num_local_experts": 8, "sliding_window": None}
    folder = where / family
    small_module(family, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(folder: Path, form: str, engine: str, own_process: bool, grader: str) -> Recipe:
    """Two steps: sample, train, update the engine with proof, sample from the new weights, train, export."""
    return Recipe.of(
        {
            "steps": 2,
            "precision": form,
            # newer versions of transformers refuse the default, SDPA, for Gemma 2 and say so with this remedy
            "model": {"path": str(folder), "attention": "eager" if folder.name == "gemma2" else "sdpa"},
            "task": {"data": "arithmetic_test", "limit": 24, "grader": grader, "grade_workers": 1},
            "rollout": {"engine": engine, "prompts": 4, "samples": 4, "max_tokens": 16}
            | ({"vllm": {"cache_gib": 0.1, "own_process": own_process}} if engine == "vllm" else {}),
            "algorithm": {"name": "grpo-token-tis"},
            "optim": {"lr": 1e-3, "updates": 1, "token_budget": 2048},
        }
    )


def cell(family: str, form: str, engine: str, where: Path) -> str:
    """``yes``, or what kept the family from passing, as the user is told."""
    own_process = engine == "vllm" and family in OWN_PROCESS
    grader = where / "even.py"
    grader.write_text(REWARD)
    folder = where / family
    if not folder.exists():
        make_folder(family, where)
    out = Path(tempfile.mkdtemp(dir=where))
    recipe = recipe_of(folder, form, engine, own_process, f"{grader}:reward")
    try:
        train(recipe, out / "run", console=Console(file=io.StringIO()))
    except (ValueError, EngineFailed, Overflow) as error:
        return _short(str(error))
    found = _examined(out / "run", family, form)
    return f"{found}, in its own process" if own_process and found == YES else found


def _examined(run: Path, family: str, form: str) -> str:
    """What the folder of a finished run says, and whether its export loads as what it was trained for."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"]]
    worst = max(row["mismatch/kl_k3"] for row in rows)
    bound = BOUND[form] * (ROUTED if family in ("qwen3_moe", "mixtral") and form != "fp32" else 1)
    if not worst < bound:
        return f"mismatch {worst:.0e}"
    if any(row["optim/skipped"] for row in rows) or not all(row["optim/grad_norm"] for row in rows):
        return "a step was skipped"
    loaded: Any = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto", output_loading_info=True)
    model, found = loaded
    if found["missing_keys"] or found["unexpected_keys"] or str(model.dtype) != f"torch.{_torch_name(form)}":
        return "the export does not load as it was written"
    with torch.no_grad():
        finite = bool(model(torch.arange(20)[None]).logits.isfinite().all())
    return YES if finite else "the export's logits are not finite"


def _torch_name(form: str) -> str:
    return {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[form]


def _short(text: str) -> str:
    """The cause, without the key before it and the remedy behind it."""
    for pattern, said in (
        (r"does not support float16", "vLLM refuses FP16 for it"),
        (r"does not know the architecture", "vLLM does not know it"),
        (r"did not arrive|was sent, but|still holds", "update refused: vLLM holds other weights"),
        (r"weights do not fit|no such weight|no module or parameter named", "update refused: other names in vLLM"),
    ):  # fmt: skip
        if re.search(pattern, text):
            return said
    return re.sub(r"\s+", " ", text.split(". ")[0])[:90]


def read_table() -> dict[tuple[str, str], dict[str, str]]:
    """(family, engine) -> format -> cell, from the page."""
    text = PAGE.read_text()
    lines = text[text.index(BEGIN) : text.index(END)].splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    names = {shown: family for family, shown in FAMILIES.items()}
    engines = {"built-in": "torch", "vLLM": "vllm"}
    return {(names[r[0]], engines[r[1]]): dict(zip(FORMATS, r[2:], strict=True)) for r in rows[2:]}


def table(cells: dict[tuple[str, str], dict[str, str]]) -> Iterable[str]:
    yield "| Family | Engine | FP16 | BF16 | FP32 |"
    yield "|---|---|---|---|---|"
    for (family, engine), row in cells.items():
        shown = "built-in" if engine == "torch" else "vLLM"
        yield f"| {FAMILIES[family]} | {shown} | " + " | ".join(row[form] for form in FORMATS) + " |"


def main(families: list[str]) -> None:
    cells = {}
    with tempfile.TemporaryDirectory() as where:
        for family in families or FAMILIES:
            for engine in ENGINES:
                cells[family, engine] = {form: cell(family, form, engine, Path(where)) for form in FORMATS}
                print(list(table({(family, engine): cells[family, engine]}))[-1], flush=True)
    if not families:
        text = PAGE.read_text()
        head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        PAGE.write_text(head + "\n" + "\n".join(table(cells)) + "\n" + tail)


if __name__ == "__main__":
    main(sys.argv[1:])
