"""Text models: what `transformers` answers, the contract of every method, TokenTM of post-norm blocks, words."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import safetensors.numpy
from conftest import CHEAP, batch, mostly_slow, tiny_bert

import tokentm_jax as tm
from tokentm_jax.methods.table import METHODS
from tokentm_jax.programs.model import function_of

pytest.importorskip("tokenizers")
GOLDENS = Path(__file__).parent / "goldens/texts"
ANSWERS = dict(np.load(GOLDENS / "answers.npz"))
TEXTS = {
    name: [tuple(t) if isinstance(t, list) else t for t in texts]
    for name, texts in json.loads((GOLDENS / "texts.json").read_text()).items()
}
KINDS = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
REFUSE = {"rise": "grid of patches", "kernel_shap": "texts differ in"}


def encoder():
    """One whose weights have a pooler, which is not read."""
    with pytest.warns(
        UserWarning, match=r"bert_encoder: left out of its weights: pooler; the outputs are the mean of"
    ):
        return tm.load(GOLDENS / "bert_encoder")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_library(kind):
    text = encoder() if kind == "bert_encoder" else tm.load(GOLDENS / kind)
    tokens = text.read(TEXTS[kind])
    mask = ANSWERS[f"{kind}/mask"]
    assert tokens.ids.shape[1] == 16 and not tokens.mask[:, mask.shape[1] :].any()
    np.testing.assert_array_equal(tokens.mask[:, : mask.shape[1]], mask)
    np.testing.assert_array_equal(tokens.ids[tokens.mask], ANSWERS[f"{kind}/ids"][mask])
    np.testing.assert_allclose(text.logits(tokens), ANSWERS[f"{kind}/outputs"], atol=2e-5)
    labelled = kind != "bert_encoder"
    assert text.class_names == (tuple(f"label {i}" for i in range(5)) if labelled else None)


@pytest.mark.slow
def test_the_real_encoder(shared):
    with pytest.warns(UserWarning, match="left out of its weights: pooler"):
        text = tm.load(shared / "data/text")
    tokens = text.read(TEXTS["minilm"])
    np.testing.assert_array_equal(tokens.ids[tokens.mask], ANSWERS["minilm/ids"][ANSWERS["minilm/mask"]])
    hidden = tm.capture(
        text.module, text.params, tokens, fields=["attention", "tokens", "final_tokens"], gradients=False
    )
    np.testing.assert_allclose(hidden.tokens[-1][tokens.mask], ANSWERS["minilm/hidden"], atol=1e-4)


# ---- every method ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["token", pytest.param("avg", marks=pytest.mark.slow)])
def bert(request):
    options = {} if request.param == "token" else {"pooler": None, "embedding_size": 8}
    return tiny_bert(pool=request.param, **options)


QUICK = ("tokentm",)
CASES = mostly_slow([m for m in METHODS if m not in REFUSE], QUICK)


@pytest.mark.parametrize("method", CASES)
def test_contract(bert, method):
    module, params = bert
    explain = jax.jit(tm.explain_fn(module, method, **{**CHEAP.get(method, {}), **ROLLOUT.get(method, {})}))
    tokens, classes = batch([5, 8, 4], 8), jnp.array([0, 1, 2], jnp.int32)
    scores = explain(params, tokens, classes)
    assert scores.shape == (3, 8) and scores.dtype == jnp.float32 and np.isfinite(scores).all()
    assert not np.asarray(scores)[~tokens.mask].any()
    assert any(np.ptp(row[mask]) > 0 for row, mask in zip(np.asarray(scores), tokens.mask, strict=True))
    # A text alone, and whatever stands behind it.
    tolerance = {"rtol": 2e-2 if method.endswith("lrp") else 1e-3, "atol": 2e-4 * float(jnp.abs(scores[0]).max())}
    for size in (5, 11):
        alone = explain(params, batch([5], size), classes[:1])
        np.testing.assert_allclose(alone[0, :5], scores[0, :5], **tolerance)
    # A class per sample, and what cannot be read.
    changed = explain(params, tokens._replace(ids=np.where(tokens.ids == tokens.ids[1, 3], 99, tokens.ids)), classes)
    assert np.isnan(changed[1]).all()
    moved = explain(params, tokens, jnp.array([1, 1, 3], jnp.int32))
    np.testing.assert_allclose(moved[1], scores[1], rtol=1e-5)
    assert np.isnan(moved[2]).all()
    assert (np.abs(moved[0] - scores[0]).max() > 0) == METHODS[method].class_specific


ROLLOUT = {"rollout": {"discard_ratio": 0.2}}


@pytest.mark.parametrize("method", REFUSE)
def test_methods_of_images_refuse(bert, method):
    module, params = bert
    model = function_of(module)
    texts = model.look_up(params, batch([4], 4))
    for name, options, message in (
        (method, {}, REFUSE[method]),
        ("occlusion", {"fill": "blur"}, "are for images"),
        ("token_dropping", {"window": 2}, "one by one"),
        ("legrad", {"read": "mean"}, "the head must read a class token"),
    ):
        with pytest.raises(tm.InputError, match=message):  # past the sentence that lists all that work
            METHODS[name].bind(name, options)(model.read(params, texts), params, texts, None)


AS_FUNCTION = [
    m for m in METHODS if m not in (*REFUSE, "token_dropping", "shapley", "occlusion", "mda", "caap")
]  # these have no mask to put in


@pytest.mark.parametrize("method", mostly_slow(AS_FUNCTION, ["tokentm"]))
@pytest.mark.parametrize("pool", mostly_slow(["token", "avg"], ["avg"]))
def test_the_module_as_a_function_of_padded_texts(pool, method):
    """A mask per sample; how the head reads tokens is told where it depends on the mask."""
    module, params = tiny_bert(pool=pool)
    texts = function_of(module).look_up(params, batch([6, 3, 4], 6))
    function = lambda params, texts: module.apply({"params": params}, texts)  # noqa: E731
    maps = [
        jax.jit(tm.explain_fn(model, method, **CHEAP.get(method, {}), **more))(params, texts, jnp.array([0, 1, 1]))
        for model, more in ((module, {}), (function, {"readout": "avg"} if module.pool == "avg" else {}))
    ]
    np.testing.assert_allclose(maps[1], maps[0], rtol=1e-4, atol=1e-5 * float(jnp.abs(maps[0]).max()))


# ---- TokenTM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": "each", "direction": "softmax"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"norms": False},
                {"norms": False, "weights": "alignment"},
                {"attention": "plain", "first_block": 1},
                {"weights": "entropy"},
                {"weights": "distance_from_mean", "ffn": False},
                {"weights": "alignment"},
                {"weights": lambda original, transformed: jnp.abs(transformed).max(-1) / jnp.abs(original).max(-1)},
            )
        ),
    ],
    ids=lambda options: ",".join(options),
)
def test_tokentm_of_post_norm_blocks_is_the_slow_loop(bert, options):
    module, params = bert
    tokens, target = batch([6, 4], 8), jnp.array([1, 2], jnp.int32)
    scores = jax.jit(tm.explain_fn(module, "tokentm", **options))(params, tokens, target)
    fields = ["attention", "attention_grad", "tokens", "token_grads", "final_tokens", "value", "value_kernel"]
    fields += ["output_kernel", "attention_branch", "ffn_branch", "transformed_value", "normalised", "middle", "after"]
    trace = jax.jit(lambda p, t: tm.capture(module, p, t, target, fields))(params, tokens)
    for sample, count in enumerate((6, 4)):
        blocks = {}
        for name, array in trace.blocks()._asdict().items():
            if array is None or name == "seen":
                continue
            array = np.asarray(array, np.float64)
            if not name.endswith("_kernel"):  # the tokens of the text alone
                array = array[:, sample]
                array = (
                    array[..., :count, :count] if "attention" in name and array.ndim == 4 else array[..., :count, :]
                )
            blocks[name] = array
        full = oracle.full_map(blocks, blocks["tokens"][0], **options)
        row = full[0] if module.pool == "token" else full.mean(0)
        np.testing.assert_allclose(scores[sample, :count], row, rtol=1e-3, atol=1e-5 * np.abs(row).max())


@pytest.mark.slow
def test_a_trace_holds_what_tokentm_needs(bert):
    module, params = bert

    @jax.jit
    def both(params, tokens):
        trace = tm.capture(module, params, tokens)
        blocks = jax.tree.map(lambda a: a[:, 0], trace.blocks())
        of_trace = tm.maths.contributions(blocks, trace.tokens[0, 0], module.reads(tokens.mask)[0])
        return of_trace, tm.explain_fn(module, "tokentm")(params, tokens)[0]

    found, expected = both(params, batch([6], 6))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_weights_are_checked(bert):
    for options, message in (
        ({"weights": "entropi"}, "'entropy', 'alignment' or 'distance_from_mean'"),
        ({"weights": "entropy", "heads": "each"}, "heads='each' has none"),
    ):
        with pytest.raises(tm.InputError, match=message):
            tm.explain_fn(bert[0], "tokentm", **options)


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text():
    return tm.load(GOLDENS / "distilbert")


def test_words_are_those_of_the_text(text):
    texts = ["A funny  film, well!", "漢字 <b>dull</b> \u202bשלום\u202c é"]
    scores = np.arange(40.0).reshape(2, 20)
    first, second = tm.words(text, texts, scores)
    assert [w.text for w in first] == ["A", "funny", "film", ",", "well", "!"]
    assert [w.score for w in first] == [1, 2 + 3, 4, 5, 6 + 7, 8]
    assert [w.score for w in tm.words(text, texts, scores, "max")[0]] == [1, 3, 4, 5, 7, 8]
    assert [w.text for w in second][:5] == ["漢", "字", "<", "b", ">"] and "שלום" in [w.text for w in second]
    for given, found in zip(texts, (first, second), strict=True):
        assert all(given[w.start : w.end] == w.text for w in found)
    pair = [("a film", "is dull")]
    assert [(w.text, w.part, w.start) for w in tm.words(text, pair, scores[:1])[0]] == [
        ("a", 0, 0), ("film", 0, 2), ("is", 1, 0), ("dull", 1, 3)
    ]  # fmt: skip


def test_a_text_like_a_photo(text):
    tokens = text.read(TEXTS["distilbert"])
    scores, details = tm.explain(text, tokens, details=True)
    np.testing.assert_array_equal(details["target"], np.asarray(text.logits(tokens)).argmax(-1))
    alone = tm.explain(text, text.read(TEXTS["distilbert"][1]), target=text.class_index("label 2"))
    assert alone.shape[0] == 1 and scores.shape == tokens.ids.shape
    versus = tm.explain(text, tokens, score=tm.scores.Versus(1), target=0)
    assert np.isfinite(versus).all() and not np.allclose(versus, scores)
    assert text.class_name(2) == "label 2"
    features = encoder()
    with pytest.raises(tm.InputError, match="gives features and no classes"):
        tm.explain(features, features.read("a film"))
    assert tm.explain(features, features.read("a film"), score=tm.scores.Channel(1)).shape == (1, 16)


def test_long_texts_are_cut_with_a_notice(text):
    with pytest.warns(UserWarning, match="1 of 2 texts have more than the 24 tokens of the model, and were cut"):
        tokens = text.read(["a film", "a film " * 100])
    assert tokens.ids.shape == (2, 24) and tokens.ids[1, -1] == 4  # [SEP] stays


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "must be a text or a list of texts"),
        (7, "must be a text or a list of texts"),
        (["a", " "], "text 2 must be a text with a word at least"),
        (["a", None], "text 2 must be a text"),
        (["a" * 1_000_001], "more than 1000000 characters"),
        (["\ud800"], "text 1 is no valid Unicode"),
    ],
)
def test_bad_texts_are_one_sentence(text, texts, message):
    with pytest.raises(tm.InputError, match=message):
        text.read(texts)


def test_bad_tokens_are_one_sentence(text):
    good = text.read("a film")
    for bad, message in (
        (good.ids, "expected what its `read` gives"),
        (good._replace(ids=good.ids[0]), r"four arrays \[B, N\]"),
        (good._replace(ids=good.ids + 99), "ids of tokens must be from 0 to 20"),
        (good._replace(mask=~good.mask), "padding follows"),
        (tm.inputs.Tokens(*(np.repeat(a, 2, 1) for a in good)), "at most 24 a text, got 32"),
    ):
        with pytest.raises(tm.InputError, match=message):
            tm.explain(text, bad)
    with pytest.raises(tm.InputError, match=r"scores must be \[1, N\]"):
        tm.words(text, "a film", np.zeros((2, 16)))
    with pytest.raises(tm.InputError, match="merge must be one of"):
        tm.words(text, "a film", np.zeros((1, 16)), "median")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no (text )?model: expected config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer that can be used"),
        (lambda f: edited(f, model_type="vit2"), "model type 'vit2' is not supported"),
        (lambda f: edited(f, model_type="roberta", pad_token_id=99), "'pad_token_id' must be one of the 24 positions"),
        (lambda f: edited(f, num_attention_heads=3), "must be a multiple of the number of heads, 3"),
        (lambda f: edited(f, type_vocab_size=-1), "'type_vocab_size' must be greater than or equal to 0, got -1"),
        (lambda f: edited(f, type_vocab_size=10**12), "'type_vocab_size' must be less than or equal to 2147483647"),
        (lambda f: edited(f, type_vocab_size=2**31 - 1), r"type_embeddings \[2, 16\] instead of \[2147483647, 16\]"),
        (lambda f: edited(f, hidden_act="mish"), "'hidden_act' must be one of"),
        (lambda f: edited(f, position_embedding_type="relative_key"), "nothing else is supported"),
        (lambda f: edited(f, id2label={"0": "a"}), "'id2label' names 1 classes of 5"),
        (lambda f: edited(f, num_hidden_layers=3), r"missing: blocks\.2\."),
        (lambda f: edited(f, num_hidden_layers=10**9), "must be less than or equal to"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"{" * 99), "damaged or incomplete"),
    ],
)
def test_a_wrong_folder_is_one_sentence(tmp_path, change, message):
    folder = tmp_path / "bert"
    shutil.copytree(GOLDENS / "bert", folder)
    change(folder)
    with pytest.raises(tm.InputError, match=message):
        tm.load(folder)


def test_a_classifier_s_own_layer_beside_the_pooler_that_nobody_reads(tmp_path):
    """As in checkpoints of RoBERTa that were fine-tuned from ones with a pooler."""
    shutil.copytree(GOLDENS / "roberta", tmp_path / "roberta")
    file = tmp_path / "roberta" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for part in ("weight", "bias"):
        tensors[f"roberta.pooler.dense.{part}"] = tensors[f"classifier.dense.{part}"] + 1
    safetensors.numpy.save_file(tensors, file)
    one, two = (tm.load(path) for path in (tmp_path / "roberta", GOLDENS / "roberta"))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    with pytest.raises(tm.InputError, match="dtype must be a floating-point type"):
        tm.load(GOLDENS / "roberta", dtype="int32")


def test_modules_of_sentence_transformers(tmp_path):
    """The token that is pooled is read from there, and a layer behind it is refused."""
    folder = tmp_path / "encoder"
    shutil.copytree(GOLDENS / "bert_encoder", folder)
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(
        tm.InputError, match=r"lacks 1_Pooling/config\.json, which specifies how its tokens are pooled"
    ):
        tm.load(folder)
    (folder / "1_Pooling").mkdir()
    for fields, pool in (
        ({}, "avg"),
        ({"pooling_mode_cls_token": True}, "token"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "avg"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "token"),  # the newer key counts
        ({"pooling_mode": ["mean"]}, "avg"),
    ):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(fields))
        assert tm.load(folder).module.pool == pool
    for fields, words in (
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "must be one of cls, mean, got 'cls' and 'mean'",
        ),
        ({"pooling_mode": ["mean", "cls"]}, "got 'mean' and 'cls'"),
        ({"pooling_mode_max_tokens": True}, "got 'max'"),
        ({"pooling_mode": "lasttoken"}, "got 'lasttoken'"),
        ({"pooling_mode": 3}, "'pooling_mode' must be"),
        ({"pooling_mode_cls_token": "yes"}, "'pooling_mode_cls_token' must be"),
    ):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(fields))
        with pytest.raises(tm.InputError, match=words):
            tm.load(folder)
    for listed in ([*modules, {"type": "sentence_transformers.models.Dense"}], [{}], {"type": "Transformer"}):
        (folder / "modules.json").write_text(json.dumps(listed))
        with pytest.raises(tm.InputError, match=r"modules\.json: expected a list of modules of Transformer, Pooling"):
            tm.load(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "Pooling", "path": "../elsewhere"}]))
    with pytest.raises(tm.InputError, match=r"modules\.json: 'path' .*plain name"):
        tm.load(folder)


# ---- architectures --------------------------------------------------------------------------------------------------

HUGGING_FACE = json.loads((GOLDENS.parent / "architectures_hf.json").read_text())
READ = ("ForSequenceClassification", "Model", "ForMaskedLM", "ForPreTraining")
OF_TEXTS = {
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    **{k: k for k in ("bert", "roberta", "distilbert", "electra")},
}


@pytest.mark.parametrize("kind", OF_TEXTS)
def test_architectures_that_are_not_read_are_refused_by_name(tmp_path, kind):
    """Every one that `transformers` has: a classifier of tokens would be taken for one of texts."""
    folder = tmp_path / kind
    shutil.copytree(GOLDENS / OF_TEXTS[kind], folder)
    names = HUGGING_FACE[kind]
    refused = [name for name in names if not name.endswith(READ) or name.endswith("LMHeadModel")]
    assert len(refused) >= 3 and any("ForTokenClassification" in name for name in refused)
    for name in [*refused, f"{names[0]}Of2Texts", "Model"]:
        edited(folder, model_type=kind, architectures=[name])
        with pytest.raises(tm.InputError, match=f"the architecture '{name}' is not supported; known: "):
            tm.load(folder)
    read = next(name for name in names if name not in refused)
    edited(folder, model_type=kind, architectures=[f"TF{read}"])
    assert tm.load(folder).module.num_classes == 5  # what the weights have is read


def test_heads_of_other_tasks_are_not_left_out_in_silence(tmp_path):
    shutil.copytree(GOLDENS / "bert_encoder", tmp_path / "bert")
    file = tmp_path / "bert/model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    extra = {f"cls.{name}": np.zeros(3, np.float32) for name in ("predictions.bias", "seq_relationship.bias")}
    safetensors.numpy.save_file({**tensors, **extra}, file)
    edited(tmp_path / "bert", architectures=["BertForPreTraining"])
    left_out = r"cls\.predictions, cls\.seq_relationship, pooler"
    with pytest.warns(
        UserWarning, match=f"left out of its weights: {left_out}; the outputs are the mean of the tokens"
    ):
        tm.load(tmp_path / "bert")
    edited(tmp_path / "bert", architectures=["BertForSequenceClassification"])
    with pytest.raises(tm.InputError, match="lack the classifier of BertForSequenceClassification"):
        tm.load(tmp_path / "bert")
    shutil.copytree(GOLDENS / "bert", tmp_path / "other")
    edited(tmp_path / "other", architectures=None)
    with pytest.warns(UserWarning, match="has no architecture: its classifier is used for whole texts"):
        tm.load(tmp_path / "other")


def test_a_tokenizer_is_known_by_its_content(tmp_path):
    """One that is replaced is another one when the model is loaded again, and none for a model that is loaded."""
    folder = tmp_path / "bert"
    shutil.copytree(GOLDENS / "bert", folder)
    first, file = tm.load(folder), folder / "tokenizer.json"
    before = first.read("a film is dull")
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["film"], vocabulary["dull"] = vocabulary["dull"], vocabulary["film"]
    file.write_text(json.dumps(content))
    second = tm.load(folder)
    assert second.preprocessing.to_dict() != first.preprocessing.to_dict()
    np.testing.assert_array_equal(first.read("a film is dull").ids, before.ids)
    np.testing.assert_array_equal(second.read("a dull is film").ids, before.ids)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling/config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, name, kind):
    folder = tmp_path / "encoder"
    shutil.copytree(GOLDENS / "bert_encoder", folder)
    (folder / "1_Pooling").mkdir()
    (folder / name).unlink(missing_ok=True)
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}[kind](folder / name)
    with pytest.raises(tm.InputError, match=f"{name} is (not a regular file|a folder)"):
        tm.load(folder)


def edited(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_options_of_images_are_refused():
    with pytest.raises(tm.InputError, match="img_size is for models of images"):
        tm.load(str(GOLDENS / "bert"), img_size=32)
    with pytest.raises(tm.InputError, match="has weights: leave out the checkpoint"):
        tm.load(GOLDENS / "bert", "a.npz")
    with pytest.raises(tm.InputError, match="class_names has 1 class names; the model has 5 classes"):
        tm.load(GOLDENS / "bert", class_names=["a"])
