"""The program `tokentm`, also `python -m tokentm_jax`."""

from tokentm_jax.cli.process import run_process


def run() -> None:
    def command() -> None:
        from tokentm_jax.cli.main import main  # only now: Ctrl-C may come while it is imported

        main(prog_name="tokentm")

    run_process(command)


if __name__ == "__main__":
    run()
