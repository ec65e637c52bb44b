"""Settings from a YAML file and `key.sub=value` overrides; a mistake is one line that names the nearest right key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from deltal.config.run import RunConfig
from deltal.errors import ConfigError


class OneOfEachKey(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error: the first would vanish without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Raises yaml's ConstructorError with the place of the second key."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated settings of a file. Raises ConfigError in one line: missing file, bad YAML, wrong key or value."""
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path("configs").glob("*.yaml")], n=1)
        raise ConfigError(f"no configuration file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        loaded = yaml.load(file.read_text(encoding="utf-8"), OneOfEachKey)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}: this is no valid YAML: {why}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values")
    return resolve(loaded, overrides, where=path)


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "configuration") -> RunConfig:
    """Validated settings from plain values. Raises ConfigError in one line."""
    try:
        merged = _copied(values)
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, or it refers to itself") from None
    # Kinds first: what is said about a choice is about the one that is made in the end.
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].strip().endswith(".kind")):
        _override(merged, override)
    try:
        json.dumps(merged, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: a value holds half a character (a lone surrogate)") from None
    _name_default_kinds(RunConfig, merged)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_misplaced(error, merged) or _explain(error)}") from None


def explained(config: BaseModel, prefix: str = "") -> Iterable[tuple[str, Any, str]]:
    """(dotted key, value, what it means) of every setting, unions resolved to what was chosen."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        key = f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from explained(value, f"{key}.")
        else:
            yield key, value, field.description or (type(config).__doc__ or "").strip().splitlines()[0]


def _name_default_kinds(settings: type[BaseModel], values: Any) -> None:
    """A choice that is set in part and names no `kind` is the default one, where there is a default."""
    for name, field in settings.model_fields.items():
        part = values.get(name) if isinstance(values, dict) else None
        if not isinstance(part, dict):
            continue
        choices = _models(field.annotation)
        if len(choices) > 1 and "kind" not in part and not field.is_required():
            default = field.get_default(call_default_factory=True)
            if default is not None:
                part["kind"] = default.kind
        for choice in choices:
            if len(choices) == 1 or _tag(choice) == part.get("kind"):
                _name_default_kinds(choice, part)


def _copied(values: Any) -> Any:
    return {key: _copied(value) for key, value in values.items()} if isinstance(values, Mapping) else values


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r} must look like learner.learning_rate=1e-5")
    try:
        parsed = yaml.load(value, OneOfEachKey)
    except yaml.YAMLError:
        parsed = value
    if parsed == value.strip():  # Left as it was typed, and not in quotes.
        parsed = _number(parsed)
    for part in parts[:-1]:
        inner = values.setdefault(part, {})
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {text!r}: {part} is a plain value and has no {parts[-1]}")
        values = inner
    if parts[-1] == "kind":
        for name in _only_of_former_kind(parts[:-1], values.get("kind"), parsed):
            values.pop(name, None)
    values[parts[-1]] = parsed


def _only_of_former_kind(place: Sequence[str], former: Any, chosen: Any) -> set[str]:
    """Settings that end with a choice's former kind, e.g. `alpha` when `delta_l` becomes `grpo`."""
    before, after = _walk([*place, str(former)])[1], _walk([*place, str(chosen)])[1]
    if before is None or after is None or (_tag(before), _tag(after)) != (former, chosen):
        return set()
    return set(before.model_fields) - set(after.model_fields)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> str:
    """The first mistake of a validation, with its place and, for an unknown key, the nearest valid one."""
    mistakes = error.errors()
    # A misspelt required key is missing as well; the misspelling is what helps.
    first = next((mistake for mistake in mistakes if mistake["type"] == "extra_forbidden"), mistakes[0])
    place = [str(part) for part in first["loc"]]
    keys, settings = _walk(place)
    dotted = ".".join(keys)
    if first["type"] == "extra_forbidden":
        valid = sorted(settings.model_fields) if settings else []
        near = difflib.get_close_matches(keys[-1], valid, n=1, cutoff=0.0)
        return f"unknown key {dotted}" + (f"; did you mean {'.'.join([*keys[:-1], near[0]])}?" if near else "")
    if first["type"] == "missing":
        return f"{dotted} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_not_found":
        field = settings.model_fields.get(keys[-1]) if settings else None
        choices = [_tag(model) for model in _models(field.annotation)] if field else []
        message = f"`kind` is missing: name one of {', '.join(filter(None, choices))}"
    if first["type"] == "union_tag_invalid":
        tag, known = first["ctx"]["tag"], [kind.strip(" '") for kind in first["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(tag, known, n=1, cutoff=0.0)
        return f"{dotted}.kind = {tag!r} is none of {', '.join(known)}; the nearest is {near[0]}"
    given = first["input"]
    shown = "" if isinstance(given, (dict, BaseModel)) else f" (got {given!r})"
    return f"{dotted}: {message}{shown}" if dotted else message


def _misplaced(error: ValidationError, values: Mapping[str, Any]) -> str | None:
    """What is said of a key at top level that belongs into a section: most often its line lacks its indentation."""
    for mistake in error.errors():
        key = str(mistake["loc"][0]) if mistake["loc"] else ""
        if mistake["type"] != "extra_forbidden" or len(mistake["loc"]) > 1:
            continue
        sections = [path for path in _sections(RunConfig) if key in _keys_of(path)]
        # A section that was opened and left empty is the one whose lines slid out.
        empty = [path for path in sections if path in values and values[path] is None]
        if sections:
            likely = (empty or sections)[:5]
            return (
                f"the key {key} stands at top level; it belongs below {', '.join(likely)}: indent its line there (on "
                f"the command line: {likely[0]}.{key}=…)"
            )
    return None


def _sections(settings: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """Dotted names of all sections, those of the outermost level first."""
    inner = {name: _models(field.annotation) for name, field in settings.model_fields.items()}
    yield from (f"{prefix}{name}" for name, choices in inner.items() if choices)
    for name, choices in inner.items():
        for choice in choices:
            yield from _sections(choice, f"{prefix}{name}.")


def _keys_of(section: str) -> set[str]:
    choices: list[type[BaseModel]] = [RunConfig]
    for name in section.split("."):
        fields = [choice.model_fields[name] for choice in choices if name in choice.model_fields]
        choices = [model for field in fields for model in _models(field.annotation)]
    return {key for choice in choices for key in choice.model_fields}


def _walk(place: Sequence[str]) -> tuple[list[str], type[BaseModel] | None]:
    """The dotted key of an error's place, union tags left out, and the settings class its last key stands in."""
    current: list[type[BaseModel]] = [RunConfig]
    keys: list[str] = []
    inside: type[BaseModel] | None = RunConfig
    for part in place:
        tagged = [model for model in current if _tag(model) == part]
        if tagged and len(current) > 1:
            current, inside = tagged, tagged[0]
            continue
        keys.append(part)
        inside = current[0] if current else None
        field = inside.model_fields.get(part) if inside else None
        current = _models(field.annotation) if field else []
    return keys, inside


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return str(field.default) if field else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
