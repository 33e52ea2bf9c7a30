"""Real processes: signals, full disks, odd environments, two at a time. A start may take some seconds more."""

# Tables of cases, several to a line.
# fmt: off

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz.base import NAMES, OPTIONS, png
from fuzz.case import CHECKPOINT, GOOD, Case, base

START = 120  # seconds that a process may take in all: JAX's import and compiling, perhaps on a busy machine
STOP = 10  # seconds from a signal to the end
EXPLAIN = ("explain", "photo.png", "--checkpoint", CHECKPOINT, "--out", "out", "--batch-size", "1")
DATASET = ("dataset", "many", "--checkpoint", CHECKPOINT, "--out", "store", "--batch-size", "2", "--chunk-size", "2",
    "--methods", "tokentm,rollout")
EVALUATE = ("evaluate", "r.py", "--out", "o")
TRAIN = ("train", "t.py", "--out", "t")
RECIPE = f"""
from tokentm_jax import EvaluateConfig
from tokentm_jax.configs import rows
config = EvaluateConfig("t", "perturbation", "many", rows("tokentm", "rollout"), batch_size=2,
                        checkpoint={CHECKPOINT!r})
"""
LONG = f"""
from models.training.recipe import TrainConfig
config = TrainConfig(name="t", train_data="data", test_data="data", model={OPTIONS!r}, epochs=60, warmup_epochs=0.5,
                     batch_size=5)
"""
MANY = {f"many/{NAMES[i % 5]}/{i:03}.png": png(i) for i in range(120)}
FILES = {"photo.png": base("photo.png"), "data": base("data"), "r.py": RECIPE, "t.py": LONG, **MANY}


def start(arguments: tuple[str, ...], cwd: Path, **more: Any) -> "subprocess.Popen[str]":
    """A process of the command line, with the environment of the suite."""
    from fuzz.runner import environment

    env = {**environment(), **more.pop("env", {})}
    env = {name: value for name, value in env.items() if value is not None}
    before = tuple(more.pop("before", ()))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **more}
    program = ["models.training", *arguments[1:]] if arguments[0] == "train" else ["tokentm_jax", *arguments]
    return subprocess.Popen([*before, sys.executable, "-m", *program], cwd=cwd, env=env, text=True,
        errors="replace", **pipes)


