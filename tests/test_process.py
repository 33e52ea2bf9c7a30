"""The end of the process after signals, with nothing said, and the environments that it runs in."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tokentm_jax.cli.dataset import _share
from tokentm_jax.cli.process import GRACE
from tokentm_jax.errors import InputError
from tokentm_jax.files import uninterrupted
from tokentm_jax.inputs.images import HALF, Preprocessing
from tokentm_jax.models.architectures import build
from tokentm_jax.models.checkpoint import write_checkpoint
from tokentm_jax.models.vit import init_params

ROOT = Path(__file__).resolve().parent.parent
BLOCKED = """
import ctypes
mutex = ctypes.create_string_buffer(64)
while True:  # the second time waits for ever, and no Python code runs
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
SWALLOWED = """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""
IMPORTED = """
try:
    import time
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("while it was imported")
"""
IGNORED = """
class Late:
    def __del__(self):  # as XLA's callback in the garbage collector
        import time
        time.sleep(60)
Late()
while True:
    pass
"""


def started(arguments, **environment):
    """A process of Python with the package; Ctrl-C is not ignored there, as it would be in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("code", "number", "twice", "exit_code", "seconds"),
    [
        ("import time; time.sleep(60)", signal.SIGINT, False, 130, 0),
        ("import time; time.sleep(60)", signal.SIGTERM, False, 143, 0),
        ("import time; time.sleep(60)", signal.SIGHUP, False, 129, 0),
        (IMPORTED, signal.SIGINT, False, 130, 0),
        (IGNORED, signal.SIGINT, False, 130, 0),
        (SWALLOWED, signal.SIGINT, False, 130, 1),
        (BLOCKED, signal.SIGINT, False, 130, 1),
        (BLOCKED, signal.SIGTERM, False, 143, 1),
        (BLOCKED, signal.SIGINT, True, 130, 0),
    ],
)
def test_a_signal_ends_the_process(code, number, twice, exit_code, seconds):
    script = f"""
import tokentm_jax.cli.process as process
process.GRACE = {60 if twice else 1}
def command():
    print("started", flush=True)
    exec({code!r}, {{}})
process.run_process(command)
"""
    process = started(["-c", script])
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    time.sleep(0.2)
    began = time.monotonic()
    for _ in range(1 + twice):
        process.send_signal(number)
        time.sleep(0.1)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == exit_code
    assert seconds <= time.monotonic() - began < seconds + 3


