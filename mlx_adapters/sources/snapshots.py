"""A model of the Hub in huggingface_hub's cache: whole, completed, or with what it lacks by name.

A cache need not be ours: `mlx_lm.load` fetches less than we do, other programs fetch file by file, downloads are cut
off. What the cache's own listing of the commit shows to be there is taken without asking anybody. What it lacks, and a
cache without a listing, is completed while the Hub answers; where it does not, what can be loaded is loaded.
"""

import contextlib
import glob
import sys
from collections.abc import Mapping
from pathlib import Path

from mlx_adapters.checkpoints.contents import MODEL_CONFIG, WEIGHTS, belongs, is_loaded, is_tokenizer
from mlx_adapters.errors import AdapterError, HubError, NotFoundError, refusals
from mlx_adapters.models.base import Base
from mlx_adapters.sources import hub
from mlx_adapters.storage import files
from mlx_adapters.storage.tensor_names import CONFIG_FILE
from mlx_adapters.system.door import fetched_by_mlx_lm, make_module


def model_snapshot(repo: str, revision: str | None, *, download: bool = True, everything: bool = False) -> Path:
    """The folder of a model in the cache, downloaded or completed where that is needed and allowed.

    everything: also what goes along with a model but is not needed to load it, such as a licence.
    Raises HubError, StorageError, FormatError or ModelError for what cannot be had or used; without `download`
    NotFoundError for what is not on this machine.
    """
    here = hub.cached(repo, revision)
    listed = hub.cached_tree(repo, here.name) if here else None
    if here and listed is not None:
        refuse_other_forms(repo, listed)
        if not _missing(here, listed, everything):
            return here
    lacks = _lacking(here, listed or {}) if here else [MODEL_CONFIG]
    if not download:
        if here and not lacks:
            return here
        raise NotFoundError(f"'{repo}' is not on this machine yet.", f"'mlx-adapters download {repo}' fetches it.")
    try:
        hub.require_online(repo, revision, here)
        return _download(repo, here.name if here and not lacks else revision)
    except HubError as error:
        if here is None:
            raise
        if not lacks:
            hub.log.info("'%s' comes from the cache, commit %s. %s", repo, here.name[:12], error.message)
            return here
        names = ", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else "")
        message = f"The copy of '{repo}' in the cache lacks {names}. {error.message}"
        raise HubError(message, "once the Hub can be reached, the same command fetches what is missing.") from error


def _lacking(folder: Path, listed: Mapping[str, int]) -> list[str]:
    """What keeps the model in `folder` from being loaded, as far as its files and its listing tell: names of files, or
    of their kind."""
    base = Base(str(folder), folder)
    lacks = [] if (folder / MODEL_CONFIG).is_file() else [MODEL_CONFIG]
    lacks += [name for name in _missing(folder, listed, False) if is_loaded(name) or is_tokenizer(name)]
    with contextlib.suppress(AdapterError):
        lacks += base.lacking
    try:
        _ = base.weight_files
    except NotFoundError:
        lacks += [] if any(map(is_loaded, lacks)) else ["its weights (model*.safetensors)"]
    except AdapterError as error:
        lacks += [] if any(map(is_loaded, lacks)) else [f"a whole weight file ({error.message})"]
    if not any(is_tokenizer(name) for name in (*lacks, *(path.name for path in folder.iterdir()))):
        lacks.append("its tokenizer")
    return list(dict.fromkeys(lacks))


def _missing(folder: Path, listed: Mapping[str, int], everything: bool) -> list[str]:
    """The files of a model that are listed and not there, or not in full."""
    wanted = [name for name in belongs(listed) if everything or fetched_by_mlx_lm(name)]
    return [name for name in wanted if not _is_whole(folder / name, listed[name])]


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _download(repo: str, revision: str | None) -> Path:
    """Fetch what of a model is not in the cache. Its config is looked at before anything large is fetched."""
    folder, commit = hub.snapshot(repo, revision, [MODEL_CONFIG, CONFIG_FILE])
    listed = hub.tree(repo, commit)
    refuse_other_forms(repo, listed)
    if not (folder / MODEL_CONFIG).is_file():
        return folder
    _refuse_unusable(Base(repo, folder))
    missing = _missing(folder, listed, everything=True)
    hub.require_room(repo, sum(listed[name] for name in missing))
    damaged = [name for name in missing if (folder / name).exists()]
    for name in damaged:
        files.remove(folder / name)
    for names, again in ((damaged, True), (belongs(listed), False)):
        if names:
            patterns = [glob.escape(name) for name in names]
            hub.snapshot(repo, commit, patterns, show_progress=sys.stderr.isatty(), again=again)
    return folder


def _refuse_unusable(base: Base) -> None:
    """Raise FormatError or ModelError for a config that mlx-lm can make nothing of. Nothing is computed."""
    config = base.config
    if config.get("model_file"):  # code of its own, which is not here yet
        return
    with refusals(lambda why: hub.Unusable(f"mlx-lm cannot load '{base.name}': {why}.", "name another base.")):
        make_module(config)


def refuse_other_forms(repo: str, names: Mapping[str, int]) -> None:
    """Raise `hub.Unusable` for a repository whose weights are all in a form that mlx-lm does not open."""
    others = sorted(name for name in names if WEIGHTS.fullmatch(name) and not name.startswith("."))
    if any(map(is_loaded, names)) or CONFIG_FILE in names or not (others or MODEL_CONFIG in names):
        return
    kinds = ", ".join(dict.fromkeys(f"*{Path(name).suffix}" for name in others[:50]))
    what = f"they are {kinds}, such as {others[0]}" if others else "there are none"
    hint = "name the repository of the model that it was made from: its page tells which."
    if not any(name.endswith(".gguf") for name in others):
        hint = f"name one with safetensors; a pull request there may hold them: {repo}@refs/pr/1."
    raise hub.Unusable(f"'{repo}' has no weights that mlx-lm loads (model*.safetensors): {what}.", hint)
