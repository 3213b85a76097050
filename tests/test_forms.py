"""Every public function takes every form of an adapter, a model, rows and a report that its types promise, and makes of
each what it makes of the others. Hypothesis picks which forms meet."""

import contextlib
import shutil
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from helpers.benchmarks import synthetic
from helpers.forms import World, make_world, parameters_of, public_functions, takes_several
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import mlx_adapters as ma
from mlx_adapters.benchmarking import run as benchmarking
from mlx_adapters.data.datasets import read_data
from mlx_adapters.evaluation import harness
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter

pytest_plugins = ["helpers.hub_fixtures"]

FUNCTIONS = public_functions()
OTHER_PLACES = {  # what a path, or what stands for one, means that is neither adapter, model nor rows
    "add.source": "what is taken in: a folder, a file, a pack, a repository",
    "add.out": "a folder to make",
    "export_peft.out": "a folder to make",
    "fuse.out": "a folder to make",
    "fuse_again.path": "a recipe, or the folder that holds one",
    "fuse_again.out": "a folder to make",
    "fuse_peft.source": "PEFT's adapter",
    "fuse_peft.out": "a folder to make",
    "import_peft.source": "PEFT's adapter",
    "pack.target": "a file to make",
    "plan_training.name": "where the run would go",
    "read_adapter.folder": "files, whatever names they have",
    "read_report.path": "the file of a report",
    "run_tasks.folder": "tasks of the harness",
    "split_data.file": "one file, of which three are made",
    "split_data.out": "a folder to make",
    "train.name": "where the run goes",
    "write_adapter.folder": "a folder to make",
    "write_demo_data.folder": "a folder to make",
}
QUICK = ma.FuseOptions(method="nearest", check=False)
LEAST = ma.TrainConfig(iterations=1, batch_size=2, save_every=1, eval_every=1)
NEW = object()  # in place of a value: a place that is not there yet


@dataclass(frozen=True)
class Call:
    """One way to call a function: what is given besides its forms, and what of its result must always be the same."""

    seen: Any
    given: dict[str, Any]
    without: tuple[str, ...] = ()  # patterns of forms that are refused, or mean another thing

    def means_another(self, form: str) -> bool:
        return any(fnmatchcase(form, pattern) for pattern in self.without)


def call(seen, *without, **given) -> Call:
    return Call(seen, given, without)


def weights(adapter) -> list[float]:
    return [mx.abs(adapter.weights[name]).sum().item() for name in sorted(adapter.weights)]


def figures(report) -> list:
    return [(e.rows, e.error, round(e.loss.value, 4)) for e in report.evaluations]


def fused(result) -> list:
    return [(layer.path, round(layer.update_ratio, 4)) for layer in result.survival]


