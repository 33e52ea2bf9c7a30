# Two commands on a fresh machine with Python (3.11 to 3.13) and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-kills test-engines fuzz bench bench-gpu lint docs lock lowest newest clean

# The environment that was tested: every package at the version of requirements.lock.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: .venv/ready  ## explain a photo of a cat with the shipped model: why cat?
	$(BIN)/tokentm explain notebooks/chelsea_face.jpg --out out/demo
	@echo
	@echo "Look at out/demo/chelsea_face.png. Next: an ImageNet model on this photo or on yours; the weights are downloaded."
	@echo "  $(BIN)/tokentm explain notebooks/coffee.jpg --model deit_tiny_patch16_224"

# Two processes; each goes on where its tests share what they set up.
TOGETHER := -n 2 --dist worksteal

test: .venv/ready  ## the default tests: CPU only, a few minutes
	$(BIN)/pytest $(TOGETHER)

test-slow: .venv/ready  ## many minutes more: every method on every kind, DeiT-tiny in float64, every page's examples
	$(BIN)/pytest $(TOGETHER) -m slow --ignore tests/fuzz --ignore tests/test_dataset_kills.py

test-kills: .venv/ready  ## jobs of `tokentm dataset` killed at random moments, in two processes, on a full disk
	$(BIN)/pytest -m slow -s tests/test_dataset_kills.py

# Beam needs older versions of some packages than requirements.lock has, so the engines have an environment.
out/engines/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear out/engines
	grep -E '^(jax|jaxlib|flax)==' requirements.lock > out/engines/constraints.txt
	out/engines/bin/pip install --quiet --upgrade pip
	out/engines/bin/pip install --quiet -e . --group engines --constraint out/engines/constraints.txt
	touch $@

test-engines: out/engines/ready  ## `tokentm dataset` on Ray, on Beam, and on an emulator of an object store; minutes
	out/engines/bin/python -m pytest -m slow tests/test_engines.py

fuzz: .venv/ready  ## thousands of hostile inputs, each judged; tests/fuzz/__init__.py tells how to repeat or choose cases
	$(BIN)/pytest -m slow -s tests/fuzz

# With PyTorch in it, the Python of BENCH also runs the other side of the throughput comparison.
BENCH ?= $(BIN)/python
bench: .venv/ready  ## benchmarks into tests/benchmark/results: half an hour on 2 idle cores, longer with PyTorch
	for name in ratios passes memory resolution roofline startup masking bfloat16 mixed parts throughput feed schedule cost; do \
	    $(BENCH) tests/benchmark/$$name.py --out tests/benchmark/results/$$name.md || exit 1; done

# BENCH_GPU needs JAX for the device, such as `pip install "jax[cuda12]"`; requirements.lock has JAX for the CPU.
BENCH_GPU ?= $(BIN)/python
bench-gpu:  ## TokenTM on a GPU or TPU, attention in a kernel or not: ten minutes at most; a second run goes on
	$(BENCH_GPU) tests/benchmark/gpu.py --out tests/benchmark/results/gpu.md

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/words.py
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typed_use.py  # strict: what users see

# What the tests do not need; pages, links and references that do not exist end it.
.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --group docs --constraint requirements.lock
	touch $@

docs: .venv/docs  ## the documentation, into out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "out/site/index.html"

lock:  ## refresh requirements.lock (needs uv)
	uv pip compile pyproject.toml --group dev --group docs --extra all --universal --python-version 3.11 --no-annotate -o requirements.lock

# Old packages meet new ones here, which warn of each other: warnings are no errors.
LOWEST := methods photos figure tokentm interface show checkpoint shipped serve scores cli
lowest:  ## a part of the tests with the lowest versions that pyproject.toml allows (needs uv)
	uv venv --quiet --clear --python 3.11 out/lowest
	uv pip compile --quiet pyproject.toml --resolution lowest-direct --extra all --python-version 3.11 -o out/lowest.txt
	uv pip install --quiet --python out/lowest/bin/python -r out/lowest.txt pytest hypothesis sybil equinox beartype
	uv pip install --quiet --python out/lowest/bin/python --no-deps .
	out/lowest/bin/python -m pytest -p no:anyio -o filterwarnings= $(LOWEST:%=tests/test_%.py)

newest:  ## the same part of the tests with the newest versions that there are, below no bound of requirements.lock
	$(PYTHON) -m venv --clear out/newest
	out/newest/bin/pip install --quiet --upgrade pip
	out/newest/bin/pip install --quiet --upgrade --upgrade-strategy eager ".[all]" pytest hypothesis sybil equinox beartype
	out/newest/bin/python -c "import flax, jax; print('jax', jax.__version__, 'flax', flax.__version__)"
	out/newest/bin/python -m pytest -p no:anyio -o filterwarnings= $(LOWEST:%=tests/test_%.py)

clean:
	rm -rf .venv out
