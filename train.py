"""Train one stage: python train.py stage.yaml [more.yaml | run_folder | key=value …]

Every argument is a YAML file, a run folder or key=value; later arguments override earlier ones. `stage:` selects the
stage, `run:` the folder for checkpoints, metrics, image grids and the finished model. Repeat the command to resume an
interrupted run.

    python train.py configs/toyland/alignment.yaml
    python train.py configs/toyland/alignment.yaml configs/toyland/short.yaml trainer.max_steps=2
    torchrun --nproc-per-node 8 train.py configs/instruction_tuning.yaml
    python train.py configs/instruction_tuning.yaml trainer.devices=8 dry_run=true         # memory and time, no GPU
    python train.py cache configs/instruction_tuning.yaml data.cached_latents=float32      # see docs/data.md
    python train.py export runs/instruction_tuning output=models/40000 [step=40000] [weights=ema|raw] [dtype=float16]
"""

import os
import signal

if __name__ == "__main__":  # let Ctrl-C end the process without a traceback while libraries are imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import; our loaders report missing weights

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import MISSING
from rich.console import Console

from callbacks.checkpoint import RunInterruptedError, StepCheckpoint
from callbacks.ema import EmaConfig, WeightAverage
from callbacks.image_grid import GridConfig, ImageGrid
from callbacks.metrics import MetricsFile, StepMetrics
from callbacks.progress import RunProgress
from callbacks.weights_and_biases import WandbConfig, wandb_logger
from datamodules.alignment import AlignmentData
from datamodules.data_config import CACHED
from datamodules.datamodule import MixtureDataModule
from datamodules.errors import DataError
from datamodules.instruction import InstructionData
from datamodules.language_modelling import LanguageModellingData
from kosmosg.config import ConfigError, describe_schema, load_config, split_options, written_config
from kosmosg.files import replaced
from kosmosg.models.build import build_tokenizer, load_image_decoder
from kosmosg.models.model_config import ModelConfig
from kosmosg.sampling import DiffusionSampler
from lightning_modules.alignment import AlignmentModule
from lightning_modules.base import StageModule, build_stage
from lightning_modules.checkpointing import (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointWriteError,
    checkpoint_name,
    checkpoint_step,
    load_weights,
    verify,
)
from lightning_modules.dry_run import DoesNotFitError, HardwareConfig, report
from lightning_modules.instruction_tuning import InstructionTuningModule
from lightning_modules.language_modelling import LanguageModellingModule
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.parallelize import apply_activation_checkpointing, apply_compile, store_frozen_weights
from lightning_modules.run_folder import RunFolder, RunFolderError
from lightning_modules.step_guard import TooManySkippedStepsError
from lightning_modules.trainer import TrainerConfig, batch_layout, build_trainer, configure_logging

DTYPES = ("float32", "float16", "bfloat16")
# Reported as a message, with exit status 2.
USER_ERRORS = (
    CheckpointDamagedError,
    CheckpointMismatchError,
    CheckpointWriteError,
    ConfigError,
    DataError,
    DoesNotFitError,
    RunFolderError,
    TooManySkippedStepsError,
)


