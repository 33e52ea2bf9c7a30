"""The process that runs cases one after another: `python -m fuzz.worker REQUESTS ANSWERS` (two file descriptors).

It imports JAX once, so that a case costs what its command costs. A request is a line of JSON, and so is an answer.
"""

import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def peak() -> int:
    """Largest resident memory since `reset`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def shown(error: BaseException) -> str:
    """The traceback; its last line says what was raised (JAX puts a note after that)."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return "".join(traceback.format_exception(error)) + f"\n{what[:400]}"


def answer_command(arguments: list[str]) -> dict[str, Any]:
    from click.testing import CliRunner
    from everything import everything

    try:
        result = CliRunner().invoke(everything, arguments, prog_name="tokentm")
    except BaseException as error:  # what only recipes raise
        return {"code": 1, "out": "", "err": "", "raised": shown(error)}
    answer = {"code": result.exit_code, "out": result.stdout, "err": result.stderr}
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        answer["raised"] = shown(result.exception)
    return answer


def answer_call(case: Any) -> dict[str, Any]:
    """Code 2 for an exception that the call may raise: an InputError; one that the docstring names; Chex's and Flax's;
    and a TypeError or ValueError that says what was expected."""
    import flax.errors
    import jax

    from tokentm_jax.errors import InputError

    try:
        jax.block_until_ready(case.call())  # else it would go on beside the next case
    except InputError as error:
        return {"code": 2, "out": "", "err": f"Error: {error}"}
    except Exception as error:
        text = " ".join(str(error).split())
        documented = getattr(case.documented, "__doc__", None) or ""
        told = isinstance(error, (TypeError, ValueError)) and re.search(r"\b(expected|must|should|required)\b", text)
        library = "[Chex]" in text or isinstance(error, flax.errors.FlaxError)
        if told or library or type(error).__name__ in documented:
            return {"code": 2, "out": "", "err": f"Error: {text[:900]}"}
        return {"code": 1, "out": "", "err": "", "raised": shown(error)}
    return {"code": 0, "out": "", "err": ""}


def main() -> None:
    requests, answers = (os.fdopen(int(fd), mode) for fd, mode in zip(sys.argv[1:], "rw", strict=True))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a case that hangs does not outlive the runner
    here = os.getcwd()
    import matplotlib.backends.backend_agg  # noqa: F401  (imported before the first case's clock starts)

    from fuzz.runner import cases_of

    warm = ("explain", os.path.join(os.environ["FUZZ_BASE"], "photo.png"), "--checkpoint")
    answer_command([*warm, os.path.join(os.environ["FUZZ_BASE"], "tiny.safetensors"), "--out", "warm"])
    print("ready", file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        os.chdir(request["cwd"])
        reset()
        began = time.monotonic()
        if request["command"]:
            answer = answer_command(request["command"])
        else:
            answer = answer_call(cases_of(request["area"])[request["index"]])
        answer |= {"seconds": time.monotonic() - began, "memory": peak()}
        os.chdir(here)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
