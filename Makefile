# The main targets, on a fresh machine with Python and make:
#   make toyland   set up and run the whole paper in miniature: data, three stages, evaluation, report
#   make test      set up and run the tests
# Both are resumable: finished steps are skipped, interrupted ones continue.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
STAMP := .venv/.installed

export TOKENIZERS_PARALLELISM := false

TOYLAND_RUNS ?= runs/toyland

# Run a resumable command. The message is for commands that are stopped before they can print their own.
resumable = @echo "$(1)"; trap 'echo "Stopped: make $@ resumes from here." >&2; exit 130' INT; $(1)

.PHONY: help setup test toyland toyland-long toyland-table-2 toyland-image-prompts toyland-decoders toyland-short toyland-pretrained rehearsal gpu-check lint docs clean-toyland
.DEFAULT_GOAL := help

help:
	@echo "make setup          virtual environment in .venv with the pinned packages"
	@echo "make test           set up and run the tests (SLOW=0 skips the slow ones; JOBS=2 worker processes)"
	@echo "make toyland        set up and run the whole paper in miniature"
	@echo "make toyland-long   the same with three to four times the steps on prompts with images, into runs/toyland-long"
	@echo "make toyland-table-2  Table 2 in miniature, after make toyland: five alignments × three seeds (SEEDS=0 for one)"
	@echo "make toyland-image-prompts  with and without image alignment at equal compute, three seeds"
	@echo "make toyland-decoders  stages 2 and 3 on a tiny Stable Diffusion XL and a tiny Sana, after make toyland"
	@echo "make toyland-short  make toyland with a few steps, as a quick check"
	@echo "make toyland-pretrained  train the tiny pretrained models again, into runs/toyland-pretrained"
	@echo "make rehearsal      run the commands of docs/recipes.md on tiny random files, in runs/rehearsal; under ten minutes (RECIPES=B)"
	@echo "make gpu-check      measure every stage and sampling on one GPU against dry run and diffusers; under ten minutes"
	@echo "make lint           ruff, pyright and the documentation's links"
	@echo "make docs           build the documentation pages, into runs/site"
	@echo "make clean-toyland  remove Toyland's data and runs"

setup: $(STAMP)

# pip would compile the packages on one core, which takes as long as installing them.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@$(RUN) -m compileall -q -j 0 -x '/tests?/' .venv/lib > /dev/null || true  # some hold templates, not Python
	@touch $(STAMP)