def ended(process: "subprocess.Popen[str]", codes: tuple[int, ...], seconds: float = START) -> str:
    """What the process said; AssertionError unless it ends well and in time."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hangs: not ended after {seconds:.0f} s; {err[-300:]}") from None
    said = f"{out or ''}{err or ''}"
    clear = "Traceback (most recent" not in said and "Exception ignored" not in said
    assert clear, f"prints a traceback: {said[-700:]}"
    assert process.returncode in codes, f"exit code {process.returncode} in place of {codes}: {said[-500:]}"
    if process.returncode == 2:
        errors = [line for line in (err or "").splitlines() if line.startswith("Error: ")]
        assert process.stderr is None or errors, f"no line 'Error: ...': {said[-300:]}"
        assert all(len(line) < 1000 for line in errors), "an error of more than 1,000 characters"
    return said


def clean(cwd: Path) -> None:
    """Nothing half-written is left."""
    left = [p for p in cwd.rglob("*") if p.name.endswith((".part", ".tmp", ".old"))
        or "orbax-checkpoint-tmp" in p.name]
    assert not left, f"left behind: {left[:3]}"


def interrupted(arguments: tuple[str, ...], number: int, wait: Callable[[Path], bool] | None,
    delay: float) -> Callable[[Path], None]:
    """A signal at a moment: exit code 130 or 143 soon after, or 0 where the work was finished."""

    def run(cwd: Path) -> None:
        process = start(arguments, cwd)
        end = time.monotonic() + START
        while wait is not None and not wait(cwd) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(number)
        ended(process, (0, 128 + number, -number) if number == signal.SIGTERM else (0, 130), STOP)
        if number == signal.SIGINT:
            clean(cwd)

    return run


def has(pattern: str) -> Callable[[Path], bool]:
    return lambda cwd: any(cwd.glob(pattern))


STARTED = {EXPLAIN: has("out"), DATASET: has("store/status/c/*"), EVALUATE: has("o/records/*.jsonl"),
    TRAIN: has("t/log.jsonl")}


def signals(rng: random.Random) -> Iterator[Case]:
    for arguments, wait in STARTED.items():
        for number in (signal.SIGINT, signal.SIGTERM):
            name = f"{arguments[0]} {signal.Signals(number).name}"
            delay = rng.uniform(0, 4)
            yield case(f"{name} after {delay:.2f} s", interrupted(arguments, number, None, delay))
            for _ in range(2 if number == signal.SIGINT else 1):
                delay = rng.uniform(0, 1)
                yield case(f"{name} while it works, {delay:.2f} s on", interrupted(arguments, number, wait, delay))


def case(note: str, process: Callable[[Path], object], **more: Any) -> Case:
    return Case(note, process=process, expect=GOOD, files={**FILES, **more.pop("files", {})}, seconds=4 * START,
        **more)


def resumed(arguments: tuple[str, ...], folder: str, same: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """Interrupted, and started again: what it ends with is what an uninterrupted run has."""

    def run(cwd: Path) -> None:
        process = start(arguments, cwd)
        while not STARTED[arguments](cwd) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        ended(process, (0, 130), STOP)
        ended(start(arguments, cwd), (0,))
        other = tuple("whole" if a == folder else a for a in arguments)
        ended(start(other, cwd), (0,))
        same(cwd / folder, cwd / "whole")

    return run


def same_bytes(one: Path, other: Path) -> None:
    names = [sorted(p.relative_to(f).as_posix() for f_ in (f,) for p in f_.rglob("*") if p.is_file()
        and p.name != ".lock") for f in (one, other)]
    assert names[0] == names[1], set(names[0]) ^ set(names[1])
    different = [name for name in names[0] if (one / name).read_bytes() != (other / name).read_bytes()]
    assert not different, f"other bytes: {different[:4]}"


def same_rows(one: Path, other: Path) -> None:
    a, b = (json.loads((folder / "results.json").read_text())["rows"] for folder in (one, other))
    assert a == b, "other figures"


def same_weights(one: Path, other: Path) -> None:
    """Of every tensor, and the metadata; the header of a safetensors file has its names in any order."""
    from safetensors import safe_open

    found = []
    for folder in (one, other):
        with safe_open(folder / "t.safetensors", "np") as file:
            found.append((file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}))  # noqa: SIM118
    assert found[0] == found[1], "other weights"


def limited(arguments: tuple[str, ...], size: int) -> Callable[[Path], None]:
    """No file may grow beyond `size` bytes: as on a full disk, "File too large"."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def run(cwd: Path) -> None:
        env = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        ended(start(arguments, cwd, preexec_fn=limit, env=env), (0, 2))
        clean(cwd)

    return run


def full_disk(arguments: tuple[str, ...], folder: str, size: str, name: str) -> Callable[[Path], None]:
    """The output is on a full file system of its own."""

    def run(cwd: Path) -> None:
        (cwd / folder).mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], cwd=cwd,
            capture_output=True)
        if mounted.returncode:
            return  # not allowed here
        try:
            said = ended(start(arguments, cwd), (2,))
            assert name in said, f"does not name {name}: {said[-300:]}"
            clean(cwd)
        finally:
            subprocess.run(["umount", "-l", folder], cwd=cwd, check=True)

    return run


def odd(arguments: tuple[str, ...], codes: tuple[int, ...] = (0,), says: str = "", **more: Any) -> Callable[[Path],
    None]:
    def run(cwd: Path) -> None:
        options = {k: v(cwd) if callable(v) and k == "prepare" else v for k, v in more.items() if k != "prepare"}
        if "prepare" in more:
            more["prepare"](cwd)
        env = {k: str(v).replace("CWD", str(cwd)) if v is not None else None for k,
            v in options.pop("env", {}).items()}
        said = ended(start(arguments, cwd, env=env, **options), codes)
        assert says in said, f"does not say {says!r}: {said[-300:]}"

    return run


