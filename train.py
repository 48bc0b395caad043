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

if __name__ == "__main__":  # Ctrl-C while the libraries load ends quietly: nothing has begun
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import; our loaders report weights themselves

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
# What ends a run with a message and exit status 2.
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
    """The keys that all stages have; see `stage` for what each stage adds."""

    module: ClassVar[type[StageModule]]
    datamodule: ClassVar[type[MixtureDataModule]]

    stage: str = MISSING
    """Name of the stage, see STAGES."""
    runs: str = "runs"
    """Folder of the run folders; `run` and `init_from` may refer to it."""
    run: str = MISSING
    """Run folder."""
    ablation: str | None = None
    """Name of the ablation, under which evaluations group its seeds, see configs/ablations/; null: none."""
    seed: int = 0
    """Seed of initial weights, noise, timesteps and dropout; data.seed is that of the order of samples."""
    init_from: str | None = None
    """Model folder or run folder of the stage before; null starts from random weights (and CLIP's vision encoder)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes and pretrained parts, see configs/model/."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length, devices and intervals."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """Assumptions of a dry run."""
    dry_run: bool = False
    """Print the memory and time that the run would take, and exit; nothing is read or written."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Average of the weights."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""


def stage(module: type[StageModule], datamodule: type[MixtureDataModule]) -> type[Experiment]:
    """The configuration of a stage: `data`, `recipe` and, where there is something to draw, `grids`."""
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
    """The schema of `stage:`. Raises ConfigError: unknown or missing."""
    name = values.get("stage")
    if name not in STAGES:
        raise ConfigError(f"stage is {name!r}; allowed: {', '.join(STAGES)}. Set it in a YAML file or as stage=…")
    return STAGES[name]


def train(experiment: Any, written: dict[str, Any]) -> Path:
    """Run the stage, or resume it, to its end; the run folder. Raises what `main` answers with a message."""
    run = RunFolder(experiment.run)
    with run.lock(written, type(experiment), write=rank_zero_only.rank == 0):
        if (finished := run.finished()) is not None:
            print(f"Run folder '{run.path}' is finished since {finished['finished']} ({finished['step']} steps)")
        else:
            fit(experiment, written, run)
            if rank_zero_only.rank == 0:
                with replaced(run.model) as folder:
                    export_model(experiment, run, run.latest_checkpoint(), folder)
                run.mark_finished(step=experiment.trainer.max_steps, max_steps=experiment.trainer.max_steps)
    return run.path


def fit(experiment: Any, written: dict[str, Any], run: RunFolder) -> None:
    """Build everything and train."""
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
                raise ValueError("grids are drawn with networks that data.cached_states leaves out; set grids.every=0")
            decoder = module.image_decoder if module.image_decoder.denoiser is not None else None
            sampler = DiffusionSampler(decoder or load_image_decoder(model.image_decoder, "images"))
            grids = [ImageGrid(experiment.grids, run.grids, sampler, encoder)]
    except (ValueError, FileNotFoundError) as error:  # parts that are missing or do not fit, named by the message
        raise ConfigError(str(error)) from error
    module.global_batch, module.guard.limit = layout.global_batch, options.max_skipped_steps
    data.micro_batches = layout.micro_batches
    skipped = module.sharded_modules() if options.is_sharded(layout.world_size) else ()
    store_frozen_weights(module, options.frozen_storage, skipped)
    apply_activation_checkpointing(module, options.activation_checkpointing)
    if options.compile:
        apply_compile(module)
    # The first rank alone reads a checkpoint's every byte; its choice is the others', see FolderCheckpoints.
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
    """Write a checkpoint's model folder; whether it holds the average of the weights, by default as `ema` says.

    Parameters sharded over ranks are whole on none, and an average is not in the module: so the module is built afresh
    and filled from the checkpoint. Raises ConfigError: no checkpoint, or a part that is missing.
    """
    if checkpoint is None or not checkpoint.is_dir():
        raise ConfigError(f"run folder '{run.path}' holds no checkpoint {checkpoint.name if checkpoint else 'yet'}.")
    wanted = bool(experiment.ema.exported if average is None else average)
    try:
        tokenizer = build_tokenizer(experiment.model)
        module = build_stage(experiment.module, without_caches(experiment), tokenizer)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    load_weights(checkpoint, module, wanted)
    module.to(dtype).save_model(output, tokenizer)
    return wanted


def without_caches(experiment: Any) -> Any:
    """The stage with all its networks."""
    return replace(experiment, data=experiment.data.without_caches())


