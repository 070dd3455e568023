"""Settings of attacks as people type them: ``NAME[:key=value,...]``, and as they are recorded."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from imma_cli.attacks.attack import Attack, AttackSettings
from imma_cli.attacks.manager import Registry
from imma_cli.errors import ImmaError


@dataclass(frozen=True)
class SettingHelp:
    """What ``imma attacks NAME`` shows of one setting."""

    name: str
    type: str
    default: Any
    meaning: str


def parse_attacks(specs: Iterable[str], registry: Registry) -> list[Attack]:
    """The attacks for what was typed, such as ``lora:rank=8,learning_rate=1e-4``.

    Raises:
        ImmaError: names every unknown attack, unknown setting and unreadable value at once.
    """
    attacks: list[Attack] = []
    reasons: list[str] = []
    for spec in specs:
        name, _, text = spec.partition(":")
        try:
            attack = registry.get(name.strip())
        except ImmaError as error:
            reasons.append(" ".join([error.what, *error.reasons, error.hint or ""]).strip())
            continue
        values, wrong = _values(attack, text)
        preset = values.get("preset", "auto")
        if preset != "auto" and preset not in attack.presets:
            wrong.append(f"{name}: there is no preset {preset!r}; choose from auto, {', '.join(attack.presets)}")
        reasons += wrong
        if not wrong:
            try:
                attacks.append(attack(attack.Settings(**values)))
            except (ValueError, TypeError) as error:
                reasons.append(f"{name}: {error}")
    specs_seen = [(a.name, a.settings) for a in attacks]
    reasons += [
        f"{n} is given twice with the same settings" for n, s in set(specs_seen) if specs_seen.count((n, s)) > 1
    ]
    if reasons:
        raise ImmaError("The attacks cannot be set up.", reasons, "imma attacks NAME shows the settings of an attack.")
    return attacks


def _values(attack: type[Attack], text: str) -> tuple[dict[str, Any], list[str]]:
    known = {f.name: f for f in fields(attack.Settings)}
    hints = get_type_hints(attack.Settings)
    values: dict[str, Any] = {}
    reasons: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, raw = (s.strip() for s in item.partition("="))
        key = key.replace("-", "_")
        if not equals:
            reasons.append(f"{attack.name}: {item!r} is not of the form key=value")
        elif key not in known:
            near = get_close_matches(key, known, n=2, cutoff=0.4)
            better = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
            reasons.append(f"{attack.name} has no setting {key!r}; {better}")
        elif key in values:
            reasons.append(f"{attack.name}: {key} is given twice")
        else:
            try:
                values[key] = TypeAdapter(hints[key]).validate_python(raw)
            except ValidationError:
                reasons.append(f"{attack.name}: {key}={raw!r} is no {_type_name(known[key].type)}")
    return values, reasons


def _type_name(hint: Any) -> str:
    return hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))


def describe(settings: type[AttackSettings]) -> list[SettingHelp]:
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
    return [SettingHelp(f.name, _type_name(f.type), f.default, meanings.get(f.name, "")) for f in fields(settings)]


def spec(attack: Attack) -> str:
    """An attack as one would type it: its name and the settings that differ from the defaults."""
    changed = {f.name: getattr(attack.settings, f.name) for f in fields(attack.settings)}
    items = [f"{f.name}={changed[f.name]}" for f in fields(attack.settings) if changed[f.name] != f.default]
    return f"{attack.name}:{','.join(items)}" if items else attack.name


def record(attack: Attack) -> dict[str, Any]:
    """An attack as results and provenance record it."""
    return {"name": attack.name, "spec": spec(attack), "settings": asdict(attack.settings)}
