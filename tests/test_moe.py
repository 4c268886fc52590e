"""Mixtures of experts: routing recorded, compared and replayed, through the built-in engine and the whole run."""

from __future__ import annotations

import copy
import io
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common_training import fixed_rows
from conftest import SIZES, byte_tokenizer, small_config, small_module
from rich.console import Console
from test_loop import recipe as small_run
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeForCausalLM,
)

from tenbit import Recipe, routing, train
from tenbit.backends.choose import make_backend
from tenbit.backends.single import SingleBackend
from tenbit.batching import collate, ungraded
from tenbit.canary import Canary
from tenbit.engines.torch import TorchEngine
from tenbit.models import fused, pretrain, upcycle
from tenbit.models.experts import is_mixture, refuse_replay, routed, router_layers, routers, unseen
from tenbit.models.fit import refuse_own_formats
from tenbit.models.loading import Model
from tenbit.precision import Precision
from tenbit.recipe import BackendSpec, OptimSpec
from tenbit.rehearsal import rehearse
from tenbit.rollout import Collected
from tenbit.sampler import Supply, _plain, _supply
from tenbit.scoring import measured, score
from tenbit.types import Batch, Completion, EngineFailed, Problem, Prompt, Rollout, Sampling, Undelivered, merge

QUIET = Console(file=io.StringIO())


def asked(count: int = 24, longest: int = 30) -> list[Prompt]:
    chance = random.Random(0)
    return [Prompt(tuple(chance.randrange(256) for _ in range(chance.randint(1, longest))), i) for i in range(count)]


def sampled(module: Any, plan: Any, max_batch: int = 7, max_tokens: int = 40) -> list[Completion]:
    precision = Precision.parse(plan)
    with TorchEngine(module.config, precision, max_batch=max_batch) as engine:
        engine.load_weights(precision.to_engine(module.state_dict().items()), 0)
        return engine.generate(asked(), Sampling(max_tokens, stop_token_ids=(256,), experts=True))


def model_of(module: Any) -> Model:
    return Model(module, byte_tokenizer(), (256,), 257, 512, torch.device("cpu"))


def watched(module: Any) -> dict[int, torch.Tensor]:
    """What each router's forward gives as experts, seen from outside."""
    seen: dict[int, torch.Tensor] = {}

    def see(place: int, out: Any) -> None:
        seen[place] = out[2]

    for i, gate in enumerate(routers(module)):
        gate.register_forward_hook(lambda m, args, out, i=i: see(i, out))
    return seen


def backend_of(module: Any, plan: Any = "fp32") -> Any:
    return make_backend(
        model_of(module), Precision.parse(plan), OptimSpec.model_validate({}), 1.0, 4, BackendSpec.model_validate({})
    )


# --- the mathematics


def test_routing_is_compared_as_sets():
    a = torch.tensor([[[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 1], [0, 1]], [[-1, -1], [-1, -1]]]])
    b = torch.tensor([[[[1, 0], [2, 3]], [[4, 6], [1, 2]], [[0, 7], [0, 1]], [[0, 1], [0, 1]]]])
    found = {k: (s.mean, s.count) for k, s in routing.compare(a, b).items()}
    assert found == {  # token 0 agrees, token 1 differs in 1 and 2 experts, token 2 in one, token 3 is not known
        "routing/tokens_differ": (2 / 3, 3),
        "routing/layers_differ": (3 / 6, 6),
        "routing/experts_differ": (4 / 12, 6),
    }
    only = routing.compare(a, b, torch.tensor([[True, False, False, True]]))
    assert (only["routing/tokens_differ"].mean, only["routing/tokens_differ"].count) == (0, 1)
    assert routing.compare(a[:, 3:], b[:, 3:]) == {}


def test_statistics_of_parts_add_up():
    chance = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 8, (3, 11, 2, 2), generator=chance) for _ in range(2))
    whole, parts = routing.compare(a, b), merge(routing.compare(x, y) for x, y in zip(a, b, strict=True))
    assert {k: pytest.approx(s.mean) for k, s in parts.items()} == {k: s.mean for k, s in whole.items()}


