# make demo   draws a picture with the embedded model and prints its path
# make test   runs the linter and all tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROMPT ?= A red circle in the top left and a blue square in the bottom right, on a white background

.PHONY: demo test clean

demo: $(READY)
	$(BIN)/python -m diffsynth_backend generate --prompt "$(PROMPT)" --seed 1 --output output/demo.png

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

$(READY): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) output
