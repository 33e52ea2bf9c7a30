"""`tokentm dataset`: the maps of a whole data set."""

import os
from pathlib import Path
from typing import Any

import click

from tokentm_jax.cli.options import MODELS_HELP, PATH, TEXT, class_names, mixed_precision, parse_options, start_jax
from tokentm_jax.cli.terminal import complain, running_work
from tokentm_jax.errors import InputError

# Variables of schedulers for `--shard auto`: the number of this job, the first number, and how many jobs there are.
SCHEDULERS = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", "", "JOB_COMPLETIONS"),
    ("CLOUD_RUN_TASK_INDEX", "", "CLOUD_RUN_TASK_COUNT"),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("SLURM_PROCID", "", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "", "OMPI_COMM_WORLD_SIZE"),
)


@click.command()
@click.argument("data", type=TEXT, metavar="SOURCE")
@click.option("--out", type=TEXT, required=True, metavar="STORE", help="Folder, or a URL such as s3://bucket/maps.")
@click.option("--model", type=TEXT, help=MODELS_HELP)
@click.option("--checkpoint", type=PATH, help="Weights; default: the shipped model.")
@click.option("--img-size", type=click.IntRange(1), help="Another resolution; position embeddings are resampled.")
@click.option("--methods", default="tokentm", show_default=True, help="One or several, as a,b,c.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the methods; repeatable.")
@click.option("--target", default="predicted", show_default=True, help="The class to explain: predicted or label.")
@click.option(
    "--score", help="What is explained: versus:CLASS, margin, log_probability or channel:NUMBER; default: the logit."
)
@click.option("--dtype", default="float16", show_default=True, help="Of the stored maps: float16 or float32.")
@click.option("--logits", default="all", show_default=True, help="What is stored of the logits: all, top5 or none.")
@click.option("--profile", default="default", show_default=True, help="Preprocessing: the model's, or reference.")
@click.option("--decoding", default="exact", show_default=True, help="draft: decode JPEGs only as finely as needed.")
@click.option("--length", type=click.IntRange(1), help="Of texts: tokens that each is padded to; longer are skipped.")
@click.option("--limit", type=click.IntRange(1), help="Number of images, taken at even intervals.")
@click.option("--batch-size", type=click.IntRange(1, 4096), default=32, show_default=True, help="Per device.")
@click.option(
    "--shard-size", "--chunk-size", type=click.IntRange(1), help="Images written together; default: 256 or a few more."
)
@click.option("--label-map", metavar="FILE", help="JSON or CSV: the data set's name of a class, the model's class.")
@class_names
@mixed_precision
@click.option("--retry-skipped", is_flag=True, help="Compute shards again that have skipped images.")
@click.option("--verify", is_flag=True, help="Read all finished shards, and compute damaged ones again.")
@click.option("--plan", is_flag=True, help="Only make the store with its list of shards, before many jobs start.")
@click.option("--shard", metavar="I/N", help="Only every N-th shard from I; 'auto' or 'auto/N' in a job of an array.")
@click.option("--engine", default="local", show_default=True, help="Where it runs: local, ray or beam.")
@click.option(
    "--engine-option", "engine_options", multiple=True, metavar="KEY=VALUE", help="Of Ray's workers or Beam."
)
@click.option("--processes", type=click.IntRange(1), hidden=True)
@click.option("--process", type=click.IntRange(0), hidden=True)
@click.option("--coordinator", metavar="HOST:PORT", hidden=True)
def dataset(
    data: str,
    out: str,
    checkpoint: Path | None,
    methods: str,
    options: tuple[str, ...],
    limit: int | None,
    classes: Path | None,
    shard_size: int | None,
    retry_skipped: bool,
    verify: bool,
    plan: bool,
    shard: str | None,
    processes: int | None,
    process: int | None,
    coordinator: str | None,
    engine: str,
    engine_options: tuple[str, ...],
    **settings: Any,
) -> None:
    """Explain a whole data set; started again with the same store, it resumes where it stopped.

    SOURCE is a folder or zip of photos, in class folders or without labels, a folder with labels.csv, a .mat file,
    tfds:NAME:SPLIT, or files that are shards: .tar of WebDataset, .parquet or .array_record, local or in an object
    store. STORE becomes a folder of Parquet files with maps, logits, labels and predictions, which
    `tokentm_jax.open_maps` reads. Images that cannot be read or explained are skipped and listed in it.

    On several machines, the same command with --shard I/N runs on each. They exchange nothing: what one has not done,
    the same command does later, with any number of them.

    \b
    Examples:
      tokentm dataset photos/ --out maps --methods tokentm,gae
      tokentm dataset "s3://bucket/train-{000000..001281}.tar" --out s3://bucket/maps --shard auto \\
        --model deit_base_patch16_224 --checkpoint deit_base.safetensors --logits top5
    """
    from tokentm_jax.runs.dataset import explain_dataset
    from tokentm_jax.runs.explainer import Explainer
    from tokentm_jax.runs.job import begin
    from tokentm_jax.runs.store import open_maps

    number, count = _share(shard, coordinator, processes, process)
    named = [name.strip() for name in methods.split(",") if name.strip()]
    explainer = Explainer(
        checkpoint=checkpoint, methods=named, options=parse_options(options), class_names=classes, **settings
    )
    if plan or engine == "local":
        start_jax()
    if plan:
        store, *_ = begin(explainer, data, out, limit, shard_size)
        click.echo(f"{out} has {len(store.shards)} shards: run the same command with --shard I/N")
        return
    with running_work("Images", "images") as report:
        outcome = explain_dataset(
            explainer,
            data,
            out,
            report,
            process=number,
            processes=count,
            limit=limit,
            shard_size=shard_size,
            retry_skipped=retry_skipped,
            verify=verify,
            engine=engine,
            engine_options=parse_options(engine_options),
        )
    if outcome.damaged:
        click.echo(f"Damaged and computed again: shard {', '.join(map(str, outcome.damaged))}", err=True)
    if outcome.limits and outcome.computed:
        click.echo(f"This run {outcome.limits}", err=True)
    if count > 1:
        click.echo(f"process {number} of {count}: its {outcome.shards} shards of {out} are finished")
        return
    stored = open_maps(out)
    if stored.count().skipped:
        skipped = list(stored.skipped.values())
        for sentence in skipped[:20]:
            complain(f"skipped: {sentence}")
        if len(skipped) == len(stored):
            raise InputError(f"no image of {data} could be explained")
    click.echo(repr(stored))