MEMORY = ("in memory", "scale", "merge")
ONE = ("name@*", "path@*", "Adapter@*", "run.*")  # one checkpoint
ELSEWHERE = ("path*", "folder", "Path", "read_adapter", "Added")  # not in the registry
WHOLE = ("name", "absolute*", "Adapter", "registered merge", "TrainRun", "entry", "Details")
CALLS = {
    "LiveModel.attach": call(lambda name: name is not None),
    "LiveModel.using": call(lambda logit: round(logit, 4)),
    "advise": call(lambda advice: (len(advice.reasons) > 0, advice.storage.as_adapters_bytes > 0)),
    "add": call(lambda added: added.kind, source="o5", out=NEW),
    "benchmark": call(lambda report: [run.result["seen"] for run in report.runs], rounds=1, prompt_tokens=8),
    "check_data": call(lambda report: (report.splits["train"].rows, report.splits["train"].tokens)),
    "check_fused": call(
        lambda checked: (round(checked.fidelity.kl_mean, 3), len(checked.survival)),
        options=ma.FuseOptions(check_rows=8, calibration_rows=8),
    ),
    "compare": call(lambda both: (round(both.cosine, 4), [round(loss, 4) for loss in both.losses])),
    "describe": call(lambda details: (details.rank, [round(layer.norm, 3) for layer in details.layers])),
    "download": call(lambda found: found.kind, repo="user/there", name="there", overwrite=True),
    "estimate": call(lambda forecast: (forecast.fits, forecast.trainable_parameters), training=LEAST, timed=False),
    "estimate_inference": call(lambda estimate: [f.weights_bytes for f in estimate.forecasts], bits=[8]),
    "evaluate": call(figures),
    "export_peft": call(lambda export: export.tensors, out=NEW),
    "extract": call(lambda error: "have the same weights" in error, rank=1),
    "fuse": call(fused, out=NEW, quantization="none", options=QUICK),
    "fuse_peft": call(lambda result: result.size_bytes, out=NEW, quantization="none", options=QUICK, source="peft"),
    "import_peft": call(weights, source="peft", name="back", overwrite=True),
    "interpolate": call(lambda points: [weights(adapter) for _, adapter in points], steps=2),
    "list_adapters": call(lambda entries: [entry.name for entry in entries][-1:], "Added"),
    "load_adapter": call(weights),
    "load_model": call(lambda model: round(mx.abs(model.logits([1, 2])).max().item(), 3)),
    "make_card": call(lambda card: "LoRA" in card.body, *MEMORY),
    "merge": call(weights, method="svd", rank=2),
    "pack": call(lambda pack: "adapters.safetensors" in pack.files, target="a.tar.gz", overwrite=True),
    "plan_training": call(lambda plan: plan.rows, name="new", training=LEAST, overwrite=True),
    "prune": call(lambda removed: removed.whole, *MEMORY, *ONE, *ELSEWHERE, dry_run=True),
    "publish": call(lambda publication: publication.kind, *MEMORY, repo="user/new", base_model="user/x", dry_run=True),
    "remove": call(lambda removed: removed.whole, *MEMORY, *ONE, *ELSEWHERE),
    "rename": call(lambda entry: entry.name, *MEMORY, *ONE, *ELSEWHERE, new="renamed"),
    "run_tasks": call(lambda report: [e.error for e in report.evaluations], tasks=["echo"]),
    "scale": call(weights, factor=0.5),
    "subtract": call(weights, weight=0.5),
    "tag": call(lambda tags: tags, *MEMORY, *ONE, *ELSEWHERE, add=["seen"]),
    "train": call(lambda run: round(run.train_losses[0][1], 4), name="new", training=LEAST, overwrite=True),
    "use": call(lambda entry: entry.iteration, *MEMORY, *ELSEWHERE, *WHOLE),
    "verify": call(lambda verification: (verification.sound, verification.problems)),
    "verify_all": call(lambda verifications: [v.sound for v in verifications]),
    "wrap_model": call(lambda model: model.base.fingerprint),
}
ALONE = dict.fromkeys(("train.reference", "plan_training.reference"), "DPO and KTO alone take one, on other rows")
FEW, COSTLY = 6, {"check_fused", "compare", "evaluate", "export_peft", "fuse", "fuse_peft", "import_peft", "train"}


def taking_forms() -> dict[str, dict[str, str]]:
    """{function: {parameter: kind}} of all that take forms."""
    found = {name: parameters_of(function) for name, function in FUNCTIONS.items()}
    taken = {
        n: {p: kind for p, kind in ps.items() if kind != "place" and f"{n}.{p}" not in ALONE} for n, ps in found.items()
    }
    return {name: parameters for name, parameters in taken.items() if parameters}


def test_every_function_that_takes_forms_has_its_call_here():
    assert taking_forms().keys() == CALLS.keys(), "a public function joins CALLS"
    places = {f"{n}.{p}" for n, f in FUNCTIONS.items() for p, kind in parameters_of(f).items() if kind == "place"}
    assert places == OTHER_PLACES.keys(), "a parameter that takes a path takes a form, or is named with a reason"


@pytest.fixture(scope="module")
def template(tiny_model, tmp_path_factory) -> Any:
    place = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(place / "home"))
        patch.chdir(place)
        world = make_world(place, tiny_model("llama"), synthetic({"base": 10.0, "sql": 9.0}))
        ma.export_peft("sql", "peft")
        shutil.copytree(world.run.folder.parent, place / "kept", symlinks=True)
        yield world


@pytest.fixture
def world(template, monkeypatch) -> World:
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(template.folder / "home"))
    monkeypatch.chdir(template.folder)
    monkeypatch.setattr(benchmarking, "run_worker", without_a_process)
    monkeypatch.setitem(sys.modules, "lm_eval", HARNESS)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", HARNESS)
    monkeypatch.setattr(harness, "harness_model", lambda module, tokenizer, size: SimpleNamespace(use_chat_template=0))
    return template


HARNESS = SimpleNamespace(
    TaskManager=lambda include_path: SimpleNamespace(match_tasks=list),
    simple_evaluate=lambda **given: {"results": {"echo": {"acc,none": 1.0}}},
    __version__="0",
)


def without_a_process(variant, config, *_) -> dict:
    """What a process of a benchmark gives, and what it would have read."""
    (result,) = [run.result for run in synthetic({variant.label: 10.0}, count=1).runs]
    adapter = load_adapter(variant.adapter) if variant.adapter else None
    rows = len(read_data(config.data).rows("train")) if config.data else 0
    size = sum(w.nbytes for w in adapter.weights.values()) if adapter else 0
    seen = [resolve_base(str(variant.base)).fingerprint, weights(adapter) if adapter else None, rows]
    return result | {"seen": seen, "adapter_bytes": size, "process_seconds": 1.0}


