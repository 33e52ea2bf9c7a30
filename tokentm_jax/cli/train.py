"""`tokentm train`: a model by a recipe."""

import dataclasses
import warnings
from pathlib import Path

import click

from tokentm_jax.cli.options import PATH, TEXT, make_folder, may_overwrite, start_jax
from tokentm_jax.cli.recipes import read_recipe
from tokentm_jax.errors import InputError, printable


@click.command()
@click.argument("recipe", type=PATH, metavar="CONFIG.py")
@click.option(
    "--train", "train_data", type=TEXT, help="Zip or folder of class folders, or tfds:NAME:SPLIT; .tsv of sentences."
)
@click.option("--test", "test_data", type=TEXT, help="The same, to measure the accuracy on.")
@click.option("--out", type=PATH, help="Folder; default: runs/<name of the recipe>.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Instead of the recipe's.")
@click.option("--limit", type=click.IntRange(1), help="Number of images of each set.")
@may_overwrite
def train(
    recipe: Path,
    train_data: str | None,
    test_data: str | None,
    out: Path | None,
    epochs: float | None,
    limit: int | None,
    overwrite: bool,
) -> None:
    """Train a model by a recipe; started again with the same folder, it goes on where it stopped.

    CONFIG.py is a Python file that is run, and whose `config`, or what its `get_config(KEY=VALUE, ...)` returns, is a
    TrainConfig, or a TextTrainConfig for sentences.

    \b
    Example:
      tokentm train configs/cifar10_vit_cpu.py --train cifar10_train.zip --test cifar10_test.zip --out runs/cifar10
    """
    from tokentm_jax.data.arrays import load_dataset
    from tokentm_jax.data.sentences import read_sentences
    from tokentm_jax.models.architectures import build
    from tokentm_jax.runs import train as training
    from tokentm_jax.runs.train_text import TextTrainConfig, train_text

    given = {"train_data": train_data, "test_data": test_data, "epochs": epochs}
    config = read_recipe(recipe, training.TrainConfig, TextTrainConfig)
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    folder = out or Path("runs") / config.name
    if isinstance(config, TextTrainConfig):
        count = len(config.class_names)
        data, test = (read_sentences(path, count, limit) for path in (config.train_data, config.test_data))
        start_jax()
        make_folder(folder)
        top_1 = train_text(config, data, test, folder, click.echo, overwrite=overwrite)
        click.echo(f"test accuracy {top_1:.2%}; the model is in {printable(folder)}")
        return
    module = build(config.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        made = training.preprocessing_of(config, module)
        others = None if config.held_out is None else f"!{config.held_out}"
        data = load_dataset(config.train_data, limit, others, made)
        test = load_dataset(config.test_data, limit, config.held_out, made)
    for warning in caught:
        click.echo(f"Warning: {printable(warning.message)}", err=True)
    if set(data.class_names) != set(test.class_names):
        raise InputError(f"{config.train_data} and {config.test_data} have different classes")
    if len(data.class_names) != module.num_classes:
        expected = f"the recipe's model has {module.num_classes} classes"
        raise InputError(f"{config.train_data} has {len(data.class_names)} classes, {expected}")
    start_jax()
    make_folder(folder)
    try:
        top_1 = training.train(config, module, data, test, folder, click.echo, overwrite=overwrite)
    except InputError:
        raise
    except ValueError as error:  # numbers of the recipe that do not go together
        raise InputError(f"the recipe {recipe}: {error}") from error
    click.echo(f"test accuracy {top_1:.2%}; the model is in {printable(folder)}")
