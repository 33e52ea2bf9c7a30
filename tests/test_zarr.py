"""Stores of version 0.1, zarr groups: `goldens/zarr_store` was written by its writer, which is gone."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tokentm_jax.errors import InputError
from tokentm_jax.runs.store import open_maps

STORE = Path(__file__).parent / "goldens/zarr_store"


def test_it_is_read_as_before():
    """The arrays of `zarr_store.npz` were read by version 0.1."""
    found, expected = open_maps(STORE), np.load(STORE.with_suffix(".npz"))
    assert found.keys == tuple(expected["keys"]) and len(found) == 5 and found.missing == 0
    for name, array in (("logits", found.logits), ("target", found.target), ("status", found.status)):
        np.testing.assert_array_equal(array[:], expected[name])
    np.testing.assert_array_equal(found.read("gae"), expected["gae"])
    np.testing.assert_array_equal(found.read("gae", [4, 1]), expected["gae"][[4, 1]])
    assert found.skipped == {"03-é.png": str(expected["reason"][0])}
    assert found.find("gae", {}, [("04-é.png", None), ("03-é.png", None)])[0] == [0]
    assert "5 examples, 4 done, 1 skipped, complete\ntiny on the folder" in repr(found)


def flip(file):
    content = file.read_bytes()
    file.write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])


def swap(file):
    """Chunk 0 takes the place of chunk 1: the file's own checksum is right."""
    place = list(file.parts)
    place[place.index("c") + 1] = "0"
    shutil.copy(Path(*place), file)


def wait_forever(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (flip, "maps/gae/c/1/0/0"),
        (lambda file: file.write_bytes(b""), "logits/c/1/0"),
        (Path.unlink, "scale/gae/c/1"),
        (Path.unlink, "checksum/c/1/0"),
        (swap, "maps/gae/c/1/0/0"),
        (swap, "key/c/1/0"),
        (wait_forever, "target/c/1"),
        (flip, "status/c/1"),
        (lambda file: os.truncate(file, 2**20), "target/c/1"),
    ],
)
def test_damage_is_told_where_it_is_read(tmp_path, damage, file):
    shutil.copytree(STORE, tmp_path / "maps")
    damage(tmp_path / "maps" / file)
    found, good = open_maps(tmp_path / "maps"), open_maps(STORE)
    with pytest.raises(InputError, match=r"cannot be read \(.*\): compute the maps again, with another --out"):
        (found.read("gae", [2]), found.logits[2], found.key[2], found.target[2])
    np.testing.assert_array_equal(found.read("gae", [0, 1, 4]), good.read("gae", [0, 1, 4]))


def test_what_is_not_done_has_fill_values(tmp_path):
    shutil.copytree(STORE, tmp_path / "maps")
    (tmp_path / "maps/status/c/0").unlink()
    found = open_maps(tmp_path / "maps")
    assert found.missing == 1 and "1 of 3 chunks missing" in repr(found)
    assert found.keys[:2] == ("", "") and np.isnan(found.read("gae")[:2]).all() and found.target[1] == -1


def test_a_provenance_is_not_taken_on_trust(tmp_path):
    out = tmp_path / "maps"
    shutil.copytree(STORE, out)
    root = json.loads((out / "zarr.json").read_text())
    made = root["attributes"]["tokentm"]
    for change, sentence in (
        ({"format": 3}, "has the layout 3"),
        ({"chunk_size": 320_000_000_000}, "'chunk_size' must be less than or equal to 65536"),
        ({"examples": 10**15}, "'examples' must be less"),
        ({"methods": ["../../x"]}, r"'methods'.0. is wrong .*pattern"),
        ({"shapes": {**made["shapes"], "maps/gae": [2**30, 2**30]}}, r"a chunk takes .* MiB of memory"),
        ({"shapes": {**made["shapes"], "maps/gae": [2, 4]}}, r"maps/gae/zarr.json cannot be read .*shape"),
        ({"dtype": "float32"}, r"cannot be read .*data_type"),
    ):
        (out / "zarr.json").write_text(json.dumps({**root, "attributes": {"tokentm": {**made, **change}}}))
        with pytest.raises(InputError, match=sentence):
            open_maps(out)
    for bad, sentence in (
        (b"{", r"zarr.json is not valid JSON"),
        (b"null", r"its zarr.json has something else"),
        (b" " * (2**24 + 1), r"zarr.json is larger than 16 MiB"),
    ):
        (out / "zarr.json").write_bytes(bad)
        with pytest.raises(InputError, match=sentence):
            open_maps(out)


def test_it_is_read_from_an_object_store():
    files = fsspec.filesystem("memory")
    files.put(str(STORE), "/zarr_store", recursive=True)
    found, good = open_maps("memory://zarr_store"), open_maps(STORE)
    assert found.keys == good.keys and found.skipped == good.skipped
    np.testing.assert_array_equal(found.read("gae"), good.read("gae"))
