"""`fuse`: adapters into base weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._help import LongCommand
from mlx_adapters.cli._options import (
    OUTPUT_FILE,
    REFERENCE,
    Reads,
    any_base_option,
    base_option,
    complete_references,
    json_option,
    overwrite_option,
    refuse_ignored,
    refuse_outputs_that_are_read,
    resize_option,
    subfolder_option,
    tell_outputs,
    text_only_option,
    trust_option,
)
from mlx_adapters.cli._settings import option, options
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import BITS, DTYPES, MODES, Precision, Quantization
from mlx_adapters.storage import files, paths
from mlx_adapters.storage.tensor_names import REPORT_FILE
from mlx_adapters.system.limits import for_good
from mlx_adapters.units import count

if TYPE_CHECKING:
    from mlx_adapters.calibration.fidelity import Fidelity
    from mlx_adapters.fusion.result import FuseResult


@click.command("fuse", cls=LongCommand)
@click.argument("refs", nargs=-1, metavar="REF... OUT", shell_complete=complete_references)
@click.option(
    "--bits",
    type=click.Choice((*BITS, "16")),
    callback=lambda _, __, bits: "none" if bits == "16" else bits,
    default="keep",
    show_default=True,
    help="Bits per weight; keep: the base's own precision, none (or 16): unquantized.",
)
@option(
    Quantization, "group_size", default=None, help="Weights that share a scale [the base's at its own bits, else 64]."
)
@option(Quantization, "mode", default=None, type=click.Choice(MODES), help="Quantization mode [affine].")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Type of scales and of unquantized weights; auto: the base's.",
)
@options(FuseOptions, without="seed program")
@option(FuseOptions, "program", flag="--for")
@click.option("--weight", "weights", type=float, multiple=True, help="Share of each adapter, in order [1 each].")
@click.option(
    "--from-peft",
    metavar="SRC",
    help="Fuse a PEFT folder or Hub repository, with its modules_to_save, biases and tokens.",
)
@resize_option
@text_only_option
@subfolder_option
@click.option("--continue", "resume", is_flag=True, help="Go on with this fuse where it was stopped after a minute.")
@click.option("--again", metavar="RECIPE", help="Repeat the fuse of a recipe, to the byte.")
@click.option("--check-only", metavar="MODEL", help="Write nothing; check a fused model. Above --max-kl: status 1.")
@click.option("--adapter", type=REFERENCE, metavar="REF", help="The adapter, with --check-only.")
@click.option("--html", type=OUTPUT_FILE, help="Write the report as a page: what was lost, and where the bits are.")
@base_option
@any_base_option
@overwrite_option
@trust_option
@json_option
@Reads(
    modes={
        "again": "refs html overwrite trust_remote_code as_json",
        "check_only": "refs adapter weights base any_base calibration calibration_rows check_rows max_kl html "
        "trust_remote_code as_json",
        "from_peft": "refs base bits group_size mode dtype method calibration calibration_rows thorough check "
        "check_rows max_kl budget_bits program format force resize text_only subfolder html overwrite "
        "trust_remote_code as_json",
    },
    needs={
        "adapter": "check_only",
        "force": "max_kl",
        "resize": "from_peft",
        "text_only": "from_peft",
        "subfolder": "from_peft",
    },
)
def fuse_command(
    refs: tuple[str, ...],
    bits: str,
    group_size: int | None,
    mode: str | None,
    dtype: str,
    weights: tuple[float, ...],
    base: str | None,
    any_base: bool,
    overwrite: bool,
    as_json: bool,
    again: str | None,
    check_only: str | None,
    from_peft: str | None,
    resize: bool,
    text_only: bool,
    subfolder: str | None,
    adapter: str | None,
    html: Path | None,
    resume: bool,
    **settings: Any,
) -> None:
    """Write the base model with the adapter REF in its weights to the folder OUT.

    Several adapters are added, each with its --weight.

    \b
    Example:
      mlx-adapters fuse sql out/sql-4bit --bits 4
      mlx-adapters fuse sql chat out/both --weight 0.7 --weight 0.3
      mlx-adapters fuse sql out/sql-small --bits 4 --max-kl 0.005 --html report.html
      mlx-adapters fuse --from-peft user/lora-with-lm-head --base meta-llama/Llama-3.2-1B out/whole
      mlx-adapters fuse sql out/sql-ollama --bits 4 --for ollama
      mlx-adapters fuse --again out/sql-4bit out/sql-4bit-again
      mlx-adapters fuse --check-only out/somebody-elses --adapter sql
    """
    with for_good():
        from mlx_adapters.fusion.fuse import fuse, fuse_again

    refuse_outputs_that_are_read()
    asked, on_event = FuseOptions(**settings), _output.progress()
    if check_only is not None:
        _check_only(check_only, [*refs, *([adapter] if adapter else [])], base, weights, asked, any_base, html, as_json)
        return
    if not asked.check:
        refuse_ignored("check_rows", "--no-check")
    if asked.format == "gguf":
        refuse_ignored("check_rows", "a GGUF file, which is not checked")
    if asked.method == "calibrated" and bits == "none":
        refuse_ignored("method", "--bits none")
    if asked.method == "nearest" or bits == "none" or (asked.method == "auto" and bits == "8" and not asked.mixed):
        why = "--bits none" if bits == "none" else "--method nearest" if asked.method == "nearest" else "--bits 8"
        why += " without --method calibrated" if why == "--bits 8" else ""
        refuse_ignored("thorough calibration_rows resume" + (" calibration" if not asked.check else ""), why)
    if len(refs) < (1 if again or from_peft else 2):
        raise click.UsageError("Give the adapter and the folder to write.")
    *adapters, out = refs
    if html is not None and paths.lies_in(html, paths.expanded(out)):
        raise click.UsageError("--html is a file beside the model, not in its folder, which only the fuse writes.")
    precision = Precision.spelled(bits, group_size, mode)
    if again is not None:
        if adapters:
            raise click.UsageError("--again takes the adapters from the recipe; give only the folder to write.")
        result = fuse_again(again, out, overwrite=overwrite, on_event=on_event)
    elif from_peft is not None:
        if adapters or base is None:
            raise click.UsageError("--from-peft takes --base and the folder to write, and no other adapter.")
        from mlx_adapters.fusion.peft import fuse_peft

        result = fuse_peft(
            from_peft,
            out,
            base=base,
            quantization=precision,
            dtype=dtype,
            resize=resize,
            text_only=text_only,
            subfolder=subfolder,
            options=asked,
            overwrite=overwrite,
            on_event=on_event,
        )
    else:
        result = fuse(
            base,
            adapters,
            out,
            quantization=precision,
            dtype=dtype,
            weights=weights or None,
            options=asked,
            overwrite=overwrite,
            any_base=any_base,
            resume=resume,
            on_event=on_event,
        )
    if html is not None:
        from mlx_adapters.fusion import result as results

        files.write_text(html, results.html(result))
    if as_json:
        _output.emit_json(result)
    else:
        _show(result)
    tell_outputs()


def _check_only(
    model: str,
    adapters: list[str],
    base: str | None,
    weights: tuple[float, ...],
    options: Any,
    any_base: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    from mlx_adapters.fusion import check
    from mlx_adapters.fusion.fuse import require_faithful

    if not adapters:
        raise click.UsageError("Give the adapter with --adapter.")
    checked = check.check_fused(
        model,
        adapters,
        base=base,
        weights=weights or None,
        options=options,
        any_base=any_base,
        on_event=_output.progress(),
    )
    if html is not None:
        files.write_text(html, check.html(checked))
    if as_json:
        _output.emit_json(checked)
    else:
        _show_verdict(checked.fidelity, checked.text)
        _output.table(*checked.fidelity.table(), right=range(1, 7))
        tell_outputs()
    require_faithful(checked.fidelity, options.max_kl, "fuse it with more bits, or calibrated.")


def _show(result: "FuseResult") -> None:
    from mlx_adapters.fusion import result as results

    if result.fidelity:
        _show_verdict(result.fidelity, result.text)
    how = f"{result.method} rounding, {result.bits_per_weight:.2f} bits per weight (scales and unquantized tensors too)"
    folder = _output.place(result.folder)
    _output.say(
        f"{folder}: {'unquantized' if result.method == 'none' else how}, {_output.size(result.size_bytes)}, "
        f"{results.changed(result)}made in {_output.duration(result.seconds)}"
    )
    if left := results.unquantized(result):
        _output.say(left)
    if result.text and result.method == "calibrated":
        _output.say(f"Calibrated on {result.text['calibration_rows']} rows of {result.text['source']}.")
    for line in result.opened_with:
        _output.out(line)  # whole, to be copied
    there = _output.word(result.reference)
    if not result.opened_with:
        _output.next_steps(f'mlx-adapters generate "..." --base {there}', f"mlx-adapters publish {there} USER/REPO")
    if (result.folder / REPORT_FILE).is_file():
        _output.note(f"Every layer's figures are in {_output.place(result.folder / REPORT_FILE)}.")


def _show_verdict(fidelity: "Fidelity", text: dict[str, Any] | None) -> None:
    where = f" of {text['source']}" if text else ""
    _output.say(fidelity.verdict)
    _output.say(
        f"KL is the mean distance from {fidelity.reference} in nats per token: on {fidelity.tokens:,} tokens of "
        f"{count(fidelity.rows, 'row')} kept aside{where}."
    )
    if text and text["why"]:
        _output.say(f"That is the general text, because: {text['why']}")
