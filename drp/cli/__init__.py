"""The command line, `drp`: a module for each command, and modules that they share."""

from __future__ import annotations

import click

from drp.cli.compare import compare
from drp.cli.doctor import doctor
from drp.cli.http import http
from drp.cli.sample import sample
from drp.cli.serve import keys, serve, status
from drp.cli.simulate import simulate
from drp.cli.trace import trace
from drp.cli.tune import tune
from drp.cli.worker import worker
from drp.platforms import require_linux

COMPLETION = """\b
Completion in the shell:
  bash   eval "$(_DRP_COMPLETE=bash_source drp)"     in ~/.bashrc
  zsh    eval "$(_DRP_COMPLETE=zsh_source drp)"      in ~/.zshrc
  fish   _DRP_COMPLETE=fish_source drp | source      in ~/.config/fish/completions/drp.fish
"""


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        import drp  # its version is looked up on first use

        click.echo(f"drp, version {drp.__version__}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=COMPLETION)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
def main() -> None:
    """Run diffusion sampling faster, by drafting timesteps on several devices and refining them."""
    try:
        require_linux()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None


for command in (sample, compare, tune, serve, keys, status, worker, http, simulate, trace, doctor):
    main.add_command(command)
