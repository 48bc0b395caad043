# Two commands on a fresh machine with Python and make:
#   make toyland   set up, then the whole paper in miniature: data, three stages, evaluation, report
#   make test      set up, then the tests
# Both are resumable: finished steps are skipped, interrupted ones continue.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
STAMP := .venv/.installed

export TOKENIZERS_PARALLELISM := false

# A resumable command; says so, too, when it is stopped before it can say it itself.
resumable = @echo "$(1)"; trap 'echo "Stopped: make $@ resumes from here." >&2; exit 130' INT; $(1)

.PHONY: help setup test parity tests-beside-parity toyland toyland-table-2 toyland-short toyland-pretrained gpu-check lint clean-toyland
.DEFAULT_GOAL := help

help:
	@echo "make setup          virtual environment in .venv with the pinned packages"
	@echo "make test           set up and run the tests (SLOW=0 leaves out the slow ones; JOBS=2 at a time)"
	@echo "make toyland        set up and run the whole paper in miniature"
	@echo "make toyland-table-2  Table 2 in miniature after it: five alignments × three seeds (SEEDS=0 for one)"
	@echo "make toyland-short  the same in a few steps, to see that everything runs"
	@echo "make toyland-pretrained  train the tiny pretrained models anew, into runs/toyland-pretrained"
	@echo "make gpu-check      every stage and sampling on one GPU, beside dry run and diffusers; under ten minutes"
	@echo "make lint           ruff and pyright"
	@echo "make clean-toyland  remove Toyland's data and runs"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# Parity alone in one process, which counts that every recorded output was compared, and with the threads it was recorded
# with. Of the rest, each worker has one thread: more threads than cores would wait for each other. Workers take files
# in the order of tests/conftest.py, the long ones first.
JOBS ?= 2
PYTEST := $(RUN) -m pytest $(if $(filter 0,$(SLOW)),,--slow)
test: parity
	@$(MAKE) --no-print-directory tests-beside-parity

parity: setup
	$(PYTEST) tests/parity

tests-beside-parity: setup
	OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder --ignore tests/parity

toyland: export HF_HUB_OFFLINE := 1
toyland: setup
	$(call resumable,$(RUN) -m datamodules.toyland)
	$(call resumable,$(RUN) train.py configs/toyland/language_modelling.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/alignment.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/image_alignment.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/instruction_tuning.yaml)
	$(call resumable,$(RUN) evaluate.py configs/toyland/evaluation.yaml)

# The rows of Table 2: the stage whose file each one changes, and its file in configs/toyland/table_2/.
TABLE_2 := alignment/alignernet_24_layers alignment/alignernet_12_layers alignment/decoder_12_layers \
           instruction_tuning/end_to_end_with_alignernet instruction_tuning/end_to_end_without_alignernet
SEEDS ?= 0 1 2
TOYLAND_RUNS ?= runs/toyland

# Seed by seed, so that all rows are there after a third of the time.
toyland-table-2: export HF_HUB_OFFLINE := 1
toyland-table-2: setup
	$(foreach seed,$(SEEDS),$(foreach row,$(TABLE_2),$(call table_2_run,$(row),$(seed))))
	$(call resumable,$(RUN) evaluate.py configs/toyland/ablations.yaml)
	$(RUN) evaluate.py tables $(TOYLAND_RUNS)/ablations/evaluation output=$(TOYLAND_RUNS)/ablations/tables

define table_2_run
	$(call resumable,$(RUN) train.py configs/toyland/$(patsubst %/,%,$(dir $(1))).yaml configs/toyland/table_2/$(notdir $(1)).yaml seed=$(2))

endef

toyland-short: export HF_HUB_OFFLINE := 1
toyland-short: export TOYLAND_DATA := data/toyland-short
toyland-short: export TOYLAND_RUNS := runs/toyland-short
# Its networks gain nothing from a second thread, which another job may want.
toyland-short: export OMP_NUM_THREADS ?= 1
toyland-short: setup
	$(call resumable,$(RUN) -m datamodules.toyland configs/toyland/data_short.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/language_modelling.yaml configs/toyland/short.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/alignment.yaml configs/toyland/short.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/image_alignment.yaml configs/toyland/short.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/instruction_tuning.yaml configs/toyland/short.yaml)
	$(call resumable,$(RUN) evaluate.py configs/toyland/evaluation.yaml configs/toyland/evaluation_short.yaml)

toyland-pretrained: setup
	$(call resumable,$(RUN) -m datamodules.toyland.pretrained output=runs/toyland-pretrained)

SIZE ?= gpu
PARTS ?=
gpu-check: setup
	$(RUN) -m benchmarks check $(PARTS) size=$(SIZE)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

clean-toyland:
	rm -rf data/toyland data/toyland-short runs/toyland runs/toyland-short
