"""Ray, Beam and an object store for real, on this machine: the same bytes as by one process, whatever is killed.

TOKENTM_KILLS is the number of workers that are killed under each engine.
"""

import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dataset import content
from test_dataset_kills import OPTIONS

import tokentm_jax as tm
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.images import HALF, Preprocessing
from tokentm_jax.models.architectures import build
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.models.vit import init_params
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.store import open_maps

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # warnings of Ray and Beam are not ours

KILLS = int(os.environ.get("TOKENTM_KILLS", "2"))
SHARDS, IMAGES = 6, 5  # the last batch of a shard is not full
DELAY = 0.7  # seconds until the server answers: kills strike before the end
WORKERS = {"ray": "ray::Job", "beam": "sdk_worker_main"}  # in the command lines of workers
TWO = {"ray": {"workers": 2, "num_cpus": 1}, "beam": {"direct_num_workers": 2}}
PACKAGES = {"ray": "ray", "beam": "apache_beam"}
NAME = "{:06}.tar"


@pytest.fixture(params=["ray", "beam"])
def engine(request):
    if find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"{PACKAGES[request.param]} is not installed")
    return request.param


def write_shards(folder, count):
    """Tars of WebDataset; some images are damaged."""
    rng = np.random.default_rng(0)
    for i in range(count):
        with tarfile.open(folder / NAME.format(i), "w") as tar:
            for j in range(IMAGES):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(image, "PNG")
                files = {"png": b"damaged" if i % 3 == 1 and j == 2 else image.getvalue(), "cls": b"%d" % (j % 4)}
                for suffix, file in files.items():
                    info = tarfile.TarInfo(f"{i:06}{j:03}.{suffix}")
                    info.size = len(file)
                    tar.addfile(info, io.BytesIO(file))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import jax

    module = build(OPTIONS)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return write_checkpoint(
        path, module, init_params(module, jax.random.key(0)), Preprocessing((32, 32), 1.0, "bilinear", **HALF)
    )


