"""`python -m models.training`: a model by a recipe."""

import dataclasses
from functools import partial
from pathlib import Path

import click

from tokentm_jax.cli.main import OneSentence
from tokentm_jax.cli.options import PATH, TEXT, make_folder, may_overwrite, start_jax
from tokentm_jax.cli.process import run_process
from tokentm_jax.cli.recipes import read_recipe
from tokentm_jax.errors import InputError, printable


@click.command(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=PATH, metavar="RECIPE.py")
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

    RECIPE.py is a Python file that is run, and whose `config`, or what its `get_config(KEY=VALUE, ...)` returns, is a
    TrainConfig, a TextTrainConfig for sentences, a QuestionTrainConfig for questions about scenes, or an
    AmortiseConfig for an explainer.

    \b
    Example:
      python -m models.training models/training/recipes/cifar10_vit_cpu.py --out runs/cifar10
    """
    from models.training import train as photos
    from models.training.amortise import train_explainer
    from models.training.data import load_dataset
    from models.training.recipe import AmortiseConfig, QuestionTrainConfig, TextTrainConfig, TrainConfig
    from models.training.train_questions import train_questions
    from models.training.train_text import read_sentences, train_text
    from tokentm_jax.models.architectures import build

    given = {"train_data": train_data, "test_data": test_data, "epochs": epochs}
    config = read_recipe(recipe, TrainConfig, TextTrainConfig, AmortiseConfig, QuestionTrainConfig)
    if isinstance(config, QuestionTrainConfig) and (train_data or test_data or limit):
        raise InputError("scenes are rendered: leave out --train, --test and --limit")
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    if isinstance(config, TextTrainConfig):
        sets = (read_sentences(p, len(config.class_names), limit) for p in (config.train_data, config.test_data))
        job = partial(train_text, config, *sets)
    elif isinstance(config, QuestionTrainConfig):
        job = partial(train_questions, config)
    elif isinstance(config, AmortiseConfig):
        data = load_dataset(config.train_data, limit or config.images)
        job = partial(train_explainer, config, data, load_dataset(config.test_data, limit or config.test_images))
    else:
        module = build(config.model)
        made = photos.preprocessing_of(config, module)
        others = None if config.held_out is None else f"!{config.held_out}"
        data = load_dataset(config.train_data, limit, others, made)
        job = partial(photos.train, config, module, data, load_dataset(config.test_data, limit, config.held_out, made))
    folder = out or Path("runs") / config.name
    start_jax()
    make_folder(folder)
    try:
        top_1 = job(folder, click.echo, overwrite=overwrite)
    except InputError:
        raise
    except ValueError as error:  # numbers of the recipe that do not go together
        raise InputError(f"the recipe {recipe}: {error}") from error
    found = "correlation with held-out samples" if isinstance(config, AmortiseConfig) else "test accuracy"
    click.echo(f"{found} {top_1:.2%}; the model is in {printable(folder)}")


if __name__ == "__main__":
    run_process(lambda: train(prog_name="python -m models.training"))
