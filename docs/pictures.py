"""Draw the pictures of docs/images. Those of the tutorial show the arrays of its code.

    python docs/pictures.py                                # the tutorials'
    python docs/pictures.py DEIT_TINY.safetensors          # and those of README, metrics and figures, with DeiT-tiny

They are committed, since the site is built without computing anything.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from PIL import Image

import tokentm_jax as tm

DOCS = Path(__file__).resolve().parent
PHOTO = DOCS.parent / "notebooks" / "chelsea_face.jpg"
RATIOS = LogNorm(0.1, 10)  # ratios of lengths and weights


def names_of(page: str) -> dict:
    """The names that the code of a page leaves behind; it runs beside a photo called cat.jpg."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE))
    names: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(PHOTO, Path(folder) / "cat.jpg")
        os.chdir(folder)
        exec(compile(code, page, "exec"), names)
        os.chdir(DOCS)
    return names


def panel(figure, place, values, title, scale, colours="viridis"):
    axes = figure.add_subplot(*place)
    picture = axes.imshow(values, cmap=colours, norm=scale)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    return picture


def save(figure: Figure, name: str) -> None:
    file = DOCS / "images" / name
    figure.savefig(file, dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.08)
    Image.open(file).convert("RGB").save(file, optimize=True, quality=85)


def by_block(names: dict, attention: str, ffn: str, name: str, label: str, scale: Normalize, colours: str):
    """Two rows of fields, the attention layers' above the FFNs', on one scale."""
    grid, depth = names["vit"].module.grid, names["vit"].module.depth
    figure = Figure((9.4, 3.2), layout="constrained")
    for row, values, layer in ((0, names[attention], "attention"), (1, names[ffn], "FFN")):
        for block, field in enumerate(np.asarray(values)[:, 1:]):
            place = (2, depth, row * depth + block + 1)
            shown = panel(figure, place, field.reshape(grid), f"{layer} {block + 1}", scale, colours)
    figure.colorbar(shown, ax=figure.axes, shrink=0.8, label=label)
    save(figure, name)


def tutorial() -> None:
    names = names_of("tutorials/equations.md")
    grid, columns = names["vit"].module.grid, names["vit"].module.depth + 1
    photo = np.asarray(Image.open(PHOTO).convert("RGB"))
    side = min(photo.shape[:2])
    left = (photo.shape[1] - side) // 2
    photo = photo[:side, left : left + side]

    embedded = np.asarray(names["length"](names["tokens"][0]))[1:].reshape(grid)
    ratios = [np.asarray(names[n])[:, 1:] for n in ("attention_ratio", "ffn_ratio")]
    figure = Figure((10.6, 3.2), layout="constrained")
    axes = figure.add_subplot(2, columns, 1)
    axes.imshow(photo)
    axes.set_title("photo", fontsize=9)
    axes.axis("off")
    own = panel(figure, (2, columns, columns + 1), embedded, "L(x), embedded", Normalize(0, embedded.max()), "cividis")
    figure.colorbar(own, ax=figure.axes[-1], location="bottom", shrink=0.9)
    fields = []
    for row, (values, layer) in enumerate(zip(ratios, ("attention", "FFN"), strict=True)):
        for block, field in enumerate(values):
            place = (2, columns, row * columns + block + 2)
            shown = panel(figure, place, field.reshape(grid), f"{layer} {block + 1}", RATIOS)
            fields.append(figure.axes[-1])
    figure.colorbar(shown, ax=fields, shrink=0.8, label="ratio of lengths")
    save(figure, "lengths.png")

    by_block(names, "attention_necc", "ffn_necc", "necc.png", "NECC", Normalize(0.6, 1.4), "RdBu_r")
    by_block(names, "attention_weights", "ffn_weights", "weights.png", "weight w", RATIOS, "viridis")

    figure = Figure((11, 1.8), layout="constrained")
    for i, step in enumerate(names["steps"]):
        step = np.asarray(step)
        scale = Normalize(step.min(), step.max())
        panel(figure, (1, columns, i + 1), step, f"after block {len(names['steps']) - i}", scale, "inferno")
    axes = figure.add_subplot(1, columns, columns)
    axes.imshow(blended(photo, np.asarray(names["heatmap"])))
    axes.set_title("heatmap", fontsize=9)
    axes.axis("off")
    save(figure, "contributions.png")

    explained("demo.jpg", PHOTO)  # the demo's picture


