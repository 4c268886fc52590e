"""Recipes: overrides, resolution, learning-rate schedules, and what they build."""

from __future__ import annotations

import math

import pytest

from tenbit.algorithms import ALGORITHMS, GRPO, PG
from tenbit.precision import Format
from tenbit.recipe import OptimSpec, Recipe

SMALL = {"steps": 3, "rollout": {"max_tokens": 8}}


def write(tmp_path, text: str):
    file = tmp_path / "r.toml"
    file.write_text(text)
    return file


def test_overrides_reach_every_level(tmp_path):
    file = write(tmp_path, 'steps = 3\nprecision = "fp16"\n[rollout]\nmax_tokens = 8\n')
    made = Recipe.load(
        file,
        [
            "steps=5",
            "optim.lr=2e-5",
            "task.data=my.jsonl",
            "eval.data=['a', 'b']",
            "precision.casting=autocast",
            "rollout.dynamic_sampling=true",
            "algorithm.name=grpo",
        ],
    )
    assert (made.steps, made.optim.lr, made.task.data) == (5, 2e-5, "my.jsonl")
    assert made.eval.data == ("a", "b")
    assert (made.precision.casting, made.precision.compute) == ("autocast", Format.FP16)
    assert made.dynamic_sampling is True
    assert isinstance(made.algorithm.build().objective, GRPO)


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    made = Recipe.of({**SMALL, "precision": "bf16/fp32", "algorithm": {"name": "icepop", "cap": 4.0}})
    made.dump(tmp_path / "out.toml")
    assert Recipe.load(tmp_path / "out.toml") == made


def test_a_recipe_cannot_be_changed():
    made = Recipe.of(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        made.steps = 4


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_by_name_is_the_published_one(name):
    assert Recipe.of({**SMALL, "algorithm": {"name": name}}).algorithm.build() == ALGORITHMS[name]


def test_parts_of_an_algorithm_can_be_changed():
    spec = {"name": "grpo-seq-mis", "cap": 5.0, "clip_high": 0.3, "advantage": "group-mean", "reduction": "token-mean"}
    made = Recipe.of({**SMALL, "algorithm": spec}).algorithm.build()
    assert isinstance(made.objective, GRPO)
    assert made.objective.correction is not None
    assert (made.objective.correction.cap, made.objective.clip.high, made.objective.clip.low) == (5.0, 0.3, 0.2)
    assert (made.advantage, made.reduction) == ("group-mean", "token-mean")


def test_dapo_brings_its_sampling_and_shaping_and_both_can_be_changed():
    made = Recipe.of({**SMALL, "rollout": {"max_tokens": 20480}, "algorithm": {"name": "dapo"}})
    assert (made.dynamic_sampling, made.overlong_buffer) == (True, 4096)
    changed = {"max_tokens": 20480, "dynamic_sampling": False, "overlong_buffer": 0}
    made = Recipe.of({**SMALL, "rollout": changed, "algorithm": {"name": "dapo"}})
    assert (made.dynamic_sampling, made.overlong_buffer) == (False, 0)


def test_the_default_is_equation_5_in_fp16():
    made = Recipe.of(SMALL)
    assert made.precision.name == "fp16"
    assert isinstance(made.algorithm.build().objective, PG)


def test_learning_rates_by_hand():
    constant = OptimSpec.model_validate({"lr": 1.0, "warmup": 4})
    assert [constant.lr_at(i, 10) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = OptimSpec.model_validate({"lr": 1.0, "schedule": "linear"})
    assert [linear.lr_at(i, 4) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = OptimSpec.model_validate({"lr": 1.0, "schedule": "cosine", "warmup": 2})
    assert cosine.lr_at(2, 10) == 1.0
    assert cosine.lr_at(6, 10) == pytest.approx(0.5)
    assert cosine.lr_at(8, 10) == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    assert cosine.lr_at(10, 10) == pytest.approx(0.0)


def test_evaluation_may_truncate_and_training_may_not():
    """Pitfall 10: a renormalised distribution is not the policy that the trainer scores."""
    made = Recipe.of({**SMALL, "eval": {"every": 1, "data": ["aime24"], "top_p": 0.95}})
    assert made.eval_sampling((1,)).truncated
    assert not made.sampling((1,)).truncated
    with pytest.raises(ValueError, match="not the policy"):
        Recipe.of({**SMALL, "rollout": {"max_tokens": 8, "top_k": 5}})


def test_temperature_is_the_same_on_both_sides():
    """Pitfall 9: the backend divides by the temperature that the engine samples with; there is one key for both."""
    made = Recipe.of({**SMALL, "rollout": {"max_tokens": 8, "temperature": 0.6}})
    assert made.sampling(()).temperature == made.rollout.temperature == 0.6
