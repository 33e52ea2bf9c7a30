"""The command line. JAX is imported inside the commands, so that `--help` answers at once."""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokentm_jax import __version__
from tokentm_jax.cli.explain import Run, fail, output_names, print_result, sheet_names
from tokentm_jax.cli.terminal import complain, console, memory_errors, running_images, running_table
from tokentm_jax.errors import InputError, printable, suggest
from tokentm_jax.files import read_text, reason, require_ours

if TYPE_CHECKING:
    from tokentm_jax.models.vit import ViT

MODELS_HELP = "Timm name, shipped model or hf-hub:timm/NAME (see `tokentm models`); default: the checkpoint's own."
LARGEST_RECIPE = 2**20  # bytes
INTERRUPTED = 130  # exit code, as shells have it


class Given(click.ParamType):
    """A text, or the path that it names, that is not empty: an empty path would be the current folder."""

    def __init__(self, kind: type[str] | type[Path]) -> None:
        self.kind = kind
        self.name = "path" if kind is Path else "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        if not str(value).strip() or "\0" in str(value):
            self.fail("must be a name that a file can have.", param, ctx)
        return self.kind(value)


PATH, TEXT = Given(Path), Given(str)


class Commands(click.Group):
    """The group whose commands turn bad input into one sentence and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with memory_errors():
                return super().main(*args, **kwargs)  # which knows what to do where nobody reads our output
        except InputError as error:
            complain(str(error))
        except OSError as error:
            where = f"{click.format_filename(error.filename)}: " if error.filename else ""
            complain(f"{where}{reason(error)}")
        except RecursionError:
            complain("something that was given is nested too deeply")
        sys.exit(2)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tokentm")
def main() -> None:
    """Explain what a Vision Transformer sees: TokenTM heatmaps and other methods.

    \b
    Example:
      tokentm explain cat.jpg
    """


# ---- explain --------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option("--model", help=MODELS_HELP)
@click.option("--checkpoint", type=PATH, help="Weights; default: the shipped model.")
@click.option("--method", default="tokentm", show_default=True, help="A method, several as a,b,c, or 'all'.")
@click.option("--target", help="Class to explain, by number or name; default: each photo's predicted class.")
@click.option("--out", type=PATH, default="explanations", show_default=True, help="Folder.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the method; repeatable.")
@click.option("--batch-size", type=click.IntRange(1, 1024), default=8, show_default=True)
@click.option("--classes", type=PATH, help="Class names: .json, or .txt with one per line.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of tables.")
def explain(
    photos: tuple[str, ...],
    model: str | None,
    checkpoint: Path | None,
    method: str,
    target: str | None,
    out: Path,
    options: tuple[str, ...],
    batch_size: int,
    classes: Path | None,
    as_json: bool,
) -> None:
    """Show the top five classes of photos and write heatmaps.

    PHOTO is a file, a folder or a pattern. For each photo, <name>.png (photo, heatmap, both) and <name>.npz (the
    map and how it was made) go to the output folder. With several methods, each batch of photos gives one
    comparison picture, and each photo and method <name>.<method>.npz.

    \b
    Examples:
      tokentm explain cat.jpg
      tokentm explain photos/ --model deit_tiny_patch16_224 --checkpoint deit_tiny.safetensors
      tokentm explain cat.jpg --method tokentm,rollout,gae --target "tabby cat"
      tokentm explain cat.jpg --option ffn=false --json
    """
    from rich.progress import Progress

    from tokentm_jax.data.photos import find_photos
    from tokentm_jax.methods.table import METHODS
    from tokentm_jax.models.loading import load

    chosen = list(METHODS) if method == "all" else list(dict.fromkeys(m.strip() for m in method.split(",")))
    settings = parse_options(options)
    for name in chosen:
        if name not in METHODS:
            raise suggest("method", name, METHODS)
        METHODS[name].bind(name, settings)  # an unknown option is noticed before any work
    _start_jax()
    vit = load(model, checkpoint, class_names=classes)
    class_index = None if target is None else vit.class_index(target)
    _make_folder(out)

    results: dict[str, dict[str, Any]] = {}
    paths: list[Path] = []
    for argument in photos:
        try:
            paths += [path for path in find_photos([argument]) if path not in paths]
        except InputError as error:
            fail(results, argument, error)
    results |= {str(path): {} for path in paths}
    names = output_names(paths, out, chosen)
    batches = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
    sheets = list(names.values()) if len(paths) == 1 else sheet_names(len(batches), paths, out)
    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as bar:
        task = bar.add_task("Explaining", total=len(paths))
        for sheet, batch in zip(sheets, batches, strict=True):
            run = Run(vit, chosen, settings, class_index, out, names, sheet, min(batch_size, len(paths)))
            run.explain(batch, results, skip_unfit=method == "all")
            bar.advance(task, len(batch))

    failed = sum("error" in result for result in results.values())
    if as_json:
        click.echo(json.dumps([{"path": path, **result} for path, result in results.items()], indent=1))
    else:
        for path, result in results.items():
            if "error" not in result:
                print_result(path, result)
    if failed:
        click.echo(f"{failed} of {len(results)} photos failed", err=True)
        click.get_current_context().exit(2)


def parse_options(texts: Sequence[str]) -> dict[str, bool | int | float | str | None]:
    """The options by name, from KEY=VALUE each. Raises InputError for a text of another form and for a second one of
    a name."""
    options: dict[str, bool | int | float | str | None] = {}
    for key, value in map(parse_option, texts):
        if key in options:
            raise InputError(f"the option {key!r} is given twice")
        options[key] = value
    return options


def parse_option(text: str) -> tuple[str, bool | int | float | str | None]:
    """ "KEY=VALUE" -> key and the value as bool, int, float, None or else text."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise InputError(f"an option is given as KEY=VALUE, got {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return key, words[value.lower()]
    if re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        return key, int(value)
    if re.fullmatch(r"[+-]?([0-9]{1,18}\.?[0-9]{0,30}|\.[0-9]{1,30})(e[+-]?[0-9]{1,2})?", value, re.IGNORECASE):
        return key, float(value)
    return key, value


def _make_folder(out: Path) -> None:
    probe = out / f".{os.getpid()}.part"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"the output folder {out} cannot be written: {reason(error)}") from None