@dataclass
class Experiment:
    """Configuration keys of all stages; `stage` adds those of each stage."""

    module: ClassVar[type[StageModule]]
    datamodule: ClassVar[type[MixtureDataModule]]

    stage: str = MISSING
    """Stage to train, see STAGES in train.py."""
    runs: str = "runs"
    """Parent of the run folders, for use in `run` and `init_from` as ${runs}."""
    run: str = MISSING
    """Run folder: checkpoints, metrics, image grids and the finished model."""
    ablation: str | None = None
    """Name of the ablation, by which evaluations group the seeds, see configs/ablations/; null: none."""
    seed: int = 0
    """Seed of initial weights, noise, timesteps and dropout; data.seed sets the order of samples."""
    init_from: str | None = None
    """Model or run folder of the previous stage; null: random weights, and CLIP's in the vision encoder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network sizes and pretrained networks, see configs/model/."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its learning rate schedule."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Number of steps, devices, precision and intervals."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """GPU and assumptions of a dry run."""
    dry_run: bool = False
    """Print the memory and time that the run needs, and exit. No weights or data are read, nothing is written."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average of the weights."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases logging."""


def stage(module: type[StageModule], datamodule: type[MixtureDataModule]) -> type[Experiment]:
    """Make the configuration schema of a stage: `Experiment` with `data`, `recipe` and, if it can draw, `grids`."""
    schemas = {"data": datamodule.Config, "recipe": module.Recipe}
    if module.draws_images:
        schemas["grids"] = GridConfig
    return make_dataclass(
        module.__name__.replace("Module", "Experiment"),
        [(name, schema, field(default_factory=schema)) for name, schema in schemas.items()],
        bases=(Experiment,),
        namespace={"module": module, "datamodule": datamodule},
    )


STAGES: dict[str, type[Experiment]] = {
    "language_modelling": stage(LanguageModellingModule, LanguageModellingData),
    "alignment": stage(AlignmentModule, AlignmentData),
    "instruction_tuning": stage(InstructionTuningModule, InstructionData),
}


def stage_schema(values: dict[str, Any]) -> type[Experiment]:
    """Return the schema of the configured stage. Raises ConfigError: `stage` is missing or unknown."""
    name = values.get("stage")
    if name not in STAGES:
        raise ConfigError(f"stage is {name!r}; allowed: {', '.join(STAGES)}. Set it in a YAML file or as stage=…")
    return STAGES[name]


def train(experiment: Any, written: dict[str, Any]) -> Path:
    """Run or resume a stage to its end; returns the run folder. Raises one of USER_ERRORS."""
    run = RunFolder(experiment.run)
    with run.lock(written, type(experiment), write=rank_zero_only.rank == 0):
        if (finished := run.finished()) is not None:
            print(f"Run '{run.path}' is finished: {finished['step']} steps, on {finished['finished']}")
        else:
            fit(experiment, written, run)
            if rank_zero_only.rank == 0:
                with replaced(run.model) as folder:
                    export_model(experiment, run, run.latest_checkpoint(), folder)
                run.mark_finished(step=experiment.trainer.max_steps, max_steps=experiment.trainer.max_steps)
    return run.path


def fit(experiment: Any, written: dict[str, Any], run: RunFolder) -> None:
    """Build module, data and callbacks, and train from the last intact checkpoint."""
    options, model = experiment.trainer, experiment.model
    try:
        layout = batch_layout(experiment.data.micro_batch_size, options)
        tokenizer = build_tokenizer(model)
        module: Any = build_stage(experiment.module, experiment, tokenizer)
        encoder = None if module.mllm is None else module.mllm.encoder(tokenizer)
        data = experiment.datamodule.build(experiment.data, encoder, model.image_size, module.image_decoder)
        data.networks = cached_networks(experiment)
        grids = []
        if experiment.module.draws_images and experiment.grids.every:
            if encoder is None:
                raise ValueError("grids need the MLLM, which is not loaded with data.cached_states; set grids.every=0")
            decoder = module.image_decoder if module.image_decoder.denoiser is not None else None
            sampler = DiffusionSampler(decoder or load_image_decoder(model.image_decoder, "images"))
            grids = [ImageGrid(experiment.grids, run.grids, sampler, encoder)]
    except (ValueError, FileNotFoundError) as error:  # parts that are missing or do not fit together
        raise ConfigError(str(error)) from error
    module.global_batch, module.guard.limit = layout.global_batch, options.max_skipped_steps
    data.micro_batches = layout.micro_batches
    skipped = module.sharded_modules() if options.is_sharded(layout.world_size) else ()
    store_frozen_weights(module, options.frozen_storage, skipped)
    apply_activation_checkpointing(module, options.activation_checkpointing)
    if options.compile:
        apply_compile(module)
    # Only rank 0 verifies the checkpoint; FolderCheckpoints.load_checkpoint broadcasts its choice.
    checkpoint = run.intact_checkpoint() if rank_zero_only.rank == 0 else run.latest_checkpoint()
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    wandb = wandb_logger(experiment.wandb, run.path, experiment.stage, written)
    trainer = build_trainer(
        options,
        layout.world_size,
        default_root_dir=run.path,
        logger=[MetricsFile(run.path / "metrics.csv", first_step), *([wandb] if wandb else [])],
        callbacks=[
            StepMetrics(options.log_every),
            RunProgress(experiment.stage),
            *([WeightAverage(experiment.ema.decay)] if experiment.ema.decay else []),
            *grids,
            StepCheckpoint(run.checkpoints, options.checkpoint_every, options.keep_checkpoints),
        ],
    )
    trainer.fit(module, data, ckpt_path=checkpoint)


def export_model(
    experiment: Any,
    run: RunFolder,
    checkpoint: Path | None,
    output: Path,
    average: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Write a checkpoint as a model folder; returns whether it holds the moving average, by default as in `ema`.

    The module is built anew and loaded from the checkpoint, because the trained one may be sharded.

    Raises:
        ConfigError: there is no checkpoint, or a part of the model is missing.
    """
    if checkpoint is None or not checkpoint.is_dir():
        raise ConfigError(f"run folder '{run.path}' has no checkpoint {checkpoint.name if checkpoint else 'yet'}.")
    average = bool(experiment.ema.exported if average is None else average)
    try:
        tokenizer = build_tokenizer(experiment.model)
        module = build_stage(experiment.module, without_caches(experiment), tokenizer)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    load_weights(checkpoint, module, average)
    module.to(dtype).save_model(output, tokenizer)
    return average


def without_caches(experiment: Any) -> Any:
    """Return the experiment with all networks loaded and nothing read from caches."""
    return replace(experiment, data=experiment.data.without_caches())


