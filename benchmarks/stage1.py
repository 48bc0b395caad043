"""Stage 1: a step on text, pairs and interleaved documents, packed, against the same documents one to a row."""

from collections.abc import Sequence
from typing import Any

from benchmarks.batches import PackedBatch, stage1_batch
from benchmarks.comparison import Comparison
from benchmarks.config import BenchmarkConfig, read_config
from benchmarks.models import Parts
from benchmarks.released import Language, recomputed
from lightning_modules.language_modelling import LanguageModellingModule, LanguageModellingRecipe
from lightning_modules.optimizer import OptimizerConfig


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """See `benchmarks`."""
    return comparison(read_config(arguments)).measure()


def comparison(config: BenchmarkConfig) -> Comparison:
    """Default (packed, chunked cross-entropy, layers recomputed), released way, levers, scaling."""
    mllm, batch = Parts(config).mllm(), stage1_batch(config)

    def module(**recipe: Any) -> LanguageModellingModule:
        recipe = {"loss_chunk": config.stage1.loss_chunk, **recipe}
        return LanguageModellingModule(mllm, LanguageModellingRecipe(**recipe), OptimizerConfig(), config.seed).train()

    def step(module: LanguageModellingModule, batch: PackedBatch, recompute: bool = config.stage1.recompute) -> float:
        with recomputed(*([mllm] if recompute else [])):
            loss = module.loss(batch.packed, batch.packed_labels)
            loss.backward()
        return float(loss.detach())

    default, plain, separate = module(), module(loss_chunk=None), module(separate_documents=True)

    def released(packed: bool = False, **changes: bool):
        way = Language(mllm, **changes)
        rows = (batch.packed, batch.packed_labels) if packed else (batch.padded, batch.padded_labels)
        return lambda: way(*rows)

    def scaled(rows: int, row_tokens: int):
        other = stage1_batch(config, rows, row_tokens)
        return lambda: step(default, other)

    tokens = int((~batch.packed.padding).sum())
    chunked, whole = step(default, batch), step(plain, batch)
    alone, apart = float(Language(mllm)(batch.padded, batch.padded_labels)), step(separate, batch)
    rows, size = config.stage1.rows, config.stage1.row_tokens
    return Comparison(
        name="stage1",
        config=config,
        ours=lambda: step(default, batch),
        theirs=released(),
        items=tokens,
        unit="tokens",
        levers={
            "packed rows": released(packed=True),
            "logits of counted positions alone": released(counted_logits=True),
            "no recompute": released(recompute=False),
            "the default without recompute": lambda: step(default, batch, recompute=False),
            "the default with whole logits": lambda: step(plain, batch),
            "the default with documents kept apart": lambda: step(separate, batch),
        },
        axes={
            "rows": {count: lambda count=count: scaled(count, size) for count in (1, 2, 4)},
            "tokens of a row": {
                length: lambda length=length: scaled(rows, length) for length in (size, 2 * size, 4 * size)
            },
        },
        facts={
            "documents": f"{len(batch.padded)}, packed into {rows} rows of {size}; padded to "
            f"{batch.padded.ids.shape[1]} tokens they fill {batch.padded.ids.numel() / tokens:.2f} times the room",
            "chunked loss against whole logits, relative difference": f"{abs(chunked / whole - 1):.1e}",
            "documents kept apart against one to a row, relative difference": f"{abs(apart / alone - 1):.1e}",
        },
    )
