"""What must be read beside a verdict: how little was looked at, and what the recipe has that an audit does not follow.

few(answers, tokens)                       "seen were only 1 token of 1 answer; ..."
cut_short(cut, answers, recipe, own, ...)  how many answers the audit cut off that training will not
narrow(window)                             that hardly any loss scale fits
unfollowed(precision, recipe, module)      what vLLM would refuse of a plan that the built-in engine follows
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenbit.engines.vllm_fit import not_followed
from tenbit.precision import Format, Precision
from tenbit.recipe import Recipe
from tenbit.studies.audit_backward import Window
from tenbit.studies.audit_verdict import Stretch

FEW_ANSWERS, FEW_TOKENS = 16, 500  # below either a verdict says little of what training will meet

ROOM = 4.0  # a window of loss scales narrower than this is told of


def seen(answers: int, tokens: int) -> str:
    return f"{tokens:,} token{'s' * (tokens != 1)} of {answers:,} answer{'s' * (answers != 1)}"


def few(answers: int, tokens: int) -> list[str]:
    if answers >= FEW_ANSWERS and tokens >= FEW_TOKENS:
        return []
    return [
        f"seen were only {seen(answers, tokens)}; below {FEW_TOKENS} tokens or {FEW_ANSWERS} answers a verdict says "
        "little of what training will meet. Raise --prompts, --samples or --max-tokens"
    ]


def cut_short(cut: int, answers: int, recipe: Recipe, own: Recipe | None, stretch: Stretch) -> list[str]:
    """Answers that the audit's limit ended and the recipe's will not; `stretch` is what the window allows for them."""
    if not cut or own is None:
        return []
    moved = f"its low end lies {stretch.low:g} times higher" if stretch.low > 1 else ""
    moved = moved or (f"its high end lies {stretch.high:g} times lower" if stretch.high > 1 else "")
    allowed = f"The window of loss scales allows for answers of that length: {moved}. " if moved else ""
    return [
        f"{cut:,} of {answers:,} answers were cut off at {recipe.rollout.max_tokens:,} tokens, and the recipe's may "
        f"have {own.rollout.max_tokens:,}. {allowed}Raise --max-tokens to see more of them"
    ]


def narrow(window: Window) -> list[str]:
    """A dynamic loss scale halves and doubles by itself: so little room it leaves at once."""
    if window.empty or window.high_at is None or window.high >= ROOM * window.low:
        return []
    between = f"{window.low:g}" if window.low == window.high else f"{window.low:g} to {window.high:g}"
    return [
        f"hardly a loss scale fits, {between}: one overflow or one growth step leaves it. FP32 for the modules at its "
        f"ends (precision.fp32: {window.low_at} and {window.high_at}) makes it wider"
    ]


def instead(precision: Precision, rounding: bool) -> tuple[str, ...]:
    """Formats to train in where this plan is unsafe, none that it has. BF16 is no remedy for `rounding`."""
    sides = {precision.compute, precision.rollout}
    if sides == {Format.FP32}:
        return ()
    return ("fp32",) if rounding or Format.BF16 in sides else ("bf16", "fp32")


def of_recipe(recipe: Recipe, own: Recipe | None, target: Path | None) -> list[str]:
    """`recipe` is the audit's, `own` the one that `--apply` named."""
    notes = []
    if own is not None and not _same(own.model.path, recipe.model.path):
        notes.append(
            f"{recipe.model.path} was audited, but {target} trains model.path = {own.model.path!r}: what is found is "
            "of the former. Audit the model that is trained"
        )
    if recipe.lora is not None or (own is not None and own.lora is not None):
        notes.append(
            "the adapter (lora.*) is not looked at: gradients are those of all weights, as in full fine-tuning"
        )
    return notes


def _same(a: str, b: str) -> bool:
    one, other = (Path(path).expanduser() for path in (a, b))
    return a == b or (one.is_dir() and one.resolve() == other.resolve())


def unfollowed(precision: Precision, recipe: Recipe | None, module: Any) -> list[str]:
    """What the recipe's engine will refuse of the plan. vLLM is not started: this is what is known of it."""
    if recipe is None or recipe.rollout.kind != "vllm":
        return []
    key = "rollout.ray.engine" if recipe.rollout.engine == "ray" else "rollout.engine"
    apart = recipe.lora is not None and recipe.lora.rollout == "adapter"
    refused = not_followed(precision, module, apart)
    if not refused:
        return []
    return [
        f"{key} = 'vllm' does not follow {'; '.join(refused)}. {key} = 'torch' does; vLLM will refuse to start with "
        "this plan"
    ]
