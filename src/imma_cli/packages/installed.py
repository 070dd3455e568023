"""What is installed beside imma, what imma itself needs of it, and which plugins a package brings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from importlib import invalidate_caches
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from imma_cli.attacks.points import DISABLE, ONLY_OWN, OWN, normalized, plugin_points
from imma_cli.errors import ImmaError

MARK = "imma-brought:"


def needs_of(name: str) -> list[str]:
    """The normalised names of what the package *name* requires, without its extras; empty if it is not installed."""
    try:
        required = distribution(name).requires or []
    except PackageNotFoundError:
        return []
    lines = [line for line in required if not re.search(r";.*\bextra\s*==", line)]
    return [normalized(match[0]) for line in lines if (match := re.match(r"[A-Za-z0-9._-]+", line))]


def version_of(name: str) -> str | None:
    """The installed version of *name*; None if it is not installed."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def needed_by_imma() -> set[str]:
    """Everything that imma stops working without: itself, what it requires, and what that requires."""
    found: set[str] = set()
    waiting = [OWN, "pip"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += needs_of(name)
    return found


def constraints() -> list[str]:
    """imma and what it requires directly, at the installed versions: no plugin may change them by the way."""
    versions = {name: version_of(name) for name in (OWN, *needs_of(OWN))}
    return [f"{name}=={version}" for name, version in sorted(versions.items()) if version]


def brought(names: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """The attacks, the metrics and the broken plugins of the packages *names*, by a process that starts afresh.

    Raises:
        ImmaError: imma does not start any more.
    """
    invalidate_caches()
    ours = {normalized(point.package.name) for point in plugin_points()}
    if not ours & set(map(normalized, names)):
        return {"attacks": [], "metrics": [], "broken": []}
    env = {key: value for key, value in os.environ.items() if key not in (DISABLE, ONLY_OWN)}
    code = "import sys; from imma_cli.packages.installed import say_brought; say_brought(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *names], env=env, capture_output=True, encoding="utf-8", check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            found: dict[str, list[dict[str, Any]]] = json.loads(line.removeprefix(MARK))
            return found
    raise ImmaError("imma does not start any more in this environment.", done.stderr.strip().splitlines()[-3:])


def say_brought(names: Collection[str]) -> None:
    """Write what `brought` reads to standard output."""
    from imma_cli.attacks.manager import discover
    from imma_cli.verification.metrics import discover_metrics

    wanted = {normalized(name) for name in names}
    report: dict[str, list[dict[str, Any]]] = {"attacks": [], "metrics": [], "broken": []}
    for kind, registry in (("attacks", discover()), ("metrics", discover_metrics())):
        for name, found in registry.found.items():
            if normalized(found.distribution) in wanted:
                report[kind].append({"name": name, "summary": found.cls.summary, "distribution": found.distribution})
        for broken in registry.broken:
            said = {"plugin": broken.plugin, "distribution": broken.distribution, "reason": broken.reason}
            if normalized(broken.distribution) in wanted and said not in report["broken"]:
                report["broken"].append(said)
    sys.stdout.write(f"\n{MARK}{json.dumps(report)}\n")
