"""`python -m tokentm_jax` is `tokentm`."""

from tokentm_jax.cli import main

main(prog_name="tokentm")
