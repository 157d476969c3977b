"""Settings of a project, `[tool.gradflow]` in its `pyproject.toml`: thresholds of rules, and findings to leave out.

```toml
[tool.gradflow]
ignore = ["massive-activation"]

[tool.gradflow.thresholds]
"dead-units.share" = 0.6
```

`gradflow rules` prints the key of every threshold.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradflow.errors import UsageError
from gradflow.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FILE = "pyproject.toml"
KEYS = ("ignore", "thresholds")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a project set.

    Attributes:
        ignore: Codes of findings to leave out.
        thresholds: Values of thresholds by key (`gradflow rules` prints them).
        path: The file that it was read from, None where there is none.
    """

    ignore: tuple[str, ...] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    path: Path | None = None


def settings(start: Path | None = None) -> Settings:
    """Return the settings of the project that a directory (the working one by default) belongs to.

    They are those of the nearest `pyproject.toml` here or above; none where it has no `[tool.gradflow]`.

    Raises:
        UsageError: The file cannot be read, or a key or value in it is none that gradflow knows.
    """
    here = (start or Path.cwd()).absolute()
    path = next((found for folder in (here, *here.parents) if (found := folder / FILE).is_file()), None)
    if path is None:
        return Settings()
    try:
        tool = tomllib.loads(path.read_text("utf-8")).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"expected {path} to be a TOML file, got {error}; repair it or run elsewhere") from error
    given = tool.get("gradflow", {}) if isinstance(tool, dict) else {}
    return Settings() if given == {} else _checked(given, path)


def _checked(given: Any, path: Path) -> Settings:
    where = f"[tool.gradflow] in {path}"
    if not isinstance(given, dict):
        raise UsageError(f"expected a table as {where}, got {given!r}")
    _known(given, KEYS, f"keys of {where}")
    ignore = given.get("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(code, str) for code in ignore):
        raise UsageError(f"expected ignore in {where} to be a list of codes, got {ignore!r}")
    _known(ignore, RULES, f"codes of findings as ignore in {where}")
    thresholds = given.get("thresholds", {})
    if not isinstance(thresholds, dict):
        raise UsageError(f"expected thresholds in {where} to be a table of numbers, got {thresholds!r}")
    thresholds = dict(_flat(thresholds))
    _known(thresholds, threshold_keys(), f"thresholds in {where}")
    for key, value in thresholds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(f"expected a number as threshold {key} in {where}, got {value!r}")
    return Settings(tuple(ignore), {key: float(value) for key, value in thresholds.items()}, path)


def _flat(thresholds: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Keys with their values; `dead-units.share` without quotes is a table in TOML, and means the same."""
    for key, value in thresholds.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", number) for inner, number in value.items())
        else:
            yield key, value


def threshold_keys() -> list[str]:
    """Keys of every threshold that can be set, in the order of the rules."""
    return [threshold.key for rule in RULES.values() for threshold in rule.thresholds]


def _known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"expected {what} that gradflow knows, got {name!r}; {hint}")
