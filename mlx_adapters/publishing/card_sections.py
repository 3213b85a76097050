"""The sections of a model card, each a function of what is published; "" where nothing is known.

`facts` holds what the subject itself does not: `repo` (its id on the Hub), `base` (a BaseCard), `base_id`
(the base's id in the front matter, or None) and `pictures` (file name -> SVG).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_adapters.benchmarking.words import markdown, verdict
from mlx_adapters.models.metadata import losses_of
from mlx_adapters.publishing import staging
from mlx_adapters.publishing.card_examples import example_of
from mlx_adapters.publishing.cleaning import clean_text
from mlx_adapters.publishing.subject import Subject
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, FUSE_RECIPE_FILE, split
from mlx_adapters.units import count, duration, number, size

Facts = Mapping[str, Any]
CURVE_FILE, CHART_FILE = "loss.svg", "quality.svg"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(headers), line(["---"] * len(headers)), *map(line, rows)])


def value_text(value: Any) -> str:
    """A value from metadata for a table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e-3 else number(value, 4)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    if isinstance(value, Mapping):
        if list(value) == ["name"]:  # an objective without settings
            return value_text(value["name"])
        return ", ".join(f"{key} {value_text(item)}" for key, item in value.items())
    return str(value)


def settings_table(values: Mapping[str, Any]) -> str:
    """A table of all settings that are set."""
    rows = [(key.replace("_", " "), value_text(value)) for key, value in values.items() if value not in (None, {}, [])]
    return table(("setting", "value"), rows) if rows else ""


def link(base_id: str | None, name: str) -> str:
    """The base model as a Markdown link, or just its name."""
    return f"[{base_id}](https://huggingface.co/{base_id})" if base_id else f"`{name}`"


def base_name(subject: Subject, facts: Facts) -> str:
    """The base model as the card names it."""
    return str(facts["base_id"] or subject.base.get("name") or "its base model")


# -- what it is ------------------------------------------------------------------------------------


def what_it_is(subject: Subject, facts: Facts) -> str:
    """The opening sentences: what was published, and of which base."""
    base = link(facts["base_id"], base_name(subject, facts))
    describe = {"adapter": _adapter_text, "peft": _peft_text}.get(subject.kind, _model_text)
    version = (subject.metadata.get("versions") or subject.recipe.get("versions") or {}).get("mlx_adapters")
    date = str(subject.metadata.get("date") or subject.recipe.get("date") or "")[:10]
    made = f" Made with mlx_adapters {version}{f' on {date}' if date else ''}." if version else ""
    notes = [facts["base"].note] if facts["base"].note else []
    return " ".join([describe(subject, base) + made, *notes])


def _adapter_text(subject: Subject, base: str) -> str:
    adapter = subject.adapter
    assert adapter is not None
    config = adapter.config
    modules = Counter(split(key)[1] for key in config.keys)
    named = ", ".join(f"{name} ({count})" for name, count in sorted(modules.items()))
    kind = {"lora": "LoRA", "dora": "DoRA"}[config.type]
    at = f" Checkpoint of iteration {adapter.iteration}." if adapter.iteration is not None else ""
    return (
        f"A {kind} adapter for {base}: rank {config.rank}, scale {config.scale:g} "
        f"(alpha {config.scale * config.rank:g}), {adapter.parameters:,} parameters "
        f"in {count(len(config.keys), 'layer')}: {named}.{at}"
    )


def _peft_text(subject: Subject, base: str) -> str:
    config = subject.config
    return (
        f"A LoRA adapter for {base} in PEFT's format: rank {config.get('r')}, alpha {config.get('lora_alpha')}"
        f"{', DoRA' if config.get('use_dora') else ''}{', rsLoRA' if config.get('use_rslora') else ''}."
    )


def _model_text(subject: Subject, base: str) -> str:
    adapters = [str(adapter.get("name")) for adapter in subject.recipe.get("adapters") or []]
    what = f"{base} with {_and([f'`{a}`' for a in adapters])} fused into its weights" if adapters else "A model"
    quantization = subject.config.get("quantization")
    if isinstance(quantization, Mapping) and "bits" in quantization:
        mode = quantization.get("mode", "affine")
        precision = f"{quantization['bits']}-bit weights in groups of {quantization.get('group_size')} ({mode})"
        mixed = sum(isinstance(value, Mapping) for value in quantization.values())
        precision += f", {count(mixed, 'layer')} at another precision" if mixed else ""
    elif subject.kind == "gguf":
        precision = "one GGUF file"
    else:
        precision = "not quantized"
    return f"{what}: {precision}."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def overview(subject: Subject, facts: Facts) -> str:
    """The one picture of how good it is, with what it says: against what it costs where a benchmark was given."""
    if CHART_FILE not in facts["pictures"]:
        return ""
    if subject.benchmark:
        said = verdict(subject.benchmark.readable)
    else:
        measured = subject.report["fidelity"]
        same = f"same token {measured['same_top']:.1%}, " if measured.get("same_top") is not None else ""
        said = f"Beside the adapter on its base: {same}KL {number(measured['kl_mean'], 2)} nats per token."
    return f"{said}\n\n![Quality]({CHART_FILE})"


