"""Train one stage: python train.py stage.yaml [more.yaml | run_folder | key=value …]

Every argument is a YAML file, a run folder or key=value; later wins. `stage:` names the stage, `run:` the folder for
checkpoints, logs, pictures and the finished model. The same command goes on with an interrupted run.

    python train.py configs/toyland/alignment.yaml
    python train.py configs/toyland/alignment.yaml configs/toyland/short.yaml trainer.max_steps=2
    torchrun --nproc-per-node 8 train.py configs/instruction_tuning.yaml configs/scale/8.yaml
    python train.py configs/instruction_tuning.yaml configs/scale/8.yaml dry_run=true
    python train.py export runs/instruction_tuning output=models/step-40000 [step=40000] [weights=ema|raw]
    python train.py sweep configs/sweeps/toyland/alignment.yaml trials=8 [seed=0] [key=value …]
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the libraries load ends quietly: nothing has begun
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import; our loaders report weights themselves

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import MISSING
from rich.console import Console

from callbacks.checkpoint import RunInterruptedError, StepCheckpoint
from callbacks.ema import EmaConfig, WeightAverage
from callbacks.image_grid import GridConfig, ImageGrid
from callbacks.metrics_file import MetricsFile
from callbacks.model_export import ModelExport
from callbacks.progress import RunProgress
from callbacks.throughput import Throughput
from callbacks.weights_and_biases import WandbConfig, wandb_logger
from datamodules.alignment import AlignmentData, AlignmentDataConfig
from datamodules.errors import DataError
from datamodules.instruction import InstructionData, InstructionDataConfig
from datamodules.language_modelling import LanguageModellingData, LanguageModellingDataConfig
from datamodules.moments.files import moments_identity
from kosmosg.config import ConfigError, describe_schema, load_config
from kosmosg.image_processing import TargetTransform, UnderstandingTransform
from kosmosg.models.model_config import ModelConfig
from kosmosg.prompt import PromptEncoder
from kosmosg.sampling import DiffusionSampler
from kosmosg.tokenizer import Tokenizer
from lightning_modules.alignment import AlignmentModule, AlignmentRecipe
from lightning_modules.base import StageModule, build_stage
from lightning_modules.estimate.compute import affordable_updates
from lightning_modules.estimate.hardware import HardwareConfig
from lightning_modules.estimate.run_estimate import DoesNotFitError, report
from lightning_modules.instruction_tuning import InstructionTuningModule, InstructionTuningRecipe
from lightning_modules.language_modelling import LanguageModellingModule, LanguageModellingRecipe
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.runs.checkpoint_folder import CheckpointDamagedError, checkpoint_step
from lightning_modules.runs.export import export
from lightning_modules.runs.local_sweep import sweep_command
from lightning_modules.runs.run_folder import RunFolder, RunFolderError
from lightning_modules.runs.tensor_storage import StorageError
from lightning_modules.runs.trained_weights import CheckpointMismatchError
from lightning_modules.scale.batch_layout import BatchLayout, batch_layout, count_devices
from lightning_modules.scale.launcher import launched_by_ourselves, named_launcher
from lightning_modules.scale.recompute import apply_compile, apply_recompute
from lightning_modules.scale.trainer import TrainerConfig, build_trainer, quieten_libraries
from lightning_modules.step_guard import TooManySkippedStepsError


@dataclass
class Experiment:
    """What every stage's configuration holds; the stages add `data`, `recipe` and, where images are drawn, `grids`."""

    module: ClassVar[type[StageModule]]

    stage: str = MISSING
    """Name of the stage, see STAGES."""
    runs: str = "runs"
    """Where run folders lie, for `run` and `init_from` to refer to."""
    run: str = MISSING
    """Run folder."""
    ablation: str | None = None
    """Name of the ablation, under which evaluations gather its seeds, see configs/ablations/; null: none."""
    seed: int = 0
    """Of initial weights, noise, timesteps and dropout; data.seed is the order's."""
    init_from: str | None = None
    """Model folder or run folder of the stage before; null starts from random weights (and CLIP's image tower)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes and pretrained parts, see configs/model/."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Length, devices and intervals."""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """What a dry run assumes."""
    dry_run: bool = False
    """Tell what the run would take and end; nothing is read or written."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Average of the weights."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def datamodule(self, tokenizer: Tokenizer, module: Any) -> lightning.LightningDataModule:
        """The stage's batches."""
        raise NotImplementedError

    def pictures(self, run: RunFolder, tokenizer: Tokenizer, module: Any) -> list[lightning.Callback]:
        """Callbacks that draw; none where there is no image decoder."""
        return []

    def layout(self) -> BatchLayout:
        """How an update's rows are divided. Raises ValueError: they cannot be."""
        options = self.trainer
        devices = count_devices(options.devices, options.num_nodes, options.accelerator)
        return batch_layout(self.data.batch_size, options.global_batch_size, devices, options.num_nodes)  # type: ignore

    def encoder(self, tokenizer: Tokenizer) -> PromptEncoder:
        mllm = self.model.mllm
        return PromptEncoder(tokenizer, UnderstandingTransform(mllm.vision.image_size), mllm.image_tokens)


