"""Small random models, made on the spot, and what several tests share."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast, set_seed

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# A suite started in the background inherits an ignored Ctrl-C, and so would the runs it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


def byte_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """256 bytes, an end-of-sequence token and, if asked for, a pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    specials = {"eos_token": "<|eos|>"} | ({"pad_token": "<|pad|>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=raw, **specials)


def small_config(family: str, **changes):
    """Of any family that transformers knows, by its model_type."""
    extra = {"head_dim": 16} if family.startswith(("qwen3", "gemma")) else {}
    if family in ("gemma2", "gemma3_text"):
        extra |= {"query_pre_attn_scalar": 16}
    if family == "qwen3_moe":
        extra |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    tied = family == "qwen2" or family.startswith("gemma")
    return AutoConfig.for_model(family, **{**SIZES, **extra, "tie_word_embeddings": tied, **changes})


def small_module(family: str = "qwen2", seed: int = 0, **changes):
    """A small random model in FP32, with logits spread enough to make sampling interesting."""
    from transformers import AutoModelForCausalLM

    set_seed(seed)
    module = AutoModelForCausalLM.from_config(small_config(family, initializer_range=0.08, **changes))
    return module.eval()


@pytest.fixture(scope="module")
def grader(tmp_path_factory) -> str:
    """A user's grader that a random model can please: the share of even bytes in its answer."""
    file = tmp_path_factory.mktemp("grader") / "even.py"
    file.write_text(
        "def reward(problem, text):\n    b = text.encode()\n    return sum(x % 2 == 0 for x in b) / max(1, len(b))\n"
    )
    return f"{file}:reward"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """model_folder("llama") -> a folder with a small random model and a byte tokenizer."""
    made = {}

    def make(family: str = "qwen2", pad: bool = True, **changes):
        key = (family, pad, tuple(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}")
            small_module(family, **changes).save_pretrained(folder)
            byte_tokenizer(pad).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="module")
def cluster():
    """One local Ray cluster for the engines and runs of a module, which find it joined already."""
    import ray

    from tenbit.engines import ray_cluster

    ray_cluster.join(ray, 4, 300 << 20)
    yield
    ray_cluster.leave(ray)
