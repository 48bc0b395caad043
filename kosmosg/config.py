"""Configuration by one rule: every argument is a YAML file or `key=value`; later wins.

- A YAML file may start from others: `extends: [model/toyland, data/captions]`. A name is looked for under the nearest
  folder called `configs` above the file, then under the project's `configs/`, with or without `.yaml`; a name that
  begins with `./` or `../` is taken from the file's own folder. What is extended is read first, so the file wins.
- A run folder (it holds the resolved `config.yaml`) is an argument like its YAML.
- Relative paths *in* a configuration are relative to the working directory, as on a command line.
- In `key=value`, the value is read as YAML; `null` and the string `None` (which W&B sweeps pass) mean None.
- `${divide:${model.mllm.layers},2}` is a whole share of another value, for files that fit every size of the model.

Schemas are dataclasses that stand beside what they configure; `__post_init__` checks values.
"""

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

Schema = TypeVar("Schema")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RUN_CONFIG = "config.yaml"
SUFFIXES = (".yaml", ".yml")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the argument, the key and what is allowed."""


@dataclass(frozen=True)
class Layer:
    """One argument's (or extended file's) values, and the name to blame for them."""

    origin: str
    values: DictConfig


def load_config(arguments: Sequence[str], schema: type[Schema] | Callable[[dict[str, Any]], type[Schema]]) -> Schema:
    """Merge `arguments` in order into an instance of `schema`.

    `schema` is a dataclass, or a function that picks one from the merged plain values (`train.py` picks by `stage`).
    Raises ConfigError: unknown argument or file, circular `extends`, unknown key, value of a wrong type or range.
    """
    OmegaConf.register_resolver("divide", divide, replace=True)
    layers = [layer for argument in arguments for layer in read_argument(argument)]
    if not isinstance(schema, type):
        schema = schema(_plain_values(layers))
    config = OmegaConf.structured(schema)
    for layer in layers:
        try:
            config = OmegaConf.merge(config, layer.values)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{layer.origin}: {_describe(error)}") from error
    try:
        return OmegaConf.to_object(config)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        key = error.full_key or error.key
        raise ConfigError(f"'{key}' has no value; set it in a YAML file or as {key}=…") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_describe(error)) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def divide(number: int, divisor: int) -> int:
    """`${divide:number,divisor}`. Raises ValueError: the quotient is not whole."""
    if not divisor or number % divisor:
        raise ValueError(f"{number} cannot be divided by {divisor} without a remainder")
    return number // divisor


def save_config(config: Any, file: Path) -> None:
    """Write a schema instance as resolved YAML; the file is itself a valid argument. Atomic."""
    values = (
        config
        if isinstance(config, dict)
        else OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    )
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(yaml.safe_dump(_portable(values), sort_keys=False, allow_unicode=True))
    beside.replace(file)


def read_argument(argument: str) -> list[Layer]:
    """The layers of one argument, those it extends first. Raises ConfigError."""
    path = Path(argument)
    if path.is_dir():
        if not (path / RUN_CONFIG).is_file():
            raise ConfigError(f"'{argument}' is a folder without {RUN_CONFIG}, so it is no run folder")
        return _read_file(path / RUN_CONFIG, ())
    if path.suffix in SUFFIXES:
        if not path.is_file():
            known = [str(CONFIGS.relative_to(CONFIGS.parent) / name) for name in _known_files()]
            raise ConfigError(f"there is no configuration file '{argument}'.{_nearest(argument, known)}")
        return _read_file(path, ())
    key, equals, value = argument.partition("=")
    if not equals:
        raise ConfigError(
            f"argument '{argument}' is neither a YAML file, a run folder nor key=value."
            + _nearest(argument, [*_known_files(), *(name.removesuffix(".yaml") for name in _known_files())])
        )
    if key.startswith("-"):
        raise ConfigError(f"argument '{argument}': write {key.lstrip('-')}={value}, without dashes")
    if not all(key.split(".")) or key == "extends":
        raise ConfigError(f"argument '{argument}': '{key}' is no key (files are extended in YAML only)")
    return [Layer(argument, _key_value(argument, key, value))]


def _key_value(argument: str, key: str, value: str) -> DictConfig:
    try:
        node = OmegaConf.from_dotlist([argument])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"argument '{argument}': the value {value!r} is not YAML: {error}") from error
    values = OmegaConf.to_container(node)
    if value == "":
        raise ConfigError(f"argument '{argument}' has no value; write {key}=null for none, {key}=\"''\" for empty text")
    return OmegaConf.create(_without_none_strings(values))


def _read_file(file: Path, above: tuple[Path, ...]) -> list[Layer]:
    resolved = file.resolve()
    if resolved in above:
        chain = " → ".join(path.name for path in (*above[above.index(resolved) :], resolved))
        raise ConfigError(f"{file}: 'extends' runs in a circle: {chain}")
    try:
        values = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{file} holds {type(values).__name__} at its top; a configuration is a mapping")
    bases = values.pop("extends", None) or []
    layers: list[Layer] = []
    for base in [bases] if isinstance(bases, str) else bases:
        layers += _read_file(_find_base(str(base), resolved), (*above, resolved))
    return [*layers, Layer(str(file), values)]


def _find_base(name: str, file: Path) -> Path:
    roots = [*[folder for folder in file.parents if folder.name == "configs"][:1], CONFIGS]
    if name.startswith(("./", "../")):
        roots = [file.parent]
    with_suffix = name if name.endswith(SUFFIXES) else f"{name}.yaml"
    for root in roots:
        if (root / with_suffix).is_file():
            return root / with_suffix
    known = [known.removesuffix(".yaml") for known in _known_files(roots[0])]
    places = " and ".join(str(root) for root in dict.fromkeys(roots))
    raise ConfigError(f"{file}: extends '{name}', but there is no {with_suffix} under {places}.{_nearest(name, known)}")


def _plain_values(layers: list[Layer]) -> dict[str, Any]:
    try:
        merged = OmegaConf.unsafe_merge({}, *(layer.values for layer in layers))
    except OmegaConfBaseException as error:
        raise ConfigError(_describe(error)) from error
    return OmegaConf.to_container(merged)  # type: ignore[return-value]


def _describe(error: OmegaConfBaseException) -> str:
    message = str(error).split("\n", 1)[0]
    key = getattr(error, "full_key", None)
    return f"{message} (at '{key}')" if key and f"'{key}'" not in message else message


def _known_files(root: Path = CONFIGS) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml"))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean: '{close[0]}'?" if close else f" There are: {', '.join(known)}" if known else ""


def _without_none_strings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none_strings(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_none_strings(item) for item in value]
    return None if value == "None" else value


def _portable(value: Any) -> Any:
    """Plain YAML types alone, so that the safe loader reads what is written."""
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_portable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def written_config(arguments, schema):
    import json
    from dataclasses import asdict

    return json.loads(json.dumps(asdict(load_config(arguments, schema))))


def describe_schema(schema):
    from kosmosg.config_help import describe_schema

    return describe_schema(schema)
