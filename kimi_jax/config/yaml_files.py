"""How experiment files are read: YAML, `base:` files underneath, and `a.b=c` overrides on top."""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from kimi_jax.errors import UserError

BASE_KEY = "base"


_MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`


class _Loader(yaml.SafeLoader):
    """YAML as people expect it, and a key given twice is an error.

    Numbers and booleans are those of YAML 1.2: 1e-3 is a number; `on`, 1:30 and 2026-11-22 are words.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or `_Loader` would read as something else."""


_FLOAT = r"[-+]?((\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
for _name, _pattern, _first in (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+)$", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<$", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), _first)


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as text that `parse_yaml` reads back to the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def parse_yaml(text: str, source: str) -> Any:
    """Parses one YAML document; a syntax error is a one-line `UserError` with its line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise UserError(f"{where}: {error.problem or 'is not YAML'}") from None
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # the latter of wrong `!!bool x`
        raise UserError(f"{source}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{source}: is nested too deeply") from None


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file and everything under its `base:`, which is relative to the file.

    Raises:
      UserError: a file is missing or not YAML, its top level is not a mapping, or bases form a circle.
    """
    return _read(Path(path), ())


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads one YAML file whose top level is a mapping, without looking at its `base:`.

    Raises:
      UserError: it is missing, not YAML, or something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        what = "empty" if data is None else f"{type(data).__name__} at top level"
        raise UserError(f"{path}: is {what}, must be a mapping of keys to values")
    return data


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise UserError(f"{path}: base files form a circle: {' -> '.join(p.name for p in (*chain, path))}")
    data = read_mapping(path)
    base = data.pop(BASE_KEY, None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: base: got {base!r}, must be the path of another config file")
    return merge(_read(path.parent / base, (*chain, path.resolve())), data)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lays `over` on `under`: mappings merge key by key, anything else replaces.

    A mapping whose `kind` differs from the one under it replaces it whole: the fields of one variant mean nothing to
    another.
    """
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        mergeable = isinstance(value, Mapping) and isinstance(below, Mapping)
        same_kind = mergeable and value.get("kind", below.get("kind")) == below.get("kind")
        merged[key] = merge(below, value) if same_kind else value
    return merged


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies `path.to.key=value` strings in order; the value is YAML and replaces what stands at the path.

    Raises:
      UserError: every override that is not of that form, one line each.
    """
    problems = []
    result = dict(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"override {override!r}: must be of the form path.to.key=value")
            continue
        try:
            result = with_value(result, keys, parse_yaml(text, f"override {override!r}"))
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    return result


def with_value(data: Any, keys: Sequence[str], value: Any) -> Any:
    """A copy of nested mappings in which `value` replaces what stands at the path `keys`."""
    if not keys:
        return value
    below = data if isinstance(data, Mapping) else {}
    return {**below, keys[0]: with_value(below.get(keys[0]), keys[1:], value)}
