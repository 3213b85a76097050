"""A fused model as one GGUF file for llama.cpp.

Layers that the plan has in up to 5 bits, and mxfp4, go over code by code (`gguf_format.blocks`); 6 and 8 bits become
q8_0, rounded once; the rest is f16, or what --dtype says. `gguf_format` knows llama.cpp's names and numbers.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.assembly.plan import LayerPlan
from mlx_adapters.assembly.survival import not_finite
from mlx_adapters.assembly.tensors import Assembly, Rounded
from mlx_adapters.assembly.weights import BaseWeights
from mlx_adapters.assembly.writing import Unit, Written
from mlx_adapters.checkpoints.left_out import without_place
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import Precision
from mlx_adapters.errors import FormatError
from mlx_adapters.events import Note, OnEvent, Progress
from mlx_adapters.gguf_format import blocks, hyperparameters
from mlx_adapters.gguf_format.architectures import architecture_of
from mlx_adapters.gguf_format.hyperparameters import settings_of
from mlx_adapters.gguf_format.tensors import EXACT, Layout, Place
from mlx_adapters.gguf_format.tokenizer import check_strings, read_tokenizer
from mlx_adapters.models.adapter import templates_of
from mlx_adapters.models.base import Base
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.rounding.grids import to_numpy
from mlx_adapters.rounding.packed import Packed
from mlx_adapters.storage import paths, tensor_names
from mlx_adapters.system.door import mx

FILE_NAME = "model.gguf"
FILE_TYPES = {"F32": "ALL_F32", **{kind: f"MOSTLY_{kind}" for kind in ("F16", "BF16", "Q8_0", "Q4_1", "Q5_1")}}
FILE_TYPES["MXFP4"] = "MOSTLY_MXFP4_MOE"


class GgufWriter:
    """One file, of a type for each layer."""

    loadable = False

    def __init__(self, precision: Precision, dtype: mx.Dtype | None, base: Base) -> None:
        own = base.quantization
        self.precision = precision
        if precision.quantization is not None:
            asked = precision.like(own if own and own.mode != "affine" else None)
            grid = blocks.same_grid(asked)
            rounds = asked.mode == "affine" and asked.bits == 8 and precision.group_size in (None, 32, 64)
            require(
                grid is not None or rounds,
                f"GGUF has nothing like {asked.bits} bits in mode {asked.mode}.",
                "it takes --bits keep, none, 8 (q8_0), 5 (q5_1) and 4 (q4_1); the MLX format has them all.",
            )
            self.precision = Precision.of(blocks.finest(asked)) if grid else Precision(8, 32, "affine")
        self.kind = {mx.float32: "F32", mx.bfloat16: "BF16"}.get(dtype, "F16")
        self._eight: set[str] = set()
        self._made: Layout | None = None
        blocks.package()

    @property
    def rounds(self) -> bool:
        """Whether the file's own q8_0 rounds some layers."""
        return bool(self._eight)

    def dtype(self, source: BaseWeights) -> mx.Dtype:
        """The file's types are made from float32."""
        return mx.float32

    def scale_dtype(self) -> mx.Dtype:
        """That of q4_1's and q5_1's scales."""
        return mx.float16

    def settled(self, base: Base, source: BaseWeights, plans: list[LayerPlan]) -> list[LayerPlan]:
        """The plan as the file can hold it. Raises ConfigError for tensors that llama.cpp does not have."""
        self._made = Layout(architecture_of(source.module), source.module, settings_of(source.module, base.config))
        self._made.check()
        return [self._settled(plan) for plan in plans]

    def _settled(self, plan: LayerPlan) -> LayerPlan:
        if plan.target is None:
            return replace(plan, copied=False)
        if blocks.same_grid(plan.target) is None:
            self._eight.add(plan.path)
            return replace(plan, target=None, copied=False)
        return plan if plan.copied else replace(plan, target=blocks.finest(plan.target))

    def _form(self, name: str, shape: tuple[int, ...]) -> str:
        """The type of an unquantized tensor of ours."""
        kind = "Q8_0" if tensor_names.split(name)[0] in self._eight else self.kind
        return blocks.form_of(self._layout.places(name)[0].name, shape, kind, EXACT)

    @property
    def _layout(self) -> Layout:
        assert self._made is not None, "the plan comes first"
        return self._made

    def stored(self, path: str, rows: mx.array) -> mx.array:
        """The rows as they come back from the file."""
        form = self._form(tensor_names.join(path, tensor_names.WEIGHT), tuple(rows.shape))
        return mx.array(blocks.restored(blocks.quantized(to_numpy(rows), form), form))

    def beside_bytes(self, assembly: Assembly) -> int:
        """None."""
        return 0

    def write(self, assembly: Assembly, folder: Path, rounded: Rounded, on_event: OnEvent) -> Written:
        """Write `folder`/model.gguf. Raises FormatError for a tokenizer or numbers that cannot be written correctly."""
        base, layout = assembly.base, self._layout
        loaded = load_tokenizer_of(base)
        tokenizer = read_tokenizer(base.tokenizer or base.folder, layout.config["vocab_size"], loaded)
        templates = {one.chat_template for one in templates_of(base, [a for a, _ in assembly.updates.adapters])}
        if len(templates) == 1 and (own := templates.pop()):
            tokenizer = replace(tokenizer, templates={"default": own})
        for text in check_strings(tokenizer, loaded):
            on_event(Note(f"llama.cpp cuts up {text!r} otherwise than this tokenizer.", "warning"))
        tensors, path = self._tensors(assembly, rounded), folder / FILE_NAME
        paths.require_free_space(folder, sum(tensor.nbytes for tensor in tensors))
        forms = {blocks.same_grid(plan.target) for plan in assembly.plans if plan.target is not None}
        kind = min((str(form) for form in forms), default="Q8_0" if self.rounds else self.kind)
        with paths.storage_errors(path):
            writer = blocks.package().GGUFWriter(path, layout.architecture.name)
            try:
                writer.add_name(Path(base.name).name)
                writer.add_file_type(getattr(blocks.package().LlamaFileType, FILE_TYPES[kind]))
                hyperparameters.write(writer, layout.architecture, layout.values)
                tokenizer.write(writer)
                _write_tensors(writer, tensors, on_event)
            finally:
                writer.close()
        return Written(path.stat().st_size, without_place(base, "gguf"))

    def _tensors(self, assembly: Assembly, rounded: Rounded) -> list["_Tensor"]:
        """All tensors of the file in the model's order; those that llama.cpp wants besides come first."""
        plans = {plan.path: plan for plan in assembly.plans if plan.target is not None}
        made = [_given(name, values) for name, values in self._layout.more().items()]
        parts: dict[str, list[tuple[str, Unit]]] = {}
        for unit in assembly.units(rounded):
            for name, _, shape in unit.layout:
                path, leaf = tensor_names.split(name)
                if path in plans and leaf in tensor_names.QUANTIZED_LEAVES:
                    parts.setdefault(path, []).append((leaf, unit))
                else:
                    made.append(self._plain(name, shape, unit))
        made += [self._packed(plans[path], leaves) for path, leaves in parts.items()]
        return sorted(made, key=lambda tensor: tensor_names.natural_order(tensor.name))

    def _plain(self, name: str, shape: tuple[int, ...], unit: Unit) -> "_Tensor":
        form, places, parts_of = self._form(name, shape), self._layout.places(name), self._layout.parting(name)

        def make() -> list[np.ndarray]:
            parts = parts_of(to_numpy(unit.make()[0]))
            for part in parts:
                if not np.isfinite(part).all():
                    raise not_finite(tensor_names.split(name)[0])
                if why := blocks.why_not(name, part, form):
                    raise FormatError(why, "pass --dtype bfloat16.")
            return [blocks.quantized(part, form) for part in parts]

        return _Tensor(name, places, _shapes(places, self._layout.shape(places[0].name, shape)), form, make)

    def _packed(self, plan: LayerPlan, leaves: list[tuple[str, Unit]]) -> "_Tensor":
        name, target = tensor_names.join(plan.path, tensor_names.WEIGHT), plan.target
        places = self._layout.places(name)
        assert target is not None

        def make() -> list[np.ndarray]:
            done: dict[int, list[mx.array]] = {}
            for _, unit in leaves:
                if id(unit) not in done:
                    done[id(unit)] = unit.make()
            packed = Packed.of({leaf: done[id(unit)].pop(0) for leaf, unit in leaves}, target)
            parts = [packed if p.rows is None else packed[mx.array(p.rows)] for p in places]
            return [blocks.blocks_of(part, place.columns) for part, place in zip(parts, places, strict=True)]

        return _Tensor(name, places, _shapes(places, plan.shape), str(blocks.same_grid(target)), make)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of ours to be written: where its parts go, their shapes and type, and how to make them."""

    name: str
    places: list[Place]
    shapes: list[tuple[int, ...]]
    form: str
    make: Callable[[], list[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return sum(blocks.nbytes(shape, self.form) for shape in self.shapes)


def _given(name: str, values: np.ndarray) -> _Tensor:
    return _Tensor("", [Place(name)], [values.shape], "F32", lambda: [values])


def _shapes(places: list[Place], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [shape if place.rows is None else (len(place.rows), *shape[1:]) for place in places]


def _write_tensors(writer: Any, tensors: list[_Tensor], on_event: OnEvent) -> None:
    for tensor in tensors:
        kind = getattr(blocks.package().GGMLQuantizationType, tensor.form)
        for place, shape in zip(tensor.places, tensor.shapes, strict=True):
            size = blocks.nbytes(shape, tensor.form)
            writer.add_tensor_info(place.name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, tensor in enumerate(tensors, 1):
        for values in tensor.make():
            try:
                writer.write_tensor_data(values)
            except OSError as error:  # NumPy does not tell which
                raise OSError(error.errno or errno.ENOSPC, str(error)) from error
        mx.clear_cache()
        on_event(Progress("write", number, len(tensors), "layer"))
