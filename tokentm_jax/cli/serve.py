"""`tokentm serve`: a page that explains photos, recordings or texts."""

import socket
import time
from pathlib import Path

import click

from tokentm_jax.cli.options import MODELS_HELP, PATH, TEXT, class_names, methods_of, start_jax
from tokentm_jax.errors import InputError, printable, require
from tokentm_jax.files import reason

# Methods of a few passes, each family once or twice.
QUICK = (
    "tokentm,gae,attn_lrp,legrad,transformer_attribution,conservative_lrp,libra_full_grad,attcat,grad_cam,rollout,"
    "raw_attention,gradient_x_input,tokentm_mix"
)


@click.command()
@click.option("--model", type=TEXT, help=MODELS_HELP)
@click.option("--checkpoint", type=PATH, help="Weights; default: the shipped model's, or timm's of a timm name.")
@click.option("--methods", help="Methods to choose from, as a,b,c, or 'all'; the first is shown first.")
@class_names
@click.option("--host", type=TEXT, default="127.0.0.1", show_default=True, help="0.0.0.0 opens it to other machines.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--allow-host", "names", type=TEXT, multiple=True, metavar="NAME", help="Another name of the server.")
@click.option("--max-upload", type=click.IntRange(1, 512), default=20, show_default=True, help="MiB of an upload.")
@click.option("--timeout", type=click.IntRange(1, 3600), default=60, show_default=True, help="Seconds of one answer.")
def serve(
    model: str | None,
    checkpoint: Path | None,
    methods: str | None,
    classes: Path | None,
    host: str,
    port: int,
    names: tuple[str, ...],
    max_upload: int,
    timeout: int,
) -> None:
    """Serve a page that explains photos, recordings or texts: give one, choose class and method, see the map.

    Needs the extra [serve]. Only this machine can open the page, unless --host changes this. What is sent stays in
    memory, and is forgotten with its answer. Ctrl-C ends it.

    \b
    Examples:
      tokentm serve
      tokentm serve --model deit_tiny_patch16_224
      tokentm serve --model runs/sst2_minilm
      tokentm serve --methods gae,rollout --host 0.0.0.0 --port 8080
    """
    for package in ("starlette", "uvicorn"):
        require(package, "serve", "tokentm serve")
    from tokentm_jax.cli.web import application, explained, is_local, server
    from tokentm_jax.models.loading import load

    chosen = methods_of(methods or QUICK)
    with _listening(host, port) as listening:
        start_jax()
        vit = load(model, checkpoint, class_names=classes)
        vit.require_classes()
        click.echo(f"Compiling {chosen[0]} for {printable(vit.name)} ...", err=True)
        example, took = vit.preprocessing.example(), []
        for _ in range(2):
            began = time.monotonic()
            explained(vit, example, chosen[0], None)
            took.append(time.monotonic() - began)
        app = application(
            vit, chosen, host=host, names=names, largest=max_upload * 2**20, seconds=timeout, ready=chosen[:1],
            compiling=took[0] - took[1],
        )  # fmt: skip
        number = listening.getsockname()[1]
        shown = "localhost" if is_local(host) else f"[{host}]" if ":" in host else host
        click.echo(f"http://{shown}:{number}/ explains a {vit.preprocessing.kind} in {took[1]:.2f} s; Ctrl-C ends it")
        if not is_local(host):
            click.echo("Anyone who can reach this machine over the network can open this page.", err=True)
        server(app, timeout).run([listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before minutes go by with compiling. Raises InputError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        cause = reason(error).partition(" (while")[0]  # what Python adds repeats the address
        raise InputError(f"port {port} of {host} cannot be used: {cause}") from None
