"""YAML to nested frozen dataclasses and back.

Nothing is guessed: an unknown key, a key given twice or a value of another type is a `ConfigError` that names
the path, the value and what would be right. A schema is an *instance* whose fields are its defaults; a file
says only what differs. Supported field types: nested dataclasses, bool, int, float, str, Path, Literal, and
`X | None` of these.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

RawMapping = dict[str, Any]
T = TypeVar("T")


class ConfigError(ValueError):
    """The message is one line and names the path of the key at fault, such as `pools.decode.replicas`."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word: half of such a file would be ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice in the same section", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_mapping(text: str, *, source: str) -> RawMapping:
    """The mapping that a YAML document is; an empty document is an empty one. `source` names it in errors."""
    try:
        document = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ConfigError(f"{source}{line}: {e.problem}") from e
    except yaml.YAMLError as e:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(e).split())}") from e
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(
            f"{source}: the top level is {_describe(document)}, but it must be a mapping of settings"
        )
    return document


def set_override(raw: RawMapping, assignment: str) -> None:
    """Applies `pools.decode.replicas=2` to a raw mapping, in place. The value is YAML, as in a file."""
    dotted, separator, text = assignment.partition("=")
    keys = dotted.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"{assignment!r} is not an override: write KEY.PATH=VALUE, such as pools.decode.replicas=2"
        )
    section = raw
    for depth, key in enumerate(keys[:-1]):
        inner = section.get(key)
        if inner is None:
            inner = section[key] = {}
        if not isinstance(inner, dict):
            path = ".".join(keys[: depth + 1])
            raise ConfigError(f"{path} is {_describe(inner)}, so {dotted} cannot be set inside it")
        section = inner
    section[keys[-1]] = parse_mapping(f"value: {text}", source=f"the value of {dotted}")["value"]


def build(default: T, raw: object, *, directory: Path, path: str = "") -> T:
    """`default` with what `raw` says in its place. Relative `Path` values are taken from `directory`."""
    if raw is None:  # a section whose lines are all commented out
        return default
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{path or 'the top level'} is {_describe(raw)}, but it must be a mapping of settings"
        )
    assert dataclasses.is_dataclass(default)
    assert not isinstance(default, type)
    hints = typing.get_type_hints(type(default))
    changes: RawMapping = {}
    for key, value in raw.items():
        key_path = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(f"{key_path} is not a setting{_nearest(str(key), hints)}")
        changes[key] = _convert(value, hints[key], getattr(default, key), directory=directory, path=key_path)
    try:
        return dataclasses.replace(default, **changes)
    except ConfigError:
        raise
    except ValueError as e:  # from __post_init__, whose messages start with the field's name
        raise ConfigError(f"{path}.{e}" if path else str(e)) from e


def dump(config: object) -> str:
    """All settings as YAML; `build` of it with any defaults gives an equal object."""
    return yaml.safe_dump(_to_raw(config), sort_keys=False)


def _to_raw(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _to_raw(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value


def _convert(value: object, hint: Any, default: object, *, directory: Path, path: str) -> object:
    if dataclasses.is_dataclass(hint):
        return build(default, value, directory=directory, path=path)
    # A Literal's union is typing's own until Python 3.14.
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None and type(None) in typing.get_args(hint):
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is Literal:
        return _convert_choice(value, typing.get_args(hint), path=path)
    return _convert_scalar(value, hint, directory=directory, path=path)


def _convert_choice(value: object, choices: tuple[object, ...], *, path: str) -> object:
    if value in choices:
        return value
    listed = ", ".join(str(choice) for choice in choices)
    raise ConfigError(f"{path} is {_describe(value)}, but it must be one of: {listed}")


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _convert_scalar(value: object, hint: type, *, directory: Path, path: str) -> object:
    match value:
        case bool() if hint is bool:
            return value
        case bool():
            pass  # bool is an int to Python, not to a reader of the file
        case int() if hint is int:
            return value
        case int() | float() if hint is float and math.isfinite(value):
            return float(value)
        case str() if "\0" in value:
            pass  # no path and no argument of a process can hold it
        case str() if hint is str:
            return value
        case str() if hint is Path and value:
            return Path(directory, Path(value).expanduser())
    raise ConfigError(f"{path} is {_describe(value)}, but it must be {_EXPECTED[hint]}")


def _describe(value: object) -> str:
    match value:
        case None:
            return "empty"
        case bool():
            return f"{str(value).lower()} (a truth value)"
        case int() | float():
            return f"{value} (a number)"
        case str():
            return f"{value!r} (text)"
        case list():
            return "a list"
        case dict():
            return "a mapping"
    return f"{value!r} ({type(value).__name__})"


def _nearest(word: str, known: Iterable[object]) -> str:
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(names)}"
