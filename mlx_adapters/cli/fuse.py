"""`fuse`: adapters into base weights."""

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import any_base_option, base_option, json_option, overwrite_option

BITS = ["keep", "none", "2", "3", "4", "5", "6", "8"]


@click.command("fuse")
@click.argument("refs", nargs=-1, required=True, metavar="REF... OUT")
@click.option("--bits", type=click.Choice(BITS), default="keep", show_default=True,
              help="Bits per weight; keep: the base's own precision, none: unquantized.")  # fmt: skip
@click.option("--group-size", type=int, help="Weights that share a scale [64; 32 or 16 in the float modes].")
@click.option("--mode", type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]), help="Quantization mode [affine].")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Type of scales and of unquantized weights; auto: the base's.")  # fmt: skip
@click.option("--weight", "weights", type=float, multiple=True, help="Share of each adapter, in order [1 each].")
@base_option
@any_base_option
@overwrite_option
@json_option
def fuse_command(
    refs: tuple[str, ...], bits: str, group_size: int | None, mode: str | None, dtype: str,
    weights: tuple[float, ...], base: str | None, any_base: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write the base model with the adapter REF in its weights to the folder OUT.

    Several adapters are added, each with its --weight.

    \b
    Example:
      mlx-adapters fuse sql out/sql-4bit --bits 4
      mlx-adapters fuse sql chat out/both --weight 0.7 --weight 0.3
    """
    from mlx_adapters.fusion.fuse import fuse
    from mlx_adapters.fusion.plan import check_precision

    if len(refs) < 2:
        raise click.UsageError("Give the adapter and the folder to write.")
    *adapters, out = refs
    precision = check_precision(bits, group_size, mode)
    result = fuse(
        base, adapters, out, quantization=precision, dtype=dtype, weights=weights or None,
        overwrite=overwrite, any_base=any_base, on_event=_output.progress(),
    )  # fmt: skip
    if as_json:
        _output.emit_json(result)
        return
    changed = len(result.survival)
    _output.out(
        f"{result.folder}: {result.bits_per_weight:.2f} bits per weight, {_output.size(result.size_bytes)}, "
        f"{changed} layers changed, made in {_output.duration(result.seconds)}"
    )
    _output.out(f"share of the update that survives (mean cosine): {result.update_survival:.4f}")
