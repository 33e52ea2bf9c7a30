"""Stores of version 0.1, zarr groups: `goldens/zarr_store` was written by its writer, which is gone."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tokentm_jax as tm
from tokentm_jax.errors import InputError
from tokentm_jax.runs.store import open_maps
from tokentm_jax.runs.zarr import ANSWER

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
        ({"shapes": {**made["shapes"], "maps/gae": [2**30, 2**30]}}, r"a chunk of 2 examples takes .* MiB of memory"),
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


def test_a_store_that_never_answers(tmp_path):
    """A server that takes the connection and says nothing, in a process of its own: that must end, too."""
    code = (
        "from tokentm_jax.runs.zarr import open_zarr\n"
        "from tokentm_jax import InputError\n"
        "try: open_zarr('gs://some-bucket/maps')\n"
        "except InputError as error: print(error)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        servers = {"TENSORSTORE_GCS_HTTP_URL": f"http://{where}", "GCE_METADATA_ROOT": where, "HOME": str(tmp_path)}
        servers["TOKENTM_STORE_WAIT"] = "1"
        job = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **servers}, capture_output=True, text=True, timeout=60
        )
    said = (
        "the store gs://some-bucket/maps cannot be read: no answer in 1 s; the environment variable TOKENTM_STORE_WAIT"
    )
    assert job.returncode == 0 and job.stdout.startswith(said) and job.stdout.count("\n") == 1


def test_how_long_a_store_may_take_to_answer(monkeypatch):
    assert ANSWER < 10
    for given in ("soon", "0", "-1", "nan", "1e9"):
        monkeypatch.setenv("TOKENTM_STORE_WAIT", given)
        with pytest.raises(InputError, match=f"TOKENTM_STORE_WAIT must be a number of seconds .*, got '{given}'"):
            tm.open_maps(STORE)
    for given in ("", "30"):
        monkeypatch.setenv("TOKENTM_STORE_WAIT", given)
        assert len(tm.open_maps(STORE)) == 5
