# Two commands on a fresh machine with Python and make:
#   make toyland   set up, then the whole paper in miniature: data, three stages, evaluation, report
#   make test      set up, then the tests
# Both are resumable: finished steps are skipped, interrupted ones continue.

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
STAMP := .venv/.installed

export TOKENIZERS_PARALLELISM := false

TOYLAND_RUNS ?= runs/toyland

# A resumable command; says so, too, when it is stopped before it can say it itself.
resumable = @echo "$(1)"; trap 'echo "Stopped: make $@ resumes from here." >&2; exit 130' INT; $(1)

.PHONY: help setup test toyland toyland-long toyland-table-2 toyland-image-prompts toyland-decoders toyland-short toyland-pretrained rehearsal gpu-check lint docs clean-toyland
.DEFAULT_GOAL := help

help:
	@echo "make setup          virtual environment in .venv with the pinned packages"
	@echo "make test           set up and run the tests (SLOW=0 leaves out the slow ones; JOBS=2 at a time)"
	@echo "make toyland        set up and run the whole paper in miniature"
	@echo "make toyland-long   the same with three and four times the steps on prompts with images, into runs/toyland-long"
	@echo "make toyland-table-2  Table 2 in miniature after it: five alignments × three seeds (SEEDS=0 for one)"
	@echo "make toyland-image-prompts  what image prompts in alignment bring, at equal compute, three seeds"
	@echo "make toyland-decoders  stages 2 and 3 on a tiny Stable Diffusion XL and a tiny Sana, after make toyland"
	@echo "make toyland-short  the same in a few steps, to see that everything runs"
	@echo "make toyland-pretrained  train the tiny pretrained models anew, into runs/toyland-pretrained"
	@echo "make rehearsal      docs/recipes.md's own commands on tiny random files, into runs/rehearsal; under ten minutes (RECIPES=B)"
	@echo "make gpu-check      every stage and sampling on one GPU, beside dry run and diffusers; under ten minutes"
	@echo "make lint           ruff, pyright and the documentation's links"
	@echo "make docs           the documentation as pages, into runs/site"
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

# Stages 1 and 2 are make toyland's own.
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

# The rows of Table 2: the stage whose file each one changes, and its file in configs/toyland/table_2/.
TABLE_2 := alignment/alignernet_24_layers alignment/alignernet_12_layers alignment/decoder_12_layers \
           instruction_tuning/end_to_end_with_alignernet instruction_tuning/end_to_end_without_alignernet
SEEDS ?= 0 1 2

# Seed by seed, so that all rows are there after a third of the time.
toyland-table-2: export HF_HUB_OFFLINE := 1
toyland-table-2: setup
	$(foreach seed,$(SEEDS),$(foreach row,$(TABLE_2),$(call table_2_run,$(row),$(seed))))
	$(call resumable,$(RUN) evaluate.py configs/toyland/ablations.yaml)
	$(RUN) evaluate.py tables $(TOYLAND_RUNS)/ablations/evaluation output=$(TOYLAND_RUNS)/ablations/tables

define table_2_run
	$(call resumable,$(RUN) train.py configs/toyland/$(patsubst %/,%,$(dir $(1))).yaml configs/toyland/table_2/$(notdir $(1)).yaml seed=$(2))

endef

# Two recipes at equal FLOPs, each half of make toyland's, from one stage 2: 680 steps of the paper's stage 3, or 400 steps
# of image alignment and 300 of stage 3 with its term. EYES is what the MLLM sees with, a CLIP folder, and its name.
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

# Stages 2 and 3 on two more image decoders, which are trained first. What Gemma makes of a caption behind its long
# instruction is computed once. Where words stand in Sana's condition depends on the caption's length, so M takes more
# steps, without N. Flow matching has no other w(t) than 1.
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

# Refuses dead links; `mkdocs serve` shows the pages while they are written.
docs: export TRANSFORMERS_VERBOSITY := error
docs: export NO_MKDOCS_2_WARNING := 1
docs: setup
	$(RUN) -m mkdocs build --strict --site-dir runs/site

clean-toyland:
	rm -rf data/toyland data/toyland-short runs/toyland runs/toyland-long runs/toyland-short
