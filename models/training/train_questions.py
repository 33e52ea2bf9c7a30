"""Training of a small vision-language model of questions about rendered scenes; repeatable and resumable."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from jax import Array

from models.training.loop import Loop, State, begin, descend, muon, run_steps
from models.training.recipe import QuestionTrainConfig
from tokentm_jax.data import questions
from tokentm_jax.data.questions import ASKED, WORDS, asked, drawn
from tokentm_jax.data.scenes import COLOURS, SHAPES, SIDE, Scene
from tokentm_jax.errors import require
from tokentm_jax.files import replace, write_json, write_text
from tokentm_jax.identity import claimed, environment
from tokentm_jax.inputs.images import Preprocessing
from tokentm_jax.inputs.prompts import IMAGE, PROMPT
from tokentm_jax.inputs.texts import Tokens
from tokentm_jax.maths.maps import unit
from tokentm_jax.models.decoder import Cache
from tokentm_jax.models.names import Tensors, renamed
from tokentm_jax.models.params import to_timm
from tokentm_jax.models.vision_decoder import VisionDecoder
from tokentm_jax.models.vit import ViT, init_params
from tokentm_jax.validation import check_fields

MARKS = ("<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "<start_of_image>", "<image_soft_token>", "<end_of_image>")
PAD, EOS, BOS, _, LINES, START, PLACE, END = range(len(MARKS))
NUMBERS = {word: number for number, word in enumerate([*MARKS, *WORDS])}
PREPROCESSING = Preprocessing((SIDE, SIDE), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
LONGEST = 12  # tokens of question and answer, at most, with the last mark


def model_of(config: QuestionTrainConfig) -> VisionDecoder:
    """The module of a recipe: a Gemma 3."""
    tower = {"class_token": False, "num_classes": 0, "global_pool": "avg", "fc_norm": False, "activation": "gelu_tanh"}
    usual = {"activation": "gelu_tanh", "norm_eps": 1e-6, "vocab_size": len(NUMBERS), "end": (EOS,)}
    usual |= {"qk_norm": True, "post_norms": True, "project_norm": 1e-6, "project_bias": False, "together": (IMAGE,)}
    fields: dict[str, Any] = {**usual, **config.text}
    fields["embed_scale"] = fields["embed_dim"] ** 0.5
    return VisionDecoder(**fields, vision=ViT(**{**tower, **config.vision}))


def _before(module: VisionDecoder) -> list[int]:
    """The tokens before a question."""
    gh, gw = module.image_grid
    return [BOS, LINES, START] + [PLACE] * (gh * gw) + [END, LINES]


class Batch(NamedTuple):
    """Scenes with questions, S and Q of them, and what each of n patches shows."""

    images: Any  # uint8 [S, H, W, 3]
    ids: Any  # int32 [S, Q, N]: question, answer, <eos>, <pad> ...
    starts: Any  # int32 [S, Q]: the number of tokens before the answer
    ends: Any  # int32 [S, Q]: of all tokens
    kinds: Any  # int32 [S, n]: the kind of the part that a patch shows and its quarter, from 1; 0: the background


def _batch(patch: int, split: Any, indices: np.ndarray, kinds: list[list[str]]) -> Batch:
    scenes = [drawn(int(index), split) for index in indices]
    ids = np.full((len(scenes), len(kinds[0]), LONGEST), PAD, np.int32)  # perhaps of no questions
    starts, ends = np.zeros((2, *ids.shape[:2]), np.int32)
    for place, (index, scene) in enumerate(zip(indices, scenes, strict=True)):
        for which, about in enumerate(kinds[place]):
            one = asked(int(index), split, about, scene)
            question = one.question.lower().replace("?", " ?").split()
            numbers = [*(NUMBERS[word] for word in (*question, *one.answer)), EOS]
            ids[place, which, : len(numbers)] = numbers
            starts[place, which], ends[place, which] = len(question), len(numbers)
    shown = np.stack([_kinds(scene, patch) for scene in scenes])
    return Batch(np.stack([scene.image for scene in scenes]), ids, starts, ends, shown)


def _kinds(scene: Scene, patch: int) -> np.ndarray:
    """The kind of the part that each patch shows [n]: its shape, colour, size and quarter, as one number; 0: none."""
    ids = scene.ids.reshape(SIDE // patch, patch, -1, patch).max((1, 3)).ravel()
    sizes = [*questions.SIZES]
    numbers = [0]
    for part in scene.parts:
        shape, colour = [*SHAPES].index(part.kind.shape), [*COLOURS].index(part.kind.colour)
        row, column = (place // 2 for place in part.place)
        kind = (shape * len(COLOURS) + colour) * len(sizes) + sizes.index(questions.size_of(part))
        numbers.append(1 + 4 * kind + 2 * row + column)
    return np.array(numbers, np.int32)[ids]


KINDS = 1 + len(SHAPES) * len(COLOURS) * len(questions.SIZES) * 4


def _batches(config: QuestionTrainConfig, patch: int, tower_steps: int, start: int) -> Iterator[Batch]:
    """Endless batches from step `start` on, each of (seed, step); the first `tower_steps` ones without questions."""
    step = start
    while True:
        random = np.random.default_rng([config.seed, step])
        size = config.batch_size
        indices = np.arange(step * size, (step + 1) * size)
        count = 0 if step < tower_steps else config.questions
        kinds = [[ASKED[k] for k in random.permutation(len(ASKED))[:count]] for _ in range(size)]
        yield _batch(patch, "train", indices, kinds)
        step += 1


def _answers(module: VisionDecoder, params: Any, batch: Batch) -> tuple[Array, Array, Array, Array]:
    """Logits [S Q, N - 1, V] of the tokens of question and answer after the first, these tokens [S Q, N - 1], which
    belong to the answer, and the tower's tokens [S, n, D].

    The tokens of an image do not see the questions, so their keys and values are computed once for all questions.
    """
    (s, q, n), known = batch.ids.shape, _before(module)
    apply: Any = partial(module.apply, {"params": params})
    seen = apply(PREPROCESSING.normalise(unit(batch.images)), method="patch_tokens")
    before = np.broadcast_to(np.array(known, np.int32), (s, len(known)))
    words = Tokens(before, before >= 0, np.where(before == PLACE, IMAGE, PROMPT).astype(np.int32), before < 0)
    empty = jnp.zeros((module.depth, s, module.num_kv_heads, len(known) + n, module.head_dim))
    texts = apply(jax.tree.map(jnp.asarray, words), apply(seen, method="projected"), method="placed")
    _, cache = apply(texts, Cache(empty, empty), jnp.zeros((), jnp.int32), method="extend")
    cache = jax.tree.map(lambda a: jnp.repeat(a, q, 1), cache)
    ids, (starts, ends) = batch.ids.reshape(s * q, n), (a.reshape(s * q, 1) for a in (batch.starts, batch.ends))
    places = jnp.arange(n)
    words = Tokens(ids, places < ends, jnp.zeros_like(ids), places < 0)
    hidden, _ = apply(words, cache, jnp.asarray(len(known), jnp.int32), method="extend")
    logits = apply(hidden[:, :-1], method="logits")
    return logits, ids[:, 1:], ((places >= starts) & (places < ends))[:, 1:], seen


def loss_of(module: VisionDecoder, params: Any, batch: Batch) -> Array:
    """The mean cross-entropy of the answers' tokens, if there are questions, plus that of the kind of part that each
    patch shows and its quarter, which a linear map of the tower's tokens must give: so the tower learns from the first
    step on. Without the quarter, its tokens lose whether they are left or right."""
    if batch.ids.shape[1]:
        logits, ids, counted, seen = _answers(module, params["model"], batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        loss = jnp.where(counted, losses, 0).sum() / counted.sum()
    else:
        images = PREPROCESSING.normalise(unit(batch.images))
        seen: Any = module.apply({"params": params["model"]}, images, method="patch_tokens")
        loss = jnp.zeros(())
    shown = optax.softmax_cross_entropy_with_integer_labels(seen @ params["probe"]["kernel"], batch.kinds)
    return loss + shown.mean()


@partial(jax.jit, static_argnums=0)
def _right(module: VisionDecoder, params: Any, batch: Batch) -> Array:
    """Whether every token of an answer is the most probable one, given those before it [S, Q]."""
    logits, ids, counted, _ = _answers(module, params, batch)
    return ((logits.argmax(-1) == ids) | ~counted).all(1).reshape(batch.starts.shape)


def answer_accuracy(module: VisionDecoder, params: Any, count: int, size: int = 50) -> dict[str, float]:
    """The share in [0, 1] of the test questions of each kind whose whole answer the model writes."""
    found = []
    for first in range(0, count, size):
        indices = np.arange(first, first + size) % count
        batch = _batch(module.vision.tiling.patch[0], "test", indices, [[*ASKED]] * size)
        found.append(np.asarray(_right(module, params, batch))[: count - first])
    return dict(zip(ASKED, np.concatenate(found).mean(0).tolist(), strict=True))


def train_questions(
    config: QuestionTrainConfig, out: Path, log: Callable[[str], None], *, overwrite: bool = False
) -> float:
    """Train to the end, or from where `out` stopped on; returns the share of right answers in [0, 1].

    `out` becomes a folder that `load` loads, in the layout of Gemma 3, next to the checkpoints and `log.jsonl`.

    Raises:
      InputError: what `models.training.train.train` raises.
    """
    config = check_fields(config, "the recipe")
    module = model_of(config)
    per_epoch = config.scenes // config.batch_size
    terms = {**dataclasses.asdict(config), **environment(), "questions_version": questions.VERSION}
    written = ("checkpoints", "log.jsonl", "config.json", "model.safetensors", "tokenizer.json")
    written += ("preprocessor_config.json",)
    optimiser = muon(config, per_epoch)
    probe = {"kernel": 0.02 * jax.random.normal(jax.random.key(config.seed), (module.vision.embed_dim, KINDS))}

    tower_steps = round(config.tower_epochs * per_epoch)

    def loss(params: Any, batch: Batch) -> Array:
        return loss_of(module, params, batch)

    @jax.jit
    def step(state: State, batch: Batch) -> tuple[State, Array]:
        after, found = descend(optimiser, state, partial(loss, batch=batch), config.ema_decay)
        if not batch.ids.shape[1]:  # nothing but the tower learns; without gradients, other weights would only decay
            old, new = state.params["model"], after.params["model"]
            after = after._replace(params=after.params | {"model": old | {"vision": new["vision"]}})
        return after, found

    def measure(state: State) -> float:
        found = answer_accuracy(module, state.average["model"], config.test_scenes)
        log(", ".join(f"{kind} {share:.1%}" for kind, share in found.items()))
        return float(np.mean([*found.values()]))

    with claimed(out := out.absolute(), json.loads(json.dumps(terms)), written, overwrite):
        state, top_1 = run_steps(
            Loop(round(config.epochs * per_epoch), per_epoch, config.checkpoint_epochs),
            begin(
                optimiser, {"model": init_params(module, jax.random.key(config.seed)), "probe": probe}, averaged=True
            ),
            partial(_batches, config, module.vision.tiling.patch[0], tower_steps),
            lambda state, _, batch: step(state, batch),
            measure,
            out,
            log,
        )
        how = {"accuracy": top_1, "scenes": round(config.epochs * config.scenes), "questions": questions.VERSION}
        write_vision_folder(out, module, state.average["model"], how)
    return top_1


# ---- the folder -----------------------------------------------------------------------------------------------------


def write_vision_folder(out: Path, module: VisionDecoder, params: Mapping[str, Any], how: Mapping[str, Any]) -> None:
    """A model of scenes as a folder in the layout of Gemma3ForConditionalGeneration, in half precision; each file as a
    whole. Files of these names are replaced: the folder must be claimed."""
    vision, activation = module.vision, "gelu_pytorch_tanh"
    base = {"rope_type": "default", "rope_theta": module.rope_base}
    text = {
        "model_type": "gemma3_text",
        "vocab_size": module.vocab_size,
        "max_position_embeddings": module.max_length,
        "hidden_size": module.embed_dim,
        "num_hidden_layers": module.depth,
        "num_attention_heads": module.num_heads,
        "num_key_value_heads": module.num_kv_heads,
        "head_dim": module.head_dim,
        "intermediate_size": module.mlp_hidden,
        "hidden_activation": activation,
        "rms_norm_eps": module.norm_eps,
        "query_pre_attn_scalar": module.head_dim,
        "layer_types": ["full_attention"] * module.depth,
        "sliding_window": module.max_length,
        "rope_parameters": {"full_attention": base, "sliding_attention": base},
        **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS},
    }
    tower = {
        "model_type": "siglip_vision_model",
        "image_size": vision.img_size[0],
        "patch_size": vision.patch_size,
        "hidden_size": vision.embed_dim,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": int(vision.embed_dim * vision.mlp_ratio),
        "hidden_act": activation,
        "layer_norm_eps": vision.norm_eps,
        "vision_use_head": False,
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": tower,
        "mm_tokens_per_image": module.image_grid[0] * module.image_grid[1],
        **{"image_token_index": PLACE, "boi_token_index": START, "eoi_token_index": END, "eos_token_id": EOS},
        "tie_word_embeddings": True,
        "tokentm_jax": dict(how),
    }
    processor = {
        **{"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3, "rescale_factor": 1 / 255},
        **{"image_mean": PREPROCESSING.mean, "image_std": PREPROCESSING.std},
        "size": {"height": vision.img_size[0], "width": vision.img_size[1]},
    }
    data = safetensors.numpy.save(_tensors(vision, jax.device_get(params)), {"format": "pt"})
    write_text(out / "tokenizer.json", tokenizer(), overwrite=True)
    write_json(out / "preprocessor_config.json", processor, overwrite=True)
    replace(out / "model.safetensors", lambda part: part.write_bytes(data), overwrite=True)
    write_json(out / "config.json", config, overwrite=True)


def _tensors(vision: ViT, params: Mapping[str, Any]) -> Tensors:
    """The parameters of a model under the names of the layout, float16."""
    words = {name: value for name, value in params.items() if name not in ("vision", "project", "norm_project")}
    found = {f"text.{name}": tensor for name, tensor in to_timm(words).items()}
    for name, tensor in to_timm(params["vision"], vision).items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", np.split(tensor, 3), strict=True):
                found["vision." + name.replace(".qkv.", f".{part}.")] = piece
        else:
            found[f"vision.{name}"] = tensor[0] if name == "pos_embed" else tensor
    found["mm_soft_emb_norm.weight"] = params["norm_project"]["scale"]
    found["mm_input_projection_weight"] = params["project"]["kernel"]
    for name in found:
        if re.search(r"^text\..*(norm\d?|post\d)\.weight$|^mm_soft", name):
            found[name] = found[name] - 1  # the layout's norms multiply by 1 + w
    halved = {name: np.ascontiguousarray(np.asarray(tensor).astype(np.float16)) for name, tensor in found.items()}
    return renamed(halved, _NAMES)


_NAMES = (
    (r"^mm_", "multi_modal_projector.mm_"),
    (r"^text\.word_embeddings$", "language_model.model.embed_tokens.weight"),
    (r"^text\.norm\.", "language_model.model.norm."),
    (r"^text\.blocks\.(\d+)\.", r"language_model.model.layers.\1."),
    (r"^(language_model.*)\.attn\.([qk]_norm)\.", r"\1.self_attn.\2."),
    (r"^(language_model.*)\.attn\.([qkv])\.", r"\1.self_attn.\2_proj."),
    (r"^(language_model.*)\.attn\.proj\.", r"\1.self_attn.o_proj."),
    (r"^(language_model.*)\.mlp\.(\w+)\.", r"\1.mlp.\2_proj."),
    (r"^(language_model.*)\.norm1\.", r"\1.input_layernorm."),
    (r"^(language_model.*)\.post1\.", r"\1.post_attention_layernorm."),
    (r"^(language_model.*)\.norm2\.", r"\1.pre_feedforward_layernorm."),
    (r"^(language_model.*)\.post2\.", r"\1.post_feedforward_layernorm."),
    (r"^vision\.", "vision_tower.vision_model."),
    (r"_model\.pos_embed$", "_model.embeddings.position_embedding.weight"),
    (r"_model\.patch_embed\.proj\.", "_model.embeddings.patch_embedding."),
    (r"_model\.blocks\.(\d+)\.", r"_model.encoder.layers.\1."),
    (r"(encoder.*)\.attn\.([qkv])\.", r"\1.self_attn.\2_proj."),
    (r"(encoder.*)\.attn\.proj\.", r"\1.self_attn.out_proj."),
    (r"(encoder.*)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"vision_model\.norm\.", "vision_model.post_layernorm."),
)


def tokenizer() -> str:
    """The `tokenizer.json` of the words of `WORDS`: a word piece is a word with the space before it."""
    engines = require("tokenizers", "text", "writing a tokenizer")
    known = {mark: number for number, mark in enumerate(MARKS)}
    known |= {word if word == "?" else f"▁{word}": NUMBERS[word] for word in WORDS}
    engine = engines.Tokenizer(engines.models.WordLevel(known, unk_token="<unk>"))
    space = engines.normalizers.Replace(engines.Regex(r"\s+\?"), "?")
    engine.normalizer = engines.normalizers.Sequence([engines.normalizers.Lowercase(), space])
    words = engines.pre_tokenizers.Metaspace(prepend_scheme="always")
    marks = engines.pre_tokenizers.Punctuation("isolated")
    engine.pre_tokenizer = engines.pre_tokenizers.Sequence([words, marks])
    engine.decoder = engines.decoders.Metaspace(prepend_scheme="always")
    engine.add_special_tokens(list(MARKS))
    return engine.to_str(pretty=True)
