"""The program `tokentm`, also `python -m tokentm_jax`."""

import gc
import os
import signal


def run() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a shell's background
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))  # until `run_process` has its own
    gc.set_threshold(50_000)  # the objects of imports and of tracing stay: searching them took a tenth of the time
    from tokentm_jax.cli.process import run_process

    def command() -> None:
        from tokentm_jax.cli.main import main  # only now: Ctrl-C may come while it is imported

        main(prog_name="tokentm")

    run_process(command)


if __name__ == "__main__":
    run()
