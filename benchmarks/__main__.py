"""Measure speed and memory: python -m benchmarks {check|released|loader} [part …] [size=cpu|gpu|tiny] [key=value …]

    python -m benchmarks check size=gpu                # or: make gpu-check
    python -m benchmarks check sampling size=gpu part_seconds=300
    python -m benchmarks released alignment            # at the CPU size, in some minutes
    python -m benchmarks released --write              # write the table into docs/performance.md
    python -m benchmarks loader

check: each stage's optimizer step compared with its dry run, and sampling compared with diffusers. released: each
stage's step compared with the released code's implementation. loader: data loading compared with decoding alone, on one
core. Parts are the stages and sampling, by default all. Results are printed and appended to `output` one by one.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read at import; silences messages of libraries between our tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from benchmarks import check, loader, released
from benchmarks.measure import Limit, OutOfTimeError, describe_machine, peak_flops
from benchmarks.setting import BenchmarkConfig, Setting, open_setting, read_config
from kosmosg.config import ConfigError
from lightning_modules.dry_run import GIB, TERA
from lightning_modules.trainer import configure_logging
from train import STAGES

COMMANDS = ("check", "released", "loader")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
Result = dict[str, Any]


def run(command: str, parts: Sequence[str], config: BenchmarkConfig, setting: Setting) -> list[Result]:
    """Measure all parts. If a part fails or exceeds its time limit, that is recorded as its result."""
    results: list[Result] = []
    end = time.monotonic() + config.total_seconds
    run_facts: dict[str, Any] = {"command": command, "size": config.name, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    run_facts |= {"machine": describe_machine(setting.device)}
    if command == "check":
        half = any("bf16" in setting.experiment(part).trainer.precision for part in config.stages)
        dtype = torch.bfloat16 if half else torch.float32
        run_facts["peak_flops_per_second"] = peak_flops(setting.device, dtype, config.clock)
    for part in parts:
        limit = Limit(min(config.part_seconds, end - time.monotonic()))
        try:
            with limit.enforced():
                if command == "released":
                    measured = released.compare_stage(setting, part, limit)
                elif part == "sampling":
                    measured = check.check_sampling(setting, limit)
                else:
                    measured = check.check_stage(setting, part, limit)
                for result in measured:
                    results.append(run_facts | result)
                    record(results[-1], config.output)
        except (OutOfTimeError, RuntimeError, ValueError) as error:  # running out of memory is a RuntimeError
            if isinstance(error, ConfigError):
                raise
            problem = str(error).partition("\n")[0]
            results.append(run_facts | {"part": part, "problem": f"{type(error).__name__}: {problem}"})
            record(results[-1], config.output)
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def record(result: Result, output: str) -> None:
    """Print a result and append it to `output`."""
    print(" | ".join(row(result)), flush=True)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a") as file:
        file.write(json.dumps(result) + "\n")


HEADERS = {
    "check": ("part", "micro-batch", "peak GiB / dry run", "rows per second", "share of peak FLOP/s", "vs. diffusers"),
    "released": ("stage", "variant", "seconds per step", "speed-up over released", "peak GiB", "loss"),
}


def row(result: Result) -> list[str]:
    """Format a result as a row of its command's table."""
    if "problem" in result:
        return [result["part"], result["problem"]]
    memory = f"{result['peak_bytes'] / GIB:.2f}"
    if result["command"] == "released":
        seconds, loss = f"{result['seconds']:.3f}", f"{result['loss']:.6f}"
        return [result["part"], result["variant"], seconds, times(result["ratio"]), memory, loss]
    share = dry = versus = ""
    if "dry_run_bytes" in result:
        dry = f" / {result['dry_run_bytes'] / GIB:.2f}"
        share = f"{result['flops_per_second'] / result['peak_flops_per_second']:.0%}"
    if "ratio" in result:
        versus = f"{times(result['ratio'])} of {result['diffusers_rows_per_second']:.3g}/s"
    size = (
        f"{result['micro_batch']} × {result['tokens_per_row']} tokens" if share else f"{result['micro_batch']} images"
    )
    tokens = f" ({result['rows_per_second'] * result['tokens_per_row']:,.0f} tokens)" if share else ""
    speed = f"{result['rows_per_second']:.3g}{tokens}"
    return [f"{result['part']}, {result['variant']}", size, memory + dry, speed, share, versus]


def times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f}) ×"


def markdown(results: Sequence[Result]) -> str:
    """Format the results as a Markdown table with machine, versions and date."""
    facts, header = results[0], HEADERS[results[0]["command"]]
    cells = [row(result) for result in results]
    lines = [header, ["---"] * len(header), *(line + [""] * (len(header) - len(line)) for line in cells)]
    versions = ", ".join(f"{name} {version}" for name, version in facts["machine"]["versions"].items())
    note = f"{facts['machine']['device']}, {facts['machine']['threads']} threads; {versions}; {facts['started']}."
    if peak := facts.get("peak_flops_per_second"):
        note = f"Peak, in a large matrix product: {peak / TERA:,.3g} TFLOP/s. " + note
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {facts['command']}, size {facts['size']}\n\n{table}\n\n{note}\n"


def with_section(page: str, name: str, text: str) -> str:
    """Replace the section `name` of a page between its two comments, or append it."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{begin}\n{text}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{section}\n"
    before, _, rest = page.partition(begin)
    return before + section + rest.partition(end)[2]


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 success, 1 a part failed or took too long, 2 invalid arguments."""
    positional = [argument for argument in arguments if argument != "--write"]
    if not positional or positional[0] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    command, keys = positional[0], [argument for argument in positional[1:] if "=" in argument]
    parts = [argument for argument in positional[1:] if "=" not in argument]
    configure_logging()
    problems = False
    try:
        if command == "loader":
            text, name = loader.markdown(loader.measure(keys)), "loader"
        else:
            config = read_config(keys)
            known = [part for part in config.stages if command == "check" or part in STAGES]
            known += ["sampling"] if command == "check" else []
            for part in parts:
                if part not in known:
                    raise ConfigError(f"{command} has no part '{part}'; allowed: {', '.join(known)}")
            with open_setting(config) as setting:
                results = run(command, parts or known, config, setting)
            text, name = markdown(results), f"{command} {config.name}"
            problems = any("problem" in result for result in results)
    except ConfigError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}")
    if "--write" in arguments:
        PAGE.write_text(with_section(PAGE.read_text(), name, text))
    return int(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
