"""Read and write study files: YAML, `--set`, local paths, and every problem told at once in plain words."""

import difflib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sae_transfer.config import Study
from sae_transfer.errors import StudyError

Loc = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)

# YAML 1.2's scalars. PyYAML's own (1.1) make `off` False, `010` 8, `1:30` 90, a date an object, and `5e-5` a string.
SCALARS = {
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (re.compile(r"[-+]?[0-9][0-9_]{0,99}"), list("-+0123456789")),
    "float": (re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), list("-+.0123456789")),
}

# A value for each required key, so that the rest of a faulty study can still be checked for contradictions.
STAND_INS: dict[str, dict[str, Any]] = {
    "pair": {"base": "-", "chat": "-"},
    "site": {"layer": 0, "hook": "resid_pre"},
    "tokens": {"dataset": "-"},
    "norm_scale": {"base": 1, "chat": 1},
    "external_saes": {"name": "stand-in", "trained_on": "base"},
}

# Keys that name something on disk, and whether they may name something on the hub instead.
PATH_KEYS = {
    ("pair", "base"): True,
    ("pair", "chat"): True,
    ("tokens", "dataset"): True,
    ("instruct", "dataset"): True,
    ("instruct", "rollouts"): False,
    ("external_saes", "path"): False,
}
PATH_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".npy")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars and without aliases, which would tie one key's override to another key."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias (*); write the value out instead", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_decimal(self, node: Any) -> int:
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which `_Loader` alone would read as a number."""


for _tag, (_pattern, _first) in SCALARS.items():
    _anchored = re.compile(rf"^(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def load_study(path: Path | str, overrides: Sequence[str] = ()) -> Study:
    """Read a study file; local paths in it become absolute, so that the study runs from anywhere.

    Args:
        path: The YAML file.
        overrides: `--set` arguments, KEY=VALUE: a dotted key, a YAML value; a key below `saes` goes into each entry.

    Returns:
        The study, free of contradictions.

    Raises:
        StudyError: Everything wrong with file and overrides, a line each.
    """
    path = Path(path)
    raw, problems = read_mapping(path)
    for override in overrides:
        problems += _apply(override, raw)
    problems += _locate(raw, path.absolute().parent)
    return _checked(raw, str(path), problems, overrides, default_name=path.stem)


def parse_study_file(path: Path | str) -> Study:
    """Read a study file as it stands, wherever its paths lead: a run directory's own, maybe from another machine.

    Args:
        path: The YAML file.

    Returns:
        The study.

    Raises:
        StudyError: Everything wrong with it, a line each.
    """
    path = Path(path)
    raw, problems = read_mapping(path)
    return _checked(raw, str(path), problems, default_name=path.stem)


def parse_study(mapping: dict[str, Any], where: str) -> Study:
    """Make a study of a mapping as YAML gives it.

    Args:
        mapping: Keys and values; left unchanged.
        where: What to call their source in messages.

    Returns:
        The study.

    Raises:
        StudyError: Everything wrong with it, a line each.
    """
    return _checked(mapping, where, [])


def parse_other(
    mapping: dict[str, Any], model: type[M], where: str, problems: Sequence[tuple[Loc, str]], remedy: str
) -> M:
    """Make something else than a study of a mapping, with problems worded as a study's.

    Args:
        mapping: Keys and values as YAML gives them; left unchanged.
        model: What it describes.
        where: What to call their source in messages.
        problems: Found already, each with its place.
        remedy: What to try once they are mended.

    Returns:
        It.

    Raises:
        StudyError: Everything wrong with it, a line each.
    """
    given, parsed, found = _copied(mapping), None, list(problems)
    try:
        parsed = model.model_validate(given)
    except ValidationError as error:
        found += [(fault["loc"], _wording(fault, model)) for fault in error.errors(include_url=False)]
    if parsed is None or found:
        raise StudyError("\n".join(dict.fromkeys(_line(*fault, given, where, {}) for fault in found)), remedy)
    return parsed


def resolved_yaml(study: Study) -> str:
    """The study as YAML with every default written out; it loads back to an equal study."""
    dump = study.model_dump(mode="json")
    for key in ("saes", "external_saes"):
        if dump[key] is not None:
            dump[key] = [{name: value for name, value in entry.items() if value is not None} for entry in dump[key]]
    return f"# The study as resolved, with all defaults; running this file reproduces the run.\n{as_yaml(dump)}"


def as_yaml(mapping: dict[str, Any]) -> str:
    """A mapping of JSON values as YAML that `read_mapping` reads back as it was."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def read_mapping(path: Path) -> tuple[dict[str, Any], list[tuple[Loc, str]]]:
    """Read a YAML file that holds one mapping.

    Args:
        path: The file.

    Returns:
        The mapping, and the keys it gives twice, each with a message.

    Raises:
        StudyError: It cannot be read, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror or error}); expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: is not UTF-8 text; expected a YAML file") from error
    try:
        value, repeated = _read_yaml(text)
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: {_yaml_problem(error)}") from error
    if not isinstance(value, dict):
        raise StudyError(f"{path}: got {_shown(value)}; expected keys and values, such as `site: {{layer: 13}}`")
    return value, repeated


def set_key(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place; absent sections on the way are made, and a list on the way is entered at each entry.

    Args:
        mapping: A study as YAML gives it.
        key: Such as `evaluate.tokens` or `saes.widths`.
        value: Any YAML value.

    Raises:
        StudyError: A value on the way holds no keys, or the key is malformed.
    """
    *sections, last = key.split(".")
    if not all((*sections, last)):
        raise StudyError(f"{key}: got an empty part; expected a dotted key, such as evaluate.tokens")
    nodes = [mapping]
    for section in sections:
        below: list[Any] = []
        for node in nodes:
            if node.get(section) is None:
                node[section] = {}
            below += node[section] if isinstance(node[section], list) else [node[section]]
        if not below or not all(isinstance(node, dict) for node in below):
            raise StudyError(f"{key}: {section} holds no keys; expected a mapping there")
        nodes = below
    for node in nodes:
        node[last] = value


