"""`publish`, `download`, `card`: the Hugging Face Hub."""

from collections.abc import Sequence
from typing import Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import (
    UserPath,
    base_option,
    carried,
    complete_references,
    json_option,
    overwrite_option,
    subfolder_option,
)

_source = click.argument("source", metavar="REF|MODEL", shell_complete=complete_references)
_base_model = click.option("--base-model", metavar="ID", help="The base's id on the Hub, for the card [from metadata].")
_benchmark = click.option(
    "--benchmark",
    type=UserPath(exists=True, dir_okay=False),
    metavar="FILE",
    help="Report of 'benchmark --output' to show in the card.",
)
_ask = click.option(
    "--ask", "questions", multiple=True, metavar="TEXT", help="Answer this and show it in the card; may be repeated."
)
_license = click.option("--license", metavar="ID", help="License for the card, e.g. apache-2.0 [the base's].")


@click.command("publish")
@_source
@click.argument("repo", metavar="USER/REPO")
@click.option("--public", is_flag=True, help="Let everybody see it; without this it is private.")
@click.option("--dry-run", is_flag=True, help="Show files, card and changes; upload nothing.")
@click.option("-m", "--message", help="Message of the commit.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to; made if it is not there [main].")
@click.option("--create-pr", is_flag=True, help="Propose the change as a pull request.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out files such as '*.svg'; may be repeated.")
@_benchmark
@_ask
@_base_model
@_license
@json_option
def publish_command(
    source: str,
    repo: str,
    public: bool,
    dry_run: bool,
    message: str | None,
    revision: str | None,
    create_pr: bool,
    exclude: tuple[str, ...],
    benchmark: str | None,
    questions: tuple[str, ...],
    base_model: str | None,
    license: str | None,
    as_json: bool,
) -> None:
    """Upload an adapter, or the folder of a fused model, with a card made from its metadata.

    What belongs to the model or adapter goes up, with a card: no data, logs, checkpoints, local paths or tokens. What
    stays is listed, with the reason. Sign in first with 'hf auth login'.

    \b
    Example:
      mlx-adapters publish sql me/sql-lora --dry-run
      mlx-adapters publish ./out/sql-4bit me/sql-4bit --public
    """
    from mlx_adapters.publishing.uploads import publish

    result = publish(
        source,
        repo,
        private=not public,
        dry_run=dry_run,
        message=message,
        revision=revision,
        create_pr=create_pr,
        exclude=exclude,
        benchmark=benchmark,
        answers=_answers(source, questions),
        base_model=base_model,
        license=license,
        show_progress=_output.live(),
        on_event=_output.progress(),
    )
    if as_json:
        _output.emit_json(result)
        return
    rows = [(file.path, _output.size(file.size_bytes), file.change) for file in result.files]
    _output.table(("FILE", "SIZE", "CHANGE"), rows, right=(1,))
    for why in dict.fromkeys(result.left_out.values()):
        names = [name for name, reason in result.left_out.items() if reason == why]
        more = f" and {len(names) - 4} more" if len(names) > 5 else ""
        _output.note(f"Left out ({why}): {', '.join(names[: 4 if more else None])}{more}.")
    where = f"{'private' if result.private else 'public'} {result.kind} '{repo}'"
    if dry_run:
        _output.out(f"\n{result.card}")
        _output.note(f"Nothing was uploaded. Without --dry-run this becomes the {where}.")
        _output.next_steps("the same line without --dry-run")
    else:
        _output.say(f"{result.url if result.changed else 'Nothing has changed: ' + str(result.url)}")
        _output.note(f"Published as the {where}." if result.changed else f"The {where} is up to date.")
        _output.next_steps(f"mlx-adapters download {_output.word(repo)}")


@click.command("download")
@click.argument("repo", metavar="USER/REPO[/FOLDER][@REVISION]")
@click.option("--name", help="Name to keep it under [the repository's].")
@subfolder_option
@base_option
@overwrite_option
@json_option
def download_command(
    repo: str, name: str | None, subfolder: str | None, base: str | None, overwrite: bool, as_json: bool
) -> None:
    """Take an adapter (of any MLX program, or PEFT's) from the Hub into the registry, or a model into the cache.

    \b
    Example:
      mlx-adapters download me/sql-lora --name sql
      mlx-adapters download me/sql-lora@v2 --name sql2
    """
    from mlx_adapters.sources.downloads import download

    live = _output.live()
    result = download(
        repo,
        name=name,
        base=base,
        subfolder=subfolder,
        overwrite=overwrite,
        show_progress=live,
        on_event=_output.progress(),
    )
    if as_json:
        _output.emit_json(result)
    elif result.kind == "adapter":
        _output.say(f"{result.name}: {result.repo} at {result.commit[:12]}")
        _output.next_steps(f'mlx-adapters generate "..." --adapter {result.name}')
    else:
        _output.say(f"{_output.place(result.folder)}: {result.repo} at {result.commit[:12]}")
        _output.next_steps(f'mlx-adapters generate "..." --base {result.repo}')


@click.command("card")
@_source
@click.option("--repo", metavar="USER/REPO", help="The repository that the examples name.")
@click.option("--write", is_flag=True, help="Write README.md (and the loss curve) into the folder; keeps your part.")
@_benchmark
@_ask
@_base_model
@_license
@json_option
def card_command(
    source: str,
    repo: str | None,
    write: bool,
    benchmark: str | None,
    questions: tuple[str, ...],
    base_model: str | None,
    license: str | None,
    as_json: bool,
) -> None:
    """Print the model card of an adapter or a fused model, as 'publish' would upload it.

    \b
    Example:
      mlx-adapters card sql --ask "List the Physics courses."
      mlx-adapters card ./out/sql-4bit --write
    """
    from mlx_adapters.publishing.uploads import make_card, write_card

    options: dict[str, Any] = {"repo": repo, "base_model": base_model, "license": license, "benchmark": benchmark}
    options["answers"] = _answers(source, questions)
    if write:
        path = write_card(source, **options, on_event=_output.progress())
        if as_json:
            _output.emit_json({"path": path})
        else:
            _output.out(_output.place(path))
            where = _output.word(repo or "USER/REPO")
            _output.next_steps(f"mlx-adapters publish {_output.word(source)} {where}{carried('publish')}")
        return
    card = make_card(source, **options)
    if as_json:
        _output.emit_json({"front_matter": card.front, "text": str(card)})
    else:
        _output.out(str(card), newline=False)


def _answers(source: str, questions: Sequence[str]) -> dict[str, dict[str, str]]:
    """What the published thing answers, and of an adapter its base beside it: greedy, 128 tokens at most."""
    if not questions:
        return {}
    from mlx_adapters.generation.live import load_model
    from mlx_adapters.publishing.subject import read_subject
    from mlx_adapters.sources.bases import recorded_base

    subject = read_subject(source)
    if subject.kind not in ("adapter", "model"):
        raise click.UsageError(f"--ask needs an adapter or a model for MLX; '{source}' is in another format.")
    adapter = subject.adapter
    model = load_model(recorded_base([adapter]) if adapter else subject.folder)
    given: dict[str, dict[str, str]] = {question: {} for question in questions}
    for whose in ("base", subject.name) if adapter else (subject.name,):
        if adapter and whose != "base":
            model.attach(adapter)
        for question in questions:
            given[question][whose] = model.generate(question, max_tokens=128).text
    return given