def environments() -> Iterator[Case]:
    no_cache = {"JAX_COMPILATION_CACHE_DIR": None}
    strange = {"ünï.png": base("photo.png"), "\udcff.png": base("photo.png")}
    explain = ("explain", "photo.png", "ünï.png", "\udcff.png", *EXPLAIN[2:])
    for note, env in (
        ("no HOME", {"HOME": None, "XDG_CACHE_HOME": None, **no_cache}), ("an empty HOME", {"HOME": "", **no_cache}),
        ("HOME nowhere", {"HOME": "/nowhere/x", **no_cache}), ("HOME a file", {"HOME": "/etc/passwd", **no_cache}),
        ("HOME read-only", {"HOME": "/proc", **no_cache}),
        ("ascii output", {"PYTHONIOENCODING": "ascii"}), ("Latin-1 output", {"PYTHONIOENCODING": "latin-1"}),
        ("LANG=C", {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("LANG=nonsense", {"LANG": "xx_YY.nonsense", "LC_ALL": "xx_YY.nonsense"}), ("COLUMNS=1", {"COLUMNS": "1"}),
        ("COLUMNS=x", {"COLUMNS": "x"}),
        ("COLUMNS=-5", {"COLUMNS": "-5", "LINES": "-1"}), ("TERM=nonsense", {"TERM": "nonsense", "FORCE_COLOR": "1"}),
        ("no TMPDIR", {"TMPDIR": "/nowhere"}), ("a cache that is a file",
        {"JAX_COMPILATION_CACHE_DIR": "/etc/passwd"}), ("a cache on /proc", {"JAX_COMPILATION_CACHE_DIR": "/proc/x"}),
        ("XDG_CACHE_HOME a file", {"XDG_CACHE_HOME": "/etc/passwd", **no_cache}),
        ("XDG_CACHE_HOME relative", {"XDG_CACHE_HOME": "x", **no_cache}), ("no PATH", {"PATH": ""}),
        ("MPLCONFIGDIR nowhere", {"MPLCONFIGDIR": "/proc/x"}),
    ):
        yield case(note, odd(explain, env=env), files=strange)
    yield case("MPLBACKEND=nonsense", odd(EXPLAIN, (0, 2), env={"MPLBACKEND": "nonsense"}))
    for note, env in (("unknown JAX_PLATFORMS", {"JAX_PLATFORMS": "nonsense"}),
            ("JAX_PLATFORMS=cuda", {"JAX_PLATFORMS": "cuda"}), ("JAX_PLATFORMS=tpu", {"JAX_PLATFORMS": "tpu"})):
        for command in (EXPLAIN, EVALUATE):
            yield case(f"{command[0]}: {note}", odd(command, (2,), env["JAX_PLATFORMS"], env=env))

    for flags in ("--xla_nonsense=1", "nonsense"):  # XLA ends the process itself, with one line
        yield case(f"XLA_FLAGS={flags}", odd(EXPLAIN, (1,), "XLA_FLAGS", env={"XLA_FLAGS": flags}))

    def damage_cache(cwd: Path) -> None:
        shutil.copytree(base_cache(), cwd / "cache")
        for file in (cwd / "cache").iterdir():
            file.write_bytes(file.read_bytes()[:100] + b"damaged")

    def read_only(cwd: Path) -> None:
        shutil.copytree(base_cache(), cwd / "cache")
        for path in (cwd, *cwd.parents):  # the unknown user must get in
            if path != Path("/") and path.stat().st_uid == os.getuid():
                path.chmod(path.stat().st_mode | 0o555)

    yield case("a damaged compile cache", odd(EXPLAIN, prepare=damage_cache,
        env={"JAX_COMPILATION_CACHE_DIR": "CWD/cache"}), own=("cwd/cache/*",))
    if shutil.which("setpriv") and os.getuid() == 0:
        user = ("setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups")
        for note, env in (("HOME of root", no_cache), ("no HOME", {"HOME": None, **no_cache}),
                ("a read-only cache", {"JAX_COMPILATION_CACHE_DIR": "CWD/cache"})):
            yield case(f"an unknown user, {note}", as_user(user, env, read_only))
    yield case("models | head", piped(("models",)))
    yield case("explain | head", piped(EXPLAIN))
    for command in (("models",), ("methods", "--json"), EXPLAIN, ("compare", "run")):
        yield case(f"{command[0]} with stdout closed", closed(command, 1), files={"run": base("run")})
        yield case(f"{command[0]} with stderr closed", closed(command, 2), files={"run": base("run")})
        yield case(f"{command[0]} to /dev/full", to_full(command), files={"run": base("run")})


def base_cache() -> Path:
    from fuzz.case import BASE

    return BASE.parent / "cache"


def as_user(user: tuple[str, ...], env: dict[str, Any], prepare: Callable[[Path], None]) -> Callable[[Path], None]:
    def run(cwd: Path) -> None:
        prepare(cwd)
        (cwd / "out").mkdir()
        (cwd / "out").chmod(0o777)
        made = {k: v.replace("CWD", str(cwd)) if v else v for k, v in env.items()}
        ended(start(EXPLAIN, cwd, env=made, before=user), (0,))

    return run


def piped(arguments: tuple[str, ...]) -> Callable[[Path], None]:
    """The reader has gone before anything is written."""

    def run(cwd: Path) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        process = start(arguments, cwd, stdout=writer)
        os.close(writer)
        ended(process, (0, 1, 2, 141))

    return run


def closed(arguments: tuple[str, ...], number: int) -> Callable[[Path], None]:
    return lambda cwd: ended(start(arguments, cwd, preexec_fn=lambda: os.close(number)), (0, 1, 2) if number == 1
        else (0,)) and None


def to_full(arguments: tuple[str, ...]) -> Callable[[Path], None]:
    def run(cwd: Path) -> None:
        with open("/dev/full", "w") as full:
            ended(start(arguments, cwd, stdout=full), (1, 2))

    return run


def together() -> Iterator[Case]:
    """Two processes on one folder."""

    def two(arguments: tuple[str, ...]) -> Callable[[Path], None]:
        def run(cwd: Path) -> None:
            pair = [start(arguments, cwd) for _ in range(2)]
            for process in pair:
                ended(process, (0, 2), 2 * START)
            assert 0 in [process.returncode for process in pair], "neither ended well"
            clean(cwd)

        return run

    def comparing(cwd: Path) -> None:
        process = start(EVALUATE, cwd)
        while not any(cwd.glob("o/records/*.jsonl")) and process.poll() is None:
            time.sleep(0.02)
        while process.poll() is None:  # in this process, so that it looks often
            done = subprocess.run([sys.executable, "-c", COMPARE], cwd=cwd, env=process_environment(),
                capture_output=True, text=True, timeout=START)
            assert "Traceback" not in done.stdout + done.stderr, done.stderr[-500:]
        ended(process, (0,))
        ended(start(tuple("whole" if a == "o" else a for a in EVALUATE), cwd), (0,))
        same_rows(cwd / "o", cwd / "whole")

    for arguments in (TRAIN, EVALUATE, EXPLAIN):
        yield case(f"two {arguments[0]} on one folder", two(arguments))
    yield case("compare beside a running evaluate", comparing)


COMPARE = """
from pathlib import Path
from tokentm_jax.errors import InputError
from tokentm_jax.runs.report import compare
for _ in range(200):
    try:
        compare([Path("o")])
    except InputError:
        pass
"""


def process_environment() -> dict[str, str]:
    from fuzz.runner import environment

    return environment()


def cases(rng: random.Random) -> Iterator[Case]:
    yield from signals(rng)
    yield case("dataset resumed after SIGINT", resumed(DATASET, "store", same_bytes))
    yield case("evaluate resumed after SIGINT", resumed(EVALUATE, "o", same_rows))
    yield case("train resumed after SIGINT", resumed(TRAIN, "t", same_weights))
    yield from together()
    convert = ("convert", CHECKPOINT, "d/w.safetensors")
    for command, folder, size, name in ((convert, "d", "8k", "d/w"),
            (("convert", CHECKPOINT, "d/orbax"), "d", "8k", "d/orbax"), (TRAIN, "t", "16k", "t"),
            (EVALUATE, "o", "8k", "o"), (DATASET, "store", "16k", "store"), (EXPLAIN, "out", "8k", "out")):
        yield case(f"{command[0]} to {command[-1][:9]} on a full disk", full_disk(command, folder, size, name))
        yield case(f"{command[0]} to {command[-1][:9]}, files of 2 kB at most", limited(command, 2000))
    yield from environments()
