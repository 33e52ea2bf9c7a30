"""Fine-tuning of a text encoder as a classifier of sentences; repeatable and resumable as `train`."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import safetensors.numpy
from jax import Array

from models.training.loop import Loop, State, adamw, begin, descend, run_steps
from models.training.recipe import TextTrainConfig
from tokentm_jax.data.examples import Example
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError
from tokentm_jax.files import replace, write_json, write_text
from tokentm_jax.identity import claimed, digest, digest_files, environment
from tokentm_jax.inputs.texts import MASKS, Tokens, WordPieces
from tokentm_jax.models.bert import Bert
from tokentm_jax.models.names import LAYOUTS, Tensors, renamed
from tokentm_jax.models.params import to_timm
from tokentm_jax.models.text_layouts import read_text_folder
from tokentm_jax.validation import check_fields

SORTED = 8  # batches of sentences that are sorted by length together, so that little is padding


class Sentences(NamedTuple):
    """Sentences with their classes, int32 [n]; `identity` identifies these and their order."""

    texts: tuple[str, ...]
    labels: np.ndarray
    identity: str


def read_sentences(path: str, classes: int, limit: int | None = None) -> Sentences:
    """The sentences of a `.tsv` file. Raises InputError, also for a class that is not below `classes`."""
    source = open_source(path, limit=limit)
    examples = [source[i] for i in range(len(source))]
    labels = np.array([example.label for example in examples], np.int32)
    if labels.max() >= classes:
        raise InputError(f"{path} has the class {labels.max()}, and the recipe has classes 0 to {classes - 1}")
    texts: Any = tuple(example.content for example in examples)
    return Sentences(texts, labels, digest(texts, labels.tolist()))


class Batch(NamedTuple):
    tokens: Tokens
    labels: Any


def _batches(config: TextTrainConfig, tokenize: Callable[..., Any], data: Sentences, start: int) -> Iterator[Batch]:
    """Endless batches from step `start` on: every epoch is a new order from (seed, epoch), in which sentences of like
    length stand together."""
    size = config.batch_size
    per_epoch, step = len(data.texts) // size, start
    lengths = np.array([len(text) for text in data.texts])
    while True:
        epoch = step // per_epoch
        rng = np.random.default_rng([config.seed, epoch])
        order = rng.permutation(len(data.texts))[: per_epoch * size]
        parts = [order[i : i + SORTED * size] for i in range(0, len(order), SORTED * size)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        groups = rng.permutation(order.reshape(per_epoch, size))
        while step // per_epoch == epoch:
            rows = groups[step % per_epoch]
            yield Batch(tokenize([data.texts[i] for i in rows]), data.labels[rows])
            step += 1


@partial(jax.jit, static_argnums=0)
def _hits(module: Bert, params: Any, batch: Batch) -> Array:
    logits: Any = module.apply({"params": params}, batch.tokens)
    return (logits.argmax(-1) == batch.labels).sum()


def text_accuracy(module: Bert, params: Any, tokenize: Callable[..., Any], data: Sentences, size: int = 64) -> float:
    """Top-1 accuracy in [0, 1] over the whole of `data`."""
    order = np.argsort([len(text) for text in data.texts], kind="stable")
    hits = 0
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        full = np.concatenate([rows, rows[-1:].repeat(size - len(rows))])  # the last batch is as large as the others
        labels = np.where(np.arange(size) < len(rows), data.labels[full], -1).astype(np.int32)
        hits += int(_hits(module, params, Batch(tokenize([data.texts[i] for i in full]), labels)))
    return hits / len(data.texts)


def train_text(
    config: TextTrainConfig,
    data: Sentences,
    test: Sentences,
    out: Path,
    log: Callable[[str], None],
    *,
    overwrite: bool = False,
) -> float:
    """Fine-tune to the end, or from where `out` stopped on; returns the test accuracy in [0, 1].

    `out` becomes a folder that `load` loads, in BERT's layout, next to the checkpoints and `log.jsonl`.
    `overwrite` also replaces files of these names that this program did not write.

    Raises:
      InputError: an encoder that cannot be read, too few sentences, or what `models.training.train.train` raises.
    """
    config = check_fields(config, "the recipe")
    folder = Path(config.encoder)
    pieces = WordPieces.from_file(folder / "tokenizer.json")
    changes = {"num_classes": len(config.class_names), "pool": config.pool}
    changes |= {"pooler": "tanh" if config.pool == "token" else None}
    module, params, *_ = read_text_folder(folder, pieces.token(*MASKS), changes, config.seed)
    reader = dataclasses.replace(pieces, length=min(config.max_length, module.max_length))

    def tokenize(texts: Sequence[str]) -> Tokens:
        return reader.stacked([reader.sample(Example(text, text)) for text in texts])

    per_epoch = len(data.texts) // config.batch_size
    steps = round(config.epochs * per_epoch)
    if not steps:
        raise InputError(
            f"{config.train_data}: {len(data.texts)} sentences do not fill a batch, or the epochs no step"
        )
    terms = {**dataclasses.asdict(config), **environment()}
    terms["encoder"] = {"name": config.encoder, "identity": digest_files(sorted(folder.glob("*.*")))}
    for name, given in (("train_data", data), ("test_data", test)):
        terms[name] = {"name": f"{terms[name]}, {len(given.texts)} sentences", "identity": given.identity}
    written = ("checkpoints", "log.jsonl", "config.json", "model.safetensors", "tokenizer.json")
    optimiser = adamw(config, per_epoch)

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch) -> tuple[State, Array]:
        def loss_of(params: Any) -> Array:
            logits: Any = module.apply({"params": params}, batch.tokens)
            targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, module.num_classes), config.label_smoothing)
            return optax.softmax_cross_entropy(logits, targets).mean()

        return descend(optimiser, state, loss_of)

    with claimed(out := out.absolute(), json.loads(json.dumps(terms)), written, overwrite):
        state, top_1 = run_steps(
            Loop(steps, per_epoch, config.checkpoint_epochs),
            begin(optimiser, params),
            partial(_batches, config, tokenize, data),
            lambda state, _, batch: step(state, batch),
            lambda state: text_accuracy(module, state.params, tokenize, test),
            out,
            log,
        )
        how = {"accuracy": top_1, "epochs": config.epochs, "test_data": Path(config.test_data).name}
        write_text_folder(out, module, state.params, config.class_names, pieces.content, how)
    return top_1


def write_text_folder(
    out: Path,
    module: Bert,
    params: Mapping[str, Any],
    class_names: Sequence[str],
    tokenizer: str,
    how: Mapping[str, Any],
) -> None:
    """A text classifier as a folder in the layout of BertForSequenceClassification; each file as a whole.

    Files of these names are replaced: the folder must be claimed.
    """
    tensors = _names(jax.device_get(params))
    content = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": module.vocab_size,
        "max_position_embeddings": module.max_length,
        "hidden_size": module.embed_dim,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.num_heads,
        "intermediate_size": module.mlp_hidden,
        "type_vocab_size": module.type_vocab_size,
        "hidden_act": next(name for name, own in LAYOUTS["activations"]["texts"].items() if own == module.activation),
        "layer_norm_eps": module.norm_eps,
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "label2id": {name: i for i, name in enumerate(class_names)},
        "tokentm_jax": {"pool": module.pool, "pooler": module.pooler, **how},
    }
    if module.embedding_size:
        content["embedding_size"] = module.embedding_size
    write_text(out / "tokenizer.json", tokenizer, overwrite=True)
    data = safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in tensors.items()}, {"format": "pt"})
    replace(out / "model.safetensors", lambda part: part.write_bytes(data), overwrite=True)
    write_json(out / "config.json", content, overwrite=True)


def _names(params: Mapping[str, Any]) -> Tensors:
    """The parameters of a `Bert` with types, pooler and head, as a BertForSequenceClassification has them."""
    tensors: Tensors = {}
    for name, tensor in to_timm(params).items():
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), np.split(tensor, 3), strict=True):
                tensors[name.replace(".attn.qkv.", f".attn.{part}.")] = piece
        else:
            tensors[name] = tensor
    return renamed(tensors, _BACK)


_BACK = (
    (r"^(word|position)_embeddings$", r"bert.embeddings.\1_embeddings.weight"),
    (r"^type_embeddings$", "bert.embeddings.token_type_embeddings.weight"),
    (r"^embed_norm\.", "bert.embeddings.LayerNorm."),
    (r"^blocks\.(\d+)\.", r"bert.encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.norm1\.", ".attention.output.LayerNorm."),
    (r"\.norm2\.", ".output.LayerNorm."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^pooler\.", "bert.pooler.dense."),
    (r"^head\.", "classifier."),
)
