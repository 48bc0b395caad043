"""A result as a terminal's tables or as Markdown: the same rows."""

from typing import Any

from rich.console import Console
from rich.table import Table

MEGABYTE = 1e6
Rows = list[list[str]]


def print_result(result: dict[str, Any]) -> None:
    """To the terminal."""
    console = Console()
    console.print(f"\n[bold]{headline(result)}[/bold]")
    for caption, header, rows in tables(result):
        table = Table(*header, title=caption, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(footnote(result), style="dim")


def markdown(result: dict[str, Any]) -> str:
    """The same as Markdown."""
    parts = [f"### {result['benchmark']}", "", headline(result), ""]
    for caption, header, rows in tables(result):
        parts += [f"{caption}:", ""] if caption else []
        parts += [line(header), line(["---"] * len(header)), *map(line, rows), ""]
    return "\n".join([*parts, footnote(result), ""])


def with_section(page: str, name: str, text: str) -> str:
    """The page with its section `name` written anew, between its two marks; at the end if it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = f"{begin}\n{text}\n{end}"
    if begin not in page:
        return f"{page.rstrip()}\n\n{section}\n"
    before, _, rest = page.partition(begin)
    return before + section + rest.partition(end)[2]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def headline(result: dict[str, Any]) -> str:
    """One sentence with the ratio."""
    return f"{times(result['ratio'])} as fast as {result['against']} ({result['benchmark']}, size {result['size']})."


def tables(result: dict[str, Any]) -> list[tuple[str, list[str], Rows]]:
    """(caption, header, rows) of each table."""
    found = [("", ["way", "seconds a step", "share of the ceiling", "peak memory beyond the weights"], summary(result))]
    if result["levers"]:
        rows = [
            [lever["lever"], times(lever["ratio"]), f"{lever['memory_by_theirs']:.2f}"] for lever in result["levers"]
        ]
        found.append((f"Each lever alone, against {result['against']}", ["lever", "times as fast", "memory"], rows))
    if result["scaling"]:
        rows = [
            [row["axis"], str(row["size"]), f"{row['seconds']:.3f}", f"{row['growth']:.2f}", f"{row['linear']:.2f}"]
            for row in result["scaling"]
        ]
        header = ["axis", "size", "seconds a step", "times the first", "if in proportion"]
        found.append(("Cost of the default way", header, rows))
    return found


def summary(result: dict[str, Any]) -> Rows:
    seconds, top, memory = result["seconds"], result["ceiling"], result["memory"]
    return [
        [
            "project's default",
            f"{seconds['ours']:.3f}",
            f"{100 * top['share_of_ours']:.0f} %",
            f"{memory['ours_bytes'] / MEGABYTE:,.1f} MB",
        ],
        [
            result["against"].removeprefix("the "),
            f"{seconds['theirs']:.3f}",
            f"{100 * top['share_of_theirs_for_the_same']:.0f} % for the same result",
            f"{memory['theirs_bytes'] / MEGABYTE:,.1f} MB",
        ],
    ]


def footnote(result: dict[str, Any]) -> str:
    """What the figures hold for."""
    machine, top, work = result["machine"], result["ceiling"], result["work"]
    facts = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in result["facts"].items())
    return (
        f"{work['items']} {work['unit']} a step ({work['per_second']:.3g} a second), {top['flops_of_ours'] / 1e9:,.0f} "
        f"GFLOP. Ceiling, a large matrix product: {top['flops_per_second'] / 1e9:,.0f} GFLOP/s. {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}. {facts}."
    )


def times(ratio: dict[str, float]) -> str:
    """1.23 (1.20–1.26) ×."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f}) ×"