def answers(subject: Subject, facts: Facts) -> str:
    """Example questions with the answers that were given."""
    parts = []
    for question, given in subject.answers.items():
        rows = [(whose, shortened(" ".join(text.split()))) for whose, text in given.items()]
        parts.append(f"**{' '.join(question.split())}**\n\n{table(('', 'answer'), rows)}")
    return "\n\n".join(["## What it answers", *parts]) if parts else ""


def shortened(text: str, most: int = 300) -> str:
    """The beginning of a long answer, without signs that cannot be seen."""
    text = "".join(character for character in text if character.isprintable())
    return text if len(text) <= most else f"{text[:most].rstrip()} …"


# -- how it was made -------------------------------------------------------------------------------


def training(subject: Subject, facts: Facts) -> str:
    """Data, settings, losses and the curve; for a merged, extracted or imported adapter, what it came from."""
    metadata = subject.trained
    parts = []
    data = metadata.get("data") or {}
    if data.get("splits"):
        rows = ", ".join(f"{part.get('rows', 0):,} {name}" for name, part in data["splits"].items())
        parts.append(f"Data: `{data.get('source')}`, rows: {rows}.")
    losses = _losses(subject)
    if losses:
        parts.append(losses)
    parts += [f"![Loss by iteration]({CURVE_FILE})"] if CURVE_FILE in facts["pictures"] else []
    settings = metadata.get("training")
    if isinstance(settings, Mapping):
        parts.append(_details("All settings", settings_table(settings)))
    for key, title in (("merge", "Merged from"), ("extract", "Extracted from"), ("peft", "Imported from PEFT")):
        if isinstance(metadata.get(key), Mapping):
            parts.append(f"{title}:\n\n{settings_table(_flat(metadata[key]))}")
    title = "How the adapter was made" if subject.is_model else "How it was made"
    return "\n\n".join([f"## {title}", *parts]) if parts else ""


