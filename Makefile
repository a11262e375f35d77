# Two commands on a fresh machine: `make demo` writes a portrait, `make test` runs every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt $(shell find caphuman_ref export quant runtime shaders \
	-type f -not -path '*/__pycache__/*' -not -name '* *')

# The demo's photo lies in scikit-image's wheel; .cache may hold wheels of other versions and other Pythons.
WHEELS := .cache/scikit_image-$(shell sed -n 's/^scikit-image==//p' constraints.txt)-*.whl

.PHONY: demo test lint clean

# A portrait from the embedded bundle, with what a user needs and no more.
demo: $(VENV)/.demo
	ls $(WHEELS) >/dev/null 2>&1 || \
		$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: -c constraints.txt -d .cache scikit-image
	$(BIN)/python -m caphuman_edge.runtime.demo --photo "$$(ls $(WHEELS) | head -n 1)"

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