SLOW_IMPORT = """
import runpy, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print("importing", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv = ["tokentm", "--version"]
runpy.run_module("tokentm_jax", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["tokentm_jax.cli.process", "tokentm_jax.cli.main", "click"])
def test_ctrl_c_while_the_program_is_imported(module):
    process = started(["-c", SLOW_IMPORT.format(module=module)])
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 130


ARRAYS = {  # variables of a scheduler -> what `--shard auto` makes of them
    "Slurm": ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, (6, 8)),
    "srun": ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
    "Cloud Run": ({"CLOUD_RUN_TASK_INDEX": "0", "CLOUD_RUN_TASK_COUNT": "2"}, (0, 2)),
}


@pytest.mark.parametrize(("variables", "expected"), ARRAYS.values(), ids=ARRAYS)
def test_the_share_of_a_job_in_an_array(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _share("auto", None, None, None) == expected
    assert _share("1/3", None, None, None) == (1, 3)


def test_shares_that_are_none(monkeypatch, capsys):
    assert _share(None, None, None, None) == (0, 1) and _share(None, None, 3, 2) == (2, 3)
    assert _share(None, "10.0.0.1:1234", 3, 2) == (2, 3)
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[0] == warnings[2] == "Warning: --processes and --process are deprecated: use --shard 2/3"
    assert "--coordinator is not needed any more" in warnings[1] and len(warnings) == 3
    for shard in ("", "1", "1/", "/2", "2/2", "-1/2", "a/b", "1/2/3", "١/٢x", "auto/x"):
        with pytest.raises(InputError, match=r"--shard"):
            _share(shard, None, None, None)
    with pytest.raises(InputError, match=r"are now --shard I/N, and need each other"):
        _share(None, None, 3, None)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "4")
    with pytest.raises(InputError, match=r"found JOB_COMPLETION_INDEX=4, but not how many jobs there are: use auto/N"):
        _share("auto", None, None, None)
    assert _share("auto/16", None, None, None) == (4, 16)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "x")
    with pytest.raises(InputError, match=r"JOB_COMPLETION_INDEX must be a number, got 'x'"):
        _share("auto/16", None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kilobytes", "environment", "sentence"),
    [
        (300_000, {}, "JAX cannot be imported: "),
        (1_500_000, {}, "this process may use 1464 MiB of addresses (ulimit -v), and JAX needs 2048"),
        (None, {"JAX_ENABLE_X64": "perhaps"}, "JAX cannot be imported: "),
        (None, {"JAX_COMPILATION_CACHE_MAX_SIZE": "x"}, "JAX cannot be imported: "),
        (None, {"JAX_DEFAULT_MATMUL_PRECISION": "x"}, "JAX cannot be imported: "),
    ],
)
def test_where_jax_cannot_start(kilobytes, environment, sentence, tmp_path):
    limit = f"ulimit -v {kilobytes};" if kilobytes else ""
    command = f"{limit} '{sys.executable}' -m tokentm_jax explain notebooks/chelsea.png --out '{tmp_path}/out'"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=settings, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(f"Error: {sentence}") and done.stderr.count("\n") == 1


def test_other_ends_are_pythons_own():
    script = "from tokentm_jax.cli.process import run_process; run_process(lambda: {})"
    for command, exit_code, words in (("None", 0, ""), ("exit(3)", 3, ""), ("1 / 0", 1, "ZeroDivisionError")):
        process = started(["-c", script.format(command)])
        out, errors = process.communicate(timeout=20)
        assert (process.returncode, out) == (exit_code, "")
        assert words in errors and bool(words) == bool(errors)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "| head -1"])
def test_streams(redirection):
    """Closed, full, and read no further."""
    command = f"'{sys.executable}' -m tokentm_jax --help {redirection}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    full = redirection == ">/dev/full"
    assert done.returncode == (2 if full else 0)
    assert done.stderr == ("Error: No space left on device\n" if full else "")


@pytest.mark.slow
def test_environments(tmp_path):
    """All at once: no home, no place for caches, a narrow terminal that knows ASCII; and JAX without a device."""
    photo = tmp_path / "猫\x1b[31m.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(photo)
    (tmp_path / "file").touch()
    narrow = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "COLUMNS": "20", "TERM": "dumb", "NO_COLOR": ""}
    nowhere = {
        name: str(tmp_path / "file") for name in ("JAX_COMPILATION_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")
    }
    arguments = ["-m", "tokentm_jax", "explain", photo, "--out", tmp_path / "out"]
    done = started(["-c", NO_HOME, *arguments], **narrow, **nowhere)
    out, errors = done.communicate(timeout=120)
    assert (done.returncode, errors) == (0, "")
    assert "cat" in out and "??[31m.png" in out and "\x1b" not in out
    assert len(list((tmp_path / "out").iterdir())) == 2
    for platform in ("gpuu", "cuda"):
        done = started(arguments, JAX_PLATFORMS=platform)
        _, errors = done.communicate(timeout=120)
        assert done.returncode == 2 and errors.startswith(
            f"Error: JAX finds no device with JAX_PLATFORMS={platform!r}"
        )
        assert len(errors.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONWARNINGS": "error"},
        {"PYTHONDEVMODE": "1"},
        {"PYTHONOPTIMIZE": "2"},
        {"JAX_ENABLE_X64": "1"},
        {"JAX_DEBUG_NANS": "1"},
        {"COLUMNS": "1", "LINES": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "tr_TR.UTF-8"},
        {"HOME": "/nonexistent/x", "TMPDIR": "/nonexistent", "JAX_COMPILATION_CACHE_DIR": "/proc/none"},
        {"TZ": "Nowhere/Nothing"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_an_environment_changes_nothing(environment, tmp_path):
    done = started(
        ["-m", "tokentm_jax", "explain", ROOT / "notebooks/chelsea.png", "--out", tmp_path / "out"], **environment
    )
    out, errors = done.communicate(timeout=300)
    assert (done.returncode, errors) == (0, "") and "cat" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"chelsea.png", "chelsea.npz"}


def test_a_folder_that_is_gone(tmp_path):
    """The working folder was removed: what needs none works, and a relative path is one sentence."""
    command = f"cd '{tmp_path}' && mkdir gone && cd gone && rmdir ../gone && '{sys.executable}' -m tokentm_jax"
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments, exit_code, words in (
        ("--version", 0, ""),
        ("convert a.safetensors b", 2, "a.safetensors does not"),
    ):
        done = subprocess.run(["sh", "-c", f"{command} {arguments}"], capture_output=True, text=True, env=settings)
        assert done.returncode == exit_code and done.stderr.count("\n") == bool(words) and words in done.stderr


# As where the user id has no entry: `os.setuid` to such a one needs an administrator and readable folders.
NO_HOME = """
import os, pwd, runpy, sys
os.environ.pop("HOME", None)
def getpwuid(number):
    raise KeyError(number)
