"""`completion`: for the shell."""

import os
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from mlx_adapters.cli import _output

# bash breaks words at COMP_WORDBREAKS, "@" and "=" among them, and replaces its second argument, the last piece,
# alone; so `_Bash` splits the line itself and gives back as much of each word. A Mac's /bin/bash is 3.2: it has no
# compopt (from 4.0) and no nosort (from 4.4), and is told beforehand to complete files where nothing else fits.
BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' completion type value
    COMPREPLY=()
    for completion in $(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_PIECE="$2" \\
            %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames 2> /dev/null ;;
            file) compopt -o default 2> /dev/null ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s 2> /dev/null ||
    complete -o default -F %(complete_func)s %(prog_name)s
"""
# A Mac's own ~/.zshrc does not exist, so nothing has set up completion; folders that others may write are left out.
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
"""


class _WholeWords(ShellComplete):
    """Completions of `--option=value` are the whole word."""

    def get_completions(self, args: list[str], incomplete: str) -> "list[CompletionItem[str]]":
        items = super().get_completions(args, incomplete)
        option, equals, _ = incomplete.partition("=")
        if equals and option.startswith("--"):
            for item in items:
                item.value = f"{option}={item.value}"
        return items


@add_completion_class
class _Bash(_WholeWords, BashComplete):
    source_template = BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        self._word = "" if line.endswith((" ", "\t")) else words.pop()
        return words[1:], self._word

    def format_completion(self, item: "CompletionItem[str]") -> str:
        before = self._word.removesuffix(os.environ["COMP_PIECE"])
        return f"{item.type},{item.value.removeprefix(before)}"


@add_completion_class
class _Zsh(_WholeWords, ZshComplete):
    def source(self) -> str:
        first, rest = super().source().split("\n", 1)  # "#compdef" stays first: then zsh finds it in $fpath, too
        return f"{first}\n{ZSH}{rest}"


@add_completion_class
class _Fish(_WholeWords, FishComplete):
    pass


SHELLS: dict[str, Any] = {"zsh": _Zsh, "bash": _Bash, "fish": _Fish}


@click.command("completion")
@click.argument("shell", type=click.Choice(tuple(SHELLS)))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and the names of adapters.

    \b
    Example:
      mlx-adapters completion zsh > ~/.mlx-adapters.zsh    # then 'source ~/.mlx-adapters.zsh' at the end of ~/.zshrc
      mlx-adapters completion bash >> ~/.bashrc
      mlx-adapters completion fish > ~/.config/fish/completions/mlx-adapters.fish
    """
    completer = SHELLS[shell](ctx.find_root().command, {}, "mlx-adapters", "_MLX_ADAPTERS_COMPLETE")
    _output.out(completer.source(), newline=False)