def _share(shard: str | None, coordinator: str | None, processes: int | None, process: int | None) -> tuple[int, int]:
    """The number of this process and how many there are. InputError for anything but I/N."""
    if coordinator is not None:
        click.echo("Warning: --coordinator is not needed any more: processes exchange nothing, see --shard", err=True)
        shard = shard or ("auto" if coordinator == "auto" else None)
    if processes is not None or process is not None:
        if shard is not None or processes is None or process is None:
            raise InputError("--processes N and --process I are now --shard I/N, and need each other")
        shard = f"{process}/{processes}"
    if shard is None:
        return 0, 1
    first, _, second = shard.partition("/")
    if first == "auto":
        found = next((names for names in SCHEDULERS if names[0] in os.environ), None)
        if found is None:
            raise InputError("--shard auto found no array of jobs (Slurm, Kubernetes, ...): give --shard I/N")
        index, start, total = (os.environ.get(name, "") for name in found)
        if not index.isdecimal() or (start and not start.isdecimal()):
            raise InputError(f"--shard auto: the variable {found[0]} must be a number, got {index!r:.80}")
        first, second = str(int(index) - int(start or 0)), second or total
        if not second:
            raise InputError(f"--shard auto found {found[0]}={index}, but not how many jobs there are: use auto/N")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise InputError(f"--shard must be I/N with I from 0 to N - 1, got {shard!r:.80}")
    if processes is not None:
        click.echo(f"Warning: --processes and --process are deprecated: use --shard {shard}", err=True)
    return int(first), int(second)
