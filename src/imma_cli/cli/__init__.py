"""The command line. Every command is one file; this one puts them together and catches imma's error."""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from imma_cli import __version__
from imma_cli.cli import attacks, demo, harden, inspect, install, metrics, new_attack, report, uninstall, verify
from imma_cli.cli.console import err, show_error
from imma_cli.cli.fitting import out_of_memory
from imma_cli.environment import prepare_environment
from imma_cli.errors import ImmaError

app = typer.Typer(
    name="imma",
    help="Harden the weights of text-to-image models against malicious fine-tuning, and show how far that holds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(harden.harden)
app.command()(verify.verify)
app.command()(report.report)
app.command()(attacks.attacks)
app.command()(metrics.metrics)
app.command()(install.install)
app.command()(uninstall.uninstall)
app.command("new-attack")(new_attack.new_attack)
app.command()(inspect.inspect)


FAULT = 70
"""The exit code of a fault of the program's own, as in sysexits.h."""


class Interrupted(BaseException):
    """Ctrl-C, or a request to end. Not KeyboardInterrupt, which typer would turn into an abort of its own."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"imma {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Load only the attacks and metrics that ship with imma.")
    ] = False,
) -> None:
    if no_plugins:
        from imma_cli.attacks.points import ONLY_OWN

        # by the environment, so that processes which a command starts keep to it
        before = os.environ.get(ONLY_OWN)
        os.environ[ONLY_OWN] = "1"
        context.call_on_close(lambda: _set_back(ONLY_OWN, before))


def _set_back(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not disturb the cleaning up
    raise Interrupted


def main() -> None:
    """The entry point ``imma``."""
    prepare_environment()
    # xformers warns at import where there is no GPU it was built for; what that means is said by --attention. And
    # bitsandbytes, on processors, of a kernel that nothing here asks for
    for name in ("xformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except ImmaError as error:
        show_error(error)
        sys.exit(2)
    except Exception as error:  # noqa: BLE001 - a fault of imma's own, or of a plugin, keeps its traceback
        if said := out_of_memory(error):
            show_error(said)
            sys.exit(2)
        sys.excepthook(*sys.exc_info())
        sys.exit(FAULT)  # never 1: for `imma verify` that is a verdict
    except Interrupted:
        err.print("Interrupted. No half file was left; the input and earlier outputs are as they were.")
        sys.exit(130)