pwd.getpwuid = getpwuid
sys.argv = ["", *sys.argv[3:]]
runpy.run_module("tokentm_jax", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_random_moments(number, tmp_path, shared):
    """Twenty runs of `tokentm explain` on a busy machine, each ended somewhere from its start to its end."""
    photos = sorted((shared / "data/imagenet_sample").rglob("*.*"))[:30]
    busy = [started(["-c", "while True: pass"]) for _ in range(3)]
    draw = random.Random(0)
    ended = 0
    try:
        for i in range(20):
            methods = ["--method", "tokentm,gae,rollout", "--out", tmp_path / f"out{i}"]
            cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / f"cache{i}")}
            process = started(["-m", "tokentm_jax", "explain", *photos, *methods], **cache)
            time.sleep(draw.uniform(1, 14))
            if process.poll() is not None:
                process.communicate()
                continue
            ended += 1
            began = time.monotonic()
            process.send_signal(number)
            assert process.communicate(timeout=60)[1] == ""
            assert process.returncode == 128 + number
            assert time.monotonic() - began < GRACE + 5
    finally:
        for process in busy:
            process.kill()
            process.communicate()
    assert ended > 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_while_orbax_writes(number):
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    before, steps = signal.signal(number, interrupt), []
    try:
        with pytest.raises(KeyboardInterrupt, match=str(int(number))):
            with uninterrupted():
                for _ in range(2):
                    os.kill(os.getpid(), number)
                    steps.append("written")
            steps.append("not reached")
        assert steps == ["written", "written"]
        assert signal.getsignal(number) is interrupt
        with uninterrupted():
            pass  # nothing waits any more
        signal.signal(number, signal.SIG_IGN)
        with uninterrupted():
            os.kill(os.getpid(), number)  # is still ignored
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)

    def elsewhere():  # only the main thread may set handlers
        with uninterrupted():
            return "written"

    with ThreadPoolExecutor() as threads:
        assert threads.submit(elsewhere).result() == "written"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny model, photos for many seconds of work, and the recipes of two commands."""
    path, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(0)
    options = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2)
    module = build(options)
    params = init_params(module, jax.random.key(0))
    write_checkpoint(path / "tiny.safetensors", module, params, Preprocessing((16, 16), **HALF), ["a", "b"])
    for i in range(1000):
        file = path / "photos" / "ab"[i % 2] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    photos, checkpoint = str(path / "photos"), str(path / "tiny.safetensors")
    (path / "evaluate.py").write_text(
        "from tokentm_jax import EvaluateConfig\n"
        "from tokentm_jax.configs import rows\n"
        f"config = EvaluateConfig('x', 'saco', {photos!r}, rows('rollout'), checkpoint={checkpoint!r}, batch_size=1)"
    )
    (path / "train.py").write_text(
        "from models.training.recipe import TrainConfig\n"
        f"config = TrainConfig('x', {photos!r}, {photos!r}, {options!r}, 1000, batch_size=500)"
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "arguments", "first"),
    [
        ("dataset", "photos --checkpoint tiny.safetensors --batch-size 1 --shard-size 1", "shards/*/0*"),
        ("evaluate", "evaluate.py", "records/rollout*.jsonl"),
        ("train", "train.py", "checkpoints/*"),
    ],
)
def test_signals_while_results_are_written(work, tmp_path, monkeypatch, command, arguments, first, number):
    """From the first file of the results on; where the moments fall in a loop of writing is left to chance."""
    monkeypatch.chdir(work)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(work / "cache")}
    for moment in range(2):
        out = tmp_path / str(moment)
        program = ["models.training"] if command == "train" else ["tokentm_jax", command]
        process = started(["-m", *program, *arguments.split(), "--out", out], **cache)
        while not list(out.glob(first)) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.15 * moment)
        began = time.monotonic()
        process.send_signal(number)
        said = "".join(process.communicate(timeout=60))
        assert process.returncode == 128 + number, said
        assert time.monotonic() - began < GRACE + 5
        assert "Traceback" not in said and "Exception" not in said and "Error" not in said
        unfinished = (".part", ".__lock", ".orbax-checkpoint-tmp")
        assert not [path for path in out.rglob("*") if path.name.endswith(unfinished)]
        assert {path.read_text()[-1:] for path in out.rglob("*.jsonl")} <= {"", "\n"}  # no half line


KEEPING = """
import jax, numpy as np, tokentm_jax as tm
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
vit = tm.load()
tm.explain(vit, np.full((1, 32, 32, 3), 0.5, np.float32))
print(sum(hits), jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.slow
def test_python_keeps_programs_between_processes(tmp_path):
    """In the folder of the command line, or where JAX is told; and none where it is told so."""
    known = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {"XDG_CACHE_HOME": str(tmp_path)}

    def run(**more):
        done = subprocess.run([sys.executable, "-c", KEEPING], env={**known, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hits, folder = done.stdout.split()
        return int(hits) > 0, folder

    assert run(JAX_ENABLE_COMPILATION_CACHE="false") == (False, "None")
    assert not any(tmp_path.iterdir())
    assert [run(), run()] == [(False, str(tmp_path / "tokentm_jax")), (True, str(tmp_path / "tokentm_jax"))]
    assert (tmp_path / "tokentm_jax").stat().st_mode & 0o77 == 0
    other = str(tmp_path / "other")
    assert run(JAX_COMPILATION_CACHE_DIR=other) == (False, other)
