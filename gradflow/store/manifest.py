"""`run.json`: what a run says about itself, as text, as a dict with defaults, and as records. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

from gradflow.errors import RunError, SchemaVersionError
from gradflow.records import Branch, Layer, Parameter, Stream
from gradflow.schema import SCHEMA_VERSION

Meta = dict[str, Any]
Record = TypeVar("Record")

FILE = "run.json"

DEFAULTS: Meta = {
    "schema_version": SCHEMA_VERSION,
    "run_id": "",
    "gradflow": "",
    "torch": "",
    "model": "",
    "world_size": 1,
    "precision": "",
    "branches": [],
    "streams": [],
    "layers": [],
    "parameters": [],
    "optimizers": [],
    "config": {},
    "started": "",
    "stopped": None,
    "problems": [],
}


def dump(meta: Mapping[str, Any]) -> bytes:
    """Return `meta` as strict JSON, the schema version included; a NaN or infinity, which JSON lacks, becomes null."""
    text = json.dumps(plain({"schema_version": SCHEMA_VERSION, **meta}), ensure_ascii=False, indent=1)
    return text.encode("utf-8", errors="replace")


def plain(value: Any) -> Any:
    """Nested value as JSON knows it: records as objects, non-finite floats as null, anything unknown as its text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    return _number(value) if isinstance(value, Real) else str(value)


def _number(value: Real) -> int | float | None:
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def parse(data: bytes, where: str) -> Meta:
    """Return the content of the run.json at `where`.

    Raises:
        RunError: It is no JSON object, or its version is no number.
        SchemaVersionError: A newer gradflow wrote it.
    """
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"expected JSON in {where}, got text that does not parse ({error}); "
            "restore the file from a copy, or record the run again"
        ) from error
    if not isinstance(meta, dict):
        raise RunError(f"expected a JSON object in {where}, got {type(meta).__name__}; is this a gradflow run?")
    version = meta.get("schema_version", SCHEMA_VERSION)
    if type(version) is not int:
        raise RunError(
            f"expected a whole number as schema_version in {where}, got {version!r}; is this a gradflow run?"
        )
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"expected schema version {SCHEMA_VERSION} or older in {where}, got version {version}, "
            f"written by gradflow {meta.get('gradflow', '(unknown)')}; upgrade gradflow to read this run"
        )
    return meta


def complete(meta: Mapping[str, Any], problems: list[str]) -> Meta:
    """Return `meta` with defaults for what is missing or of the wrong kind; what was replaced goes into `problems`."""
    full = {**DEFAULTS, **meta}
    for key in ("branches", "streams", "layers", "parameters", "optimizers", "problems"):
        if not isinstance(full[key], (list, tuple)):
            problems.append(f"{FILE}: {key} should be a list, got {type(full[key]).__name__}; read as empty")
            full[key] = []
    for key in ("optimizers", "problems"):
        whole = [entry for entry in full[key] if isinstance(entry, Mapping)]
        if len(whole) < len(full[key]):
            problems.append(f"{FILE}: {len(full[key]) - len(whole)} of {key} left out: not objects")
            full[key] = whole
    full["optimizers"] = [{**entry, "groups": _objects(entry.get("groups"))} for entry in full["optimizers"]]
    if not isinstance(full["config"], Mapping):
        problems.append(f"{FILE}: config should be an object, got {type(full['config']).__name__}; read as empty")
        full["config"] = {}
    if type(full["world_size"]) is not int or full["world_size"] < 1:
        problems.append(f"{FILE}: world_size should be 1 or more, got {full['world_size']!r}; read as 1")
        full["world_size"] = 1
    return full


def _objects(entries: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, (list, tuple)) else []


def branches(meta: Meta, problems: list[str]) -> list[Branch]:
    """Return the branches of a run in order of execution."""
    return _records("branches", meta, problems, _branch)


def layers(meta: Meta, problems: list[str]) -> list[Layer]:
    """Return the layers of a run in order of execution."""
    return _records("layers", meta, problems, _layer)


def streams(meta: Meta, problems: list[str]) -> list[Stream]:
    """Return the streams and trunks of a run."""
    return _records("streams", meta, problems, _stream)


def parameters(meta: Meta, problems: list[str]) -> list[Parameter]:
    """Return the parameters of a run in the model's order."""
    return _records("parameters", meta, problems, _parameter)


def _records(key: str, meta: Meta, problems: list[str], build: Callable[[Mapping[str, Any]], Record]) -> list[Record]:
    """Build a record an entry; an entry that does not fit is left out and named."""
    records = []
    for position, entry in enumerate(meta[key]):
        try:
            if not isinstance(entry, Mapping):
                raise TypeError(f"should be an object, got {type(entry).__name__}")  # noqa: TRY301
            records.append(build(entry))
        except (TypeError, ValueError, KeyError) as error:
            problems.append(f"{FILE}: {key}[{position}] left out: {error}")
    return records


def _branch(entry: Mapping[str, Any]) -> Branch:
    name = _get(entry, "name", str)
    return Branch(
        name=name,
        join=_get(entry, "join", str, name),
        module=_get(entry, "module", str, ""),
        kind="projection" if entry.get("kind") == "projection" else "identity",
        occurrence=_get(entry, "occurrence", int, 0),
        depth=_get(entry, "depth", int, 0),
        placement=entry["placement"] if entry.get("placement") in ("pre-norm", "post-norm") else "none",
        stream=_get(entry, "stream", str, ""),
    )


def _layer(entry: Mapping[str, Any]) -> Layer:
    name = _get(entry, "name", str)
    return Layer(
        name=name,
        module=_get(entry, "module", str, name),
        kind=_get(entry, "kind", str, ""),
        occurrence=_get(entry, "occurrence", int, 0),
        depth=_get(entry, "depth", int, 0),
    )


def _stream(entry: Mapping[str, Any]) -> Stream:
    return Stream(
        name=_get(entry, "name", str),
        kind="trunk" if entry.get("kind") == "trunk" else "stream",
        points=tuple(_all(_get(entry, "points", Sequence, ()), str)),
        nodes=tuple(_all(_get(entry, "nodes", Sequence, ()), int)),
        exact=_get(entry, "exact", bool, default=False),
        segments=tuple(_all(_get(entry, "segments", Sequence, ()), int)),
    )


def _parameter(entry: Mapping[str, Any]) -> Parameter:
    group = entry.get("group")
    return Parameter(
        name=_get(entry, "name", str),
        shape=tuple(_all(_get(entry, "shape", Sequence, ()), int)),
        dtype=_get(entry, "dtype", str, ""),
        requires_grad=_get(entry, "requires_grad", bool, default=True),
        group=None if group is None else str(group),
    )


def _get(entry: Mapping[str, Any], key: str, kind: type[Any], default: Any = None) -> Any:
    """Return `entry[key]`, checked; `default` where it is missing, unless that is None: then it is needed."""
    if key not in entry and default is not None:
        return default
    value = entry.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{key} should be {kind.__name__}, got {value!r:.80}")
    return value


def _all(values: Sequence[Any], kind: type[Record]) -> Sequence[Record]:
    if isinstance(values, str) or not all(isinstance(value, kind) for value in values):
        raise TypeError(f"should be a list of {kind.__name__}, got {values!r:.80}")
    return values