def _apply(override: str, raw: dict[str, Any]) -> list[tuple[Loc, str]]:
    """Apply one `--set`; what it says wrongly comes back as a problem without a place."""
    key, equals, text = override.partition("=")
    if not equals:
        return [((), f"--set {override}: expected KEY=VALUE, such as evaluate.tokens=8192")]
    try:
        value, repeated = _read_yaml(text)
        if repeated:
            return [((), f"--set {override}: {repeated[0][1]}")]
        set_key(raw, key.strip(), value)
    except yaml.YAMLError as error:
        return [((), f"--set {override}: {_yaml_problem(error)}")]
    except StudyError as error:
        return [((), f"--set {override}: {error}")]
    return []


def _read_yaml(text: str) -> tuple[Any, list[tuple[Loc, str]]]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        return loader.construct_document(node), list(_repeated_keys(node, ()))
    finally:
        loader.dispose()


def _repeated_keys(node: yaml.Node, loc: Loc) -> Iterator[tuple[Loc, str]]:
    """YAML libraries let the last of equal keys win without a word."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(item, (*loc, index))
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                yield (*loc, name), f"given twice, on lines {lines[name]} and {line}; expected once"
            lines.setdefault(name, line)
            yield from _repeated_keys(value, (*loc, name))


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    said = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    return f"{place}not readable as YAML: {', '.join(said) or error}"


def _locate(raw: dict[str, Any], beside: Path) -> Iterator[tuple[Loc, str]]:
    """Replace local paths by absolute ones, in place."""
    for (section, key), may_be_hub_id in PATH_KEYS.items():
        content = raw.get(section)
        for index, entry in enumerate(content if isinstance(content, list) else [content]):
            if not isinstance(entry, dict):
                continue
            text = entry.get(key)
            if not isinstance(text, str) or not text or text.startswith("demo:"):
                continue
            # os.path, because pathlib raises on names too long for a file.
            places = dict.fromkeys(os.path.abspath(place / os.path.expanduser(text)) for place in (beside, Path.cwd()))
            found = [place for place in places if os.path.exists(place)]
            if found:
                entry[key] = found[0]
            elif not may_be_hub_id or text.startswith(("./", "../", "/", "~")) or text.endswith(PATH_SUFFIXES):
                loc = (section, index, key) if isinstance(content, list) else (section, key)
                yield loc, f"got {_shown(text)}; expected a file or directory, found neither {' nor '.join(places)}"


def _checked(
    raw: dict[str, Any],
    where: str,
    problems: list[tuple[Loc, str]],
    overrides: Sequence[str] = (),
    default_name: str | None = None,
) -> Study:
    """Validate, collect contradictions even where fields are wrong, and raise everything as one error."""
    # An empty section, as is left when all its lines are commented out, is an absent one.
    given = {key: value for key, value in _copied(raw).items() if value is not None}
    if default_name is not None:
        given.setdefault("name", default_name)
    study, faults = _validated(given)
    problems = problems + [(error["loc"], _wording(error)) for error in faults]
    failed = [loc for loc, _ in problems]
    for message, keys in study.contradictions() if study else ():
        locs = [tuple(int(part) if part.isdigit() else part for part in key.split(".")) for key in keys]
        if not any(_rests_on(loc, fault) for loc in locs for fault in failed):
            problems.append((locs[0], message))
    if study is None or problems:
        set_keys = {tuple(text.partition("=")[0].strip().split(".")): text for text in overrides}
        lines = [_line(loc, message, given, where, set_keys) for loc, message in problems]
        raise StudyError("\n".join(dict.fromkeys(lines)), f"mend this, then: sae-transfer check {where}")
    return study


def _validated(given: dict[str, Any]) -> tuple[Study | None, list[ErrorDetails]]:
    """The study and what is wrong with its fields; where something is, the study has defaults and stand-ins there."""
    faults: list[ErrorDetails] = []
    patched = given
    for attempt in range(4):  # A wrong required key takes two rounds to mend: away with it, then a stand-in.
        try:
            return Study.model_validate(patched), faults
        except ValidationError as error:
            errors = error.errors(include_url=False)
            faults = faults if attempt else errors
            patched = _copied(patched)
            for fault in errors:
                _mend(patched, fault)
    return None, faults


def _mend(raw: dict[str, Any], fault: ErrorDetails) -> None:
    """Take the key away that is wrong, or give the one that is missing."""
    loc = fault["loc"]
    *way, key = loc[:-1] if isinstance(loc[-1], int) else loc
    node: Any = raw
    for part in way:
        # Where one value was given for a list there is no index to follow.
        if isinstance(part, str):
            node = node.get(part, {})
        elif isinstance(node, list):
            node = node[part]
    node.pop(key, None)
    if fault["type"] == "missing":
        stand_ins = STAND_INS[str(loc[0])]
        node[key] = dict(stand_ins) if len(loc) == 1 else stand_ins[str(key)]


def _copied(value: Any) -> Any:
    """A deep copy whose keys are text, as they stand in the file."""
    if isinstance(value, dict):
        return {str(key): _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _rests_on(loc: Loc, fault: Loc) -> bool:
    """Whether a key's value is unknown because of a fault: in it, in what holds it, or in an entry of its list."""
    held = fault == loc[: len(fault)]
    entry = len(fault) == len(loc) + 1 and fault[: len(loc)] == loc and isinstance(fault[-1], int)
    return bool(fault) and (held or entry)


