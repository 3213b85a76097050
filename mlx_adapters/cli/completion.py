"""`completion`: for the shell."""

import click

from mlx_adapters.cli import _output

SHELLS = ("zsh", "bash", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and the names of adapters.

    \b
    Example:
      mlx-adapters completion zsh > ~/.mlx-adapters.zsh    # then add 'source ~/.mlx-adapters.zsh' to ~/.zshrc
      mlx-adapters completion bash >> ~/.bashrc
      mlx-adapters completion fish > ~/.config/fish/completions/mlx-adapters.fish
    """
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    assert completer is not None
    root = ctx.find_root().command
    _output.out(completer(root, {}, "mlx-adapters", "_MLX_ADAPTERS_COMPLETE").source(), newline=False)