@dataclass
class LanguageModelling(Experiment):
    module = LanguageModellingModule
    data: LanguageModellingDataConfig = field(default_factory=LanguageModellingDataConfig)
    """Text, captions and interleaved documents."""
    recipe: LanguageModellingRecipe = field(default_factory=LanguageModellingRecipe)
    """What trains."""

    def datamodule(self, tokenizer: Tokenizer, module: Any) -> lightning.LightningDataModule:
        return LanguageModellingData(self.data, self.encoder(tokenizer))


@dataclass
class Alignment(Experiment):
    module = AlignmentModule
    data: AlignmentDataConfig = field(default_factory=AlignmentDataConfig)
    """Captions."""
    recipe: AlignmentRecipe = field(default_factory=AlignmentRecipe)
    """Weights of the losses."""
    grids: GridConfig = field(default_factory=GridConfig)
    """Pictures of held-out prompts."""

    def datamodule(self, tokenizer: Tokenizer, module: Any) -> lightning.LightningDataModule:
        return AlignmentData(self.data, self.encoder(tokenizer), module.text_target.tokenize)

    def pictures(self, run: RunFolder, tokenizer: Tokenizer, module: Any) -> list[lightning.Callback]:
        if self.grids.every == 0:
            return []
        sampler = DiffusionSampler.from_pretrained(self.model.image_decoder)
        return [ImageGrid(self.grids, run.grids, sampler, tokenizer, module.text_target)]


@dataclass
class InstructionTuning(Experiment):
    module = InstructionTuningModule
    data: InstructionDataConfig = field(default_factory=InstructionDataConfig)
    """Constructed samples, edits and captions."""
    recipe: InstructionTuningRecipe = field(default_factory=InstructionTuningRecipe)
    """What trains, and the loss."""
    grids: GridConfig = field(default_factory=GridConfig)
    """Pictures of held-out prompts."""

    def datamodule(self, tokenizer: Tokenizer, module: Any) -> lightning.LightningDataModule:
        transform = TargetTransform(self.model.image_size)
        identity = moments_identity(module.image_decoder.vae, transform) if self.data.kept_moments else None
        return InstructionData(self.data, self.encoder(tokenizer), transform, identity)

    def pictures(self, run: RunFolder, tokenizer: Tokenizer, module: Any) -> list[lightning.Callback]:
        if self.grids.every == 0:
            return []
        decoder = module.image_decoder
        sampler = DiffusionSampler(decoder.unet, decoder.vae, decoder.scheduler)
        return [ImageGrid(self.grids, run.grids, sampler, tokenizer)]


STAGES: dict[str, type[Experiment]] = {
    "language_modelling": LanguageModelling,
    "alignment": Alignment,
    "instruction_tuning": InstructionTuning,
}


