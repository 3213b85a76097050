"""Which quantized products does this device compute wrong? A table of shapes, precisions and types.

    python scripts/check_products.py [--seconds 300] [--processes 4] [--gradients] [--dtype float32] [--out FILE]

Each kind of layer is compared with its dense copy on the CPU (`models/quantized_check.py`), with --gradients also what
goes back through it. Linear layers of one group for each row and wider ones, joined ones (q, k, v below each other),
routers of few rows, embeddings, experts and the matrices of each head in MLA. On CUDA MLX compiles each kind when it
is first used, so kinds are shared out among processes; a line is printed for each as it is done.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SHAPES = [  # (class, rows, inputs): what tiny models have, and real ones
    *[("Linear", rows, inputs) for rows in (4, 8, 16, 64, 128) for inputs in (64, 128, 512)],
    *[("Linear", rows, inputs) for rows, inputs in ((8, 2048), (128, 2048), (256, 2048), (768, 2048), (2048, 768))],
    ("Joined", 128, 64),  # 64 + 32 + 32 rows
    ("Joined", 256, 64),  # 128 + 128
    ("Joined", 1280, 1024),
    ("Embedding", 320, 64),
    ("SwitchLinear", 64, 64),
    ("SwitchLinear", 272, 128),
    ("SwitchLinear", 768, 2048),
    ("MultiLinear", 64, 64),
    ("MultiLinear", 32, 64),
    ("MultiLinear", 512, 128),
]
PRECISIONS = [(4, 64, "affine"), (8, 64, "affine"), (4, 32, "affine"), (8, 32, "affine"), (4, 128, "affine")]
PRECISIONS += [(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]
PRECISIONS += [(bits, group_size, "affine") for bits in (2, 3, 5, 6) for group_size in (64, 32)]


def made(kind: str, rows: int, inputs: int):
    """A dense layer of random weights."""
    from mlx_lm.models.mla import MultiLinear
    from mlx_lm.models.switch_layers import SwitchLinear

    from mlx_adapters.system.door import mx, nn  # noqa: F401

    if kind == "Embedding":
        return nn.Embedding(rows, inputs)
    if kind == "SwitchLinear":
        return SwitchLinear(inputs, rows, 4, bias=False)
    if kind == "MultiLinear":
        return MultiLinear(inputs, rows, 2)
    return nn.Linear(inputs, rows, bias=False)


def packed(kind: str, rows: int, inputs: int, precision: tuple, dtype):
    """The same quantized, its scales in `dtype`; several layers as one."""
    from mlx_adapters.runtime.sites import joined

    bits, group_size, mode = precision
    options = {"bits": bits, "group_size": group_size, "mode": mode}
    parts = (rows // 2, rows // 4, rows // 4) if kind == "Joined" else (rows,)
    layers = []
    for count in parts:
        dense = made(kind, count, inputs)
        dense.set_dtype(dtype)
        layers.append(dense.to_quantized(**options))
    return joined(layers) if kind == "Joined" else layers[0]


def jobs(dtypes: list[str]) -> list:
    """All kinds that can be made, the likeliest first."""
    return [
        (shape, precision, dtype)
        for precision in PRECISIONS
        for shape in SHAPES
        for dtype in dtypes
        if shape[2] % precision[1] == 0
    ]


def work(args) -> None:
    """Every `processes`-th kind, from `worker` on, until the time is over."""
    import mlx_adapters  # noqa: F401
    from mlx_adapters.models.quantized_check import check_layer
    from mlx_adapters.system.door import mx

    for shape, precision, name in jobs(args.dtype)[args.worker :: args.processes]:
        if time.time() > args.until:
            return
        dtype = getattr(mx, name)
        layer = packed(*shape, precision, dtype)
        began = time.time()
        check = check_layer(layer, dtype, args.gradients)
        line = {"shape": shape, "precision": precision, "dtype": name, "error": check.error, "right": check.right}
        line |= {"seconds": round(time.time() - began, 1), "kind": check.kind}
        print(json.dumps(line), flush=True)


def main() -> None:
    """Start the workers, collect what they print, and give a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(args)
        return
    until, tried = time.time() + args.seconds, []
    more = ["--processes", str(args.processes), "--until", str(until), "--dtype", *args.dtype]
    more += ["--gradients"] * args.gradients
    children = [
        subprocess.Popen([sys.executable, __file__, "--worker", str(number), *more], stdout=subprocess.PIPE, text=True)
        for number in range(args.processes)
    ]
    for child in children:
        try:
            text, _ = child.communicate(timeout=max(until + 20 - time.time(), 1))
        except subprocess.TimeoutExpired:
            child.kill()
            text, _ = child.communicate()
        tried += [json.loads(line) for line in text.splitlines()]
    for line in tried:
        if not line["right"]:
            print(f"WRONG {line['kind']}: {line['error']:.3g}")
    wrong, wanted = sum(not line["right"] for line in tried), len(jobs(args.dtype))
    longest = max((line["seconds"] for line in tried), default=0)
    print(f"{len(tried)} of {wanted} kinds tried, {wrong} wrong; the longest took {longest:.0f} s")
    if args.out:
        args.out.write_text("\n".join(map(json.dumps, tried)) + "\n")


if __name__ == "__main__":
    main()
