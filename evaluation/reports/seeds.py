"""Runs of one experiment gathered over their seeds, from one evaluation or from several whose numbers compare."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean

from evaluation.protocols.requests import EvaluationError
from evaluation.reports.compare import Evaluated, obstacles
from evaluation.scores.metric import Metric
from evaluation.scores.results import Score, cells, sizes

Runs = dict[int, dict[str, Score]]
"""The scores of an experiment by seed and metric."""


def seed_groups(
    evaluations: Sequence[Evaluated], table: str, metrics: Sequence[type[Metric]], stage: str, names: Mapping[str, str]
) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and rows: for evaluations that compare, the mean over seeds of each experiment, then every seed.

    Args:
        names: what experiments are called, in their order; others follow by their own names.

    Raises:
        EvaluationError: a seed of an experiment is in two evaluations.
    """
    for together in comparable(evaluations, table, stage):
        experiments = gathered(together, table, stage)
        order = sorted(experiments, key=lambda name: ([*names, name].index(name), name))
        origin = f"{', '.join(e.name for e in together)}: {together[0].protocol(table)}"
        rows = [[names.get(name, name), *mean_cells(experiments[name], metrics)] for name in order]
        yield f"{origin}; mean over seeds (lowest–highest of a seed)", rows
        rows = [
            [f"{names.get(name, name)}, seed {seed}", *cells(found, metrics), sizes(shown(found, metrics))]
            for name in order
            for seed, found in sorted(experiments[name].items())
        ]
        yield f"{origin}; every seed (95 % interval over its images)", rows


def comparable(evaluations: Sequence[Evaluated], table: str, stage: str) -> list[list[Evaluated]]:
    """The evaluations that hold runs of `stage`, those together whose numbers compare."""
    groups: list[list[Evaluated]] = []
    for evaluation in evaluations:
        if any(is_run(score, table, stage) for score in evaluation.scores):
            fitting = (group for group in groups if not obstacles(group[0], evaluation, table))
            if (group := next(fitting, None)) is None:
                groups.append([evaluation])
            else:
                group.append(evaluation)
    return groups


def gathered(evaluations: Sequence[Evaluated], table: str, stage: str) -> dict[str, Runs]:
    """The runs of each experiment."""
    experiments: dict[str, Runs] = {}
    origin: dict[tuple[str, int], str] = {}
    for evaluation in evaluations:
        for score in evaluation.scores:
            if not is_run(score, table, stage):
                continue
            assert score.experiment is not None and score.seed is not None
            first = origin.setdefault((score.experiment, score.seed), evaluation.name)
            if first != evaluation.name:
                raise EvaluationError(
                    f"seed {score.seed} of '{score.experiment}' is in '{first}' and in '{evaluation.name}'; a seed "
                    "counts once: leave one of them out."
                )
            experiments.setdefault(score.experiment, {}).setdefault(score.seed, {})[score.metric] = score
    return experiments


def is_run(score: Score, table: str, stage: str) -> bool:
    return score.table == table and score.stage == stage and score.seed is not None


def mean_cells(runs: Runs, metrics: Sequence[type[Metric]]) -> list[str]:
    """`9.55 (9.41–9.72)` for each metric, and `3 seeds × 500`."""
    texts = []
    for metric in metrics:
        values = [found[metric.name].value for found in runs.values() if metric.name in found]
        low, value, high = (metric.number(f(values)) if values else "–" for f in (min, mean, max))
        texts.append(f"{value} ({low}–{high})" if len(values) > 1 else value)
    images = dict.fromkeys(sizes(shown(found, metrics)) for found in runs.values())
    return [*texts, f"{len(runs)} seed{'s' * (len(runs) > 1)} × {' or '.join(images)}"]


def shown(found: Mapping[str, Score], metrics: Sequence[type[Metric]]) -> dict[str, Score]:
    return {metric.name: found[metric.name] for metric in metrics if metric.name in found}