def _start_jax() -> None:
    """Keep compiled programs between runs where that is possible, and raise InputError where JAX finds no device."""
    import jax

    try:
        chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        cache = chosen or str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokentm_jax")
        if "://" not in cache:
            os.makedirs(cache, exist_ok=True, mode=0o700)
            os.listdir(cache)
        if not chosen:
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    except (OSError, RuntimeError):  # a file, a folder of somebody else, no home
        jax.config.update("jax_compilation_cache_dir", None)
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # that of a known platform that is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(f"JAX finds no device with JAX_PLATFORMS={platforms!r} ({reason(error)})") from None


# ---- tables ---------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of a table.")
def models(as_json: bool) -> None:
    """List the shipped models and the architectures that a checkpoint can be loaded into.

    \b
    Example:
      tokentm models
    """
    rows = list(_model_rows())
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None)
    for column in ("Model", "Parameters", "Resolution", "Patch", "Weights"):
        table.add_column(column, justify="left" if column in ("Model", "Weights") else "right", no_wrap=True)
    for row in rows:
        height, width = row["resolution"]
        size = str(height) if height == width else f"{height} x {width}"
        weights = "shipped" if row["shipped"] else "needs a checkpoint"
        table.add_row(row["name"], f"{row['parameters'] / 1e6:.1f} M", size, str(row["patch_size"]), weights)
    console().print(table)


def _model_rows() -> Iterator[dict[str, Any]]:
    from tokentm_jax.models.architectures import ARCHITECTURES, build
    from tokentm_jax.models.checkpoint import read_description
    from tokentm_jax.models.loading import SHIPPED

    files = {file.stem: file for folder in reversed(SHIPPED) for file in sorted(folder.glob("*.safetensors"))}
    shipped = {name: read_description(file) for name, file in files.items()}
    configs = {name: (description["architecture"], True) for name, description in shipped.items() if description}
    for name, (config, is_shipped) in {**configs, **{n: (c, False) for n, (c, _) in ARCHITECTURES.items()}}.items():
        module = build(config)
        yield {
            "name": name,
            "parameters": parameter_count(module),
            "resolution": list(module.img_size),
            "patch_size": module.patch_size,
            "shipped": is_shipped,
        }


