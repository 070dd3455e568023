"""How `imma harden` goes about it: settings, drawings, and a bar for each thing that takes its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Literal

from imma_cli.cli.console import err
from imma_cli.cli.progress import course

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.cli.console import Refusals
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.processes import Processes
    from imma_cli.families.runtime import Runtime
    from imma_cli.immunizers.checking import Check
    from imma_cli.immunizers.imma import Immunized, ImmunizerSettings, Step
    from imma_cli.immunizers.keeper import Keeper
    from imma_cli.immunizers.retention import Retention
    from imma_cli.immunizers.scope import Protect
    from imma_cli.immunizers.settings import EpisodesSettings, Strength

    HardeningSettings = ImmunizerSettings | EpisodesSettings

FEWEST_KEPT = 8


@dataclass(frozen=True)
class Task:
    """What is hardened, against whom, and how."""

    model: Model
    attacks: Sequence[Attack]
    concepts: Sequence[Concept]
    """Where the model is still to draw them, their names are all that counts."""
    settings: HardeningSettings | None
    """None: nothing is hardened."""
    runtime: Runtime
    keep: Sequence[str] = ()
    shared_by: int = 1
    """Processes among which a launcher shares it."""

    @property
    def names(self) -> list[str]:
        return [concept.name for concept in self.concepts]


def quickened(settings: HardeningSettings, model: Model) -> HardeningSettings:
    """*settings* for a first look: enough steps to see that hardening works, too few to harden as far as it goes.

    Without the short attacks along the way, which would take longer than the steps do.
    """
    from imma_cli.immunizers.settings import EpisodesSettings, defaults_for

    assert isinstance(settings, EpisodesSettings)
    return replace(settings, steps=defaults_for(model).steps // 4, checks=0)


def settings_for(
    method: Literal["episodes", "imma", "maximize", "none"],
    protect: Protect,
    strength: Strength,
    steps: int | None,
    outer_learning_rate: float | None,
    batch_size: int,
    seed: int,
    accumulate: int = 1,
    eight_bit: bool = False,
) -> HardeningSettings | None:
    """None where nothing is to be hardened."""
    from imma_cli.immunizers.imma import ImmunizerSettings
    from imma_cli.immunizers.settings import EpisodesSettings

    if method == "episodes":
        return EpisodesSettings(protect, strength, steps, outer_learning_rate, batch_size, seed, accumulate, eight_bit)
    if method == "none":
        return None
    return ImmunizerSettings(method, protect, steps, outer_learning_rate, batch_size, seed, accumulate, eight_bit)


def without_copies(attacks: Sequence[Attack], *, quiet: bool) -> list[Attack]:
    """*attacks* without those that train a second copy of all weights, for models so large that nobody has asked for it."""
    costly = [attack.name for attack in attacks if attack.in_place]
    if costly and not quiet:
        err.print(f"Left out, as it takes a second copy of all weights: {', '.join(costly)} (--attack simulates it).")
    return [attack for attack in attacks if not attack.in_place]


def check_eight_bit(device: str) -> None:
    """Raises ImmaError where moments cannot be held in 8 bits on *device*: a package may be missing, or built for another one."""
    import torch

    from imma_cli.attacks.training import adamw
    from imma_cli.errors import ImmaError

    try:
        probe = torch.nn.Parameter(torch.zeros(4096, device=device))
        probe.grad = torch.ones_like(probe)
        adamw([probe], 1e-3, eight_bit=True).step()
    except ImportError as error:
        raise ImmaError("--8bit needs bitsandbytes.", hint="pip install 'imma-cli[8bit]'") from error
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise ImmaError(
            f"--8bit: the installed bitsandbytes fails on {device} ({type(error).__name__}: {said}).",
            hint="pip install -U 'imma-cli[8bit]', or leave --8bit out.",
        ) from error


def check_low_memory(refusals: Refusals, attacks: Sequence[Attack] | None, protect: Protect) -> None:
    """What trains all weights cannot do with 16 bits of them."""
    if costly := [attack.name for attack in attacks or () if attack.in_place]:
        refusals.add(
            f"--low-memory: {', '.join(costly)} train all weights, of which it holds most in 16 bits. Leave them out."
        )
    if protect == "unet":
        refusals.add(
            "--low-memory: --protect unet changes the weights that it would hold in 16 bits. Choose attention or less."
        )


def checked(settings: HardeningSettings | None, model: Model, pairs: int) -> HardeningSettings | None:
    """*settings* with the numbers that depend on the model's size, where episodes are to be.

    Raises:
        ImmaError: there are too few steps for *pairs* attacks on concepts.
    """
    from imma_cli.immunizers.settings import EpisodesSettings

    if not isinstance(settings, EpisodesSettings):
        return settings
    require_enough(settings, pairs, small=model.is_small)
    return settings.resolved(model)


def require_enough(settings: HardeningSettings, pairs: int, *, small: bool) -> None:
    """Raises ImmaError where there are too few steps for *pairs* attacks on concepts, of a model that is *small* or not."""
    from imma_cli.immunizers.settings import FULL_SIZE, SMALL, EpisodesSettings

    if isinstance(settings, EpisodesSettings):
        settings.require_enough((SMALL if small else FULL_SIZE).steps, pairs)


def drawn(task: Task, count: int, seed: int, keeper: Keeper, processes: Processes, *, quiet: bool) -> list[Concept]:
    """*count* pictures of each concept by the model itself."""
    from imma_cli.concepts.drawing import packed, unpacked

    return keeper.once(
        "drawn",
        lambda: draw_all(task, count, seed, processes, quiet=quiet)[0],
        lambda concepts: {"concepts": [packed(concept) for concept in concepts]},
        lambda saved: [unpacked(concept) for concept in saved["concepts"]],
    )


def draw_all(
    task: Task, count: int, seed: int, processes: Processes | None = None, *, quiet: bool
) -> tuple[list[Concept], float]:
    """*count* pictures of each concept by the model itself, and the seconds that took."""
    from imma_cli.concepts.drawing import draw_concept
    from imma_cli.families.processes import ALONE

    concepts = []
    began = monotonic()
    for name in task.names:
        with task.runtime.autocast(), course(f"Drawing {name}", count, of="pictures", quiet=quiet) as advance:
            concepts.append(
                draw_concept(
                    task.model,
                    name,
                    role="defend",
                    seed=seed,
                    count=count,
                    on_picture=advance,
                    processes=processes or ALONE,
                )
            )
    return concepts, monotonic() - began


def carry_out(
    task: Task,
    keeper: Keeper,
    after_cycle: Callable[[], None] = lambda: None,
    processes: Processes | None = None,
    *,
    quiet: bool,
) -> Immunized:
    """Harden with a bar for each thing that takes its time; nothing where there are no settings.

    Of the model, only the UNet can be relied on afterwards: the memory of what is not needed any more is given back.
    """
    from imma_cli.families.processes import ALONE
    from imma_cli.immunizers.duration import cycles_of
    from imma_cli.immunizers.episodes import immunize_in_episodes
    from imma_cli.immunizers.imma import Immunized, immunize
    from imma_cli.immunizers.retention import retained
    from imma_cli.immunizers.settings import EpisodesSettings

    def show(step: Step) -> None:
        advance(step.cycle, **_curves(step))
        after_cycle()

    def release() -> None:
        model.release(needed)

    def show_check(check: Check) -> None:
        if not seen:
            advance(check.cycle, short_attack=check.undefended)  # where the curve begins: on the original
        seen.append(check)
        advance(check.cycle, short_attack=check.loss)

    model, attacks, concepts, settings = task.model, task.attacks, task.concepts, task.settings
    if settings is None:
        return Immunized({})
    processes = processes or ALONE
    seen: list[Check] = []
    needed = {part for attack in attacks for part in attack.computes_with}
    cycles = cycles_of(model, attacks, len(concepts), settings)
    if not isinstance(settings, EpisodesSettings):
        with course("Hardening", cycles, of="cycles", quiet=quiet) as advance:
            return immunize(model, attacks, concepts, settings, task.runtime, show, keeper, release, processes)
    retention = keeper.once(
        "retention",
        lambda: retention_for(task, processes, quiet=quiet),
        vars,
        lambda saved: retained(saved, model.device),
    )
    needed.add("text_encoder")  # every attacker writes captions of its own
    with course("Hardening", cycles, of="cycles", quiet=quiet) as advance:
        return immunize_in_episodes(
            model,
            attacks,
            concepts,
            settings,
            task.runtime,
            retention,
            show,
            show_check,
            keeper=keeper,
            on_encoded=release,
            processes=processes,
        )


def retention_for(task: Task, processes: Processes | None = None, *, quiet: bool) -> Retention:
    """What must stay where *task* is hardening in episodes, as the model draws it."""
    from imma_cli.families.processes import ALONE
    from imma_cli.immunizers.retention import retain
    from imma_cli.immunizers.settings import EpisodesSettings, defaults_for

    assert isinstance(task.settings, EpisodesSettings)
    prompts = kept_prompts(task.model, task.concepts, task.settings, task.keep)
    with course("Drawing what must stay", len(prompts), of="pictures", quiet=quiet) as advance:
        return retain(
            task.model,
            prompts,
            noisings=defaults_for(task.model).noisings,
            seed=task.settings.seed,
            runtime=task.runtime,
            on_picture=advance,
            processes=processes or ALONE,
        )


def kept_prompts(
    model: Model, concepts: Sequence[Concept], settings: EpisodesSettings, keep: Sequence[str]
) -> list[str]:
    """Everyday prompts, and those in *keep*, which are together as many as each other kind, or one each."""
    from imma_cli.immunizers.retention import prompts_beside, vocabulary_of
    from imma_cli.immunizers.settings import defaults_for

    # a short run cannot make use of many pictures, and need not wait for them
    count = min(defaults_for(model).kept_pictures, max(FEWEST_KEPT, settings.cycles(model) // 2))
    prompts = prompts_beside([c.name for c in concepts], vocabulary_of(model), count, settings.seed)
    return prompts + (list(keep) * max(1, count // 4 // len(keep)) if keep else [])


def _curves(step: Step) -> dict[str, float | None]:
    return {"attacker_loss": step.inner_loss, "immunizer_loss": step.outer_loss, "drift": step.drift}
