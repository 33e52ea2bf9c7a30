"""Runs cases in worker processes and judges their answers."""

import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import os
import queue
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fuzz.case import BAD, BASE, EITHER, GOOD, Case, write

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SHARE = float(os.environ.get("FUZZ_SHARE", "1"))
ONLY = [name for name in os.environ.get("FUZZ_ONLY", "").split(",") if name]
PATIENCE = float(os.environ.get("FUZZ_PATIENCE", "1"))
WORKERS = int(os.environ.get("FUZZ_WORKERS", "2"))
AREAS = {  # cases of each
    "photos": 400,
    "checkpoints": 320,
    "mat": 320,
    "zips": 380,
    "tables": 360,
    "recipes": 420,
    "runs": 300,
    "stores": 500,
    "shards": 440,
    "arguments": 400,
    "library": 540,
    "processes": 100,
}
CASES = int(os.environ.get("FUZZ_CASES", sum(AREAS.values())))
MEMORY = 2 * 10**9  # bytes
LONGEST = 1000  # characters of a line of error
START = 300  # seconds that a worker may take to start
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Verdict:
    """What came of one case; no problems: it was answered well."""

    id: str
    case: Case
    problems: list[str]
    seconds: float = 0.0
    memory: int = 0
    detail: str = ""  # output and traceback

    def __str__(self) -> str:
        repeat = f"FUZZ_ONLY={self.id} FUZZ_SEED={SEED} make fuzz"
        command = f"\n    tokentm {' '.join(map(ascii, self.case.command))[:400]}" if self.case.command else ""
        return f"{self.id} ({self.case.note}): {'; '.join(self.problems)}{command}\n    {repeat}"