# What ends a run with a message and exit status 2.
STOPS = (
    CheckpointDamagedError,
    CheckpointMismatchError,
    ConfigError,
    DataError,
    DoesNotFitError,
    RunFolderError,
    StorageError,
    TooManySkippedStepsError,
)


def stage_schema(values: dict[str, Any]) -> type[Experiment]:
    """The schema of `stage:`. Raises ConfigError: unknown or missing."""
    stage = values.get("stage")
    if stage not in STAGES:
        raise ConfigError(f"stage is {stage!r}; allowed: {', '.join(STAGES)}. Set it in a YAML file or as stage=…")
    return STAGES[stage]


def train(experiment: Experiment) -> Path:
    """Run the stage, or go on with it, to its end; the run folder. Raises what `main` answers with a message."""
    run = RunFolder(experiment.run)
    with run.held(experiment, write=rank_zero_only.rank == 0):
        if (finished := run.finished()) is not None:
            print(f"Run folder '{run.path}' is finished since {finished['finished']} ({finished['step']} steps)")
        else:
            fit(experiment, run)
    return run.path


def fit(experiment: Experiment, run: RunFolder) -> None:
    """Build everything and train."""
    options = experiment.trainer
    try:
        layout = experiment.layout()
        tokenizer = Tokenizer.from_pretrained(Path(experiment.model.tokenizer))
        module = build_stage(experiment, tokenizer)
        data, pictures = experiment.datamodule(tokenizer, module), experiment.pictures(run, tokenizer, module)
        if options.max_flops is not None:
            options = replace(options, max_steps=affordable_updates(options.max_flops, layout, run, module, data))
    except (ValueError, FileNotFoundError) as error:  # parts that are missing or do not fit, named by the message
        raise ConfigError(str(error)) from error
    module.global_batch, module.max_skipped_steps = layout.global_batch, options.max_skipped_steps
    apply_recompute(module, options.recompute)
    if options.compile:
        apply_compile(module)
    # The first process alone reads a checkpoint's every byte; its choice is the others', see FolderCheckpoints.
    checkpoint = run.intact_checkpoint() if rank_zero_only.rank == 0 else run.latest_checkpoint()
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    loggers = [MetricsFile(run.path / "metrics.csv", first_step)]
    loggers += filter(None, [wandb_logger(experiment.wandb, run.path, experiment)])
    trainer = build_trainer(
        options,
        layout,
        default_root_dir=run.path,
        logger=loggers,
        callbacks=[
            Throughput(),
            RunProgress(experiment.stage),
            *([WeightAverage(experiment.ema.decay)] if experiment.ema.decay else []),
            *pictures,
            ModelExport(run, tokenizer, lambda: build_stage(experiment, tokenizer), experiment.ema.exported),
            StepCheckpoint(run.checkpoints, options.checkpoint_every, options.keep_checkpoints),
        ],
    )
    with named_launcher():
        trainer.fit(module, data, ckpt_path=checkpoint)


COMMANDS: dict[str, Callable[[Sequence[str]], str]] = {
    "export": lambda arguments: export(arguments, stage_schema),
    "sweep": sweep_command,
}


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 finished, 2 a mistake in the arguments, 128 + signal when stopped and saved."""
    given = [argument for argument in arguments if argument not in ("-h", "--help")]
    if not given:
        print(__doc__ + f"\nStages: {', '.join(STAGES)}. With --help and a file, its keys are listed.")
        return 0 if arguments else 2
    quieten_libraries()
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
        run = train(experiment)
    except STOPS as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except RunInterruptedError as stop:
        if rank_zero_only.rank == 0:
            print(stop, file=sys.stderr)
        return 0 if launched_by_ourselves() else 128 + stop.signal
    except KeyboardInterrupt:  # before the first step, or between the trials of a sweep
        print("Stopped. The same command goes on from there.", file=sys.stderr)
        return 128 + signal.SIGINT
    if rank_zero_only.rank == 0:
        print(f"The model is in '{run / 'model'}'.")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
