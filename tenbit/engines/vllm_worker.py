"""What tenbit adds to vLLM's worker: weights installed under watch, and scores of the sampled distribution.

vLLM mixes this class into its worker (`worker_extension_cls`), in whatever process that runs, and `VllmEngine` calls
its methods by name (`collective_rpc`). It touches vLLM only through the worker that it is part of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tenbit.engines import sampling as sampler
from tenbit.engines import vllm_fit
from tenbit.engines.delivery import Arrivals
from tenbit.engines.vllm_experts import Plain, Recorder
from tenbit.engines.vllm_lora import held
from tenbit.types import Sampling

vllm_fit.register()  # vLLM's worker imports this file before it makes its model


class WorkerExtension:
    """Methods of vLLM's worker. `model_runner` is the worker's own."""

    model_runner: Any

    def tenbit_model_module(self) -> str:
        """Where vLLM's model comes from: its own classes, or transformers'."""
        return type(self.model_runner.get_model()).__module__

    def tenbit_install(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
        """Puts a full state dict in place and says what is where now: `delivery.Report` in plain values."""
        arrivals, model = Arrivals(), self.model_runner.get_model()
        # some architectures have no module for a tied head, and refuse its name; any other gap shows in the report
        known = (pair for pair in named if hasattr(model, pair[0].partition(".")[0]))
        with arrivals:
            self.model_runner.reload_weights(weights_iterator=arrivals.watch(known))
        report = arrivals.report(model, self.model_runner.model_config.dtype).plain()
        repack_experts(model)  # after they were read back: it puts another layout in their place
        return report

    def tenbit_install_file(self, path: str) -> dict[str, Any]:
        """The same from a safetensors file in shared memory, for an engine in a process of its own."""
        with safe_open(path, framework="pt") as file:
            return self.tenbit_install((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def tenbit_adapter(self, rank: int) -> dict[str, list[str]]:
        """Checksums of the adapter that the kernels read, by layer."""
        return held(self.model_runner.lora_manager._adapter_manager, rank)

    def tenbit_begin_experts(self) -> None:
        """From now on a mixture's routers are watched."""
        self.tenbit_recorder = Recorder(self.model_runner)
        self.tenbit_recorder.start()

    def tenbit_end_experts(self) -> dict[str, Plain]:
        """What they chose since."""
        return self.tenbit_recorder.stop()

    def tenbit_begin_scoring(self, temperature: float, top_p: float, top_k: int) -> None:
        """From now on scores of prompt tokens are of the distribution that such a sampling draws from."""
        sampling = Sampling(1, temperature, top_p, top_k)
        self.model_runner.sampler.compute_logprobs = lambda logits: sampler.log_mu_all(logits, sampling)

    def tenbit_end_scoring(self) -> None:
        del self.model_runner.sampler.compute_logprobs  # the class's own shows again


def repack_experts(model: torch.nn.Module) -> None:
    """vLLM's CPU kernels for experts keep a packed copy that its reload leaves as it was."""
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        repack = getattr(experts, "process_weights_after_loading", None)
        if repack is not None and next(module.parameters()).device.type == "cpu":
            repack(module)
