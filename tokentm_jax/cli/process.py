"""The process around a command: its signals, its streams, and an end that comes whatever XLA's threads do."""

import gc
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tokentm_jax.errors import printable

GRACE = 5.0  # seconds from the first signal to the end


def run_process(command: Callable[[], Any]) -> NoReturn:
    """Run a command to its end, which after Ctrl-C is 130, after SIGTERM 143 and after SIGHUP 129, with nothing said.

    The first signal raises KeyboardInterrupt in the main thread, so that unfinished files are removed. It may come to
    nothing there: C++ compiles for a minute, or takes the exception for its own. So the process ends after `GRACE`
    seconds in any case, and at once at the second signal; whatever is written appears whole or not at all.
    """
    received: list[int] = []
    ending: list[int] = []  # the exit code, once the command has ended

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        if ending or frame:  # an exception while a module of C++ is imported may crash it
            os._exit(128 + number)
        raise KeyboardInterrupt

    code: Any = 0
    _settle_environment()
    _keep_quiet_after(received)
    # Those that are not ignored, as Ctrl-C is in the background jobs of a shell.
    hangup = [signal.SIGHUP] if os.name == "posix" else []  # the terminal was closed
    caught = [n for n in (signal.SIGINT, signal.SIGTERM, *hangup) if signal.getsignal(n) is not signal.SIG_IGN]
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)  # written to even while no Python code runs
    threading.Thread(target=_end_in_time, args=(reader, caught), daemon=True).start()
    try:
        for number in caught:
            signal.signal(number, interrupt)
        command()
    except SystemExit as end:
        code = end.code
    except BaseException:
        if not received:  # what C++ makes of a KeyboardInterrupt may be any exception
            raise
    ending.append(0)
    if received:
        code = 128 + received[0]
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads, or the disk is full: Python would say so once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            code = code or 2
    if received:
        os._exit(code)  # Python's own end may crash while XLA's threads still compile or compute
    gc.freeze()  # Python's end would search all objects of JAX for cycles: half a second
    sys.exit(code)


def _end_in_time(reader: socket.socket, caught: list[signal.Signals]) -> None:
    """End the process `GRACE` seconds after the first signal, or at the second."""
    number = 0
    while number not in caught:
        number = reader.recv(1)[0]
    reader.settimeout(GRACE)
    try:
        while reader.recv(1)[0] not in caught:
            pass
    except TimeoutError:
        pass
    os._exit(128 + number)


def _keep_quiet_after(received: list[int]) -> None:
    """Print nothing that goes wrong after a signal, and end the process where its KeyboardInterrupt is lost."""

    def quiet(hook: Callable[..., Any]) -> Callable[..., Any]:
        def report(*args: Any) -> None:
            if received and isinstance(getattr(args[0], "exc_value", None), KeyboardInterrupt):
                os._exit(128 + received[0])
            # Of C++ in a separate thread: TensorStore's, whose event loop ended with the error that we report.
            lost = getattr(args[0], "object", args) is None and threading.current_thread() is not main_thread
            if not received and not lost:
                hook(*args)

        return report

    main_thread = threading.main_thread()
    sys.excepthook, sys.unraisablehook = quiet(sys.excepthook), quiet(sys.unraisablehook)
    threading.excepthook = quiet(threading.excepthook)


def _settle_environment() -> None:
    """Streams that take every text, a home, and warnings of one line."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would take its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        Path.home()
    except RuntimeError:  # a user id without an entry, as in containers
        os.environ["HOME"] = os.devnull  # no folder can be made in it
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it uses another folder if it cannot write
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files, and an unknown backend ends Matplotlib's import
    for name in ("asyncio", "absl"):  # Orbax logs through them what it also raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {printable(message)}\n"
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
