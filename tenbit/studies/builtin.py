"""Measures the built-in model and writes the perfectible set that it defines (section 4 of the paper).

    python -m tenbit.studies.builtin                  accuracy, greedy and at temperature 1, response lengths
    python -m tenbit.studies.builtin --write          also data/arithmetic_perfectible.jsonl

`--samples` responses at temperature 1 to every problem of `arithmetic`, by the built-in engine in FP16; problems with
an accuracy between 20% and 80% are perfectible: solvable, and not solved.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, quantiles

from tenbit.clock import Clock
from tenbit.engines.choose import make_engine
from tenbit.models import loading
from tenbit.prompts import ask
from tenbit.recipe import Recipe
from tenbit.rollout import Group, Policy
from tenbit.tasks import arithmetic
from tenbit.tasks.grading import open_grader

LOW, HIGH = 0.2, 0.8
MAX_TOKENS = 320


def accuracy(groups: Sequence[Group]) -> list[float]:
    return [fmean(r.correct for r in group) for group in groups]


def perfectible(groups: Sequence[Group]) -> list[dict[str, object]]:
    """Rows of the problems whose accuracy is within [LOW, HIGH]."""
    return [
        {"problem": g[0].problem.prompt, "answer": g[0].problem.answer, "initial_accuracy": round(share, 4)}
        for g, share in zip(groups, accuracy(groups), strict=True)
        if LOW <= share <= HIGH
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tenbit.studies.builtin", description=__doc__)
    parser.add_argument("--model", default="builtin", help="a checkpoint folder")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="write the perfectible set into the package's data")
    args = parser.parse_args()
    tree = {"steps": 1, "model": {"path": args.model}, "rollout": {"max_tokens": MAX_TOKENS}}
    recipe = Recipe.of(tree)
    model = loading.load(recipe.model)
    with open_grader("exact") as grader, make_engine(recipe.rollout, model, recipe.precision) as engine:
        engine.load_weights(recipe.precision.to_engine(model.module.state_dict().items()), version=0)
        sampled = Policy(engine, model.tokenizer, grader, recipe.sampling(model.stop_token_ids))
        greedy = replace(sampled, sampling=replace(sampled.sampling, temperature=0.0))
        for name in arithmetic.SIZES:
            asked = ask(name, recipe, model, MAX_TOKENS, None)
            best = greedy.answer(asked, 1, ("greedy", name), Clock())
            groups = sampled.answer(asked, args.samples, ("builtin", name), Clock())
            lengths = [r.completion.length for g in groups for r in g]
            cuts = quantiles(lengths, n=20)
            print(f"{name}: greedy {fmean(accuracy(best)):.1%}, temperature 1 {fmean(accuracy(groups)):.1%}")
            print(
                f"  {len(groups)} problems x {args.samples}; response tokens: mean {fmean(lengths):.0f}, "
                f"5% {cuts[0]:.0f}, 95% {cuts[-1]:.0f}, longest {max(lengths)}"
            )
            if name == "arithmetic":
                kept = perfectible(groups)
                print(
                    f"  perfectible: {len(kept)}, accuracy {fmean(float(str(r['initial_accuracy'])) for r in kept):.1%}"
                )
                if args.write:
                    path = Path(arithmetic.DATA, "arithmetic_perfectible.jsonl")
                    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


if __name__ == "__main__":
    main()
