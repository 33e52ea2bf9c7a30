"""The commands of the package and `train`, which is run from a clone, as one program."""

from models.training.__main__ import train
from tokentm_jax.cli.main import Commands, main

everything = Commands(commands={**main.commands, "train": train})