def _losses(subject: Subject) -> str:
    m = subject.trained
    parts = []
    if subject.validation_loss is not None:
        at = f" at iteration {m['iteration']}" if m.get("iteration") else ""
        parts.append(f"validation loss {number(subject.validation_loss, 4)}{at}")
    for name, points in zip(("training", "validation"), losses_of(m), strict=True):
        if points:
            parts.append(f"last {name} loss of the run {number(points[-1][1], 4)}")
    if isinstance(m.get("duration_seconds"), int | float):
        parts.append(f"trained in {duration(m['duration_seconds'])}")
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}. Losses are in nats per trained token." if text else ""


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Short entries only: long lists of layers belong to the recipe."""
    return {key: value for key, value in values.items() if len(value_text(value)) < 300}


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>" if body else ""


# -- figures ---------------------------------------------------------------------------------------


def evaluation(subject: Subject, facts: Facts) -> str:
    """The table of scores, "" if nothing was measured."""
    rows = []
    for scores in () if subject.is_model else subject.evaluations:
        for name, value in scores["metrics"].items():
            error = (scores.get("errors") or {}).get(name)
            spread = f" ± {number(error, 2)}" if error is not None else ""
            rows.append((scores["data"], name.replace("_", " "), number(value, 4) + spread))
    return f"## Evaluation\n\n{table(('data', 'measure', 'value'), rows)}" if rows else ""


def fidelity(subject: Subject, facts: Facts) -> str:
    """What fusing cost, from fuse_report.json."""
    report, measured = subject.report, subject.report.get("fidelity")
    if not report:
        return ""
    text = report.get("text") or {}
    parts = [f"Rounding: {report.get('method')}"]
    if text.get("calibration_rows") and report.get("method") == "calibrated":
        parts.append(f"calibrated on {text['calibration_rows']:,} rows of `{text.get('source')}`")
    if report.get("bits_per_weight"):
        parts.append(f"{report['bits_per_weight']:.2f} bits per weight over the whole model")
    if report.get("update_survival") is not None and report.get("survival") != []:
        parts.append(f"share of the update that survived {report['update_survival']:.4f} (mean cosine)")
    sections = ["## What fusing changed", ", ".join(parts) + "."]
    if measured and measured.get("tokens") and measured.get("rows"):
        sections.append(_fidelity_table(measured, f"`{text['source']}`" if text.get("source") else "text"))
    return "\n\n".join(sections)


def _fidelity_table(measured: Mapping[str, Any], source: str) -> str:
    alone = measured.get("base_kl") is None  # a full fine-tune: no adapter
    judged_by = "model before rounding" if alone else "base with the adapter"
    rows = [
        (judged_by, "0", "0", "0", "1", measured.get("loss_adapter")),
        (
            "**this model**",
            measured.get("kl_mean"),
            measured.get("kl_median"),
            measured.get("kl_p99"),
            measured.get("same_top"),
            measured.get("loss_fused"),
        ),
        ("base alone", measured.get("base_kl"), None, None, measured.get("base_same_top"), measured.get("loss_base")),
    ][: 2 if alone else 3]
    cells = [[cell if isinstance(cell, str) else number(cell, 4) for cell in row] for row in rows]
    headers = ("model", "KL", "KL median", "KL 99 %", "same top token", "loss")
    return (
        f"Measured on {measured.get('tokens'):,} tokens of {measured.get('rows'):,} rows of {source} that calibration "
        f"never saw. KL is KL({judged_by} ‖ model) in nats per token, loss is in nats per token.\n\n"
        f"{table(headers, cells)}"
    )


def speed(subject: Subject, facts: Facts) -> str:
    """The benchmark that was given, with its machine and conditions."""
    return f"## Speed and memory\n\n{clean_text(markdown(subject.benchmark).strip())}" if subject.benchmark else ""


def files_table(subject: Subject, facts: Facts) -> str:
    """The files and their sizes, as they go up."""
    sizes = staging.sizes(subject)
    rows = [(f"`{name}`", size(nbytes)) for name, nbytes in sizes.items()]
    return f"## Files\n\n{table(('file', 'size'), [*rows, ('in all', size(sum(sizes.values())))])}"


# -- use, limits and recipe -------------------------------------------------------------------------


def usage(subject: Subject, facts: Facts) -> str:
    """How to load it, by the libraries that can."""
    base = facts["base_id"] or subject.base.get("name") or "BASE"
    return f"## How to use it\n\n{example_of(subject)(facts['repo'], base)}"


def limits(subject: Subject, facts: Facts) -> str:
    """What follows from the metadata; nothing about the model's behavior, which nobody measured."""
    sentences = []
    base = subject.base
    if not subject.is_model:
        quantization = base.get("quantization")
        stored = f" stored at {quantization['bits']} bits" if isinstance(quantization, Mapping) else ""
        revision = f" (revision `{base['revision']}`)" if base.get("revision") else ""
        sentences.append(
            f"It needs its base model. It was made on {base_name(subject, facts)}{revision}{stored}; "
            "on other weights nobody has measured it."
        )
    settings = subject.trained.get("training")
    longest = settings.get("max_seq_length") if isinstance(settings, Mapping) else None
    if isinstance(longest, int) and longest > 0:
        sentences.append(f"Trained on texts of at most {longest:,} tokens.")
    if not subject.evaluations and not subject.report:
        sentences.append("No evaluation is recorded.")
    if facts["base"].license is None:
        sentences.append("The base model's license is not recorded here; it applies.")
    return "## Limits\n\n" + "\n".join(f"- {text}" for text in sentences) if sentences else ""


def recipe(subject: Subject, facts: Facts) -> str:
    """The command and the record that it can be made again from."""
    command = subject.metadata.get("command") or subject.recipe.get("command")
    parts = [f"```shell\n{command}\n```"] if command else []
    versions = subject.metadata.get("versions") or subject.recipe.get("versions")
    if isinstance(versions, Mapping):
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    if subject.recipe:
        parts.append(
            f"`{FUSE_RECIPE_FILE}` holds all settings; with base and adapter at hand the same bytes come "
            f"out of `mlx-adapters fuse --again {FUSE_RECIPE_FILE} OUT`."
        )
    recorded = (subject.metadata.get("sha256") or {}).get(ADAPTER_FILE)
    splits = (subject.trained.get("data") or {}).get("splits") or {}
    hashes = [(name, f"`{str(part.get('sha256'))[:16]}`") for name, part in splits.items() if part.get("sha256")]
    parts += [table(("data", "SHA-256"), hashes)] if hashes else []
    if recorded and subject.adapter and subject.adapter.iteration is None:
        parts.append(f"SHA-256 of `{ADAPTER_FILE}`: `{recorded}`.")
    return "\n\n".join(["## Recipe", *parts]) if parts else ""


SECTIONS = (what_it_is, overview, answers, usage, evaluation, fidelity, speed, training, limits, files_table, recipe)