@functools.cache
def cases_of(area: str) -> list[Case]:
    """All cases of an area, the same in every process."""
    count = AREAS[area] if area == "processes" else max(1, AREAS[area] * CASES // sum(AREAS.values()))
    prepare()
    made = importlib.import_module(f"fuzz.{area}").cases(random.Random(f"{SEED}/{area}"))
    return list(itertools.islice(made, count))


def chosen(area: str) -> list[int]:
    """Numbers of the cases to run."""
    numbers = range(len(cases_of(area)))
    if ONLY:
        return [i for i in numbers if area in ONLY or name_of(area, i) in ONLY]
    return [i for i in numbers if int((i + 1) * SHARE + 1e-9) > int(i * SHARE + 1e-9)]


def name_of(area: str, index: int) -> str:
    return f"{area}-{index:03}"


def environment() -> dict[str, str]:
    """Of the workers: this clone before what is on the path, the CPU, a compile cache of our own."""
    code = os.environ.get("FUZZ_CODE", str(REPOSITORY))
    path = os.pathsep.join([code, str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(BASE.parent / "cache")}
    more |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **more, "FUZZ_SEED": str(SEED), "FUZZ_BASE": str(BASE), "FUZZ_CASES": str(CASES)}


def prepare() -> None:
    """Make what the cases start from."""
    if not BASE.exists():
        BASE.parent.mkdir(parents=True, exist_ok=True)
        # Not from here: Python would take the package of the current folder.
        subprocess.run([sys.executable, "-m", "fuzz.base", str(BASE)], env=environment(), cwd=BASE.parent, check=True)


class Worker:
    """A worker process, started anew after it died or was killed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.home = Path(tempfile.mkdtemp(prefix="worker-", dir=BASE.parent))

    def start(self) -> None:
        to_worker, requests = os.pipe()
        answers, from_worker = os.pipe()
        command = [sys.executable, "-m", "fuzz.worker", str(to_worker), str(from_worker)]
        self.log = (self.home / "log").open("wb")
        self.process = subprocess.Popen(
            command,
            env=environment(),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            pass_fds=(to_worker, from_worker),
            start_new_session=True,
        )
        os.close(to_worker)
        os.close(from_worker)
        self.requests, self.answers = os.fdopen(requests, "wb", 0), answers
        self.left = b""
        line, problem = self._line(START)
        assert line == b"ready", f"the worker does not start: {problem} {(self.home / 'log').read_text()[-2000:]}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.requests.close()
            os.close(self.answers)
            self.log.close()
            self.process = None

    def _memory(self) -> int:
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # type: ignore[union-attr]
        except (OSError, IndexError):
            return 0

    def _line(self, seconds: float) -> tuple[bytes | None, str]:
        """A line from the worker, or None and what is wrong with it."""
        end, most = time.monotonic() + seconds, 0
        while b"\n" not in self.left:
            if select.select([self.answers], [], [], 0.1)[0]:
                more = os.read(self.answers, 2**20)
                if not more:
                    code = self.process.wait()  # type: ignore[union-attr]
                    what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    return None, f"the process died ({what})"
                self.left += more
            most = max(most, self._memory())
            if most > 1.5 * MEMORY:
                return None, f"takes more than {most / 1e9:.1f} GB"
            if time.monotonic() > end:
                return None, f"hangs (killed after {seconds:.0f} s, {most / 1e9:.1f} GB)"
        line, self.left = self.left.split(b"\n", 1)
        return line, ""

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self.process is None:
            self.start()
        self.requests.write(json.dumps(request).encode() + b"\n")
        line, problem = self._line(seconds)
        if line is None:
            text = (self.home / "log").read_text(errors="replace")[-3000:]
            self.stop()
            return {"code": None, "died": problem, "out": "", "err": text}
        return json.loads(line)


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder: path -> a hash of a file's content, or what else it is."""
    found = {}
    for parent, folders, files in os.walk(os.fsencode(folder)):
        for name in [*folders, *files]:
            path = os.path.join(parent, name)
            key = os.fsdecode(os.path.relpath(path, os.fsencode(folder)))
            if os.path.islink(path):
                found[key] = "link"
            elif os.path.isdir(path):
                found[key] = "folder"
            elif os.path.isfile(path):
                size = os.path.getsize(path)
                with open(path, "rb") as file:  # sparse files of hundreds of megabytes: their start is enough
                    found[key] = f"{size} {hashlib.sha256(file.read(2**24)).hexdigest()}"
            else:
                found[key] = "special"
    return found


def judge(case: Case, answer: dict[str, Any], before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is wrong with an answer."""
    problems = []
    if "died" in answer:
        problems.append(answer["died"])
    elif "problem" in answer:
        problems.append(answer["problem"])
    elif "raised" in answer:
        problems.append(f"raises {answer['raised'].strip().splitlines()[-1][:300]}")
    elif "Traceback (most recent" in answer["out"] + answer["err"]:
        problems.append(f"prints a traceback: {(answer['out'] + answer['err'])[-700:]}")
    else:
        wanted = {GOOD: (0,), BAD: (2,), EITHER: (0, 2)}[case.expect]
        errors = [line for line in answer["err"].splitlines() if line.startswith("Error: ")]
        if answer["code"] not in wanted:
            said = f" ({errors[0][:300]})" if errors else ""
            problems.append(f"exit code {answer['code']} in place of {' or '.join(map(str, wanted))}{said}")
        if answer["code"] == 2 and not errors:
            problems.append("no line 'Error: ...'")
        if answer["code"] == 2 and case.names and not any(case.names in line for line in errors):
            problems.append(f"no error names {case.names!r}: {errors[:1]}")
        if any(len(line) >= LONGEST for line in errors):
            problems.append(f"an error of {max(map(len, errors))} characters")
        if "\x1b" in answer["out"] + answer["err"]:
            problems.append("prints an escape character")
    if answer.get("seconds", 0) > case.seconds * PATIENCE:
        problems.append(f"takes {answer['seconds']:.1f} s")
    if answer.get("memory", 0) > MEMORY:
        problems.append(f"takes {answer['memory'] / 1e9:.1f} GB")
    for path, content in before.items():
        if after.get(path) != content and not any(fnmatch(path, pattern) for pattern in case.own):
            problems.append(f"{path!r} was {'changed' if path in after else 'removed'}")
    for path in after.keys() - before.keys():
        last = os.path.basename(path)
        if last.endswith((".part", ".tmp", ".old", ".__lock")) or ".orbax-checkpoint-tmp" in path:
            problems.append(f"{path!r} is left behind")
        if not path.startswith("cwd/"):
            problems.append(f"{path!r} is written outside")
        if last.startswith("EXECUTED"):
            problems.append("code of the input was executed")
    return problems


def run_case(worker: Worker, area: str, index: int) -> Verdict:
    case, name = cases_of(area)[index], name_of(area, index)
    home = BASE.parent / "cases" / name
    shutil.rmtree(home, ignore_errors=True)
    cwd = home / "cwd"
    write(cwd / "canary.txt", "the user's own")
    try:
        for path, content in case.files.items():
            write(cwd / path, content)
        before = snapshot(home)
        limit = case.seconds * PATIENCE
        if case.process is not None:
            answer = in_process(case, cwd)
        else:
            request = {"area": area, "index": index, "command": case.command, "cwd": str(cwd)}
            answer = worker.ask(request, limit)
        problems = judge(case, answer, before, snapshot(home))
    except Exception:  # of this suite itself
        answer, problems = {}, [f"the case cannot be run: {traceback.format_exc()}"]
    detail = "\n".join(answer.get(part, "") for part in ("out", "err", "raised"))
    if not (problems and ONLY) and not os.environ.get("FUZZ_KEEP"):
        shutil.rmtree(home, ignore_errors=True)
    return Verdict(name, case, problems, answer.get("seconds", 0), answer.get("memory", 0), detail)


def in_process(case: Case, cwd: Path) -> dict[str, Any]:
    """The answer of a case that starts processes itself."""
    assert case.process is not None
    began = time.monotonic()
    answer: dict[str, Any] = {"code": 0, "out": "", "err": ""}
    try:
        case.process(cwd)
    except AssertionError as error:
        answer |= {"problem": " ".join(str(error).split())[:900], "raised": traceback.format_exc()}
    return answer | {"seconds": time.monotonic() - began}


def run_area(area: str, say: Any = print) -> list[Verdict]:
    """Run the chosen cases of an area, in as many workers as there are; a line for each that fails."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    numbers = chosen(area)
    for number in numbers:
        waiting.put(number)
    verdicts: list[Verdict] = []
    broken: list[str] = []

    def work() -> None:
        worker = Worker()
        try:
            while not broken:
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                verdict = run_case(worker, area, number)
                verdicts.append(verdict)
                if verdict.problems:
                    say(f"FAILED {verdict}")
                    if len(numbers) <= 5:
                        say(verdict.detail)
        except BaseException:
            broken.append(traceback.format_exc())
        finally:
            worker.stop()
            shutil.rmtree(worker.home, ignore_errors=True)

    count = 1 if area == "processes" else min(WORKERS, len(numbers))
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken, broken[0]
    return sorted(verdicts, key=lambda verdict: verdict.id)


def summary(verdicts: Sequence[Verdict]) -> str:
    """The closing line."""
    if not verdicts:
        return "no cases"
    failed = sum(bool(verdict.problems) for verdict in verdicts)
    slowest = max(verdicts, key=lambda verdict: verdict.seconds)
    largest = max(verdicts, key=lambda verdict: verdict.memory)
    return (
        f"seed {SEED}: {len(verdicts)} cases tried, {len(verdicts) - failed} answered well, {failed} not; longest "
        f"{slowest.seconds:.1f} s ({slowest.id}), largest memory {largest.memory / 1e9:.2f} GB ({largest.id})"
    )