@pytest.fixture(scope="module")
def explainer(checkpoint):
    return tm.Explainer(checkpoint=checkpoint, methods=("tokentm", "gae"), batch_size=4)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("tars"), SHARDS)


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """The environment of workers and commands."""
    cache = str(tmp_path_factory.mktemp("cache"))
    more = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, "RAY_DEDUP_LOGS": "0"}
    paths = os.pathsep.join([str(Path(tm.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, **more}


@pytest.fixture(autouse=True)
def inherited(around, monkeypatch):
    for name, value in around.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def cluster(around):
    """Ray for the tests of this process."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": around["PYTHONPATH"]}})
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def command(checkpoint):
    """The command without source and --out; its processes have none of the settings of conftest.py."""
    more = ["--checkpoint", str(checkpoint), "--methods", "tokentm,gae", "--batch-size", "4"]
    return [sys.executable, "-m", "tokentm_jax", "dataset", *more]


def test_the_same_bytes_as_by_one_process(engine, request, explainer, command, tars, tmp_path, monkeypatch):
    """Also from relative paths, in two runs, and where shards with skipped images are computed again."""
    if engine == "ray":
        request.getfixturevalue("cluster")
    monkeypatch.chdir(tmp_path)
    source, options = f"{tars}/{{000000..{SHARDS - 1:06}}}.tar", TWO[engine]
    subprocess.run([*command, source, "--out", "local"], check=True)
    progress = []
    run = partial(explain_dataset, explainer, source, engine, engine=engine, engine_options=options)
    first = run(lambda *counts: progress.append(counts), process=0, processes=3)
    assert (first.shards, first.computed) == (2, 2) and open_maps(engine).missing == SHARDS - 2
    assert run().computed == SHARDS - 2
    assert content(tmp_path / engine) == content(tmp_path / "local")
    assert progress[0] == (0, 0, 0) and progress[-1] == (2 * IMAGES, 2 * IMAGES, 0)
    assert run(retry_skipped=True).computed == 2
    assert content(tmp_path / engine) == content(tmp_path / "local")
    assert len(open_maps(engine)) == SHARDS * IMAGES and len(open_maps(engine).skipped) == 2


def test_errors_of_workers_are_one_sentence(engine, request, explainer, tars, tmp_path):
    if engine == "ray":
        request.getfixturevalue("cluster")
    own = write_shards(tmp_path, 2)
    run = partial(explain_dataset, explainer, f"{own}/*.tar", str(tmp_path / "maps"), engine=engine)
    run(process=0, processes=2, engine_options=TWO[engine])
    (own / NAME.format(1)).write_bytes(b"changed")
    stamps = "its size and its time or checksum were '.*' and are '.*'; choose another --out$"
    with pytest.raises(InputError, match=rf"000001\.tar has changed since the store was begun: {stamps}"):
        run(engine_options=TWO[engine])
    with pytest.raises(InputError, match="was made with methods"):
        other = tm.Explainer(checkpoint=explainer.checkpoint, methods=("gae",), batch_size=4)
        explain_dataset(other, f"{own}/*.tar", str(tmp_path / "maps"), engine=engine, engine_options=TWO[engine])
    Image.new("RGB", (32, 32)).save(own / "photo.png")
    with pytest.raises(InputError, match="give its path"):
        explain_dataset(explainer, open_source(own), str(tmp_path / "more"), engine=engine)


# ---- kills ----------------------------------------------------------------------------------------------------------


class Slow(SimpleHTTPRequestHandler):
    """Files after a moment, so that a run takes long without computing."""

    def do_GET(self):
        if self.path.endswith(".tar"):
            time.sleep(DELAY)
        with suppress(ConnectionError):
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """The URL of shards that are answered slowly, and their folder."""
    pytest.importorskip("aiohttp")
    count = 30 + 10 * KILLS
    folder = write_shards(tmp_path_factory.mktemp("slow"), count)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{{000000..{count - 1:06}}}.tar", folder
    server.shutdown()


@pytest.fixture(scope="module")
def uninterrupted(slow, command, around, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "maps"
    subprocess.run([*command, slow[0], "--out", str(out)], check=True, env=around)
    return content(out)


def parts(out):
    return len(list(out.glob("shards/*/[0-9]*.parquet")))


def found(mark, text):
    """The processes that have inherited the mark, with this text in their command line."""
    wanted = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (process / "cmdline").read_bytes()
            if text in line and not line.startswith(b"/bin/sh") and mark in (process / "environ").read_bytes():
                wanted.append(int(process.name))
    return wanted


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds workers in /proc")
def test_killed_workers_change_no_byte(engine, slow, uninterrupted, command, around, tmp_path):
    """A quarter of the kills come at any moment, also of a start, the others after a part was written."""
    out, mark, rng = tmp_path / "maps", uuid.uuid4().hex, random.Random(1)
    command = [*command, slow[0], "--out", str(out), "--engine", engine]
    for option in TWO[engine].items():
        command += ["--engine-option", "{}={}".format(*option)]
    with open(tmp_path / "log", "w+") as log:
        job = subprocess.Popen(command, env={**around, "TOKENTM_MARK": mark}, stdout=log, stderr=log)
        kills, began = 0, time.monotonic()
        try:
            while kills < KILLS and job.poll() is None:
                before = parts(out)
                while (kills % 4 or not before) and parts(out) == before and job.poll() is None:
                    time.sleep(0.02)
                time.sleep(rng.uniform(0, 2 if kills % 4 else 8))
                if workers := found(mark.encode(), WORKERS[engine].encode()):
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    kills += 1
            assert job.wait(900) == 0
        finally:
            job.kill()
            log.seek(0)
            print(log.read()[-3000:])
    print(f"{engine}: {kills} workers killed, {time.monotonic() - began:.0f} s")
    assert kills == KILLS
    assert content(out) == uninterrupted
    for _ in range(300):  # Ray ends its workers a moment after its command
        if not found(mark.encode(), WORKERS[engine].encode()):
            return
        time.sleep(0.1)
    raise AssertionError("workers are left")


# ---- pipelines of others --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """Encoded images, of which one is damaged."""
    rng, files = np.random.default_rng(3), []
    for _ in range(5):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    files[3] = b"damaged"
    return {"image": np.array(files, object), "key": np.array([f"k{i}" for i in range(5)], object)}


def same(found, explainer, batch):
    """Whether rows by key are what the explainer returns here, where conftest.py has disabled optimisations."""
    expected = explainer(batch)
    assert set(found) == set(expected)
    order = np.argsort(np.array([str(key) for key in found["key"]]))
    for name, array in expected.items():
        other = (
            np.stack([np.asarray(found[name][i]) for i in order]) if array.ndim > 1 else np.array(found[name])[order]
        )
        assert other.shape == array.shape
        if array.dtype.kind == "f":
            np.testing.assert_allclose(other.astype(np.float32), array.astype(np.float32), rtol=5e-3, atol=1e-4)
        else:
            assert other.tolist() == array.tolist()


def test_ray_data_maps_batches_with_it(cluster, explainer, batch):
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    data = cluster.data.from_items(rows).map_batches(explainer, batch_size=4, num_cpus=1)
    found = data.take_all()
    same({name: [row[name] for row in found] for name in found[0]}, explainer, batch)


def test_beam_maps_batches_with_it(explainer, batch, tmp_path):
    beam = pytest.importorskip("apache_beam")
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    with beam.Pipeline(runner=FnApiRunner()) as pipeline:  # in this process
        _ = pipeline | beam.Create([batch]) | beam.Map(explainer) | beam.Map(pickled, str(tmp_path / "found.npy"))
    (columns,) = np.load(tmp_path / "found.npy", allow_pickle=True)
    same(columns, explainer, batch)


def pickled(columns, path):
    np.save(path, np.array([columns], object), allow_pickle=True)


def test_grain_maps_batches_with_it(explainer, batch):
    grain = pytest.importorskip("grain")
    rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    join = lambda rows: {name: [row[name] for row in rows] for name in rows[0]}  # noqa: E731
    data = grain.MapDataset.source(rows).batch(4, batch_fn=join).map(explainer)
    found = list(data)
    same({name: np.concatenate([each[name] for each in found]) for name in found[0]}, explainer, batch)


# ---- an object store ------------------------------------------------------------------------------------------------


class Rough:
    """An application in front of an emulator: some requests fail, some are late, and for a while all of them fail."""

    def __init__(self, application):
        self.application, self.calm, self.rng = application, True, random.Random(0)
        self.requests = self.failed = 0
        self.outage = range(0)

    def __call__(self, environ, start_response):
        if self.calm:
            return self.application(environ, start_response)
        self.requests += 1
        time.sleep(self.rng.uniform(0, 0.05))
        if self.requests in self.outage or self.rng.random() < 0.15:
            self.failed += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ServiceUnavailable</Code><Message>Please try again.</Message></Error>"]
        return self.application(environ, start_response)


@pytest.fixture
def bucket(monkeypatch):
    """An emulator of S3 on the loopback, with a bucket."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    from werkzeug.serving import make_server

    rough = Rough(server.DomainDispatcherApplication(server.create_backend_app))
    running = make_server("127.0.0.1", 0, rough, threaded=True)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{running.server_port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield rough, files
    running.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_object_store_with_errors_and_delays(bucket, explainer, tars):
    """Shards are read from S3, and the store is written there. What fails often ends a run; the next one goes on."""
    rough, files = bucket
    for tar in sorted(tars.iterdir()):
        files.put_file(str(tar), f"bucket/data/{tar.name}")
    source = f"s3://bucket/data/{{000000..{SHARDS - 1:06}}}.tar"
    explain_dataset(explainer, source, "s3://bucket/calm")
    rough.calm, rough.outage = False, range(40, 80)
    sentences = []
    for _ in range(20):
        try:
            explain_dataset(explainer, source, "s3://bucket/rough")
            break
        except InputError as error:
            sentences.append(str(error))
            if rough.requests > rough.outage.stop:
                rough.outage = range(0)
    print(f"{rough.failed} of {rough.requests} requests failed; {len(sentences)} runs ended: {sentences}")
    assert sentences and all("s3://" in sentence for sentence in sentences)
    rough.calm = True
    files.invalidate_cache()

    def objects(prefix):
        return {name.removeprefix(prefix): files.cat_file(name) for name in files.find(prefix)}

    calm = objects("bucket/calm")
    assert len([name for name in calm if name.startswith("/shards/")]) == SHARDS
    assert objects("bucket/rough") == calm
    maps = open_maps("s3://bucket/rough")
    assert maps.missing == 0 and len(maps) == SHARDS * IMAGES and len(maps.skipped) == 2
    assert np.isfinite(maps.read("gae", 0)).all()
