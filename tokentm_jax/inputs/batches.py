"""Examples of a data set as batches of one shape, decoded before the device needs them."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge

from tokentm_jax.data.examples import Example, Source
from tokentm_jax.data.photos import decoding
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.inputs.reader import PROFILES, Reader
from tokentm_jax.validation import checked

WORKERS = 4  # threads that decode; the decoders leave Python's lock
AHEAD = 2  # batches decoded before they are asked for


class Batch(NamedTuple):
    """Arrays of `size` examples, of which the first `len(keys)` count; the rest repeats the last."""

    keys: tuple[str, ...]
    inputs: Any  # what `Reader.stacked` gives; None without keys
    labels: np.ndarray  # int32 [size], -1 where unknown
    masks: np.ndarray | None  # [size, ...]
    without: Any = None  # the inputs without their parts, where the source has them
    others: np.ndarray | None = None  # int32 [size], the classes of these, -1 where unknown; None without keys


def batches(
    source: Source,
    reader: Reader,
    batch_size: int,
    profile: str = "default",
    *,
    indices: Sequence[int] | None = None,
    skipped: dict[str, str] | None = None,
) -> Iterator[Batch]:
    """Ready arrays of `batch_size` examples each, decoded ahead in threads.

    Every batch is made of `batch_size` consecutive `indices` (default: all in order; the last may have fewer), without
    those that cannot be read: `skipped` gets their keys and the reasons.
    """
    if profile not in PROFILES:
        raise suggest("profile", profile, PROFILES)
    checked("the batch size", Annotated[int, Ge(1)], batch_size)
    chosen = range(len(source)) if indices is None else indices
    groups = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    skipped = {} if skipped is None else skipped

    def one(index: int) -> tuple[str, Any]:
        try:
            with decoding.turn():  # until the photo is gone, and only the model's input is left
                example = source[index]
                without = None
                if example.without is not None:
                    without, _ = reader.levels(Example(example.key, example.without), profile)
                return example.key, (*reader.levels(example, profile), example.label, without, example.other)
        except InputError as error:
            return source.keys[index], str(error)

    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque[list[Future[tuple[str, Any]]]] = deque()
        try:
            for i in range(len(groups) + AHEAD):
                if i < len(groups):
                    waiting.append([pool.submit(one, index) for index in groups[i]])
                if i >= AHEAD:
                    results = [future.result() for future in waiting.popleft()]
                    skipped |= {key: result for key, result in results if isinstance(result, str)}
                    yield _batch([(k, r) for k, r in results if not isinstance(r, str)], batch_size, reader)
        finally:
            for group in waiting:
                for future in group:
                    future.cancel()


def _batch(results: list[tuple[str, Any]], size: int, reader: Reader) -> Batch:
    if not results:
        return Batch((), None, np.full(size, -1, np.int32), None)
    keys, found = zip(*results, strict=True)
    every = zip(*(*found, *(found[-1],) * (size - len(found))), strict=True)
    samples, masks, labels, without, others = every
    known, replaced = (
        np.array([-1 if label is None else label for label in own], np.int32) for own in (labels, others)
    )
    masks = None if masks[0] is None else reader.stacked_masks(masks)
    without = None if without[0] is None else reader.stacked(without)
    return Batch(keys, reader.stacked(samples), known, masks, without, replaced)
