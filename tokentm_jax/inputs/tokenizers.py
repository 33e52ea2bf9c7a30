"""The tokenizers of models, from the texts of their files, by the library `tokenizers`."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import reason

# Radford et al. (ICML 2021): what counts as a word before byte pairs are merged.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_START, _END = "<|startoftext|>", "<|endoftext|>"


@contextmanager
def one_sentence(files: tuple[Path, ...]) -> Iterator[None]:
    """Turns whatever the tokenizers library raises into one InputError; its panics are no Exceptions."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        names = " and ".join(map(str, files))
        raise InputError(f"{names}: no tokenizer that can be used ({reason(error)})") from None


@functools.lru_cache(maxsize=4)
def engine(contents: tuple[str, ...], context: int, *files: Path) -> Any:
    """A `tokenizers.Tokenizer` of these texts of files that cuts texts to `context` tokens. InputError for damaged
    ones, and without the extra."""
    tokenizers = require("tokenizers", "text", "reading texts")
    with one_sentence(files):
        of_one = tokenizers.Tokenizer.from_str
        found = of_one(contents[0]) if len(contents) == 1 else _byte_pairs(contents[0], contents[1], files[0])
        found.no_padding()
        found.enable_truncation(context)
    return found


def _byte_pairs(vocabulary: str, merges: str, where: Path) -> Any:
    """CLIP's tokenizer from its vocabulary (JSON) and the merges, one pair a line, below a line with the version."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = json.loads(vocabulary)
    if not isinstance(ids, dict) or not {_START, _END} <= ids.keys():
        raise InputError(f"{where} must be an object from token to id, with {_START} and {_END}")
    lines = [line for line in merges.splitlines() if line.strip() and not line.startswith("#version")]
    pairs: Any = [tuple(line.split()) for line in lines]
    engine = Tokenizer(models.BPE(ids, pairs, end_of_word_suffix="</w>", unk_token=_END))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    engine.post_processor = processors.RobertaProcessing(
        (_END, ids[_END]), (_START, ids[_START]), trim_offsets=False, add_prefix_space=False
    )
    return engine
