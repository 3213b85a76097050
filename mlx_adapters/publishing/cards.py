"""Model cards, made from metadata only: what a file does not say is left out, nothing is invented.

A card is YAML front matter that the Hub validates (hf.co/docs/hub/model-cards), sections made anew each time,
one part between two marks that belongs to the user and is carried over, and a stamp of the sections' lines, by
which the next card knows those that somebody else wrote.
"""

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlx_adapters.benchmarking.page import overview
from mlx_adapters.display import charts, layout, svg
from mlx_adapters.display.layout import Chart
from mlx_adapters.display.notebook import loss_curve
from mlx_adapters.errors import ConfigError, did_you_mean
from mlx_adapters.models.metadata import losses_of
from mlx_adapters.publishing.card_sections import CHART_FILE, CURVE_FILE, SECTIONS
from mlx_adapters.publishing.subject import Subject
from mlx_adapters.sources.references import hub_id
from mlx_adapters.storage import files
from mlx_adapters.storage.replacing import FRONT, handwritten, is_ours, lines_by_hand, made_lines, stamp

MINE, END_MINE = "<!-- yours: this part survives the next publish -->", "<!-- /yours -->"
# Keys of the front matter that are made anew each time; others that the user added are kept.
OWN = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "model-index")

# hf.co/docs/hub/repositories-licenses
_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0  bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc  cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0  cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0  cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1  eupl-1.2 agpl-3.0 gfdl
gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c  ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa  unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1  llama3.2 llama3.3 llama4
grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())


@dataclass(frozen=True)
class BaseCard:
    """What a card says of the base model: its id on the Hub, license and languages, where known."""

    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: Any = None
    note: str | None = None


