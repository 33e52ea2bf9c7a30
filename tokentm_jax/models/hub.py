"""Models of the Hugging Face Hub, as folders of its cache."""

from pathlib import Path

from tokentm_jax.errors import InputError
from tokentm_jax.files import reason
from tokentm_jax.models.layouts import CONFIG, INDEX, OPEN_CLIP, OPEN_CLIP_WEIGHTS, OTHERS, WEIGHTS, shards
from tokentm_jax.models.text_layouts import POOLING

HUB = "hf-hub:"


def download(name: str) -> Path:
    """The folder of "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION", through the hub's cache.

    Only the files that `layouts` reads are fetched. Raises InputError when the hub cannot be reached, or has no such
    model.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise InputError(f"{name} needs the hub's client: pip install 'tokentm_jax[hub]'") from None
    repository, _, revision = name.removeprefix(HUB).partition("@")

    def first_of(files: tuple[str, ...]) -> Path:
        """The first of the files that the hub has."""
        try:
            return Path(huggingface_hub.hf_hub_download(repository, files[0], revision=revision or None))
        except EntryNotFoundError:
            if len(files) == 1:
                raise
            return first_of(files[1:])

    wanted: tuple[str, ...] = ()
    try:
        wanted = (OPEN_CLIP, CONFIG)
        folder = first_of(wanted).parent
        wanted = (*(OPEN_CLIP_WEIGHTS if (folder / OPEN_CLIP).is_file() else WEIGHTS), INDEX)
        if first_of(wanted).name == INDEX:
            for shard in shards(folder):
                wanted = (shard,)
                first_of(wanted)
        for file in (*OTHERS, POOLING):
            wanted = (file,)
            try:
                first_of(wanted)
            except EntryNotFoundError:
                continue
    except InputError:
        raise
    except Exception as error:  # the client lets errors of several network libraries through
        raise InputError(f"{' or '.join(wanted)} of {name} could not be downloaded ({reason(error)})") from None
    return folder
