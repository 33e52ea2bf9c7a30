"""`python -m tokentm_jax` is `tokentm`."""

from tokentm_jax.cli.main import run

run()
