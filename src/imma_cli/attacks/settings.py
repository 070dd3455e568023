"""Settings of plugins as people type them: ``NAME[:key=value,...]``, and as they are recorded."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.manager import P, Registry
from imma_cli.attacks.plugin import Plugin, PluginSettings
from imma_cli.errors import ImmaError


@dataclass(frozen=True)
class SettingHelp:
    """What ``imma attacks NAME`` and ``imma metrics NAME`` show of one setting."""

    name: str
    type: str
    """As it stands in the source."""
    accepts: str
    """What may be given, in words."""
    default: Any
    meaning: str


def parse_attacks(specs: Iterable[str], registry: Registry[Attack]) -> list[Attack]:
    """The attacks for what was typed, such as ``lora:rank=8,learning_rate=1e-4``.

    Raises:
        ImmaError: names every unknown attack, unknown setting and unreadable value at once.
    """
    return parse(specs, registry, _preset_faults)


def parse(
    specs: Iterable[str],
    registry: Registry[P],
    faults: Callable[[type[P], dict[str, Any]], list[str]] = lambda cls, values: [],
) -> list[P]:
    """Objects of *registry*'s kind for what was typed; *faults* says what else is wrong with a class's settings.

    Raises:
        ImmaError: names every unknown name, unknown setting and unreadable value at once.
    """
    plugins: list[P] = []
    reasons: list[str] = []
    for spec in specs:
        name, _, text = spec.partition(":")
        try:
            cls = registry.get(name.strip())
        except ImmaError as error:
            reasons.append(" ".join([error.what, *error.reasons, error.hint or ""]).strip())
            continue
        values, wrong = _values(cls, text)
        wrong += faults(cls, values)
        reasons += wrong
        if not wrong:
            try:
                plugin = cls(cls.Settings(**values))
                plugin.given = frozenset(values)
                plugins.append(plugin)
            except (ValueError, TypeError) as error:
                reasons.append(f"{cls.name}: {error}")
    specs_seen = [(p.name, p.settings) for p in plugins]
    reasons += [
        f"{n} is given twice with the same settings" for n, s in set(specs_seen) if specs_seen.count((n, s)) > 1
    ]
    if reasons:
        nouns = f"{registry.kind.noun}s"
        raise ImmaError(f"The {nouns} cannot be set up.", reasons, f"imma {nouns} NAME shows the settings of one.")
    return plugins


def _preset_faults(attack: type[Attack], values: dict[str, Any]) -> list[str]:
    preset = values.get("preset", "auto")
    if preset == "auto" or preset in attack.presets:
        return []
    return [f"{attack.name}: there is no preset {preset!r}; choose from auto, {', '.join(attack.presets)}"]


def _values(cls: type[Plugin], text: str) -> tuple[dict[str, Any], list[str]]:
    known = {f.name: f for f in fields(cls.Settings)}
    hints = get_type_hints(cls.Settings)
    values: dict[str, Any] = {}
    reasons: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, raw = (s.strip() for s in item.partition("="))
        key = key.replace("-", "_")
        if not equals:
            reasons.append(f"{cls.name}: {item!r} is not of the form key=value")
        elif key not in known:
            near = get_close_matches(key, known, n=2, cutoff=0.4)
            better = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known) or 'none'}"
            reasons.append(f"{cls.name} has no setting {key!r}; {better}")
        elif key in values:
            reasons.append(f"{cls.name}: {key} is given twice")
        else:
            try:
                values[key] = TypeAdapter(hints[key]).validate_python(raw)
                if isinstance(values[key], float) and not math.isfinite(values[key]):
                    reasons.append(f"{cls.name}: {key} must be a finite number, not {raw}")
            except ValidationError:
                reasons.append(f"{cls.name}: {key}={raw!r} is not {in_words(hints[key])}")
    return values, reasons


WORDS: dict[Any, str] = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def in_words(hint: Any) -> str:
    """A setting's type as people say it; that nothing need be given is not part of it."""
    if get_origin(hint) is Literal:
        *others, last = map(str, get_args(hint))
        return f"{', '.join(others)} or {last}" if others else last
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(in_words(part) for part in get_args(hint) if part is not NoneType)
    if isinstance(hint, type) and get_origin(hint) is None:
        return WORDS.get(hint, hint.__name__)
    return str(hint).replace("typing.", "")


def describe(settings: type[PluginSettings]) -> list[SettingHelp]:
    """Every setting with its type, default, and the sentence written below it in the source."""
    meanings: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if base is object:
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except OSError:  # a plugin may come without its source
            continue
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(field.target, ast.Name):
                meanings[field.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    hints = get_type_hints(settings)  # with names of aliases such as Literals resolved
    types = {name: hint.__name__ if isinstance(hint, type) else str(hint) for name, hint in hints.items()}
    return [
        SettingHelp(
            f.name, types[f.name].replace("typing.", ""), in_words(hints[f.name]), f.default, meanings.get(f.name, "")
        )
        for f in fields(settings)
    ]


def spec(plugin: Plugin) -> str:
    """A plugin as one would type it: its name and the settings that differ from the defaults."""
    changed = {f.name: getattr(plugin.settings, f.name) for f in fields(plugin.settings)}
    items = [f"{f.name}={changed[f.name]}" for f in fields(plugin.settings) if changed[f.name] != f.default]
    return f"{plugin.name}:{','.join(items)}" if items else plugin.name


def record(plugin: Plugin) -> dict[str, Any]:
    """A plugin as results and provenance record it."""
    return {"name": plugin.name, "spec": spec(plugin), "settings": asdict(plugin.settings)}