def _line(loc: Loc, message: str, given: dict[str, Any], where: str, set_keys: dict[tuple[str, ...], str]) -> str:
    """One problem, under the file's name and key or under the `--set` that brought it."""
    if not loc:
        return message if message.startswith("--set ") else f"{where}: {message}"
    shown = ""
    node: Any = given
    for part in loc:
        if isinstance(part, int):
            # A mapping or a single value given for a list has no index in the file.
            shown += f"[{part}]" if isinstance(node, list) else ""
            node = node[part] if isinstance(node, list) and part < len(node) else node
        else:
            shown += f".{part}" if shown else part
            node = node.get(part) if isinstance(node, dict) else None
    names = tuple(str(part) for part in loc if not isinstance(part, int))
    for length in range(len(names), 0, -1):
        if names[:length] in set_keys:
            return f"--set {set_keys[names[:length]]}: {shown}: {message}"
    return f"{where}: {shown}: {message}"


def _wording(error: ErrorDetails, root: type[BaseModel] = Study) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_suggestion(error['loc'], root)}"
    if kind == "missing":
        info = _field(error["loc"], root)
        return f"missing; expected: {info.description if info else 'a value'}"
    expected = {
        "study": context.get("expected"),
        "literal_error": f"one of {str(context.get('expected', '')).replace(chr(39), '')}",
        "greater_than": f"a number above {context.get('gt')}",
        "greater_than_equal": f"a number of at least {context.get('ge')}",
        "less_than_equal": f"a number of at most {context.get('le')}",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text; a number or true/false is text in quotes",
        "string_too_short": "text that is not empty",
        "too_short": "at least one entry",
        "tuple_type": "a list",
        "model_type": "a mapping of keys to values",
        "dict_type": "a mapping of keys to values",
        "int_parsing": "a whole number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "int_parsing_size": "a smaller whole number",
        "float_parsing": "a number",
        "float_type": "a number",
    }.get(kind)
    return f"got {_shown(error['input'])}; expected {expected or error['msg']}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(_shown, value))}]"
    else:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(loc: Loc, root: type[BaseModel]) -> str:
    """The key that an unknown one may have meant: a similar one beside it, else the same one in another section."""
    name = str(loc[-1])
    beside = list(_model(loc[:-1], root).model_fields)
    close = difflib.get_close_matches(name, beside, n=1)
    elsewhere = [
        f"{section}.{name}"
        for section in root.model_fields
        if name in getattr(_model((section,), root), "model_fields", {})
    ]
    if close or elsewhere:
        return f"did you mean {(close or elsewhere)[0]}?"
    return f"expected one of {', '.join(beside)}"


def _model(loc: Loc, root: type[BaseModel]) -> type[BaseModel]:
    """The section that a place belongs to; the root itself for a key that is no section."""
    model = root
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = next(_models(model.model_fields[part].annotation), model)
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _field(loc: Loc, root: type[BaseModel]) -> FieldInfo | None:
    return _model(loc[:-1], root).model_fields.get(str(loc[-1]))
