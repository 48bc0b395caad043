"""Load configurations from YAML files and `key=value` arguments; later arguments override earlier ones.

- An argument whose text before the first `=` has no slash sets a key: `run=runs/a.yaml` sets `run`. Any other argument
  is the path of a YAML file or of a run folder with a `config.yaml`: `runs/lr=0.1/config.yaml`, `./lr=0.1`.
- Values are read according to the schema. Text is not interpreted (`run=0123`, `wandb.name=no`, `run="a #b"`), integers
  are decimal, `null` and `None` (which W&B sweeps pass) mean None if None is allowed, `key="''"` is the empty text.
  Everything else is YAML. Unquoted values in YAML files follow the same rules.
- A YAML file may extend others: `extends: [model/toyland, data/captions]`. Names are searched in the nearest folder
  called `configs` above the file, then in `configs/` beside the package, with or without `.yaml`; names that begin with
  `./` or `../` are relative to the file. The values of the file override those that it extends.
- Relative paths in a configuration are relative to the working directory.
- `${divide:${model.mllm.layers},2}` divides another value without remainder. `${oc.env:NAME}` reads an environment
  variable, whose value is never recorded (`written_config`).

Schemas are dataclasses next to the code that they configure; `__post_init__` checks values.
"""

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from kosmosg.files import write_text

Schema = TypeVar("Schema")
SchemaChoice = type[Schema] | Callable[[dict[str, Any]], type[Schema]]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"  # exists only in a clone of the repository
RUN_CONFIG = "config.yaml"
SUFFIXES = (".yaml", ".yml")
MASK = "***"
NONE = ("", "~", "null", "Null", "NULL", "None")

RENAMED = {
    "hardware.utilisation": "hardware.utilization",
    "data.batch_size": "data.micro_batch_size",
    "data.kept_moments": "data.cached_latents",
    "optimizer.clip": "optimizer.max_grad_norm",
    "optimizer.warm_up_steps": "optimizer.warmup_steps",
    "recipe.condition_drop": "recipe.condition_dropout",
    "recipe.draws_per_sample": "recipe.timesteps_per_sample",
    "recipe.length_groups": "recipe.length_buckets",
    "recipe.timesteps": "recipe.timestep_sampling",
    "recipe.trains": "recipe.trainable",
    "trainer.recompute": "trainer.activation_checkpointing",
}
REMOVED = {
    "engine": "Curation always uses Ray Data; remove the key.",
    "ray.prepare": "Tasks use every free core; remove the key.",
    "ray.write": "Tasks use every free core; remove the key.",
    "report": "'report.sheet' is now 'sheet'; the throughput report does not extrapolate.",
    "recipe.cache_megabytes": "Caption states are no longer cached in memory; remove the key.",
    "trainer.max_flops": "Set trainer.max_steps instead.",
}


class ConfigError(ValueError):
    """The configuration is invalid; the message names the argument, the key and what is allowed."""


class Plain(str):
    """An unquoted YAML scalar; the schema decides its type."""


class Argument(str):
    """The value of a `key=value` argument: text if the schema expects text, otherwise YAML."""


@dataclass(frozen=True)
class Layer:
    """The values of an argument, or of a file that it extends, and their origin for messages."""

    origin: str
    values: dict[str, Any]


def load_config(arguments: Sequence[str], schema: SchemaChoice[Schema]) -> Schema:
    """Merge `arguments` in order into an instance of `schema`.

    Args:
        schema: a dataclass, or a function that selects one by the merged values (`train.py` selects by `stage`).

    Raises:
        ConfigError: an argument, file or key is unknown, `extends` is circular, or a value has a wrong type or range.
    """
    with _merged(arguments, schema) as config:
        return OmegaConf.to_object(config)  # type: ignore[return-value]


