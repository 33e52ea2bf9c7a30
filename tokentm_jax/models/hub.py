"""Models of the Hugging Face Hub, through its client's cache: whole folders, and timm's weights by their name."""

import threading
from pathlib import Path
from typing import Any

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import quiet, reason
from tokentm_jax.models.architectures import repository_of
from tokentm_jax.models.folders import CONFIG, INDEX, OPEN_CLIP, OPEN_CLIP_WEIGHTS, OTHERS, WEIGHTS, shards
from tokentm_jax.models.text_layouts import MODULES, pooling_file

HUB = "hf-hub:"
PATIENCE = 5.0  # seconds for each step of the hub's first answer


def download(name: str) -> Path:
    """The folder of "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", through the hub's cache. Raises InputError.

    Only the files that `layouts` reads are fetched, all of one commit.
    """
    client = require("huggingface_hub", "hub", name)
    repository, _, revision = name.removeprefix(HUB).partition("@")
    with quiet("huggingface_hub"):
        files = _Repository(client, name, repository, revision or None)
        folder = files.first(OPEN_CLIP, CONFIG).parent
        weights = files.first(*(OPEN_CLIP_WEIGHTS if (folder / OPEN_CLIP).is_file() else WEIGHTS), INDEX)
        for shard in shards(folder) if weights.name == INDEX else ():
            files.first(shard)
        for file in (*OTHERS, MODULES):
            files.find(file)
        files.find(pooling_file(folder))  # which the modules name
    return folder


def download_weights(name: str) -> tuple[str, Path]:
    """A name of timm's table -> the name with its tag, and the file of timm's weights. Raises InputError."""
    tagged, repository = repository_of(name)
    client = require("huggingface_hub", "hub", f"{name} without a checkpoint")
    with quiet("huggingface_hub"):
        return tagged, _Repository(client, tagged, repository, None).first(WEIGHTS[0])


class _Repository:
    """The files of one revision of a repository; from the client's cache if the hub does not answer."""

    def __init__(self, client: Any, name: str, repository: str, revision: str | None) -> None:
        self.client, self.name, self.repository, self.revision = client, name, repository, revision
        self.silence = self._asked()  # why the hub does not answer; None: it does

    def _asked(self) -> str | None:
        """One request, in a thread. The client would retry for a minute, and wait for a silent name server."""
        from huggingface_hub.errors import HfHubHTTPError

        silent = "the Hugging Face Hub does not answer"
        answer: list[str | None] = [f"{silent} within {2 * PATIENCE:g} seconds"]

        def ask() -> None:
            try:
                url = self.client.hf_hub_url(self.repository, CONFIG, revision=self.revision)
                self.client.get_hf_file_metadata(url, timeout=PATIENCE)
                answer[0] = None
            except HfHubHTTPError as error:  # an answer; what it means is decided for each file
                down = error.response is not None and error.response.status_code >= 500
                answer[0] = f"{silent}: {reason(error)}" if down else None
            except Exception as error:  # the client raises errors of several network libraries
                answer[0] = f"{silent}: {reason(error)}"

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2 * PATIENCE)
        return answer[0]

    def first(self, *files: str) -> Path:
        """The first of these files that the repository has. InputError if it has none of them."""
        found = self.find(*files)
        if found is None:
            raise self._fault(" or ".join(files), "the repository has no such file")
        return found

    def find(self, *files: str) -> Path | None:
        """As `first`, but None if the repository has none of them. InputError if that is unknown."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        offline = self.silence is not None
        for file in files:
            try:
                where = {"revision": self.revision, "local_files_only": offline}
                found = Path(self.client.hf_hub_download(self.repository, file, **where))
            except LocalEntryNotFoundError as error:  # also an EntryNotFoundError: the hub may have the file
                known = self.client.try_to_load_from_cache(self.repository, file, revision=self.revision)
                if not offline or known is None or isinstance(known, str):  # else the cache states that it is missing
                    raise self._fault(file, self.silence or reason(error.__cause__ or error)) from None
            except EntryNotFoundError:
                continue
            except Exception as error:
                raise self._fault(file, reason(error)) from None
            else:
                if len(Path(file).parts) == 1:
                    self.revision = found.parent.name  # a folder of the cache is a commit: use it for the others
                return found
        return None

    def _fault(self, files: str, cause: str) -> InputError:
        return InputError(f"{files} of {self.name} could not be downloaded ({cause})")
