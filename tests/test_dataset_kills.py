"""Real processes of `tokentm dataset`: killed at random moments, in twos, on a full disk. Minutes of computing."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tokentm_jax.inputs.images import HALF, Preprocessing
from tokentm_jax.models.architectures import build
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.models.vit import init_params
from tokentm_jax.runs.store import open_maps

pytestmark = pytest.mark.slow

OPTIONS = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=4)
COUNT, SHARD = 1601, 8  # the last shard is not full
KILLS = 24


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command without --out: a small model, and a folder of small images of which some are damaged."""
    path, rng = tmp_path_factory.mktemp("job"), np.random.default_rng(0)
    module = build(OPTIONS)
    params = jax.tree.map(lambda a: a * 4 if a.ndim > 2 else a, init_params(module, jax.random.key(0)))
    checkpoint = write_checkpoint(
        path / "tiny.safetensors", module, params, Preprocessing((32, 32), 1.0, "bilinear", **HALF)
    )
    for i in range(COUNT):
        file = path / "photos" / "abcd"[i % 4] / f"{i:05}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if i % 97 == 5:
            file.write_bytes(b"damaged")
        else:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    start = [sys.executable, "-m", "tokentm_jax", "dataset", str(path / "photos"), "--checkpoint", str(checkpoint)]
    more = ["--methods", "tokentm,input_gradient", "--batch-size", "4", "--shard-size", str(SHARD)]
    return [*start, *more], {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(path / "cache"), "JAX_PLATFORMS": "cpu"}


class Job:
    """A running process of the command; `lines` of its standard error come in while it runs."""

    def __init__(self, command, out, *more, **named):
        arguments, environment = command
        self.process = subprocess.Popen(
            [*arguments, "--out", str(out), *map(str, more)],
            env={**environment, **named.pop("env", {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **named,
        )
        self.lines: list[str] = []
        self.started = threading.Event()  # the first images are about to be computed
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line)
                if " images, " in line:
                    self.started.set()

    def wait_for(self, out, shards):
        """Wait until this number of shards is finished."""
        while self.process.poll() is None and len(finished(out)) < shards:
            time.sleep(0.002)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        self.reader.join(60)

    def end(self, code=0):
        assert self.process.wait(600) == code, self.lines
        self.reader.join(60)
        return "".join(self.lines)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def finished(folder):
    """The parts of finished shards, with their times: whoever computes a shard again makes a new one."""
    return {part: part.stat().st_mtime_ns for part in folder.glob("shards/*/[0-9]*.parquet")}


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """An uninterrupted store, and the seconds from the first image to its end."""
    out = tmp_path_factory.mktemp("whole") / "maps"
    Job(command, out, "--limit", 4).end()  # compiles
    shutil.rmtree(out)
    job = Job(command, out)
    assert job.started.wait(300)
    began = time.monotonic()
    job.end()
    found = open_maps(out)
    assert found.missing == 0 and len(found.skipped) == len(range(5, COUNT, 97))
    seconds = time.monotonic() - began
    print(f"uninterrupted: {seconds:.1f} s")
    return content(out), seconds


def test_killed_at_random_moments_it_ends_with_the_same_bytes(command, whole, tmp_path):
    """A quarter of the kills come at any moment of a start, the others while parts are being written."""
    expected, seconds = whole
    out, rng = tmp_path / "maps", random.Random(0)
    known, leftovers, partly = {}, 0, 0
    for kill in range(KILLS):
        job = Job(command, out)
        if kill % 4:
            job.wait_for(out, len(finished(out)) + 1)
            time.sleep(rng.uniform(0, seconds / KILLS / 2))
        else:
            time.sleep(rng.uniform(0, 6))
        job.kill()
        now = finished(out)
        assert now.items() >= known.items()  # no finished shard was written again
        leftovers += len(list(out.rglob("*.part")))
        partly += len(now) > 0 and open_maps(out).missing > 0
        known = now
    Job(command, out).end()
    assert content(out) == expected
    assert finished(out).items() >= known.items()
    print(
        f"{KILLS} kills, {partly} of them in a store begun and unfinished, {leftovers} half-written files left behind"
    )
    assert partly >= 10


def test_two_processes_and_a_lost_one(command, whole, tmp_path):
    """Two processes, `--shard I/2`, write what one writes; lost in the middle, three others finish."""
    assert _several(command, tmp_path / "two", 2, ()) == 0
    assert content(tmp_path / "two") == whole[0]
    assert _several(command, tmp_path / "lost", 2, (0, 1)) > 0
    known = finished(tmp_path / "lost")
    assert known and open_maps(tmp_path / "lost").missing > 0
    _several(command, tmp_path / "lost", 3, ())
    assert content(tmp_path / "lost") == whole[0] and finished(tmp_path / "lost").items() >= known.items()


def _several(command, out, count, killed):
    """Run this number of processes, killing some of them after twenty shards; the number of shards missing."""
    jobs = [Job(command, out, "--shard", f"{i}/{count}") for i in range(count)]
    try:
        if killed:
            jobs[0].wait_for(out, 20)
        for i in killed:
            jobs[i].kill()
        for i, job in enumerate(jobs):
            if i not in killed:
                job.end()
    finally:
        for job in jobs:
            job.process.kill()
    return open_maps(out).missing


def test_the_number_of_devices_changes_nothing(command, whole, tmp_path):
    # Without the flags of conftest.py, XLA would compile other code, which rounds otherwise.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3"
    Job(command, tmp_path / "maps", env={"XLA_FLAGS": flags}).end()
    assert content(tmp_path / "maps") == whole[0]


def test_a_full_disk(command, whole, tmp_path):
    """One sentence; with room again, the rest is computed. A file system of its own needs an administrator."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        errors = Job(command, disk / "maps").end(2)
        assert "cannot be written: No space left on device; what was finished is kept" in errors
        assert "Traceback" not in errors and errors.count("Error:") == 1
        known = finished(disk / "maps")
        assert known
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        Job(command, disk / "maps").end()
        assert content(disk / "maps") == whole[0] and finished(disk / "maps").items() >= known.items()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_that_do_not_know_of_each_other(command, whole, tmp_path):
    """The same command started twice, after it was killed: both go on, and the bytes are the same."""
    job = Job(command, tmp_path / "maps")
    job.wait_for(tmp_path / "maps", 20)
    job.kill()
    for job in [Job(command, tmp_path / "maps") for _ in range(2)]:
        job.end()
    assert content(tmp_path / "maps") == whole[0]


def test_interrupted_by_hand(command, whole, tmp_path):
    # A shell starts its background jobs with SIGINT ignored, and this test may be in one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = Job(command, tmp_path / "maps")
    finally:
        signal.signal(signal.SIGINT, before)
    assert job.started.wait(300)
    time.sleep(0.5)
    job.process.send_signal(signal.SIGINT)
    assert "Traceback" not in job.end(130)
    assert not list(Path(tmp_path / "maps").rglob("*.part"))
    assert open_maps(tmp_path / "maps").missing > 0
    Job(command, tmp_path / "maps").end()
    assert content(tmp_path / "maps") == whole[0]
