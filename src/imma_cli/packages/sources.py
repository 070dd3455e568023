"""Where a package comes from, told from what was typed alone: nothing is fetched and nothing is run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from imma_cli.attacks.points import OWN, normalized
from imma_cli.errors import ImmaError

ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")
NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
REQUIREMENT = re.compile(rf"({NAME})\s*(\[[^\]]*\])?\s*([<>=!~][^;@]*)?(;.*)?")
DIRECT = re.compile(rf"({NAME})\s*(\[[^\]]*\])?\s*@\s*(\S+)")
URL = re.compile(r"(?:(?:git|hg|svn|bzr)\+)?[a-z]+://|git\+")


@dataclass(frozen=True)
class Source:
    """One package as it was asked for."""

    argument: str
    """What pip is given."""
    origin: str
    """Where it comes from, for people."""
    builds: bool
    """Whether its own code runs while it is installed: whatever is not a wheel is built first."""
    name: str | None = None
    """The distribution's name, as far as the text tells it."""
    editable: bool = False

    @property
    def shown(self) -> str:
        """The argument without a name and password that may stand in it."""
        return redacted(self.argument)


def source_of(text: str, *, editable: bool = False) -> Source:
    """What *text* means: a name on the package index, a wheel, an archive, a folder or an address.

    Raises:
        ImmaError: it is none of them, or there is no such file.
    """
    text = text.strip()
    if not text or text.startswith("-"):  # would be an option of pip
        raise ImmaError(f"{text!r} is no package.")
    if direct := DIRECT.fullmatch(text):
        return _at_address(direct[3], text, normalized(direct[1]), editable=editable)
    if URL.match(text):
        return _at_address(text, text, None, editable=editable)
    if editable or _looks_like_path(text):
        return _on_disk(text, editable=editable)
    if requirement := REQUIREMENT.fullmatch(text):
        name = normalized(requirement[1])
        if name == OWN:
            raise ImmaError("imma does not replace itself while it runs.", hint=f"Use pip: pip install -U {OWN}")
        return Source(text, "the package index", builds=False, name=name)
    raise ImmaError(f"{text!r} is no name, file, folder or address of a package.")


def redacted(url: str) -> str:
    """*url*, or a text with one, without the name and password that may stand in it."""
    return re.sub(r"//[^/\s]*@", "//", url)


def _looks_like_path(text: str) -> bool:
    # as pip decides: a bare name is never a folder
    return "/" in text or "\\" in text or text.startswith((".", "~")) or text.lower().endswith(ARCHIVES)


def _at_address(url: str, argument: str, name: str | None, *, editable: bool) -> Source:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ImmaError(f"{redacted(url)} is no address: {error}.") from error
    wheel = not editable and "+" not in parts.scheme and parts.path.endswith(".whl")
    return Source(argument, redacted(url), builds=not wheel, name=name, editable=editable)


def _on_disk(text: str, *, editable: bool) -> Source:
    # as in -e '.[test]'
    place, bracket, extras = text.partition("[")
    path = Path(place).expanduser().absolute()
    if path.is_dir():
        if not (path / "pyproject.toml").is_file() and not (path / "setup.py").is_file():
            raise ImmaError(f"{path} is no package: it has no pyproject.toml.")
        return Source(f"{path}{bracket}{extras}", f"the folder {path}", builds=True, editable=editable)
    if not path.is_file():
        raise ImmaError(f"There is no file or folder {path}.")
    if editable or not path.name.lower().endswith(ARCHIVES):
        raise ImmaError(f"{path} is no {'folder' if editable else 'wheel or archive of a package'}.")
    wheel = path.suffix.lower() == ".whl"
    name = normalized(path.name.partition("-")[0]) if wheel else None
    return Source(f"{path}{bracket}{extras}", f"the {'wheel' if wheel else 'archive'} {path}", not wheel, name)
