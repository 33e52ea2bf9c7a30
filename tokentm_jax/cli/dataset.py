"""`tokentm dataset`: the maps of a whole data set."""

from typing import Any

import click

from tokentm_jax.cli.options import MODELS_HELP, PATH, TEXT, class_names, parse_options, start_jax
from tokentm_jax.cli.rendezvous import meet
from tokentm_jax.cli.terminal import complain, running_work
from tokentm_jax.errors import InputError


@click.command()
@click.argument("data", type=TEXT, metavar="SOURCE")
@click.option(
    "--out", type=TEXT, required=True, metavar="STORE", help="Folder, or a URL that TensorStore knows (gs://, s3://)."
)
@click.option("--model", type=TEXT, help=MODELS_HELP)
@click.option("--checkpoint", type=PATH, help="Weights; default: the shipped model.")
@click.option("--img-size", type=click.IntRange(1), help="Another resolution; position embeddings are resampled.")
@click.option("--methods", default="tokentm", show_default=True, help="One or several, as a,b,c.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the methods; repeatable.")
@click.option("--target", default="predicted", show_default=True, help="The class to explain: predicted or label.")
@click.option(
    "--score", help="What is explained: versus:CLASS, log_probability or channel:NUMBER; default: the logit."
)
@click.option("--dtype", default="float16", show_default=True, help="Of the stored maps: float16 or float32.")
@click.option("--profile", default="default", show_default=True, help="Preprocessing: the model's, or reference.")
@click.option("--limit", type=click.IntRange(1), help="Number of images, taken at even intervals.")
@click.option("--batch-size", type=click.IntRange(1, 4096), default=32, show_default=True, help="Per device.")
@click.option("--chunk-size", type=click.IntRange(1), help="Images written together; default: 256 or a little more.")
@click.option("--label-map", metavar="FILE", help="JSON or CSV: the data set's name of a class, the model's class.")
@class_names
@click.option("--retry-skipped", is_flag=True, help="Compute chunks again that have skipped images.")
@click.option("--coordinator", metavar="HOST:PORT", help="Of several processes; 'auto' under Slurm, MPI or on a TPU.")
@click.option("--processes", type=click.IntRange(1), help="How many there are, with --coordinator HOST:PORT.")
@click.option("--process", type=click.IntRange(0), help="The number of this one, from 0.")
def dataset(
    data: str, out: str, methods: str, options: tuple[str, ...], limit: int | None, retry_skipped: bool, **given: Any
) -> None:
    """Explain a whole data set; started again with the same store, it resumes where it stopped.

    SOURCE is a folder or zip of photos, in class folders or without labels, a folder with labels.csv, a .mat file or
    tfds:NAME:SPLIT. STORE becomes a zarr v3 group with maps, logits, labels, predictions and provenance, which
    `tokentm_jax.open_maps` reads. Images that cannot be read or explained are skipped and listed in it.

    On several machines, the same command with --coordinator, --processes and --process runs on each, and they share
    the work. A store may be finished by another number of them.

    \b
    Examples:
      tokentm dataset photos/ --out maps --methods tokentm,gae
      tokentm dataset tfds:imagenet2012:validation --out gs://bucket/maps --model deit_base_patch16_224 \\
        --checkpoint deit_base.safetensors --coordinator 10.0.0.1:1234 --processes 4 --process 0
    """
    from tokentm_jax.data.sources import open_source
    from tokentm_jax.models.loading import load
    from tokentm_jax.runs.dataset import DatasetConfig, check, explain_dataset
    from tokentm_jax.runs.store import open_maps

    job = [given.pop(name) for name in ("coordinator", "processes", "process")]
    model, checkpoint, size, names = (given.pop(name) for name in ("model", "checkpoint", "img_size", "classes"))
    named = [name.strip() for name in methods.split(",") if name.strip()]
    config = DatasetConfig(named, parse_options(options), **given)
    source = open_source(data, limit=limit)
    check(config, source)
    number, count = _join(*job)
    start_jax()
    vit = load(model, checkpoint, img_size=size, class_names=names)
    with running_work("Images", "images") as report:
        outcome = explain_dataset(
            config, vit, source, out, report, process=number, processes=count, retry_skipped=retry_skipped
        )
    if outcome.damaged:
        click.echo(f"Damaged and computed again: chunk {', '.join(map(str, outcome.damaged))}", err=True)
    if count > 1:
        click.echo(f"process {number} of {count}: its {outcome.chunks} chunks of {out} are finished")
        return
    stored = open_maps(out)
    for sentence in list(stored.skipped.values())[:20]:
        complain(f"skipped: {sentence}")
    if len(stored.skipped) == len(stored):
        raise InputError(f"no image of {source.name} could be explained")
    click.echo(repr(stored))


def _join(coordinator: str | None, processes: int | None, process: int | None) -> tuple[int, int]:
    """Meet the other processes; returns the number of this one and how many there are."""
    if coordinator is None or coordinator == "auto":
        if processes is not None or process is not None:
            raise InputError("--processes and --process go with --coordinator HOST:PORT")
        if coordinator is None:
            return 0, 1
    elif processes is None or process is None or process >= processes:
        raise InputError("give --coordinator HOST:PORT with --processes N and --process from 0 to N - 1")
    else:
        meet(coordinator, processes, process)
    import jax

    where = None if coordinator == "auto" else coordinator
    month = 30 * 24 * 3600  # processes end at different times, and wait for each other
    try:
        jax.distributed.initialize(where, processes, process, shutdown_timeout_seconds=month)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot meet at {coordinator}: {str(error).splitlines()[0]}") from None
    return jax.process_index(), jax.process_count()