def made(world: World, name: str, forms: dict[str, Any]) -> Any:
    """What a call with these forms shows; what it does to the registry is undone."""
    call, function = CALLS[name], FUNCTIONS[name]
    given = {key: f"new-{name}" if value is NEW else value for key, value in call.given.items()} | forms
    shutil.rmtree(world.folder / f"new-{name}", ignore_errors=True)
    if name == "advise":
        given = {"report": ma.benchmark(["base", *forms.values()], rounds=1, prompt_tokens=8)} | forms
    if name == "wrap_model":
        given |= dict(zip(("module", "tokenizer"), mlx_lm.load(str(world.base)), strict=False))
    if name.startswith("LiveModel."):
        given["self"] = ma.load_model(world.base)
    with contextlib.ExitStack() as after:
        if name in ("remove", "rename"):
            after.callback(put_back, world.run.folder.parent, world.folder / "kept")
        try:
            result = function(**given)
        except ma.IncompatibleError as error:  # of a model and itself nothing can be extracted
            if name != "extract":
                raise
            result = error.message
        if name == "LiveModel.using":
            model = after.enter_context(result)
            result = mx.abs(model.logits([1, 2])).max().item()
        return call.seen(result)


def put_back(folder: Path, kept: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(kept, folder, symlinks=True)


TAKING = taking_forms()


@pytest.mark.parametrize("name", TAKING)
def test_every_form_is_taken_and_means_the_same(name, world, request):
    if name in ("download", "publish"):
        request.getfixturevalue("hub")
    if name == "download":
        ma.publish("./peft", "user/there", base_model="user/x")
    forms = {parameter: world.forms[kind] for parameter, kind in TAKING[name].items()}
    most = FEW if name in COSTLY else max(map(len, forms.values()))

    @settings(max_examples=1, phases=[Phase.generate])
    @given(st.fixed_dictionaries({parameter: st.permutations(sorted(known)) for parameter, known in forms.items()}))
    def one_after_the_other(orders: dict[str, list[str]]) -> None:
        plain = {p: next(f for f in known if not CALLS[name].means_another(f)) for p, known in forms.items()}
        expected = made(world, name, {parameter: forms[parameter][form]() for parameter, form in plain.items()})
        for number in range(most):
            chosen = {parameter: order[number % len(order)] for parameter, order in orders.items()}
            given = {parameter: forms[parameter][form]() for parameter, form in chosen.items()}
            for parameter in given:
                if number % 2 and takes_several(FUNCTIONS[name], parameter):
                    given[parameter] = iter([given[parameter]])
            if any(map(CALLS[name].means_another, chosen.values())):
                with contextlib.suppress(ma.AdapterError):
                    assert made(world, name, given) != expected, chosen
            else:
                assert made(world, name, given) == expected, chosen

    one_after_the_other()


SEEN_IN = (
    "LiveModel.using",
    "describe",
    "evaluate",
    "fuse",
    "interpolate",
    "load_model",
    "merge",
    "scale",
    "benchmark",
)


@pytest.mark.parametrize("name", SEEN_IN)
def test_a_changed_adapter_in_memory_is_what_it_holds(name, world):
    forms = {p: next(iter(world.forms[kind].values()))() for p, kind in TAKING[name].items()}
    (parameter, *_) = [p for p, kind in TAKING[name].items() if kind in ("adapter", "either")]
    changed = ma.load_adapter("sql").with_weights(ma.read_adapter("other").weights)
    shown = [made(world, name, {**forms, parameter: form}) for form in (changed, "./other", "sql")]
    assert shown[0] == shown[1] != shown[2]


def test_a_base_is_a_variant_and_a_loaded_model_is_none(world):
    model = ma.load_model(world.base, "sql")
    judged = ma.evaluate([model.base, "tiny"], "rows").evaluations
    assert judged[0].loss == judged[1].loss and judged[0].error is None
    with pytest.raises(ma.ConfigError, match="A loaded model is no variant"):
        ma.evaluate([model], "rows")
    with pytest.raises(ma.ConfigError, match="is no name of an attached adapter"):
        model.use(world.run)
    assert ma.make_card(model.base).front["library_name"] == "mlx"


def test_a_run_goes_on_by_itself(world):
    run = ma.train("tiny", "rows", name="short", training=LEAST, overwrite=True)
    again = ma.train(name=run, resume=True, training=replace(LEAST, iterations=2))
    assert (again.folder, again.final.iteration) == (run.folder, 2)
    with pytest.raises(ma.ConfigError, match="cannot name a training run"):
        ma.train(name=run.best, resume=True)
