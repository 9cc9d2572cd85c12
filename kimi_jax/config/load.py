"""Turns a YAML file and overrides into a validated config, or into one line per mistake, all at once."""

import contextlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from kimi_jax.config.base import COLLECT, Config, nearest
from kimi_jax.config.yaml_files import apply_overrides, read_config_file, to_yaml
from kimi_jax.errors import UserError

type Path_ = tuple[str | int, ...]


def load[C: Config](path: str | Path, overrides: Sequence[str], schema: type[C]) -> C:
    """Reads, merges and validates one config.

    Args:
      path: a YAML file; its `base:` files lie under it.
      overrides: `path.to.key=value` strings, applied last.
      schema: the type of the whole file.

    Raises:
      UserError: every mistake in one line each, naming the file, the key, the value and the rule.
    """
    return validate(apply_overrides(read_config_file(path), overrides), schema, source=str(path))


def validate[C: Config](data: Mapping[str, Any], schema: type[C], *, source: str) -> C:
    """Validates plain data; `source` opens each line of the error."""
    try:
        config = schema.model_validate(data, context={COLLECT: True})
        problems = [*_broken_rules(config), *_truth_as_number(config, data)]
    except ValidationError as error:
        found = [(*_locate(schema, e["loc"]), e) for e in error.errors(include_url=False)]
        problems = [_describe(*one) for one in found]
        problems += _broken_rules(_partial(schema, data, frozenset(path for path, *_ in found), ()))
    if problems:
        raise UserError([f"{source}: {problem}" for problem in problems])
    return config


def dump(config: Config) -> str:
    """The whole config as YAML, defaults included; `load` reads it back to an equal config."""
    return to_yaml(config.model_dump(mode="json"))


def json_schema(schema: type[Config]) -> dict[str, Any]:
    """JSON Schema of a config file, for editors; nothing is required at any depth, since `base:` may give it."""
    document = schema.model_json_schema()
    document["properties"]["base"] = {"type": "string", "description": "Config file under this one, relative to it."}
    for definition in (document, *document.get("$defs", {}).values()):
        definition.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


# ------------------------------------------------------------------ rules between fields
def _broken_rules(value: Any, path: Path_ = ()) -> Iterator[str]:
    if isinstance(value, Config):
        with contextlib.suppress(AttributeError, TypeError):  # in a partial config: the rule reads a wrong entry
            for field, what in value.problems():
                yield f"{_dotted((*path, field))}: {what}"
        children: Mapping[Any, Any] = dict(value)
    elif isinstance(value, Mapping):
        children = value
    else:
        return
    for key, child in children.items():
        yield from _broken_rules(child, (*path, key))


def _truth_as_number(value: Any, data: Any, path: Path_ = ()) -> Iterator[str]:
    """`true` where a number belongs, of which pydantic makes 1."""
    if isinstance(data, bool) and not isinstance(value, bool):
        yield f"{_dotted(path)}: got {data}, must be a number"
    elif isinstance(data, Mapping):
        children = dict(value)
        for key, child in data.items():
            yield from _truth_as_number(children.get(key), child, (*path, key))
    elif isinstance(data, list):
        for i, (one, child) in enumerate(zip(value, data, strict=True)):
            yield from _truth_as_number(one, child, (*path, i))


_ABSENT = object()


def _partial(annotation: Any, data: Any, wrong: frozenset[Path_], path: Path_) -> Any:
    """Builds what can be built of invalid data: wrong entries are left out, so that rules that read them cannot run."""
    declared, annotation = annotation, _unwrap(annotation)
    if path in wrong and not isinstance(data, Mapping):
        return _ABSENT
    variants = {_kind(member): member for member in _variants(annotation)}
    if variants:
        annotation = variants.get(str(data.get("kind")) if isinstance(data, Mapping) else None)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(data, Mapping):
        known = {name: data[name] for name in annotation.model_fields if name in data}
        built = {n: _partial(annotation.model_fields[n].annotation, x, wrong, (*path, n)) for n, x in known.items()}
        config = annotation.model_construct(**built)
        for name in annotation.model_fields:
            if built.get(name) is _ABSENT:
                del config.__dict__[name]
        return config
    if typing.get_origin(annotation) is dict and isinstance(data, Mapping):
        value_type = typing.get_args(annotation)[1]
        return {key: _partial(value_type, value, wrong, (*path, key)) for key, value in data.items()}
    try:
        return TypeAdapter(declared).validate_python(data)
    except (ValidationError, PydanticSchemaGenerationError):
        return _ABSENT


# ------------------------------------------------------------------ messages
def _dotted(path: Path_) -> str:
    return ".".join(str(part) for part in path)


def _describe(path: Path_, owner: type[BaseModel] | None, annotation: Any, error: Mapping[str, Any]) -> str:
    name, got, context = _dotted(path) or "file", error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"{name}: unknown key; {nearest(path[-1], owner.model_fields if owner else ())}"
        case "missing":
            return f"{name}: is missing"
        case "union_tag_not_found":
            kinds = ", ".join(filter(None, map(_kind, _variants(_unwrap(annotation)))))
            return f"{name}: has no 'kind'; {name}.kind must be one of {kinds}"
        case "union_tag_invalid":
            tags = context["expected_tags"].replace("'", "").split(", ")
            return f"{name}.kind: got {context['tag']!r}; {nearest(context['tag'], tags)}"
        case "literal_error":
            options = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            return f"{name}: got {got!r}; {nearest(got, options)}"
        case "too_short":
            return f"{name}: got {_short(got)}, must have at least {context['min_length']}"
        case "tuple_type":
            return f"{name}: got {_short(got)}, must be a list"
        case "greater_than_equal":  # pydantic writes 1e-38 with all its zeros
            return f"{name}: got {_short(got)}, must be greater than or equal to {context['ge']:g}"
        case "string_pattern_mismatch":  # of a key, which pydantic marks behind it, or of a value
            return f"{name.removesuffix('.[key]')}: got {got!r}, must match {context['pattern']}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{name}: got {_short(got)}, must be a mapping of keys to values"
        case _:
            rule = error["msg"].removeprefix("Input should be ").removeprefix("Input should ").split(", unable")[0]
            return f"{name}: got {_short(got)}, must be {rule}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------ where pydantic's location lies in the file
def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation)[0] if field else None


def _locate(schema: type[BaseModel], location: Path_) -> tuple[Path_, type[BaseModel] | None, Any]:
    """Takes the variant names out of pydantic's location.

    Returns (path in the file, type that owns its end, annotation of its end).
    """
    annotation: Any = schema
    path: list[str | int] = []
    owner: type[BaseModel] | None = None
    for part in location:
        annotation = _unwrap(annotation)
        variants = {_kind(member): member for member in _variants(annotation)}
        if part in variants:
            annotation = variants[part]
            continue
        path.append(part)
        owner = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        annotation = _child(annotation, part)
    return tuple(path), owner, annotation


def _unwrap(annotation: Any) -> Any:
    while True:
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif origin in (types.UnionType, typing.Union):
            members = [m for m in typing.get_args(annotation) if m is not type(None)]
            if len(members) > 1:
                return annotation
            annotation = members[0]
        else:
            return annotation


def _variants(annotation: Any) -> list[type[BaseModel]]:
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return []
    return [m for m in map(_unwrap, typing.get_args(annotation)) if isinstance(m, type) and issubclass(m, BaseModel)]


def _child(annotation: Any, part: str | int) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(part)
        return field.annotation if field else None
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        return arguments[1]
    return arguments[0] if arguments else None