def test_experts_are_padded_with_unknown():
    one = torch.tensor([[[1, 2]], [[3, 4]]], dtype=torch.int16)
    out = routing.padded([one, None], 3)
    assert out is not None
    assert out.dtype == torch.int16
    assert out.tolist() == [[[[1, 2]], [[3, 4]], [[-1, -1]]], [[[-1, -1]]] * 3]
    assert routing.padded([None, None], 3) is None


# --- recording and replay

SHAPE = {**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, "intermediate_size": 32}
FAMILIES = {
    "qwen3_moe": small_config("qwen3_moe", initializer_range=0.08),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2, initializer_range=0.08),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False, initializer_range=0.08),
    "granitemoe": GraniteMoeConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2, initializer_range=0.08),
    "gpt_oss": GptOssConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2, head_dim=16, initializer_range=0.08),
}


def mixture(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval()


def by_hand(family: str, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The weights of chosen experts, from the family's published rule."""
    p = logits.double().softmax(-1).gather(-1, chosen)
    return p if family == "olmoe" else p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_router_weighs_the_given_experts_by_its_own_probabilities(family):
    found: list[Any] = list(routers(mixture(family)))
    router, last = found
    rows = torch.randn(6, 64)
    chance = torch.Generator().manual_seed(1)
    given = torch.stack([torch.randperm(8, generator=chance)[:2] for _ in range(12)]).view(6, 2, 2)
    given[5] = -1  # unknown: this token chooses by itself
    plain = router(rows)
    place = next(i for i, o in enumerate(plain) if not o.is_floating_point())
    with routed(found, given.to(torch.int16)) as routes:
        out = router(rows)
        last(rows)
    taken = out[place]
    assert torch.equal(taken[:5], given[:5, 0])
    assert torch.equal(taken[5], plain[place][5])
    bias = getattr(router, "bias", None)
    logits = nn.functional.linear(rows, router.weight, bias)
    torch.testing.assert_close(out[1].double(), by_hand(family, logits, taken), rtol=1e-5, atol=1e-6)
    assert routes.chosen is not None
    assert routes.chosen.shape == (6, 2, 2)
    assert torch.equal(routes.chosen[:, 0].long(), plain[place])  # what it would have done, replay or not
    # gradients reach the router through the weights of experts that it would not have chosen
    got, want = (torch.autograd.grad(w.double().square().sum(), router.weight)[0]
                 for w in (out[1], by_hand(family, logits, taken)))  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(router)  # nothing is left behind


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_a_models_own_choice_changes_nothing(family):
    module, ids = mixture(family), torch.randint(0, 256, (2, 9))
    with routed(routers(module)) as first:
        plain = module(ids).logits
    assert first.chosen is not None
    with routed(routers(module), first.chosen.flip(-1).unflatten(0, (2, 9))) as second:  # in another order
        again = module(ids).logits
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    assert second.chosen is not None
    assert torch.equal(first.chosen, second.chosen)


def test_recomputed_layers_replay_the_same_experts():
    rows = [r for r in fixed_rows(4)]
    batch = collate(rows, 257)
    chance = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(8, generator=chance)[:2] for _ in range(2 * batch.tokens.numel())])
    experts = experts.view(*batch.tokens.shape, 2, 2).to(torch.int16)
    experts[0] = -1
    gradients = {}
    for recomputed in (False, True):
        module = small_module("qwen3_moe").train()
        if recomputed:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        backend = backend_of(module)
        with routed(routers(module), experts) as routes:
            backend.accumulate(batch, lambda logp, b: (logp[b.mask].mean(), {}))
        gradients[recomputed] = ({n: p.grad.clone() for n, p in module.named_parameters()}, routes.chosen)
    (plain, chosen), (again, rechosen) = gradients.values()
    assert torch.equal(chosen, rechosen)
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    assert plain["model.layers.0.mlp.gate.weight"].abs().max() > 0


def test_shapes_that_do_not_fit_are_refused():
    module = small_module("qwen3_moe")
    with (
        pytest.raises(ValueError, match="3 layers are given to a model with 2 routers"),
        routed(routers(module), torch.zeros(4, 3, 2)),
    ):
        pass
    with pytest.raises(ValueError, match=r"\[4, 3\] experts are given"), routed(routers(module), torch.zeros(4, 2, 3)):
        module(torch.zeros(1, 4, dtype=torch.long))
    assert all("forward" not in vars(r) for r in routers(module))


