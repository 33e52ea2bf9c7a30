"""The command line, a file per command. JAX is imported inside the commands, so that `--help` answers at once."""