def cached_networks(experiment: Any) -> dict[str, dict[str, str]]:
    """Return what each cache of the run depends on besides its data: networks and precision."""
    precision = {"computed": experiment.trainer.precision}
    return {name: network | precision for name, network in experiment.module.cached_networks(experiment).items()}


def cache(arguments: Sequence[str]) -> str:
    """`train.py cache CONFIGURATION…`: write the caches that `data.cached_*` selects; returns a summary.

    Raises:
        ConfigError: no cache is selected, or a network to be cached is trained.
        DataError: see `datamodules.cache.write_cache`.
    """
    experiment: Any = load_config(arguments, stage_schema)
    try:
        networks = cached_networks(experiment)
        if not networks:
            raise ValueError(f"no data.{CACHED}… is set; for example data.{CACHED}latents=float32 in stage 3")
        tokenizer = build_tokenizer(experiment.model)
        module: Any = build_stage(experiment.module, without_caches(experiment), tokenizer).eval()
        encoder = module.mllm.encoder(tokenizer)
        data = experiment.datamodule.build(experiment.data, encoder, experiment.model.image_size, module.image_decoder)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    data.networks = networks
    options, summary = experiment.trainer, []
    fabric = Fabric(accelerator=options.accelerator, devices=1, precision=options.precision)
    for name, (network, encode) in module.cache_encoders().items():
        if name not in networks:
            continue
        network.to(fabric.device, torch.bfloat16 if options.precision == "bf16-true" else None)
        with torch.no_grad(), fabric.autocast():
            counts = data.write_cache(name, encode)
        network.cpu()
        summary.append(
            f"{name}: {counts['written']} shards written, {counts['skipped']} skipped (finished, or in use by another "
            f"process); {counts['items']} items, {counts['unusable']} unusable."
        )
    return "\n".join(summary)


def export(arguments: Sequence[str]) -> str:
    """`train.py export RUN output=FOLDER [step=N] [weights=ema|raw] [dtype=float16|bfloat16]`: write a checkpoint as a
    model folder, also during training; returns a summary. By default the last checkpoint, the weights that the run's
    `ema` selects, in float32.

    Raises:
        ConfigError: an argument is missing, unknown or not allowed, or there is no checkpoint.
        CheckpointDamagedError, CheckpointMismatchError: the checkpoint cannot be used.
    """
    runs, options = split_options(arguments, {"output": None, "step": None, "weights": None, "dtype": "float32"})
    step, weights, dtype = options["step"], options["weights"], options["dtype"]
    if len(runs) != 1 or options["output"] is None:
        raise ConfigError("export needs one run folder and output=FOLDER; step=, weights= and dtype= are optional.")
    if dtype not in DTYPES:
        raise ConfigError(f"export: dtype={dtype} is not allowed; allowed: {', '.join(DTYPES)}.")
    if weights not in (None, "ema", "raw") or not (step is None or step.isdecimal()):
        raise ConfigError(
            f"export: step={step} weights={weights} is not allowed; step must be a number, weights ema or raw."
        )
    experiment, run = load_config(runs, stage_schema), RunFolder(runs[0])
    checkpoint = run.checkpoints / checkpoint_name(int(step)) if step else run.latest_checkpoint()
    if checkpoint is not None and checkpoint.is_dir():
        verify(checkpoint)
    output = Path(options["output"])
    average = None if weights is None else weights == "ema"
    average = export_model(experiment, run, checkpoint, output, average, getattr(torch, dtype))
    return f"Exported the {'moving average' if average else 'weights'} of '{checkpoint}' to '{output}'."


COMMANDS = {"cache": cache, "export": export}


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 finished, 2 user error, 128 + signal if stopped by a signal."""
    positional = [argument for argument in arguments if argument not in ("-h", "--help")]
    if not positional:
        print(f"{__doc__}\nStages: {', '.join(STAGES)}. Add --help to a file to list its keys.")
        return 0 if arguments else 2
    configure_logging()
    try:
        if positional[0] in COMMANDS:
            print(COMMANDS[positional[0]](positional[1:]))
            return 0
        if len(positional) < len(arguments):
            print(describe_schema(type(load_config(positional, stage_schema))))
            return 0
        experiment = load_config(arguments, stage_schema)
        if experiment.dry_run:
            report(experiment, Console())
            return 0
        run = train(experiment, written_config(arguments, stage_schema))
    except USER_ERRORS as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except RunInterruptedError as stop:
        # Only rank 0 reports the signal: launchers kill all ranks as soon as one fails.
        if rank_zero_only.rank:
            return 0
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:  # before the first step, or on a second Ctrl-C
        print("Stopped. The same command resumes from the last checkpoint.", file=sys.stderr)
        return 128 + signal.SIGINT
    if rank_zero_only.rank == 0:
        print(f"The model is in '{run / 'model'}'.")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
