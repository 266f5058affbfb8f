"""Image classifiers on the Hugging Face hub: a query, and fetching one of them for a scan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from bezoar.core.errors import MissingExtra, ModelError, SettingError
from bezoar.io.extras import one_line, printable, require

HUB = "hf:"
_KEYS = ("limit", "author", "filter", "sort")
_LIMIT = 1000
_TASK = "image-classification"
# What the readers of such folders look at; no code, no pickle where there are tensors.
_WANTED = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    Args:
        repo: Owner and name.
        revision: Commit, which stands for its contents.
    """

    repo: str
    revision: str

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{HUB}{self.repo}@{self.revision[:12]}"

    def fetch(self, folder: Path) -> Path:
        """Fetch configuration and weights of this very revision into ``folder``.

        Raises:
            MissingExtra: huggingface_hub is missing.
            ModelError: The hub cannot be reached, or the model has no safetensors.
        """
        hub = require("huggingface_hub", "hf")
        try:
            hub.snapshot_download(
                repo_id=self.repo, revision=self.revision, allow_patterns=list(_WANTED), local_dir=str(folder)
            )
        except Exception as error:  # the client lets those of its own HTTP library through
            raise _failed(error, f"{self.repo} cannot be fetched") from None
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{self.repo} has no safetensors", "Only those are fetched: a pickle could run code")
        return folder


def search(text: str) -> list[HubModel]:
    """Models that a query names.

    Args:
        text: ``hf:WORDS``, ``hf:OWNER/NAME`` for one model, both with ``?limit=..&author=..&filter=..&sort=..`` if need
            be: at most 1000 image classifiers, the most often downloaded first, by default.

    Raises:
        SettingError: It cannot be understood.
        MissingExtra: huggingface_hub is missing.
        ModelError: The hub cannot be reached.
    """
    words, _, rest = text.removeprefix(HUB).partition("?")
    options = dict(parse_qsl(rest, keep_blank_values=True))
    for name in options.keys() - set(_KEYS):
        raise SettingError(f"unknown part {printable(name)!r} of the query {text!r}", f"There are: {', '.join(_KEYS)}")
    try:
        limit = int(options.get("limit", _LIMIT))
        if limit < 1:
            raise ValueError
    except ValueError:
        raise SettingError(f"limit {options['limit']!r} is no number above 0", "Such as hf:resnet?limit=100") from None
    hub = require("huggingface_hub", "hf")
    try:
        if "/" in words and not options:
            info = hub.HfApi().model_info(words)
            return [HubModel(str(info.id), str(info.sha))]
        found = hub.HfApi().list_models(
            search=words or None,
            author=options.get("author"),
            filter=options.get("filter", _TASK),
            sort=options.get("sort", "downloads"),
            limit=limit,
            expand=["sha"],
        )
        return [HubModel(str(one.id), _revision(one)) for one in found]
    except BaseException as error:
        if not isinstance(error, Exception) or isinstance(error, MissingExtra | ModelError):
            raise
        raise _failed(error, f"the query {text!r} failed") from None


def _revision(found: Any) -> str:
    if not found.sha:
        raise ModelError(f"the hub gives no revision of {found.id}", "Without one, a change would go unnoticed")
    return str(found.sha)


def _failed(error: Exception, what: str) -> ModelError:
    return ModelError(f"{what}: {type(error).__name__}: {one_line(error)}", "Is there a network, and does it exist?")
