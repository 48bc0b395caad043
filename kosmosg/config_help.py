"""Help for a schema: every key with its type, default and docstring, as text."""

import ast
import inspect
import textwrap
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from itertools import pairwise
from typing import Any, get_type_hints

from omegaconf import MISSING


def describe_schema(schema: type, prefix: str = "") -> str:
    """One line a key, `key: type = default  docstring`; keys of nested schemas are dotted."""
    hints, docstrings = get_type_hints(schema), field_docstrings(schema)
    lines = []
    for item in fields(schema):
        key, kind = f"{prefix}{item.name}", hints[item.name]
        if is_dataclass(kind):
            lines.append(describe_schema(kind, f"{key}."))
        else:
            name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
            lines.append(f"{key}: {name.replace('typing.', '')}{_default(item)}  # {docstrings.get(item.name, '')}")
    return "\n".join(lines)


def field_docstrings(schema: type) -> dict[str, str]:
    """The string that follows each field in the source, base classes included."""
    found: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        if not is_dataclass(kind):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
        for statement, following in pairwise(body):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[statement.target.id] = str(following.value.value)
    return found


def _default(item: Field[Any]) -> str:
    value = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
    return "" if value is NO_DEFAULT or value == MISSING else f" = {value!r}"
