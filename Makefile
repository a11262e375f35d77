# Two commands on a fresh machine: `make demo` writes a portrait, `make test` runs every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt $(shell find caphuman_ref export quant runtime shaders \
	-type f -not -path '*/__pycache__/*' -not -name '* *')

# The demo's photo lies in scikit-image's wheel; .cache may hold wheels of other versions and other Pythons.
WHEELS := .cache/scikit_image-$(shell sed -n 's/^scikit-image==//p' constraints.txt)-*.whl

.PHONY: demo test test-weights lint clean

# A portrait from the embedded bundle, with what a user needs and no more.
demo: $(VENV)/.demo
	ls $(WHEELS) >/dev/null 2>&1 || \
		$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: -c constraints.txt -d .cache scikit-image
	$(BIN)/python -m caphuman_edge.runtime.demo --photo "$$(ls $(WHEELS) | head -n 1)"

# The suites run against an installed copy, so that a file missing from the wheel fails them.
# One process a core, each with one thread; a file's tests stay together, since they share what is slow to make.
test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The official perception networks with their published weights, fetched and pinned by hash, on real photos.
test-weights: $(VENV)/.test
	$(BIN)/python -m caphuman_edge.export.official --out .cache/official --downloads .cache/weights --fetch
	OFFICIAL_GRAPHS_DIR=.cache/official CAPHUMAN_DOWNLOADS=.cache/weights \
		$(BIN)/python -m pytest $(wildcard tests/backends/test_official_*.py)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache $(VENV)

$(VENV)/.demo: EXTRAS := gl
$(VENV)/.test: EXTRAS := gl,openvino,coreml,export,batch,dev
# build/ goes first: setuptools packs whatever an earlier build left there.
$(VENV)/.demo $(VENV)/.test: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/python -m pip install --quiet -c constraints.txt ".[$(EXTRAS)]"
	touch $@
