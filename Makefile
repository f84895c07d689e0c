# make pretrain: everything from a fresh clone to a trained model; make test: the tests that a change is held by while it
# is made; make test-all: these and the slow ones. All set up .venv first.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: venv pretrain test test-all lint soak gpu docs study study-quick clean

venv: $(VENV)/.ready

# constraints.txt holds the set that CI tests, which exists for Python 3.11; other versions resolve from the ranges
$(VENV)/.ready: requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than 3.10; name another: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		$$($(VENV)/bin/python -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")') \
		-r requirements.txt -e '.[dev]'
	touch $@

pretrain: venv
	deepspeed launch/pretrain.py --ds_config ds_configs/zero2.json

# files go to the two processes in the order of tests/conftest.py, those that take longest first
test: venv
	python -m pytest -m 'not soak and not slow' -n 2 --dist loadfile --no-loadscope-reorder

test-all: venv
	python -m pytest -m 'not soak' -n 2 --dist loadfile --no-loadscope-reorder

lint: venv
	ruff check .
	ruff format --check .
	mypy

soak: venv
	python -m pytest -m soak -s

# which weights find the false negatives (docs/lab/study.md): hours on two cores, goes on where it was stopped
study: venv
	python tools/study.py --plan launch/configs/study.yaml --out runs/study
	python tools/study.py --plan launch/configs/study_long.yaml --out runs/study_long

study-quick: venv
	python tools/study.py --plan launch/configs/study_quick.yaml --out runs/study

# what only a GPU can show (docs/lab/step_benchmark.md): tests, a step beside open_clip's, a batch of 32,768 pairs on one device
gpu: BESIDE := --device cuda --preset base --precision bf16 --batch 256 --warm-up 10 --repeats 5 --rounds 9
gpu: venv
	python -m pytest -m gpu -q
	python tools/benchmark_step.py $(BESIDE) --captions full --out runs/gpu_step_full \
		--steps 'open_clip, our towers' 'open_clip, its towers' 'ITC, InfoNCE' 'ITC, SACL' 'three losses'
	python tools/benchmark_step.py $(BESIDE) --out runs/gpu_step \
		--steps 'open_clip, our towers' 'ITC, SACL' 'ITC, SACL, live teacher' 'three losses' 'three losses, live teacher'
	python tools/benchmark_step.py $(BESIDE) --out runs/gpu_patches \
		--steps 'three losses' 'three losses, patches at output' 'three losses, patches as published'
	python tools/benchmark_step.py --device cuda --preset base --precision bf16 --batch 32768 --micro-batch 256 \
		--steps 'three losses' --warm-up 1 --rounds 1 --out runs/gpu_large_batch

docs: venv
	python -m sacl_ds.config_help docs/configuration.md
	python tools/presets_page.py docs/lab/presets.md
	python tools/scaling_page.py docs/lab/scaling.md
	python tests/support/documented.py docs/lab/mistakes.md

clean:
	rm -rf $(VENV) build *.egg-info