def cached_networks(experiment: Any) -> dict[str, dict[str, str]]:
    """What each cache of the run depends on beside its data; the precision of computation counts."""
    precision = {"computed": experiment.trainer.precision}
    return {name: found | precision for name, found in experiment.module.cached_networks(experiment).items()}


def cache(arguments: Sequence[str]) -> str:
    """CONFIGURATION…: write the caches that the stage's `data.cached_*` names, by the run's own configuration; what was
    done, in a sentence.

    Raises:
        ConfigError: none is named, or what should be cached trains.
        DataError: see `datamodules.cache.write_cache`.
    """
    experiment: Any = load_config(arguments, stage_schema)
    try:
        networks = cached_networks(experiment)
        if not networks:
            raise ValueError(f"no data.{CACHED}… is set, as data.{CACHED}latents=float32 in stage 3")
        tokenizer = build_tokenizer(experiment.model)
        module: Any = build_stage(experiment.module, without_caches(experiment), tokenizer).eval()
        encoder = module.mllm.encoder(tokenizer)
        data = experiment.datamodule.build(experiment.data, encoder, experiment.model.image_size, module.image_decoder)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    data.networks = networks
    options, told = experiment.trainer, []
    fabric = Fabric(accelerator=options.accelerator, devices=1, precision=options.precision)
    for name, (network, encode) in module.cache_encoders().items():
        if name not in networks:
            continue
        network.to(fabric.device, torch.bfloat16 if options.precision == "bf16-true" else None)
        with torch.no_grad(), fabric.autocast():
            counts = data.write_cache(name, encode)
        network.cpu()
        told.append(
            f"{name}: {counts['written']} shards written, {counts['skipped']} skipped (finished, or another process is "
            f"at them); {counts['items']} items, {counts['unusable']} unusable."
        )
    return "\n".join(told)


def export(arguments: Sequence[str]) -> str:
    """RUN output=FOLDER [step=N] [weights=ema|raw] [dtype=float16|bfloat16]: a checkpoint to a model folder, while its
    run goes on or after it; what was done, in a sentence. By default the last checkpoint, the run's own choice of
    weights, in float32.

    Raises:
        ConfigError: arguments that are missing, unknown or not allowed; no checkpoint.
        CheckpointDamagedError, CheckpointMismatchError: what the checkpoint holds is of no use.
    """
    runs, options = split_options(arguments, {"output": None, "step": None, "weights": None, "dtype": "float32"})
    step, weights, dtype = options["step"], options["weights"], options["dtype"]
    if len(runs) != 1 or options["output"] is None:
        raise ConfigError("export takes a run folder and output=FOLDER; step=, weights= and dtype= may be added.")
    if dtype not in DTYPES:
        raise ConfigError(f"export: dtype={dtype} is not allowed; allowed: {', '.join(DTYPES)}.")
    if weights not in (None, "ema", "raw") or not (step is None or step.isdecimal()):
        raise ConfigError(
            f"export: step={step} weights={weights} is not allowed; step is a number, weights ema or raw."
        )
    experiment, run = load_config(runs, stage_schema), RunFolder(runs[0])
    checkpoint = run.checkpoints / checkpoint_name(int(step)) if step else run.latest_checkpoint()
    if checkpoint is not None and checkpoint.is_dir():
        verify(checkpoint)
    output = Path(options["output"])
    wanted = None if weights is None else weights == "ema"
    average = export_model(experiment, run, checkpoint, output, wanted, getattr(torch, dtype))
    return f"The {'average' if average else 'weights'} of '{checkpoint}' are the model in '{output}'."


COMMANDS = {"cache": cache, "export": export}


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 finished, 2 a mistake in the arguments, 128 + signal when stopped and saved."""
    given = [argument for argument in arguments if argument not in ("-h", "--help")]
    if not given:
        print(f"{__doc__}\nStages: {', '.join(STAGES)}. Add --help to a file to list its keys.")
        return 0 if arguments else 2
    configure_logging()
    try:
        if given[0] in COMMANDS:
            print(COMMANDS[given[0]](given[1:]))
            return 0
        if len(given) < len(arguments):
            print(describe_schema(type(load_config(given, stage_schema))))
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
        # The first rank's exit status is the run's: a launcher kills the others as soon as one fails.
        if rank_zero_only.rank:
            return 0
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        print("Stopped. The same command resumes from the last checkpoint.", file=sys.stderr)
        return 128 + signal.SIGINT
    if rank_zero_only.rank == 0:
        print(f"The model is in '{run / 'model'}'.")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