@dataclass(frozen=True)
class Card:
    """A README.md: `front` is its YAML, `body` what is made, `mine` the part the user wrote."""

    front: dict[str, Any]
    body: str
    mine: str = ""
    pictures: dict[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        front = yaml.safe_dump(self.front, sort_keys=False, allow_unicode=True, width=110)
        return f"---\n{front}---\n\n{self.body}\n\n{MINE}\n{self.mine}\n{END_MINE}\n{stamp(self.body)}\n"

    def _repr_markdown_(self) -> str:
        text = f"{self.body}\n\n{self.mine}"
        for name, picture in self.pictures.items():  # a notebook has no file beside it
            data = base64.b64encode(picture.encode()).decode()
            text = text.replace(f"]({name})", f"](data:image/svg+xml;base64,{data})")
        return text

    def check(self) -> "Card":
        """Raise ConfigError for a license or base that the Hub would refuse; return self."""
        if (license := self.front.get("license")) is not None:
            _check_license(license)
        bases = self.front.get("base_model")
        for base in [bases] if isinstance(bases, str) else bases or []:
            _check_base(base)
        return self


def check_given(license: str | None, base_model: str | None) -> None:
    """Raise ConfigError for a `license` or `base_model` that the Hub would refuse."""
    if license is not None:
        _check_license(license)
    if base_model is not None:
        _check_base(base_model)


def _check_license(license: Any) -> None:
    if license not in LICENSES:
        raise ConfigError(
            f"The card's license '{license}' is not one that the Hub knows.",
            did_you_mean(str(license), LICENSES, "give it with --license; 'other' needs license_name in the card."),
        )


def _check_base(base: Any) -> None:
    if hub_id(str(base)) != (str(base), None):
        raise ConfigError(f"The card's base model '{base}' is no Hub id.", "give --base-model user/name.")


def parse_front(text: str) -> dict[str, Any]:
    """The YAML front matter of a README, {} if there is none that can be read."""
    match = FRONT.match(text)
    try:
        front = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return front if isinstance(front, dict) else {}


def lost_lines(old: str, new: Card) -> int:
    """How many lines that somebody wrote outside the marks of `old` are not in `new`.

    The stamp of `old` tells them from lines that were made, maybe of other metadata.
    """
    known = set(made_lines(str(new)))
    return sum(line not in known for line in lines_by_hand(old)) if is_ours(old) else 0


def base_card(name: str, text: str, is_hub_id: bool) -> BaseCard:
    """What `text`, the README of the base `name`, tells; "" if there is none.

    A base that is not on the Hub itself (a local conversion) may name the model it came from.
    """
    front = parse_front(text)
    origin = front.get("base_model")
    origin = origin[0] if isinstance(origin, list) and origin else origin
    note = None
    if not is_hub_id and origin:
        heading = re.search(r"^# (.+)$", text, re.M)
        note = f"Trained on a local conversion of that model{f' ({heading[1].strip()})' if heading else ''}."
    license = front.get("license")
    return BaseCard(
        hub_id=name.partition("@")[0] if is_hub_id else origin if isinstance(origin, str) else None,
        license=license if isinstance(license, str) else None,
        license_name=front.get("license_name"),
        license_link=front.get("license_link"),
        language=front.get("language"),
        note=note,
    )


def make_card(
    subject: Subject,
    base: BaseCard,
    *,
    repo: str | None = None,
    old: str = "",
    license: str | None = None,
    base_model: str | None = None,
) -> Card:
    """The card of `subject`. `old` is the README that is there: the user's part and keys are taken over.

    Raises ConfigError for a `license` or `base_model` that the Hub would refuse.
    """
    check_given(license, base_model)
    front = front_matter(subject, base, license, base_model or base.hub_id)
    replaced = (*OWN, "license", "license_name", "license_link") if license else OWN
    before = {k: v for k, v in parse_front(old).items() if k not in replaced}
    tags = [*front["tags"], *(t for t in before.pop("tags", None) or [] if t not in front["tags"])]
    front = front | before | {"tags": tags}
    pictures = _pictures(subject)
    facts = {"repo": repo or "user/repo", "base": base, "base_id": front.get("base_model"), "pictures": pictures}
    parts = [f"# {repo.partition('/')[2] if repo else subject.name}"]
    parts += filter(None, (section(subject, facts) for section in SECTIONS))
    return Card(front, "\n\n".join(parts), handwritten(old), pictures)


def front_matter(subject: Subject, base: BaseCard, license: str | None, base_id: str | None) -> dict[str, Any]:
    """The YAML keys, in a fixed order."""
    data = subject.metadata.get("data") or {}
    source = str(data.get("source") or "")
    front = {
        "license": license or base.license,
        "license_name": None if license else base.license_name,
        "license_link": None if license else base.license_link,
        "language": base.language,
        "library_name": subject.library,
        "pipeline_tag": "text-generation",
        "base_model": base_id,
        "base_model_relation": subject.relation if base_id else None,
        "datasets": [source.removeprefix("hf:")] if source.startswith("hf:") else None,
        "tags": subject.tags,
        "model-index": _model_index(subject),
    }
    return {key: value for key, value in front.items() if value not in (None, "", [])}


def _model_index(subject: Subject) -> list[dict[str, Any]] | None:
    """Evaluation results as the Hub wants them (hf.co/docs/hub/model-cards#evaluation-results)."""
    results = []
    for scores in subject.evaluations:
        dataset = str(scores["data"])
        metrics = [
            {"type": name, "name": name.replace("_", " "), "value": value} for name, value in scores["metrics"].items()
        ]
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": dataset, "type": dataset.removeprefix("hf:")},
                "metrics": metrics,
            }
        )
    return [{"name": subject.name, "results": results}] if results else None


def _pictures(subject: Subject) -> dict[str, str]:
    """File name -> SVG text: how good it is, and the losses."""
    chart, curve = _chart(subject), loss_curve(*losses_of(subject.trained))
    return ({CHART_FILE: svg.picture(chart)} if chart else {}) | ({CURVE_FILE: curve} if curve else {})


def _chart(subject: Subject) -> Chart | None:
    """Quality against size and speed if a benchmark was given, else how far a fused model is from its adapter."""
    if subject.benchmark:
        drawn = list(overview(subject.benchmark).values())
        return layout.stacked_up(drawn, "Quality, size and speed") if drawn else None
    found = subject.report.get("fidelity") or {}
    known = {key: value for key, value in found.items() if isinstance(value, int | float)}
    if "kl_mean" not in known or "loss_fused" not in known:
        return None
    first = "adapter" if "base_kl" in known else "before rounding"
    kinds = {first: ("loss_adapter", ""), "this model": ("loss_fused", "kl_mean"), "base": ("loss_base", "base_kl")}
    return charts.distances(
        {name: (known.get(loss), known.get(kl) if kl else 0.0) for name, (loss, kl) in kinds.items()}
    )


def write_readme(card: Card, folder: Path) -> Path:
    """Write README.md and its pictures into `folder`."""
    for name, text in card.pictures.items():
        files.write_text(folder / name, text)
    files.write_text(folder / "README.md", str(card))
    return folder / "README.md"
