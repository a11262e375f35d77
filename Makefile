# Two commands on a fresh machine: `make demo` writes a portrait, `make test` runs every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt $(shell find caphuman_ref export quant runtime shaders \
	-type f -not -path '*/__pycache__/*' -not -name '* *')

.PHONY: demo test lint clean

# A portrait from the embedded bundle, with what a user needs and no more. The photo lies in scikit-image's wheel.
demo: $(VENV)/.demo
	test -e .cache/scikit_image-*.whl || \
		$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: -c constraints.txt -d .cache scikit-image
	$(BIN)/python -m caphuman_edge.runtime.demo --photo .cache/scikit_image-*.whl

# The suites run against an installed copy, so that a file missing from the wheel fails them.
test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache $(VENV)

$(VENV)/.demo: EXTRAS := gl
$(VENV)/.test: EXTRAS := gl,export,dev
# build/ goes first: setuptools packs whatever an earlier build left there.
$(VENV)/.demo $(VENV)/.test: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/python -m pip install --quiet -c constraints.txt ".[$(EXTRAS)]"
	touch $@
