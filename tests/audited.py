"""Small models that overflow, or underflow, at a known place by construction, for the tests of `tenbit audit`.

Scaling by powers of two changes no mantissa; where one factor undoes another, the function in FP32 is that of the
model that it was made from, or nearly so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import byte_tokenizer, small_module

from tenbit.batching import Row, totals
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import Recipe
from tenbit.scoring import sample
from tenbit.studies.audit import Audit, audit_model
from tenbit.studies.audit_run import rows_of
from tenbit.types import Prompt, Totals

LONGEST = 24
Spoil = Callable[[Any], None]


def inside_mlp(model: Any) -> None:
    """gate * up of layer 1 reaches 2e5; what comes out of the MLP is in the hundreds."""
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight *= 2.0**8
    mlp.up_proj.weight *= 2.0**8
    mlp.down_proj.weight *= 2.0**-8


def inside_attention(model: Any) -> None:
    """The values of layer 0 reach 3e5."""
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight *= 2.0**17
    attention.o_proj.weight *= 2.0**-9


def stream(model: Any, factor: float = 2.0**17) -> None:
    """The residual stream times `factor`: norms divide by it again, so the function is the same."""
    model.model.embed_tokens.weight *= factor
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= factor
        layer.mlp.down_proj.weight *= factor


def inside_mlp_and_stream(model: Any) -> None:
    """Both at once. A rescaled stream multiplies the product by a small number, after it has overflowed."""
    inside_mlp(model)
    stream(model, 2.0**14)


def small_stream(model: Any) -> None:
    """Nothing forward is large; gradients of the stream are 512 times as large, as the norms divide by so little."""
    stream(model, 2.0**-9)


def logits(model: Any) -> None:
    """One channel of the stream is constant, and every row of the head adds 1e5 by it: softmax does not see it."""
    model.model.embed_tokens.weight[:, 5] = 5
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[5] = 0
        layer.mlp.down_proj.weight[5] = 0
    model.lm_head.weight[:, 5] = 2e4


def experts(model: Any) -> None:
    """gate * up inside layer 1's experts reaches 1e6."""
    inside = model.model.layers[1].mlp.experts
    inside.gate_up_proj *= 2.0**9
    inside.down_proj *= 2.0**-8


def large_weight(model: Any) -> None:
    """One weight is beyond FP16, and has no effect."""
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight[0, 0] = 1e5
    mlp.down_proj.weight[:, 0] = 0


def small_weights(model: Any) -> None:
    """All of a matrix is below FP16's smallest subnormal."""
    model.model.layers[0].self_attn.v_proj.weight *= 2.0**-26


def spoilt(spoil: Spoil | None = None, family: str = "llama", **changes: Any) -> Model:
    module = small_module(family, **changes).train()
    with torch.no_grad():
        module.get_input_embeddings().weight[257].normal_(0, 0.08)  # a zero row, as for padding, has huge gradients
        if spoil is not None:
            spoil(module)
    return Model(module, byte_tokenizer(), (256,), 257, 512, torch.device("cpu"))


def recipe_for(precision: Any = "fp16", **more: Any) -> Recipe:
    tree = {
        "steps": 1,
        "precision": precision,
        "rollout": {"max_tokens": LONGEST},
        "algorithm": {"advantage": "reward"},
        "optim": {"token_budget": 200},
    }
    return Recipe.of(tree | more)


def answers(model: Model, recipe: Recipe) -> list[Row]:
    prompts = [Prompt(tuple(range(40 + i, 50 + i)), i) for i in range(8)]
    return rows_of(sample(recipe, model, Precision.parse("fp32"), prompts))


def audited(model: Model, precision: Any = "fp16", total: Totals | None = None) -> Audit:
    recipe = recipe_for(precision)
    rows = answers(model, recipe)
    return audit_model(model, recipe, rows, total or totals(rows, LONGEST), lambda text: None, {})