def parameter_count(module: "ViT") -> int:
    """Number of parameters, by arithmetic: tracing all architectures would take many seconds."""
    d, hidden = module.embed_dim, int(module.embed_dim * module.mlp_ratio)
    attention = 3 * d * (d + module.qkv_bias) + d * (d + module.proj_bias)
    feed_forward = hidden * (d + 1) + d * (hidden + 1)
    scales = 0 if module.init_values is None else 2 * d
    block = attention + feed_forward + 4 * d + scales
    positions = module.grid[0] * module.grid[1] + (0 if module.no_embed_class else module.prefix)
    embedding = d * (3 * module.patch_size**2 + (not module.pre_norm) + module.prefix + positions)
    norms = 2 * d * (1 + module.pre_norm)
    heads = (d + 1) * module.num_classes * (1 + module.distilled)
    return embedding + module.depth * block + norms + heads


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of a table.")
def methods(as_json: bool) -> None:
    """List the explanation methods.

    \b
    Example:
      tokentm methods
    """
    from tokentm_jax.methods.table import METHODS

    if as_json:
        fields = ("summary", "paper", "year", "class_specific", "output", "passes")
        rows = [{"name": name, **{f: getattr(method, f) for f in fields}} for name, method in METHODS.items()]
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("Method", no_wrap=True)
    for column in ("Paper", "Year", "Class-specific", "Output", "Passes"):
        table.add_column(column)
    for name, method in METHODS.items():
        specific = "yes" if method.class_specific else "no"
        table.add_row(name, method.paper, str(method.year), specific, method.output, method.passes)
    out = console()
    out.print(table)
    out.print("Passes: forward (F) and backward (B) passes of the model per batch.", style="dim")


# ---- convert and train ----------------------------------------------------------------------------------------------


@main.command()
@click.argument("checkpoint", type=PATH)
@click.argument("out", type=PATH)
@click.option("--model", help=MODELS_HELP)
@click.option("--img-size", type=click.IntRange(1), help="Another resolution; position embeddings are resampled.")
@click.option("--classes", type=PATH, help="Class names: .json, or .txt with one per line.")
def convert(checkpoint: Path, out: Path, model: str | None, img_size: int | None, classes: Path | None) -> None:
    """Write CHECKPOINT to OUT with its architecture, preprocessing and class names.

    OUT is NAME.safetensors, or a name without suffix for an Orbax folder. It then loads without --model.

    \b
    Example:
      tokentm convert deit_tiny.pth deit_tiny.safetensors --model deit_tiny_patch16_224
    """
    from tokentm_jax.models.checkpoint import write_checkpoint
    from tokentm_jax.models.loading import load

    require_ours(out)  # before minutes of reading
    _start_jax()
    vit = load(model, checkpoint, img_size=img_size, class_names=classes)
    written = write_checkpoint(out, vit.module, vit.params, vit.preprocessing, vit.class_names, {"name": vit.name})
    millions = parameter_count(vit.module) / 1e6
    click.echo(f"{printable(written)}: {vit.name}, {millions:.1f} M parameters, {vit.module.num_classes} classes")


