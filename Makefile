.PHONY: help install demo test slow quality style clean
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: .venv/installed  ## set up .venv with the tested versions (about 5 GB, two minutes)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

demo: install  ## train question-guided selection on cards, show the table and the pictures (8 minutes on two cores)
	$(BIN)/python training/run_qgsa.py --preset demo

test: install  ## run the tests
	$(BIN)/python -m pytest

slow: install  ## run the tests that take minutes: presets on the published architectures, several processes, kills
	$(BIN)/python -m pytest -m slow

quality: install  ## check style and that no file outgrew the repository
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: install  ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all outputs
	rm -rf .venv outputs