# Parity tests run in one process, which checks that every recorded output was compared, and with the number of threads
# used for the recording. The other tests run in worker processes with one thread each. Workers take files in the order of
# tests/conftest.py, long ones first.
JOBS ?= 2
PYTEST := $(RUN) -m pytest $(if $(filter 0,$(SLOW)),,--slow)
test: setup
	$(PYTEST) tests/parity
	OMP_NUM_THREADS=1 $(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder --ignore tests/parity

toyland: export HF_HUB_OFFLINE := 1
toyland: setup
	$(call resumable,$(RUN) -m datamodules.toyland)
	$(call resumable,$(RUN) train.py configs/toyland/language_modelling.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/alignment.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/image_alignment.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/instruction_tuning.yaml)
	$(call resumable,$(RUN) evaluate.py configs/toyland/evaluation.yaml)

# Stages 1 and 2 are shared with make toyland.
LONG := configs/toyland/long.yaml
LONG_EVALUATION := output=$(TOYLAND_RUNS)-long/evaluation models.after_stage_3=$(TOYLAND_RUNS)-long/instruction_tuning
toyland-long: export HF_HUB_OFFLINE := 1
toyland-long: setup
	$(call resumable,$(RUN) -m datamodules.toyland)
	$(call resumable,$(RUN) train.py configs/toyland/language_modelling.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/alignment.yaml)
	$(call resumable,$(RUN) train.py configs/toyland/image_alignment.yaml $(LONG) init_from=$(TOYLAND_RUNS)/alignment)
	$(call resumable,$(RUN) train.py configs/toyland/instruction_tuning.yaml $(LONG))
	$(call resumable,$(RUN) evaluate.py configs/toyland/evaluation.yaml $(LONG_EVALUATION))

# The rows of Table 2, as stage/row: the stage's file and the row's file in configs/toyland/table_2/.
TABLE_2 := alignment/alignernet_24_layers alignment/alignernet_12_layers alignment/decoder_12_layers \
           instruction_tuning/end_to_end_with_alignernet instruction_tuning/end_to_end_without_alignernet
SEEDS ?= 0 1 2

# Seed by seed, so that all rows exist after a third of the time.
toyland-table-2: export HF_HUB_OFFLINE := 1
toyland-table-2: setup
	$(foreach seed,$(SEEDS),$(foreach row,$(TABLE_2),$(call table_2_run,$(row),$(seed))))
	$(call resumable,$(RUN) evaluate.py configs/toyland/ablations.yaml)
	$(RUN) evaluate.py tables $(TOYLAND_RUNS)/ablations/evaluation output=$(TOYLAND_RUNS)/ablations/tables

define table_2_run
	$(call resumable,$(RUN) train.py configs/toyland/$(patsubst %/,%,$(dir $(1))).yaml configs/toyland/table_2/$(notdir $(1)).yaml seed=$(2))

endef

# Two recipes from the same stage 2 at equal FLOPs, half of make toyland's: 680 steps of the paper's stage 3, or 400 steps
# of image alignment and 300 of stage 3 with mse_weight. EYES is the CLIP folder of the vision encoder, EYES_NAME its name.
EYES ?= datamodules/toyland/weights/clip
EYES_NAME ?= eyes
toyland-image-prompts: export HF_HUB_OFFLINE := 1
toyland-image-prompts: setup
	$(foreach seed,$(SEEDS),$(call image_prompts_run,$(TOYLAND_RUNS)/image_prompts/$(EYES_NAME)-$(seed),$(seed)))
	$(call resumable,$(RUN) evaluate.py configs/toyland/image_prompts.yaml)

HALF := configs/toyland/half.yaml
define image_prompts_run
	$(call resumable,$(RUN) train.py configs/toyland/language_modelling.yaml $(HALF) \
	  runs=$(1) seed=$(2) model.vision_weights=$(EYES))
	$(call resumable,$(RUN) train.py configs/toyland/alignment.yaml $(HALF) runs=$(1) seed=$(2) grids.every=0)
	$(call resumable,$(RUN) train.py configs/toyland/instruction_tuning.yaml $(HALF) runs=$(1) seed=$(2) grids.every=0 \
	  ablation=$(EYES_NAME)_paper init_from=$(1)/alignment run=$(1)/paper recipe.mse_weight=0 trainer.max_steps=680)
	$(call resumable,$(RUN) train.py configs/toyland/image_alignment.yaml $(HALF) runs=$(1) seed=$(2) grids.every=0)
	$(call resumable,$(RUN) train.py configs/toyland/instruction_tuning.yaml $(HALF) runs=$(1) seed=$(2) grids.every=0 \
	  ablation=$(EYES_NAME)_image_prompts run=$(1)/image_prompts trainer.max_steps=300)

endef

# Stages 2 and 3 with two more image decoders, which are trained first. For Sana, Gemma's states of the captions are cached,
# because its instruction makes prompts long. The positions of words in Sana's condition depend on the caption's length, so
# M needs more steps, without N. Flow matching supports only w(t) = 1.
DECODERS := $(TOYLAND_RUNS)/decoders
SANA_ALIGNMENT := data.cached_states=bfloat16 recipe.variant=masked recipe.rec_weight=0 grids.every=0 \
  trainer.max_steps=4000 optimizer.lr=2e-3 optimizer.warmup_steps=100
toyland-decoders: export HF_HUB_OFFLINE := 1
toyland-decoders: setup
	$(call resumable,$(RUN) -m datamodules.toyland.pretrained.decoders output=$(DECODERS))
	$(call decoder_run,stable_diffusion_xl)
	$(call resumable,$(RUN) train.py cache $(call decoder_alignment,sana) $(SANA_ALIGNMENT))
	$(call decoder_run,sana,$(SANA_ALIGNMENT),recipe.timestep_weighting=uniform)

decoder_alignment = configs/toyland/alignment.yaml configs/toyland/decoders/$(1).yaml \
  init_from=$(TOYLAND_RUNS)/language_modelling
define decoder_run
	$(call resumable,$(RUN) train.py $(call decoder_alignment,$(1)) $(2))
	$(call resumable,$(RUN) train.py configs/toyland/image_alignment.yaml configs/toyland/decoders/$(1).yaml)
	$(call resumable,$(RUN) train.py configs/toyland/instruction_tuning.yaml configs/toyland/decoders/$(1).yaml $(3))

endef

toyland-short: export HF_HUB_OFFLINE := 1
toyland-short: export TOYLAND_DATA := data/toyland-short
toyland-short: export TOYLAND_RUNS := runs/toyland-short
# Its networks are too small to gain from a second thread.
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

RECIPES ?=
rehearsal: export HF_HUB_OFFLINE := 1
rehearsal: export OMP_NUM_THREADS ?= 1
rehearsal: setup
	$(RUN) -m tests.rehearsal $(RECIPES)

SIZE ?= gpu
PARTS ?=
gpu-check: setup
	$(RUN) -m benchmarks check $(PARTS) size=$(SIZE)

lint: setup docs
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

# Fails on dead links; `mkdocs serve` shows the pages while you edit them.
docs: export TRANSFORMERS_VERBOSITY := error
docs: export NO_MKDOCS_2_WARNING := 1
docs: setup
	$(RUN) -m mkdocs build --strict --site-dir runs/site

clean-toyland:
	rm -rf data/toyland data/toyland-short runs/toyland runs/toyland-long runs/toyland-short