@main.command()
@click.argument("recipe", type=PATH, metavar="CONFIG.py")
@click.option("--train", "train_data", type=TEXT, help="Zip or folder of class folders, or tfds:NAME:SPLIT.")
@click.option("--test", "test_data", type=TEXT, help="The same, to measure the accuracy on.")
@click.option("--out", type=PATH, help="Folder; default: runs/<name of the recipe>.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="In place of the recipe's.")
@click.option("--limit", type=click.IntRange(1), help="Use so many images of each set.")
def train(
    recipe: Path,
    train_data: str | None,
    test_data: str | None,
    out: Path | None,
    epochs: float | None,
    limit: int | None,
) -> None:
    """Train a ViT by a recipe; started again with the same folder, it goes on where it stopped.

    CONFIG.py is a Python file that is run, and whose `config` is a TrainConfig.

    \b
    Example:
      tokentm train configs/cifar10_vit_cpu.py --train cifar10_train.zip --test cifar10_test.zip --out runs/cifar10
    """
    from tokentm_jax.data.arrays import load_dataset
    from tokentm_jax.models.architectures import build
    from tokentm_jax.runs import train as training

    given = {"train_data": train_data, "test_data": test_data, "epochs": epochs}
    config = _read_recipe(recipe, training.TrainConfig)
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    module = build(config.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        data, test = load_dataset(config.train_data, limit), load_dataset(config.test_data, limit)
    for warning in caught:
        click.echo(f"Warning: {printable(warning.message)}", err=True)
    if set(data.class_names) != set(test.class_names):
        raise InputError(f"{config.train_data} and {config.test_data} have different classes")
    if len(data.class_names) != module.num_classes:
        expected = f"the recipe's model has {module.num_classes} classes"
        raise InputError(f"{config.train_data} has {len(data.class_names)} classes, {expected}")
    _start_jax()
    folder = out or Path("runs") / config.name
    _make_folder(folder)
    try:
        top_1 = training.train(config, module, data, test, folder, click.echo)
    except InputError:
        raise
    except ValueError as error:  # numbers of the recipe that do not go together
        raise InputError(f"the recipe {recipe}: {error}") from error
    click.echo(f"test accuracy {top_1:.2%}; the model is in {printable(folder)}")


def _read_recipe(path: Path, kind: type) -> Any:
    """The `config` of a Python file, which is run. Raises InputError for any error in it."""

    from tokentm_jax.validation import check_fields

    def refuse(reason: str) -> NoReturn:
        raise InputError(f"the recipe {path} {reason}") from None

    read_text(path, LARGEST_RECIPE, "the recipe")  # a pipe, a device, no text: before it is run
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where results go, it has nothing to print
            found = runpy.run_path(str(path)).get("config")
    except SystemExit as error:
        refuse(f"ends the program (SystemExit: {error.code})")
    except Exception as error:
        refuse(f"cannot be run: {type(error).__name__}: {error}")
    if type(found) is not kind:
        refuse(f"must define `config` as a {kind.__name__}")
    return check_fields(found, f"the recipe {path}")


# ---- dataset --------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("data", type=TEXT, metavar="SOURCE")
@click.option(
    "--out", type=TEXT, required=True, metavar="STORE", help="Folder, or a URL that TensorStore knows (gs://, s3://)."
)
@click.option("--model", help=MODELS_HELP)
@click.option("--checkpoint", type=PATH, help="Weights; default: the shipped model.")
@click.option("--img-size", type=click.IntRange(1), help="Another resolution; position embeddings are resampled.")
@click.option("--methods", default="tokentm", show_default=True, help="One or several, as a,b,c.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the methods; repeatable.")
@click.option("--target", default="predicted", show_default=True, help="The class to explain: predicted or label.")
@click.option("--dtype", default="float16", show_default=True, help="Of the stored maps: float16 or float32.")
@click.option("--profile", default="default", show_default=True, help="Preprocessing: the model's, or reference.")
@click.option("--limit", type=click.IntRange(1), help="So many images, spread evenly over the data set.")
@click.option("--batch-size", type=click.IntRange(1, 4096), default=32, show_default=True, help="Per device.")
@click.option("--chunk-size", type=click.IntRange(1), help="Images written together; default: 256 or a little more.")
@click.option("--label-map", metavar="FILE", help="JSON or CSV: the data set's name of a class, the model's class.")
@click.option("--retry-skipped", is_flag=True, help="Compute chunks again that have skipped images.")
@click.option("--coordinator", metavar="HOST:PORT", help="Of several processes; 'auto' under Slurm, MPI or on a TPU.")
@click.option("--processes", type=click.IntRange(1), help="How many there are, with --coordinator HOST:PORT.")
@click.option("--process", type=click.IntRange(0), help="The number of this one, from 0.")
def dataset(
    data: str,
    out: str,
    model: str | None,
    checkpoint: Path | None,
    img_size: int | None,
    methods: str,
    options: tuple[str, ...],
    limit: int | None,
    retry_skipped: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    **settings: Any,
) -> None:
    """Explain a whole data set; started again with the same store, it goes on where it stopped.

    SOURCE is a folder or zip of class folders, a folder with labels.csv, a .mat file or tfds:NAME:SPLIT. STORE becomes
    a zarr v3 group with maps, logits, labels, predictions and provenance, which `tokentm_jax.open_maps` reads. Images
    that cannot be read or explained are skipped and listed in it.

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

    named = [name.strip() for name in methods.split(",") if name.strip()]
    config = DatasetConfig(named, parse_options(options), **settings)
    source = open_source(data, limit=limit)
    check(config, source)
    number, count = _join(coordinator, processes, process)
    _start_jax()
    vit = load(model, checkpoint, img_size=img_size)
    with running_images() as report:
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
    elif processes is None or process is None or process >= processes or ":" not in coordinator:
        raise InputError("give --coordinator HOST:PORT with --processes N and --process from 0 to N - 1")
    import jax

    where = None if coordinator == "auto" else coordinator
    month = 30 * 24 * 3600  # processes end at different times, and wait for each other
    try:
        jax.distributed.initialize(where, processes, process, shutdown_timeout_seconds=month)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes cannot meet at {coordinator}: {str(error).splitlines()[0]}") from None
    return jax.process_index(), jax.process_count()


# ---- evaluate -------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("recipe", type=PATH, metavar="CONFIG.py")
@click.option("--model", help=MODELS_HELP)
@click.option("--checkpoint", type=PATH, help="Weights, in place of the recipe's.")
@click.option("--data", type=TEXT, help="Folder, zip, .mat file or tfds:NAME:SPLIT, in place of the recipe's.")
@click.option("--methods", help="Rows of the recipe or other methods, as a,b,c.")
@click.option("--limit", type=click.IntRange(1), help="So many images, drawn by the recipe's seed.")
@click.option("--batch-size", type=click.IntRange(1, 4096), help="In place of the recipe's.")
@click.option("--label-map", type=TEXT, metavar="FILE", help="JSON or CSV: the data set's class name, the model's.")
@click.option("--maps", type=TEXT, help="Store of `tokentm dataset` to take maps from; others are computed.")
@click.option("--out", type=PATH, help="Folder; default: runs/<name of the recipe>.")
def evaluate(
    recipe: Path,
    model: str | None,
    checkpoint: Path | None,
    data: str | None,
    methods: str | None,
    limit: int | None,
    batch_size: int | None,
    label_map: str | None,
    maps: str | None,
    out: Path | None,
) -> None:
    """Measure explanation methods by a recipe; started again with the same folder, it goes on where it stopped.

    CONFIG.py is a Python file that is run, and whose `config` is an EvaluateConfig. The results are results.json,
    results.md and curves.png.

    \b
    Example:
      tokentm evaluate configs/perturbation_imagenet_sample.py --methods tokentm,gae --limit 100
    """
    from tokentm_jax.data.sources import open_source
    from tokentm_jax.metrics.tasks import EvaluateConfig, check, select
    from tokentm_jax.models.loading import load
    from tokentm_jax.runs.evaluate import evaluate
    from tokentm_jax.runs.store import open_maps

    config = _read_recipe(recipe, EvaluateConfig)
    if model is not None or checkpoint is not None:  # another model's checkpoint would not fit
        config = dataclasses.replace(
            config, model=model or config.model, checkpoint=None if checkpoint is None else str(checkpoint)
        )
    given = {"data": data, "limit": limit, "batch_size": batch_size, "label_map": label_map}
    config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
    if methods is not None:
        config = select(config, [name.strip() for name in methods.split(",")])
    check(config)
    _start_jax()
    stored = None if maps is None else open_maps(maps)
    source = open_source(config.data, limit=config.limit, seed=None if config.limit is None else config.seed)
    vit = load(config.model, config.checkpoint)
    folder = out or Path("runs") / config.name
    _make_folder(folder)
    with running_table() as report:
        results = evaluate(config, vit, source, folder, report, stored)
    skipped = results["run"]["skipped"]
    for sentence in skipped["examples"].values():
        complain(f"skipped: {sentence}")
    if skipped["count"]:
        click.echo(f"{skipped['count']} images were skipped", err=True)
    for line in (folder / "results.md").read_text(encoding="utf-8").splitlines():
        click.echo(printable(line))
    click.echo(f"The results are in {printable(folder)}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of a table.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Put finished evaluations side by side, with paired differences and their 95 % intervals.

    RUN is an output folder of `tokentm evaluate`. Of one run, every method is compared with the first; of several,
    every method with the same method of the first run, over the images that both have.

    \b
    Example:
      tokentm compare runs/perturbation_imagenet_sample
    """
    from tokentm_jax.runs.report import compare as compare_runs

    entries = compare_runs(list(dict.fromkeys(runs)))
    if as_json:
        click.echo(json.dumps(entries, indent=1))
        return
    table = Table(box=None)
    for column in ("Metric", "Method", "Run", "Value", "Difference", "95 % interval", "To", "Images"):
        table.add_column(column, justify="right" if column in ("Value", "Difference", "Images") else "left")
    for entry in sorted(entries, key=lambda e: e["metric"]):  # stable: methods and runs keep their order
        compared = ("", "", "")
        if entry["baseline"] is not None:
            interval = f"[{entry['low']:+.3f}, {entry['high']:+.3f}]"
            compared = (f"{entry['difference']:+.3f}", interval, entry["baseline"])
        names = [Text(printable(entry[field])) for field in ("metric", "method", "run")]
        row = (*names, f"{entry['value']:.3f}", *compared[:2], Text(printable(compared[2])))
        table.add_row(*row, str(entry["images"]))
    console().print(table)
