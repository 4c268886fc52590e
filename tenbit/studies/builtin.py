"""Measures the built-in model and writes the perfectible set that it defines (section 4 of the paper).

    python -m tenbit.studies.builtin                  accuracy, greedy and at temperature 1, response lengths
    python -m tenbit.studies.builtin --write          also data/arithmetic_perfectible.jsonl

`--samples` responses at temperature 1 to every problem of `arithmetic`, by the built-in engine in FP16; problems with
an accuracy between 20% and 80% are perfectible: solvable, and not solved.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, quantiles

from tenbit.clock import Clock
from tenbit.engines.choose import make_engine
from tenbit.models import loading
from tenbit.prompts import ask
from tenbit.recipe import Recipe
from tenbit.rollout import Policy
from tenbit.studies.perfectible import measure
from tenbit.studies.perfectible_plan import HIGH, LOW, SAMPLES
from tenbit.studies.perfectible_rule import Rule
from tenbit.tasks import arithmetic
from tenbit.tasks.grading import open_grader

MAX_TOKENS = 320


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tenbit.studies.builtin", description=__doc__)
    parser.add_argument("--model", default="builtin", help="a checkpoint folder")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--write", action="store_true", help="write the perfectible set into the package's data")
    args = parser.parse_args()
    tree = {"steps": 1, "model": {"path": args.model}, "rollout": {"max_tokens": MAX_TOKENS}}
    recipe, rule = Recipe.of(tree), Rule.of(args.samples, LOW, HIGH)
    model = loading.load(recipe.model)
    with open_grader("exact") as grader, make_engine(recipe.rollout, model, recipe.precision) as engine:
        engine.load_weights(recipe.precision.to_engine(model.module.state_dict().items()), version=0)
        sampled = Policy(engine, model.tokenizer, grader, recipe.sampling(model.stop_token_ids))
        greedy = replace(sampled, sampling=replace(sampled.sampling, temperature=0.0))
        for name in arithmetic.SIZES:
            asked = ask(name, recipe, model, MAX_TOKENS, None)
            best = [group[0].correct for group in greedy.answer(asked, 1, ("greedy", name), Clock())]
            rows = measure(sampled, asked, rule, ("builtin", name), least=rule.samples)
            lengths = [length for row in rows for length in row["lengths"]]
            cuts = quantiles(lengths, n=20)
            shares = [row["initial_accuracy"] for row in rows]
            print(f"{name}: greedy {fmean(best):.1%}, temperature 1 {fmean(shares):.1%}")
            print(
                f"  {len(rows)} problems x {args.samples}; response tokens: mean {fmean(lengths):.0f}, "
                f"5% {cuts[0]:.0f}, 95% {cuts[-1]:.0f}, longest {max(lengths)}"
            )
            if name == "arithmetic":
                kept = [row for row in rows if row["verdict"] == "kept"]
                print(f"  perfectible: {len(kept)}, accuracy {fmean(row['initial_accuracy'] for row in kept):.1%}")
                if args.write:
                    path = Path(arithmetic.DATA, "arithmetic_perfectible.jsonl")
                    columns = ("problem", "answer", "initial_accuracy")
                    lines = [json.dumps({key: row[key] for key in columns}) + "\n" for row in kept]
                    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
