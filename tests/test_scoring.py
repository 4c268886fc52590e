"""The same tokens under both policies, against transformers' own forward pass in FP32 and against compare's numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tenbit.compare import compare
from tenbit.models import loading
from tenbit.precision import Precision
from tenbit.prompts import Asked
from tenbit.recipe import Recipe
from tenbit.scoring import Scored, measured, sample, sample_and_score, train_logps
from tenbit.types import Overflow, Problem, Prompt


@pytest.fixture(scope="module")
def setting(model_folder):
    tree = {
        "steps": 1,
        "model": {"path": str(model_folder())},
        "rollout": {"max_tokens": 24, "temperature": 0.7},
        "optim": {"token_budget": 100},  # several micro-batches
    }
    recipe = Recipe.of(tree)
    return recipe, loading.load(recipe.model)


PROMPTS = [Prompt(tuple(range(40 + i, 45 + 2 * i)), seed) for i, seed in enumerate((3, 1, 4, 1, 5, 9))]


def reference(model, prompt, response, temperature):
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = model.module(input_ids=ids).logits[0].double() / temperature
    logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [None, 1.3])
def test_train_logps_are_those_of_a_plain_forward_pass(setting, temperature):
    recipe, model = setting
    sequences = [((1, 2, 3), (5, 6, 7, 8)), ((9,), (4,)), ((20, 21), tuple(range(60, 90))), ((7, 7, 7, 7), (1, 2))]
    found = train_logps(model, Precision.parse("fp32"), recipe, sequences, temperature)
    for (prompt, response), logp in zip(sequences, found, strict=True):
        assert (logp.dtype, logp.shape) == (torch.float32, (len(response),))
        want = reference(model, prompt, response, temperature or 0.7)
        assert torch.allclose(logp.double(), want, atol=2e-5)
    assert train_logps(model, Precision.parse("fp32"), recipe, []) == []


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16/fp16"])
def test_the_model_is_not_changed_and_the_sides_have_their_formats(setting, name):
    recipe, model = setting
    before = copy.deepcopy(model.module.state_dict())
    precision = Precision.parse(name)
    scored = sample_and_score(recipe, model, precision, PROMPTS)
    after = model.module.state_dict()
    assert all(torch.equal(before[k], after[k]) and after[k].dtype == before[k].dtype for k in before)
    assert [s.prompt_ids for s in scored] == [p.ids for p in PROMPTS]
    completions = sample(recipe, model, precision, PROMPTS)
    assert [c.response_ids for c in completions] == [s.response_ids for s in scored]
    gap = torch.cat([s.logratio.abs() for s in scored]).mean()
    low, high = {"fp32": (0, 2e-6), "fp16": (1e-6, 3e-3), "bf16/fp16": (3e-4, 0.05)}[name]
    assert low <= gap < high


def test_measured_leaves_out_what_is_not_finite():
    mu = torch.tensor([-1.0, -2.0, -3.0])
    clean = Scored((1,), (5, 6), mu[:2], torch.tensor([-1.1, -2.3]))
    dirty = Scored((1,), (5, 6, 7), mu, torch.tensor([-1.1, -2.3, math.nan]))
    infinite = Scored((1,), (7,), torch.tensor([-math.inf]), torch.tensor([-1.0]))
    assert measured([dirty, infinite]).metrics() == measured([clean]).metrics()
    assert measured([clean]).metrics()["kl_k1"] == pytest.approx(0.2, rel=1e-6)
    assert measured([infinite]).metrics() == measured([]).metrics() == {}


def test_an_overflow_is_raised_and_names_the_side(model_folder):
    recipe = Recipe.of({"steps": 1, "model": {"path": str(model_folder("llama"))}, "rollout": {"max_tokens": 4}})
    model = loading.load(recipe.model)
    with torch.no_grad():
        model.module.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(1e7)
    sequences = [((1, 2), (3, 4))]
    assert train_logps(model, Precision.parse("fp32"), recipe, sequences)[0].isfinite().all()
    with pytest.raises(Overflow, match="trainer's log-probabilities are not finite in fp16"):
        train_logps(model, Precision.parse("fp16"), recipe, sequences)
    with pytest.raises(Overflow):
        sample(recipe, model, Precision.parse("fp16"), PROMPTS)


def test_compare_stands_on_the_same_numbers(setting):
    recipe, model = setting
    asked = [Asked(Problem("", "", ""), p.ids) for p in PROMPTS]
    found = compare(recipe, model, asked, "bf16")
    assert found["sequences"] == recipe.compare.samples * len(asked)
    assert found["precision"] == "bf16"
    assert 1e-8 < found["kl_k3"] < 1e-2
    assert sum(b["n"] for b in found["by_length"].values()) == found["sequences"]
