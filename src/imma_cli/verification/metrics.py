"""What a metric is: a similarity between pictures, and how metrics are registered, found, set and named."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, ClassVar

from imma_cli.attacks.hookspecs import hookimpl
from imma_cli.attacks.manager import Kind, Registry, discover_kind
from imma_cli.attacks.plugin import Plugin, PluginSettings
from imma_cli.attacks.settings import parse
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

__all__ = ["METRICS", "Metric", "PluginSettings", "default_metrics", "discover_metrics", "hookimpl", "parse_metrics"]


class Metric(Plugin):
    """A similarity between pictures: the M of the similarity gap ratio (arXiv 2311.18815). Higher is more similar."""

    by_default: ClassVar[bool] = False
    """Whether it is used where nobody says which metrics to use."""

    def missing(self) -> list[str]:
        """What this metric still lacks on this machine, one sentence each with what to do; empty if it can be used.

        Cheap enough for a listing: no model is loaded and nothing is downloaded.
        """
        return []

    def prepare(self, device: str = "cpu") -> None:
        """Get ready on *device*, so that nothing can fail for want of weights after hours of training.

        A metric that loads a model loads it here, once. Metrics without one ignore *device*.

        Raises:
            ImmaError: something is missing; says what to install or download.
        """
        lacks = self.missing()
        if lacks:
            raise ImmaError(f"The metric {self.name} cannot be used here.", lacks)

    @abstractmethod
    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """The similarity of **every** reference with **every** image, [R, N]; never pairs by index.

        A number depends on its two pictures alone, so that it is the same whatever else is measured beside them. The
        pictures are RGB of any size; each metric brings them to the size and the range of values that it is defined for.
        """

    def nearest(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """The similarity of each image with the reference nearest to it: the maximum over references, [N].

        Measured against the pictures that were trained on, it tells memorisation from generalisation: an image that has
        learned the concept resembles all of its pictures somewhat, a memorised one resembles one of them almost wholly.
        """
        if not references:
            raise ValueError("There are no references to be near to.")
        nearest: NDArray[np.float64] = self.similarity(references, images).max(axis=0)
        return nearest


METRICS = Kind("metric", "imma_metrics", Metric)  # type: ignore[type-abstract]


def discover_metrics(plugins: Iterable[EntryPoint] | None = None) -> Registry[Metric]:
    """The metrics of every entry point in the group ``imma`` (or of *plugins*)."""
    return discover_kind(METRICS, plugins)


def default_metrics(registry: Registry[Metric]) -> list[Metric]:
    """The metrics that are meant to be used by default, as far as they are ready here.

    Raises:
        ImmaError: none is; says what each lacks.
    """
    meant = [found.cls(found.cls.Settings()) for found in registry.found.values() if found.cls.by_default]
    ready = [metric for metric in meant if not metric.missing()]
    if not ready:
        lacks = [f"{metric.name}: {reason}" for metric in meant for reason in metric.missing()]
        hint = "Install what is missing, or name another with --metric (imma metrics lists them)."
        raise ImmaError("There is no metric here to compare pictures by.", lacks, hint)
    return ready


def parse_metrics(specs: Iterable[str], registry: Registry[Metric]) -> list[Metric]:
    """The metrics for what was typed, such as ``clip:model=weights/clip-vit-base-patch32``.

    Raises:
        ImmaError: names every unknown metric, unknown setting and unreadable value at once.
    """
    return parse(specs, registry)