def explained(name: str, photo: Path, *options: str) -> None:
    """The picture that `tokentm explain` draws."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tokentm_jax", "explain", str(photo), *options, "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        drawn = Image.open(Path(folder) / f"{photo.stem}.png").convert("RGB")
        drawn.save(DOCS / "images" / name, quality=85, optimize=True)


def blended(photo: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """The photo uint8 [h, w, 3] under a map [gh, gw]."""
    from matplotlib import colormaps

    pixels = np.asarray(tm.to_pixels(jnp.asarray(heatmap)[None], photo.shape[:2]))[0]
    weight = (0.25 + 0.5 * np.sqrt(pixels))[..., None]
    grey = photo.mean(-1, keepdims=True) / 255
    return grey * (1 - weight) + colormaps["inferno"](pixels)[..., :3] * weight


def perturbation(checkpoint: str) -> None:
    """The perturbation test on one photo: pixels removed by relevance, and the probability that is left."""
    vit = tm.load("deit_tiny_patch16_224", checkpoint)
    image = vit.read(PHOTO)
    target = int(vit.logits(image).argmax())
    pixels = np.asarray(tm.to_pixels(tm.explain(vit, image), image.shape[1:3]))[0]
    order = np.argsort(-pixels.ravel(), kind="stable")
    shares = np.arange(10) / 10
    curves, shown = {}, {}
    for name, ranks in (("positive", order), ("negative", order[::-1])):
        removed = []
        for share in shares:
            black = image[0].reshape(-1, 3).copy()
            black[ranks[: int(share * len(order))]] = 0
            removed.append(black.reshape(image[0].shape))
        curves[name] = np.asarray(jax.nn.softmax(vit.logits(np.stack(removed))))[:, target]
        shown[name] = [removed[k] for k in (1, 3, 5, 7)]
    figure = Figure((10, 3.3), layout="constrained")
    grid = figure.add_gridspec(2, 7)
    for row, name in enumerate(("positive", "negative")):
        for column, (picture, share) in enumerate(zip(shown[name], (10, 30, 50, 70), strict=True)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture)
            axes.set_title(f"{name}, {share} %", fontsize=9)
            axes.axis("off")
    axes = figure.add_subplot(grid[:, 4:])
    for name, colour in (("positive", "#c0392b"), ("negative", "#2c5f9e")):
        axes.plot(100 * shares, 100 * curves[name], "o-", color=colour, label=name)
    axes.set_xlabel("pixels removed, %")
    axes.set_ylabel(f"probability of {vit.class_name(target)}, %")
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, "perturbation.jpg")


def grid_of_classes(checkpoint: str) -> None:
    """The example of "Figures for papers": espresso and Egyptian cat on one photo, by three methods."""
    vit, photo = tm.load("deit_tiny_patch16_224", checkpoint), DOCS.parent / "notebooks" / "cat_and_espresso.png"
    figure = tm.show(photo, vit, ["tokentm", "libra_gae", "attn_lrp"], [967, 285], side=448)
    drawn = figure.image()
    drawn.resize((1000, round(drawn.height * 1000 / drawn.width))).save(DOCS / "images" / "figure.jpg", quality=85)


if __name__ == "__main__":
    tutorial()
    for given in sys.argv[1:]:
        perturbation(given)
        model = ("--model", "deit_tiny_patch16_224", "--checkpoint", given)
        methods = ("--method", "tokentm,libra_tokentm,legrad,tokentm_mix")
        explained("espresso.jpg", DOCS.parent / "notebooks" / "coffee.jpg", *model, *methods)
        grid_of_classes(given)