def written_config(arguments: Sequence[str], schema: SchemaChoice[Any]) -> dict[str, Any]:
    """Merge `arguments` into plain values for a record, including defaults; saved as YAML it is a valid argument.

    Values that read the environment, directly or through other keys, are recorded as written. Other text and numbers of
    fields with the metadata `secret` are recorded as `***`.

    Raises:
        ConfigError: see `load_config`.
    """
    with _merged(arguments, schema) as config:
        return _written(config)


def save_config(config: Any, file: Path) -> None:
    """Write the result of `written_config`, or an instance of a schema, as YAML; atomic."""
    values = config if isinstance(config, dict) else _written(OmegaConf.structured(config))
    write_text(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def split_options(arguments: Sequence[str], options: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Split a command's arguments into paths and `key=value` options, which override the defaults in `options`.

    Raises:
        ConfigError: the command has no such option.
    """
    paths, values = [], dict(options)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in options:
            values[key] = value
        elif _is_path(argument) or not equals or Path(argument).exists():
            paths.append(argument)
        else:
            allowed = f"allowed: {', '.join(f'{name}=…' for name in options)}; ./{argument} is a path"
            raise ConfigError(f"argument '{argument}': there is no option '{key}' ({allowed})")
    return paths, values


def divide(number: int, divisor: int) -> int:
    """Implement `${divide:number,divisor}`. Raises ValueError if there is a remainder."""
    if not divisor or number % divisor:
        raise ValueError(f"{number} cannot be divided by {divisor} without a remainder")
    return number // divisor


@contextmanager
def _merged(arguments: Sequence[str], schema: SchemaChoice[Any]) -> Iterator[DictConfig]:
    """Yield the merged, unresolved configuration; errors of resolving it in the body become ConfigErrors."""
    OmegaConf.register_resolver("divide", divide, replace=True)
    layers = [layer for argument in arguments for layer in read_argument(argument)]
    kind = schema if isinstance(schema, type) else schema(_untyped(layers))
    config = OmegaConf.structured(kind)
    for layer in layers:
        _refuse_old_keys(layer, kind)
        try:
            config = OmegaConf.unsafe_merge(config, _typed(layer.values, kind))  # in place: merge() copies it each time
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            hint = f" (the path of that name is ./{layer.origin})" if Path(layer.origin).is_dir() else ""
            raise ConfigError(f"{layer.origin}: {_describe(error)}{hint}") from error
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"'{missing[0]}' has no value; set it in a YAML file or as {missing[0]}=…")
        yield config  # type: ignore[misc]
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        key = str(getattr(error, "full_key", None) or "")
        origin = next((layer.origin for layer in reversed(layers) if key and _has_value(layer.values, key)), None)
        raise ConfigError(f"{origin}: {_describe(error)}" if origin else _describe(error)) from error


def read_argument(argument: str) -> list[Layer]:
    """Return the layers of an argument, starting with those it extends. Raises ConfigError."""
    key, equals, value = argument.partition("=")
    if not equals or _is_path(argument):
        return _read_path(argument)
    if key.startswith("-"):
        raise ConfigError(f"argument '{argument}': write {key.lstrip('-')}={value}, without dashes")
    if not all(key.split(".")) or key == "extends":
        raise ConfigError(f"argument '{argument}': '{key}' is not a key (extends is allowed in YAML files only)")
    if value == "":
        raise ConfigError(f"argument '{argument}' has no value; write {key}=null for none, {key}=\"''\" for empty text")
    values: Any = Argument(value)
    for name in reversed(key.split(".")):
        values = {name: values}
    return [Layer(argument, values)]


def _is_path(argument: str) -> bool:
    return "/" in argument.partition("=")[0]


def _read_path(argument: str) -> list[Layer]:
    path = Path(argument)
    if path.is_dir():
        if not (path / RUN_CONFIG).is_file():
            raise ConfigError(f"'{argument}' is a folder without {RUN_CONFIG}, so it is not a run folder")
        return _read_file(path / RUN_CONFIG, ())
    if path.suffix not in SUFFIXES:
        known = [*_known_files(), *(name.removesuffix(".yaml") for name in _known_files())]
        nearest = _nearest(argument, known)
        raise ConfigError(f"argument '{argument}' is neither a YAML file, a run folder nor key=value.{nearest}")
    if not path.is_file():
        nearest = _nearest(argument, [f"{CONFIGS.name}/{name}" for name in _known_files()])
        raise ConfigError(f"there is no configuration file '{argument}'.{nearest}")
    return _read_file(path, ())


def _read_file(file: Path, parents: tuple[Path, ...]) -> list[Layer]:
    resolved = file.resolve()
    if resolved in parents:
        chain = " → ".join(path.name for path in (*parents[parents.index(resolved) :], resolved))
        raise ConfigError(f"{file}: 'extends' is circular: {chain}")
    try:
        values = yaml.load(file.read_bytes(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    values = {} if values in (None, "") else values
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds {type(values).__name__} at its top; it must be a mapping")
    bases = values.pop("extends", None) or []
    layers: list[Layer] = []
    for base in [bases] if isinstance(bases, str) else bases:
        layers += _read_file(_find_base(str(base), resolved), (*parents, resolved))
    return [*layers, Layer(str(file), values)]


def _find_base(name: str, file: Path) -> Path:
    roots = [*[folder for folder in file.parents if folder.name == CONFIGS.name][:1], CONFIGS]
    if name.startswith(("./", "../")):
        roots = [file.parent]
    with_suffix = name if name.endswith(SUFFIXES) else f"{name}.yaml"
    for root in roots:
        if (root / with_suffix).is_file():
            return root / with_suffix
    known = [known.removesuffix(".yaml") for known in _known_files(roots[0])]
    places = " and ".join(str(root) for root in dict.fromkeys(roots))
    if CONFIGS in roots and not CONFIGS.is_dir():
        places += " (configs/ is in a clone of the repository, not in the installed package)"
    raise ConfigError(f"{file}: extends '{name}', but there is no {with_suffix} under {places}.{_nearest(name, known)}")


class _Loader(yaml.SafeLoader):
    """YAML loader that keeps unquoted scalars as `Plain` and refuses duplicate keys."""

    # Only the merge key `<<` is still resolved.
    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012

    def construct_scalar(self, node: Any) -> str:
        text = super().construct_scalar(node)
        return text if getattr(node, "style", None) else Plain(text)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
            raise yaml.MarkedYAMLError(problem=f"the key '{twice[0]}' is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_scalar)


def _typed(value: Any, kind: Any) -> Any:
    """Convert values to the types of the schema; values that do not fit are left for the merge to refuse."""
    optional = get_origin(kind) in (Union, UnionType)
    kinds = [k for k in (get_args(kind) if optional else (kind,)) if k is not NoneType]
    if isinstance(value, dict):
        return {str(key): _typed(item, _kind_of_item(kinds[0], key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item, _kind_of_item(kinds[0], number)) for number, item in enumerate(value)]
    text = any(k in (str, Path) or (get_origin(k) is Literal and value in get_args(k)) for k in kinds)
    if isinstance(value, Argument):
        if text and not (optional and value in NONE):
            return "" if value in ("''", '""') else str(value)
        return _typed(yaml.load(value, _Loader), kind)
    if not isinstance(value, Plain):
        return value
    if value in NONE:
        return None
    if text or value.lower() in ("true", "false"):
        return str(value) if text else value.lower() == "true"
    for number in (int,) if kinds == [int] else (int, float):  # both read only decimal numbers
        with suppress(ValueError):
            return number(value)
    return str(value)


def _kind_of_item(kind: Any, key: Any) -> Any:
    if is_dataclass(kind):
        return get_type_hints(kind).get(key, Any)
    arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
    if get_origin(kind) is tuple and isinstance(key, int):
        return arguments[min(key, len(arguments) - 1)]
    return arguments[-1] if get_origin(kind) in (dict, list) else Any


def _untyped(layers: list[Layer]) -> dict[str, Any]:
    """Return the merged values without a schema, for selecting one."""
    values = []
    for layer in layers:
        with suppress(yaml.YAMLError):  # may be valid as text; otherwise it is refused once the schema is known
            values.append(_typed(layer.values, Any))
    return OmegaConf.to_container(OmegaConf.merge({}, *values))  # type: ignore[return-value]


def _refuse_old_keys(layer: Layer, kind: type) -> None:
    for key in filter(lambda key: _has_value(layer.values, key) and not _has_key(kind, key), (*RENAMED, *REMOVED)):
        if key in REMOVED:
            raise ConfigError(f"{layer.origin}: '{key}' was removed. {REMOVED[key]}")
        if _has_key(kind, RENAMED[key]):
            raise ConfigError(f"{layer.origin}: '{key}' is now '{RENAMED[key]}'")


def _has_key(kind: Any, key: str) -> bool:
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind is not None


def _has_value(values: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _written(config: Any) -> dict[str, Any]:
    reads: list[Any] = []  # environment variables that the last value has read

    def record_read(*arguments: Any) -> Any:
        reads.append(arguments)
        return oc.env(*arguments)

    def written(node: Any, secret: bool = False) -> Any:
        kind, raw = OmegaConf.get_type(node), OmegaConf.to_container(node, enum_to_str=True)
        secrets = [field.name for field in fields(kind) if field.metadata.get("secret")] if is_dataclass(kind) else []
        plain: dict[Any, Any] = {}
        items: Any = raw.items() if isinstance(raw, dict) else enumerate(raw or ())
        for key, text in items:
            reads.clear()
            value = node[key] if OmegaConf.is_interpolation(node, key) or isinstance(text, (dict, list)) else text
            hidden = secret or key in secrets
            if reads:
                plain[key] = text
            else:
                plain[key] = written(value, hidden) if OmegaConf.is_config(value) else _portable(value, hidden)
        return plain if isinstance(raw, dict) else list(plain.values())

    OmegaConf.register_resolver("oc.env", record_read, replace=True)
    try:
        return written(config)
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)


def _portable(value: Any, secret: bool) -> Any:
    """Return a YAML scalar from which `load_config` reads the same value."""
    if secret and not isinstance(value, (bool, NoneType)):
        return MASK
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value)) if isinstance(value, (str, Path)) else value


def _describe(error: Exception) -> str:
    message = str(error).split("\n", 1)[0] if isinstance(error, OmegaConfBaseException) else str(error)
    if isinstance(error, yaml.YAMLError):
        return f"the value is not YAML: {message}"
    key = getattr(error, "full_key", None)
    return f"{message} (at '{key}')" if key and f"'{key}'" not in message else message


def _known_files(root: Path = CONFIGS) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml"))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean: '{close[0]}'?" if close else f" Available: {', '.join(known)}" if known else ""


def describe_schema(schema: type, prefix: str = "") -> str:
    """Return the help of a schema, one line `key: type = default  # docstring` per key; nested keys are dotted."""
    hints, docstrings = get_type_hints(schema), field_docstrings(schema)
    lines = []
    for item in fields(schema):
        key, kind = f"{prefix}{item.name}", hints[item.name]
        if is_dataclass(kind):
            lines.append(describe_schema(kind, f"{key}."))  # type: ignore[arg-type]
        else:
            name = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
            value = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
            default = "" if value is NO_DEFAULT or value == MISSING else f" = {value!r}"
            lines.append(f"{key}: {name.replace('typing.', '')}{default}  # {docstrings.get(item.name, '')}")
    return "\n".join(lines)


def field_docstrings(schema: type) -> dict[str, str]:
    """Return the docstring of each field, the string that follows it in the source; empty without source."""
    docstrings: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        try:
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        except (OSError, TypeError):  # a class of dataclasses.make_dataclass, or a built-in one
            continue
        for statement, following in pairwise(getattr(definition, "body", [])):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docstrings[statement.target.id] = str(following.value.value)
    return docstrings
