# make demo   draws a picture with the embedded model and prints its path
# make test   runs the linter and all tests
# make test-web   installs what the page's own tests need (Node.js 20 or later) and runs those
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROMPT ?= A red circle in the top left and a blue square in the bottom right, on a white background

.PHONY: demo test test-web clean

demo: $(READY)
	$(BIN)/python -m diffsynth_backend generate --prompt "$(PROMPT)" --seed 1 --output output/demo.png

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

test-web:
	cd tests/web && npm install --no-package-lock --no-audit --no-fund && npm test

$(READY): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) output
