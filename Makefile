.PHONY: help install environments engines llama upstream vllm ray demo test slow quality style clean
.DEFAULT_GOAL := help

PYTHON ?= python3
# OpenMP's threads spin while they wait; 0.1 to 1 ms of that is enough, and more slows all down beside other programs.
export GOMP_SPINCOUNT ?= 10000
BIN := .venv/bin

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: .venv/installed  ## set up .venv with the tested versions (about 6 GB, two minutes)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

environments: .venv-4.57.6/installed .venv-5.4.0/installed .venv-5.23.0/installed  ## set up the other transformers versions of the tests

# Everything except transformers and its pinned requirements comes from .venv.
.venv-%/installed: .venv/installed
	$(PYTHON) -m venv .venv-$*
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	    > "$$(.venv-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/qgsa.pth"
	.venv-$*/bin/python -m pip install --quiet transformers==$*
	touch $@

engines: outputs/engine_files/256m/done outputs/engine_files/500m/done  ## set up the other engines that training/studies/engines.py times

# The versions with which optimum-intel exports these architectures; torch comes from .venv.
.venv-engines/installed: .venv/installed
	$(PYTHON) -m venv .venv-engines
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	    > "$$(.venv-engines/bin/python -c 'import site; print(site.getsitepackages()[0])')/qgsa.pth"
	.venv-engines/bin/python -m pip install --quiet optimum-intel==2.2.0 openvino==2026.4.1 transformers==4.57.6 \
	    'datasets<5'
	touch $@

CHECKPOINTS ?= ../shared/checkpoints
EXPORT = $(BIN)/python hub_cards/export.py --model $(CHECKPOINTS)/smolvlm-$*-instruct --random_weights true
OPENVINO = .venv-engines/bin/optimum-cli export openvino --model $(@D)/plain --task image-text-to-text

outputs/engine_files/%/done: .venv-engines/installed
	rm -rf $(@D)
	$(EXPORT) --format onnx --onnx_pointers attention selector --glance_downscale 2 --output_dir $(@D)/onnx
	$(EXPORT) --format idefics3 --output_dir $(@D)/plain
	$(OPENVINO) --weight-format fp32 $(@D)/openvino-fp32
	$(OPENVINO) --weight-format int8 $(@D)/openvino-int8
	touch $@

llama: outputs/engine_files/256m/llama/done outputs/engine_files/500m/llama/done  ## add llama.cpp to the other engines (needs a C++ compiler; 20 minutes)

# Compiled for the processor of this machine; its archive brings the converter of checkpoints, too.
LLAMA := 0.3.36
.llama/installed: .venv-engines/installed
	rm -rf .llama
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: llama-cpp-python==$(LLAMA) --dest .llama
	tar -xzf .llama/llama_cpp_python-$(LLAMA).tar.gz -C .llama --strip-components 3 \
	    $(addprefix llama_cpp_python-$(LLAMA)/vendor/llama.cpp/,convert_hf_to_gguf.py conversion gguf-py)
	CMAKE_ARGS=-DGGML_NATIVE=ON .venv-engines/bin/python -m pip install --quiet --no-binary llama-cpp-python \
	    llama-cpp-python==$(LLAMA) sentencepiece
	touch $@

GGUF = .venv-engines/bin/python .llama/convert_hf_to_gguf.py $(@D)/../plain --outtype q8_0

outputs/engine_files/%/llama/done: .llama/installed outputs/engine_files/%/done
	rm -rf $(@D) && mkdir $(@D)
	$(GGUF) --outfile $(@D)/model.gguf
	$(GGUF) --mmproj --outfile $(@D)/mmproj.gguf
	touch $@

upstream: .upstream/fetched  ## fetch transformers' own tests, which tests/upstream runs on our classes

.upstream/fetched: VERSION = $(shell sed -n 's/^transformers==//p' constraints.txt)
.upstream/fetched: constraints.txt .venv/installed
	rm -rf .upstream
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers transformers==$(VERSION) --dest .upstream
	tar -xzf .upstream/transformers-$(VERSION).tar.gz -C .upstream --strip-components 1 transformers-$(VERSION)/tests
	touch $@

vllm: .venv-vllm/installed  ## set up vLLM with our plugin for CPUs in .venv-vllm (3.5 GB)

# torchvision, torchaudio and torchcodec are built for another torch than that of vLLM for CPUs, and fail at import.
.venv-vllm/installed: pyproject.toml hub_cards/qgsa_vllm/pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --editable '.[vllm]' --editable hub_cards/qgsa_vllm
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

ray: .venv-ray/installed  ## set up Ray Serve in .venv-ray (400 MB), and run the tests of hub_cards/serve_ray.py
	.venv-ray/bin/python -m pytest tests/hub_cards/test_serve_ray.py

# Everything except Ray and its requirements comes from .venv.
.venv-ray/installed: .venv/installed
	$(PYTHON) -m venv .venv-ray
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	    > "$$(.venv-ray/bin/python -c 'import site; print(site.getsitepackages()[0])')/qgsa.pth"
	.venv-ray/bin/python -m pip install --quiet --editable '.[ray]'
	touch $@

demo: install  ## train question-guided selection on cards, show results (about 8 minutes on two cores with AVX-512, 10 with AVX2 only)
	$(BIN)/python training/run_qgsa.py --preset demo

test: install  ## run the tests
	$(BIN)/python -m pytest

slow: install  ## run the slow tests: presets on the published architectures, several processes, killed runs
	$(BIN)/python -m pytest -m slow

quality: install  ## check formatting, spelling, types and file sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python .ci/check_sizes.py

style: install  ## fix formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all outputs
	rm -rf .venv .venv-* .upstream outputs