def test_which_models_have_routers():
    module = small_module("qwen3_moe", mlp_only_layers=[0])
    assert (len(routers(module)), router_layers(module)) == (1, [1])
    assert [is_mixture(c) for c in (module.config, small_config("qwen2"))] == [True, False]
    refuse_replay(module)
    with pytest.raises(ValueError, match=r"rollout\.replay = true.*it has no experts"):
        refuse_replay(small_module("qwen2"))


def test_a_router_of_another_form_is_left_alone_and_refused_for_replay():
    """One that takes the best groups of experts first, as DeepSeek's do."""

    class GroupedTopKRouter(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            groups = x.view(-1, 2, 4).max(-1).values.topk(1).indices
            best = x.view(-1, 2, 4).gather(1, groups[..., None].expand(-1, -1, 4))[:, 0].topk(2)
            return x, best.values, best.indices + 4 * groups

    module, x = nn.ModuleList([GroupedTopKRouter()]), torch.randn(3, 8)
    with routed(routers(module)) as routes:
        out = module[0](x)
    assert routes.chosen is None
    assert torch.equal(out[2], module[0](x)[2])
    with (
        pytest.raises(ValueError, match=r"does not choose its experts by one call of topk.* rollout\.replay = false"),
        routed(routers(module), torch.zeros(3, 1, 1)),
    ):
        module[0](x)
    with pytest.raises(ValueError, match=r"\[3, 2\] experts are given"), routed(routers(module), torch.zeros(3, 1, 2)):
        module[0](x)


def test_what_is_not_compared_is_said():
    known, grouped = small_module("qwen3_moe"), SimpleNamespace(config=small_config("qwen3_moe"), named_modules=list)
    assert [unseen(known, False), unseen(small_module("qwen2"), True)] == ["", ""]
    assert "rollout.replay = true" in unseen(known, True)
    assert "'qwen3_moe'" in unseen(grouped, False)


def test_routers_that_stay_in_the_models_format_are_said():
    """Where the plan's router = "fp32" finds none (JetMoE's), and not where it finds some (DeepSeek's)."""
    bare = small_module("jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=16)
    assert "they stay in the model's format" in unseen(bare, False)
    grouped = small_module("deepseek_v2", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                           first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                           qk_nope_head_dim=8, v_head_dim=16, num_key_value_heads=4)  # fmt: skip
    assert "not known" in unseen(grouped, False)
    assert "format" not in unseen(grouped, False)


HUNYUAN = {"num_experts": 4, "moe_topk": 2, "head_dim": 16}


def test_a_family_with_fp32_weights_of_its_own_is_refused_before_there_is_a_folder(model_folder, grader, tmp_path):
    folder = model_folder("hunyuan_v1_moe", **HUNYUAN)
    said = r"'hunyuan_v1_moe' keeps parameters in FP32.*mlp\.gate\.wg.*precision = 'fp32'"
    for plan in ("fp16", "bf16"):
        with pytest.raises(ValueError, match=said):
            train(small_run(folder, precision=plan, task__grader=grader), tmp_path / "run", console=QUIET)
    with pytest.raises(ValueError, match=said):
        rehearse(small_run(folder, precision="fp16", task__grader=grader), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    refuse_own_formats(small_config("hunyuan_v1_moe", **HUNYUAN), Precision.parse("fp32"))
    refuse_own_formats(small_config("qwen3_moe"), Precision.parse("fp16"))


class Silent(TorchEngine):
    """Under the weights of the first update it does not say which experts the last response's tokens took."""

    def generate(self, prompts, sampling):
        drawn = super().generate(prompts, sampling)
        return [*drawn[:-1], replace(drawn[-1], experts=None)] if sampling.experts and self.version else drawn


def test_an_engine_that_forgets_what_to_replay_stops_the_run_before_the_steps_first_update(
    model_folder, grader, tmp_path, monkeypatch
):
    """The checkpoint that is kept is the one after the step before, none of the step's updates in it."""
    monkeypatch.setattr("tenbit.engines.torch.TorchEngine", Silent)
    stepped = []
    step = SingleBackend.step
    monkeypatch.setattr(SingleBackend, "step", lambda self: stepped.append(1) or step(self))
    tree = small_run(model_folder("qwen3_moe"), task__grader=grader, rollout__replay=True, optim__updates=2, steps=2)
    with pytest.raises(EngineFailed, match=r"did not say which experts.*saved as it was after step 1"):
        train(tree, tmp_path / "run", console=QUIET)
    assert len(stepped) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


# --- the built-in engine


def test_decode_and_prefill_choose_the_same_experts():
    """FP32: what was recorded while sampling, a token at a time, is what one pass over the whole sequence chooses."""
    module = small_module("qwen3_moe")
    seen = watched(module)
    for c in sampled(module, "fp32"):
        assert c.experts is not None
        assert c.experts.shape == (len(c.prompt_ids) + c.length - 1, 2, 2)
        with torch.no_grad():
            module(torch.tensor([[*c.prompt_ids, *c.response_ids]]))
        whole = torch.stack([seen[0], seen[1]], 1)[:-1]
        assert torch.equal(c.experts.long().sort(-1).values, whole.sort(-1).values)


def test_experts_are_recorded_only_where_asked_for():
    module = small_module("qwen3_moe")
    precision = Precision.parse("fp32")
    with TorchEngine(module.config, precision) as engine:
        engine.load_weights(module.state_dict().items(), 0)
        with_them = engine.generate(asked(2), Sampling(5, experts=True))
        without = engine.generate(asked(2), Sampling(5))
    assert [c.experts is None for c in (*with_them, *without)] == [False, False, True, True]
    assert [c.response_ids for c in with_them] == [c.response_ids for c in without]


def test_replay_lowers_the_mismatch():
    """BF16: single tokens that another expert computed are off by 0.1 and more, with replay by rounding alone."""
    module = small_module("qwen3_moe")
    drawn = sampled(module, "bf16")
    found = {}
    for replay in (False, True):
        tree = {"steps": 1, "precision": "bf16", "rollout": {"max_tokens": 40, "replay": replay}}
        scored = score(Recipe.of(tree), model_of(module), Precision.parse("bf16"), drawn)
        found[replay] = measured(scored).metrics() | {k: s.mean for k, s in merge(s.routing for s in scored).items()}
    assert found[False]["routing/tokens_differ"] > 0
    assert found[True]["logp_abs_max"] < 0.03 < found[False]["logp_abs_max"]
    assert found[True]["kl_k3"] < 0.5 * found[False]["kl_k3"]


def test_the_canary_excuses_flipped_experts_and_no_stale_ones():
    """BF16, an engine that computes otherwise than the trainer: some tokens go to other experts after some updates."""
    module, plan = small_module("qwen3_moe", num_experts=32, num_experts_per_tok=4), Precision.parse("bf16")
    asked_once = [SimpleNamespace(ids=random.Random(1).choices(range(256), k=160))]
    canary = Canary.of(asked_once, model_of(module), plan, Sampling(8), 512)  # type: ignore[arg-type]
    worst = 0.0
    with TorchEngine(module.config, plan) as engine:
        by_rows(engine)
        for _ in range(5):
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.01 * p.abs().mean() * torch.randn_like(p))
            engine.load_weights(plan.to_engine(module.state_dict().items()), 0)
            backend = backend_of(copy.deepcopy(module), "bf16")
            answers = canary.ask(engine)
            expected = canary.expect(backend, [a.drawn.response_ids for a in answers])
            canary.judge(answers, expected)  # raises nothing
            pairs = zip(expected.sequences, answers[0].scored, strict=True)
            worst = max(worst, *(float((p - q).abs().max()) for p, q in pairs))
        assert worst > 0.1  # at least one expert did flip
        drawn = replace(answers[0].drawn, logp=answers[0].drawn.logp - torch.tensor([0.0, 0.3]))
        canary.judge([replace(answers[0], drawn=drawn)], expected)  # also of the two tokens that were drawn
        with torch.no_grad():
            module.model.layers[0].mlp.experts.down_proj.mul_(-1)
        with pytest.raises(Undelivered, match="canary"):
            canary.judge(canary.ask(engine), canary.expect(backend_of(copy.deepcopy(module), "bf16")))


def by_rows(engine: TorchEngine) -> None:
    """Scores as decoding computes: a token at a time, in another order of summation than the trainer's."""
    runner: Any = engine._runner
    module, head = engine._module, runner._head

    def score(sequences: Any, sampling: Any) -> list[torch.Tensor]:
        out = []
        for prompt, response in sequences:
            ids, cache, logits = [*prompt, *response], DynamicCache(), []
            for token in ids[:-1]:
                made = module.base_model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                logits.append(head.logits(made.last_hidden_state[:, -1]))
            logp = torch.cat(logits[len(prompt) - 1 :]).log_softmax(-1)
            out.append(logp.gather(-1, torch.tensor(response)[:, None])[:, 0])
        return out

    engine.score = torch.no_grad()(score)  # type: ignore[method-assign]


# --- training


def test_fused_kernels_leave_experts_right():
    """Norms are fused, layers with experts are not; log-probabilities and gradients stay those of the library."""
    batch = collate(fixed_rows(6), 257)
    found = []
    for fuse in (False, True):
        module = small_module("qwen3_moe").train()
        backend = backend_of(module)
        if not fuse:
            for part in module.modules():
                vars(part).pop("forward", None)
        else:
            assert not any(name.endswith("layers.0") for name in fused.fusable(module))
        logp: list[torch.Tensor] = []

        def loss(l: torch.Tensor, b: Batch, logp: list[torch.Tensor] = logp) -> Any:
            logp.append(l.detach())
            return l[b.mask].mean(), {}

        backend.accumulate(batch, loss)
        found.append((logp[0], torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-5


def recipe(folder: Path, grader: str, **rollout: Any) -> Recipe:
    return Recipe.of(
        {
            "steps": 2,
            "precision": "fp16",
            "model": {"path": str(folder)},
            "task": {"data": "arithmetic", "limit": 12, "grader": grader},
            "algorithm": {"name": "grpo-token-tis"},
            "rollout": {"prompts": 4, "samples": 3, "max_tokens": 24, "replay": True, **rollout},
            "optim": {"lr": 1e-3, "updates": 2, "token_budget": 400},
            "checkpoint": {"every": 1},
        }
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in lines]


@pytest.fixture(scope="module")
def trained(model_folder, grader, tmp_path_factory) -> Path:
    """Two steps in FP16 with replay."""
    return train(recipe(model_folder("qwen3_moe"), grader), tmp_path_factory.mktemp("moe") / "run", console=QUIET)


def test_a_run_logs_how_differently_was_routed(trained):
    for row in rows(trained):
        for key in ("routing/tokens_differ", "routing/layers_differ", "routing/experts_differ"):
            assert 0 <= row[key] < 0.1
        assert row["mismatch/logp_abs_max"] < 0.03


def test_a_resumed_run_is_the_uninterrupted_one(trained, model_folder, grader, tmp_path):
    half = recipe(model_folder("qwen3_moe"), grader).model_copy(update={"steps": 1})
    out = train(half, tmp_path / "run", console=QUIET)
    train(recipe(model_folder("qwen3_moe"), grader), out, resume=True, console=QUIET)
    assert rows(out) == rows(trained)


def test_the_final_model_loads(trained):
    module = AutoModelForCausalLM.from_pretrained(trained / "model", dtype="auto")
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert module.model.layers[0].mlp.experts.gate_up_proj.shape == (8, 64, 64)
    assert module(torch.arange(5)[None]).logits.isfinite().all()


def test_replay_of_a_dense_model_is_refused(model_folder, grader, tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.replay = true"):
        train(recipe(model_folder("qwen2"), grader), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_scoring_without_experts_says_nothing_about_routing():
    module = small_module("qwen3_moe")
    tree = {"steps": 1, "precision": "fp32", "rollout": {"max_tokens": 8, "replay": True}}
    plain = [Completion(c.prompt_ids, c.response_ids, c.logp, c.finish) for c in sampled(module, "fp32", max_tokens=4)]
    assert all(s.routing == {} for s in score(Recipe.of(tree), model_of(module), Precision.parse("fp32"), plain))
    assert collate([ungraded(c) for c in plain], 257).experts is None


def test_the_documents_table_is_what_was_measured(monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import moe

    found = json.loads((root / "benchmarks" / "results" / "moe.json").read_text())["rows"]
    page = (root / "docs" / "moe.md").read_text()
    assert moe.table(found) in page
    by = {(r["engine"], r["precision"], r["router"]): r for r in found}
    assert len(by) == 12

    def over(engine: str, router: str, how: str) -> float:
        return by[engine, "bf16", router][how]["kl_k3"] / by[engine, "fp16", router][how]["kl_k3"]

    plain, replayed = ([over(e, r, how) for e in moe.ENGINES for r in moe.ROUTERS] for how in ("no replay", "replay"))
    assert 3 < min(plain) <= max(plain) < 6  # as the page says
    assert 50 < min(replayed) <= max(replayed) < 65
    for (_, name, _), row in by.items():
        gain = row["no replay"]["kl_k3"] / row["replay"]["kl_k3"]
        low, high = {"fp16": (100, 350), "bf16": (10, 31), "fp32": (0.9, 1.1)}[name]
        assert low < gain < high


def test_what_the_page_says_of_a_trained_mixture_is_what_was_measured(monkeypatch):
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import moe

    found = json.loads((root / "benchmarks" / "results" / "moe_trained.json").read_text())["rows"]
    assert moe.table(found) in (root / "docs" / "moe.md").read_text()
    by = {r["precision"]: r for r in found}
    for how in ("no replay", "replay"):
        assert 55 < by["bf16"][how]["kl_k3"] / by["fp16"][how]["kl_k3"] < 65
    assert 5.5 < by["bf16"]["tokens_differ"] / by["fp16"]["tokens_differ"] < 6.5
    assert all(1 <= by[n]["no replay"]["kl_k3"] / by[n]["replay"]["kl_k3"] < 1.1 for n in ("fp16", "bf16"))


def test_upcycling_keeps_what_the_dense_model_knows(tmp_path):
    """Before any training: every expert is made of its layer's neurons, and all of the rest is taken over."""
    dense = AutoModelForCausalLM.from_pretrained(pretrain.BUILTIN, dtype=torch.float32)
    tokens, labels = upcycle.batch(pretrain.build_tokenizer(), 0, 10)
    mixture = upcycle.upcycled(dense, tokens)
    assert torch.equal(mixture.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert mixture.lm_head.weight is mixture.model.embed_tokens.weight
    old, new = dense.model.layers[2].mlp, mixture.model.layers[2].mlp.experts
    for expert in range(upcycle.EXPERTS):
        gate, up = new.gate_up_proj[expert].chunk(2)
        kept = (gate[:, None] == old.gate_proj.weight[None]).all(-1).nonzero()[:, 1]
        assert len(kept) == len(set(kept.tolist())) == len(gate), "half of the neurons, each once"
        assert torch.equal(up, old.up_proj.weight[kept])
        assert torch.equal(new.down_proj[expert], 2 * old.down_proj.weight[:, kept])
    untrained = Qwen3MoeForCausalLM(mixture.config)
    with torch.no_grad():
        assert upcycle.loss_on(mixture, tokens, labels)[0] < upcycle.loss_on(untrained, tokens, labels)[0] / 5


def test_a_mixture_is_trained_and_saved_by_the_command(tmp_path):
    upcycle.train(tmp_path / "mixture", steps=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", dtype="auto")
    assert loaded.config.model_type == "qwen3_moe"
    assert loaded.dtype == Precision.parse("fp16").export.dtype


def test_experts_survive_a_checkpoint_of_what_is_sampled_ahead():
    experts = torch.arange(24, dtype=torch.int16).view(6, 2, 2)
    completion = Completion((1, 2, 3), (4, 5, 6, 7), torch.zeros(4), "length", 2, 0, experts)
    group = [Rollout(Problem("p", "a", "id"), completion, "text", 1.0, True, 0)]
    supply = Supply(Collected([group], [group], 1), 1, Counter())
    buffer = io.BytesIO()
    torch.save(_plain(supply), buffer)
    buffer.seek(0)
    again = _supply(torch.load(buffer, weights_only=True)).collected.groups[0][0].completion
    assert again.experts is not None
    assert torch.equal(again.experts, experts)
    assert again.experts.dtype == torch.int16
