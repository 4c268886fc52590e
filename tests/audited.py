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


def small_weights_that_count(model: Any) -> None:
    """All of layer 0's values are flushed, which its norm and its o_proj make up for: the function depends on them."""
    layer = model.model.layers[0]
    layer.input_layernorm.weight *= 2.0**7
    for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        part.weight *= 2.0**-7
    layer.self_attn.v_proj.weight *= 2.0**-24
    layer.self_attn.o_proj.weight *= 2.0**17


def biases_of_few_steps(model: Any) -> None:
    """Biases that began at zero, after a few steps of 1e-6: FP16 holds nothing below 6e-8, and 6e-5 coarsely."""
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.bias.copy_(torch.linspace(-1e-6, 1e-6, len(part.bias)))


def norms_of_few_steps(model: Any) -> None:
    """The same of Gemma's norms, which multiply by 1 + w."""
    for name, p in model.named_parameters():
        if "norm" in name:
            p.copy_(torch.linspace(-1e-6, 1e-6, p.numel()))


def coarse_logits(model: Any, added: float = 40.0) -> None:
    """Every row of the head adds 5 * `added` by a constant channel: FP16's numbers there lie 0.125 apart."""
    logits(model)
    model.lm_head.weight[:, 5] = added


def sharp_attention(model: Any, factor: float) -> None:
    """Queries and keys so many times as large: one key takes nearly all, and a weight's rounding decides which."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= factor
        layer.self_attn.k_proj.weight *= factor


def certain(model: Any) -> None:
    """Each token's logit for itself is thousands beyond the others: softmax is exactly 1."""
    model.model.embed_tokens.weight *= 500
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)


def rare_token(model: Any) -> None:
    """A token that no answer has would enter the stream as 60,000; nothing can sample it."""
    model.model.embed_tokens.weight[299] = 0
    model.model.embed_tokens.weight[299, 0] = 6e4


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


# (family, plan, what vLLM's refusal must name; nothing where it follows the plan)
VLLM_FOLLOWS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (
        "llama",
        {
            "fp32": [f"model.layers.{part}" for part in ("1.mlp", "0.mlp.down_proj", "0.self_attn.o_proj")],
            "head": "fp32",
        },
        (),
    ),
    ("gemma2", {"fp32": ["model.layers.0.mlp"], "residual_scale": 0.5}, ()),
    ("llama", {"fp32": ["model.layers.0.self_attn", "model.layers.1.mlp"]}, ("model.layers.0.self_attn", "attention")),
    ("llama", {"fp32": ["model.layers.0"]}, ("model.layers.0", "attention")),
    ("llama", {"fp32": ["model.layers.0.mlp.up_proj"]}, ("model.layers.0.mlp.up_proj", "'model.layers.0.mlp'")),
    ("llama", {"fp32": ["model.layers.0.input_layernorm"]}, ("model.layers.0.input_layernorm",)),
    ("qwen3_moe", {"fp32": ["model.layers.1.mlp"]}, ("model.layers.1.mlp", "experts")),
    ("qwen3_moe", {"residual_scale": 0.5}, ("residual_scale", "mixture")),
]
