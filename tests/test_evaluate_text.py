"""Explanations of texts: the metrics against slow loops and by hand, and evaluations that resume."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from everything import everything

import tokentm_jax as tm
from tokentm_jax.data.sentences import read_sentences
from tokentm_jax.inputs.texts import Word
from tokentm_jax.metrics import texts as metrics
from tokentm_jax.runs.evaluate_text import TextEvaluateConfig, evaluate_text

pytest.importorskip("tokenizers")
GOLDENS = Path(__file__).parent / "goldens/texts"
SENTENCES = [
    "a funny film .",
    "the film is not well , not dull at all !",
    "dull",
    "a film",
    "is the film fun , well ?",
]


@pytest.fixture(scope="module")
def text():
    return tm.load(GOLDENS / "distilbert")


def test_curves_are_those_of_texts_that_were_cut_by_hand(text):
    tokens = text.read(SENTENCES[:3])
    scores = np.random.default_rng(0).integers(0, 5, tokens.ids.shape).astype(np.float32)  # with ties
    target = np.array([0, 4, 2], np.int32)
    seen = []

    def predict(given):
        seen.extend(tuple(ids[mask]) for ids, mask in zip(given.ids, given.mask, strict=True))
        return text.logits(given)

    probability = metrics.Probabilities(predict, 16)
    curves = metrics.removal_curves(probability, tokens, scores, target, text.module.mask_id)
    losses = metrics.leave_one_out(probability, tokens, target)
    assert curves.shape == (3, 2, 2, 11)
    assert len(set(seen)) <= len(seen) <= len(set(seen)) + 30  # each text once, but for filling

    def probability(ids, i):
        full = tm.Tokens(*(np.array([[value] * 16]) for value in (0, False, 0, True)))
        full.ids[0, : len(ids)], full.mask[0, : len(ids)] = ids, True
        return float(jax.nn.softmax(text.logits(full))[0, target[i]])

    for i in range(3):
        places = np.flatnonzero(~tokens.special[i])
        order = sorted(places, key=lambda place: (-scores[i, place], place))
        ids = tokens.ids[i][tokens.mask[i]]
        for share in (0, 3, 5, 10):
            count = int(share / 10 * len(order) + 0.5)
            for kept, gone in ((0, order[:count]), (1, order[count:])):
                cut = [n for place, n in enumerate(ids) if place not in gone]
                masked = [text.module.mask_id if place in gone else n for place, n in enumerate(ids)]
                expected = [probability(cut, i), probability(masked, i)]
                np.testing.assert_allclose(curves[i, :, kept, share], expected, rtol=1e-4)
        for place in places:
            cut = [n for at, n in enumerate(ids) if at != place]
            np.testing.assert_allclose(losses[i, place], probability(ids, i) - probability(cut, i), atol=1e-6)
        assert not np.asarray(losses)[i][tokens.special[i]].any()


def test_kendall_is_scipy_s():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.integers(0, 6, 12).astype(float), rng.normal(size=12).round(1)
        assert metrics.kendall(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert metrics.kendall(np.ones(4), np.arange(4.0)) == 0


def test_agreement_by_hand():
    words = [Word(t, s, 0, 0) for t, s in (("A", 0.1), ("Great", 0.9), ("film", 0.2), ("bad", -0.5))]
    valences = {"great": 3.1, "bad": -2.5}
    assert metrics.agreement(words, valences, 1) == {
        "rated": True, "top_is_rated": 1.0, "agreement": pytest.approx(5 / np.sqrt(6 * 5))
    }  # fmt: skip
    assert metrics.agreement(words, valences, -1)["top_is_rated"] == 0.0
    assert metrics.agreement(words[:1], valences, 1) == {"rated": False, "top_is_rated": 0.0, "agreement": 0.0}


def test_the_lexicon_of_the_package():
    pytest.importorskip("vaderSentiment")
    valences = metrics.read_lexicon()
    assert len(valences) > 7000 and valences["good"] == 1.9 and valences["horrible"] == -2.5


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data.tsv").write_text("".join(f"{s}\t{i % 5}\n" for i, s in enumerate(SENTENCES)), "utf-8")
    return tmp_path / "data.tsv"


def config_of(data, *methods):
    return TextEvaluateConfig("t", str(GOLDENS / "distilbert"), str(data), tm.configs.rows(*methods), batch_size=2)


def test_an_evaluation_resumes_and_takes_more_rows(text, data, tmp_path):
    sentences = read_sentences(data, 5)
    whole = evaluate_text(config_of(data, "raw_attention", "gradient_x_input"), text, sentences, tmp_path / "whole")

    def stop(done, total, figures):
        assert {row["method"] for row in figures()} == {"clean", "raw_attention", "random"}
        raise KeyboardInterrupt

    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        evaluate_text(config_of(data, "raw_attention"), text, sentences, out, stop)
    assert evaluate_text(config_of(data, "raw_attention", "gradient_x_input"), text, sentences, out) == whole
    assert evaluate_text(config_of(data, "gradient_x_input"), text, sentences, out) == whole  # the other row stays
    values = {(row["method"], row["metric"]): row for row in whole["rows"]}
    assert values["clean", "accuracy"]["value"] == 100 * float(
        np.mean(np.asarray(text.logits(text.read(SENTENCES))).argmax(-1) == sentences.labels)
    )
    assert {metric for method, metric in values if method == "random"} == {
        "comprehensiveness", "sufficiency", "comprehensiveness_masked", "sufficiency_masked", "kendall_leave_one_out"
    }  # fmt: skip
    (out / "records" / "clean.jsonl").unlink()  # as the program advises where it is damaged
    other = dataclasses.replace(config_of(data, "raw_attention", "gradient_x_input"), batch_size=3)
    assert evaluate_text(other, text, sentences, out)["rows"] == whole["rows"]
    # What is followed is the same for all when all is there and when nothing is.
    lines = [json.loads(line) for file in (out / "records").glob("r*.jsonl") for line in file.read_text().splitlines()]
    by_key = {}
    for line in lines:
        for (key, _), curves in zip(line["keys"], line["fields"]["curves"], strict=True):
            by_key.setdefault(key, []).append(np.array(curves))
    for first, second in by_key.values():
        np.testing.assert_allclose(first[..., [0, 10]], second[..., [0, 10]], rtol=1e-5)
    assert "| raw_attention |" in (out / "results.md").read_text()
    with pytest.raises(tm.InputError, match="data"):
        evaluate_text(config_of(data, "gae"), text, read_sentences(data, 5, 3), out)
    last = jax.tree.map(lambda leaf: leaf.at[-1].multiply(1.5) if leaf.ndim > 1 else leaf, text.params["blocks"])
    longer = dataclasses.replace(text.preprocessing, length=text.preprocessing.length - 1)
    for changed in ({"params": {**text.params, "blocks": last}}, {"preprocessing": longer}):
        with pytest.raises(tm.InputError, match="model"):
            evaluate_text(config_of(data, "gae"), dataclasses.replace(text, **changed), sentences, out)


def test_sentences_are_spread_evenly(data):
    assert [read_sentences(data, 5, limit).texts for limit in (None, 5, 9)] == [tuple(SENTENCES)] * 3
    assert read_sentences(data, 5, 2).texts == (SENTENCES[0], SENTENCES[2])


def test_lengths_are_within_the_model_s(text):
    """Texts as long as the model takes, which is no multiple of eight."""
    tokenizer = dataclasses.replace(text.preprocessing, length=14)
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        tokens = tokenizer.read(["a funny film " * 9, "dull"])
    assert tokens.ids.shape == (2, 14)

    def predict(given):
        assert given.ids.shape[1] <= 14
        return text.logits(given)

    found = metrics.Probabilities(predict, 2)(tokens, np.array([1, 2]))
    np.testing.assert_allclose(found, jax.nn.softmax(text.logits(tokens))[[0, 1], [1, 2]], rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no sentence"),
        ("a film 1\n", "line 1 must be a sentence, a tab and a class from 0 to 4"),
        ("a film\t1\nfun\t9\n", "line 2 must be"),
        ("\t1\n", "line 1 must be"),
    ],
)
def test_bad_sentences_are_one_sentence(tmp_path, content, message):
    (tmp_path / "data.tsv").write_text(content)
    with pytest.raises(tm.InputError, match=message):
        read_sentences(tmp_path / "data.tsv", 5)


# ---- the commands ---------------------------------------------------------------------------------------------------


def run(*arguments, **options):
    return CliRunner().invoke(everything, list(map(str, arguments)), **options)


def settings_of(page):
    """What the script of a page of texts reads."""
    html = page.read_text("utf-8")
    start = html.index('type="application/json">') + len('type="application/json">')
    return json.loads(html[start : html.index("</script>", start)])


def apart(folder, texts):
    """A classifier that gives two texts different classes."""
    shutil.copytree(GOLDENS / "distilbert", folder)
    text, file = tm.load(GOLDENS / "distilbert"), folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    with warnings.catch_warnings(action="ignore"):  # of a text that is cut
        middle = np.asarray(text.logits(text.read(texts))).mean(0)
    tensors["classifier.bias"] = 200 * (tensors["classifier.bias"] - middle)
    tensors["classifier.weight"] = 200 * tensors["classifier.weight"]
    safetensors.numpy.save_file(tensors, file)
    return folder


@pytest.mark.slow
def test_a_page_of_texts_in_a_browser(tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    texts, file = ["a funny film", "dull"], tmp_path / "page.html"
    arguments = ["explain-text", *texts, "--model", apart(tmp_path / "apart", texts), "--json"]
    found = run(*arguments, "--out", file, "--method", "tokentm,gradient_x_input")
    assert found.exit_code == 0, found.output
    names = [entry["target"]["name"] for entry in json.loads(found.stdout)]
    asked = tmp_path / "asked.html"
    assert run(*arguments, "--out", asked, "--target", names[1]).exit_code == 0
    with api.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = chromium.new_context(viewport={"width": 390, "height": 844}).new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or complaints.append(r.url))
        page.goto(file.as_uri())
        explained = lambda: page.locator(".explained").all_text_contents()  # noqa: E731
        colours = lambda: page.locator(".word").evaluate_all("all => all.map(e => e.style.background)")  # noqa: E731
        assert all(line.startswith(f"Explained: {name},") for line, name in zip(explained(), names, strict=True))
        assert page.locator(".caution:visible").count() == 0
        # A map without signs is importance, in one colour; one with signs is for and against.
        assert "more important" in page.inner_text("#legend") and "against" not in page.inner_text("#legend")
        assert all("--important" in colour for colour in colours())
        page.select_option("#method", "gradient_x_input")
        assert "speaks for the class" in page.inner_text("#legend") and "against" in page.inner_text("#legend")
        assert any("--against" in colour for colour in colours())
        assert not any("--important" in colour for colour in colours())
        page.select_option("#class", label=names[0])  # one class for all: of the second text it is improbable
        assert all(line.startswith(f"Explained: {names[0]},") for line in explained())
        assert page.locator(".caution:visible").count() == 1
        page.reload()  # the address keeps the choice
        assert page.input_value("#method") == "gradient_x_input" and "against" in page.inner_text("#legend")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.goto(asked.as_uri())  # a class that the command was asked for is that of all texts
        assert all(line.startswith(f"Explained: {names[1]},") for line in explained())
        assert complaints == []
        chromium.close()


def test_words_on_the_command_line_and_on_a_page(tmp_path):
    page = tmp_path / "page.html"
    hostile = "a funny </script><script>alert(1)</script> film <b>well</b> שלום 漢字 😀"
    arguments = ["explain-text", hostile, "dull", "--model", apart(tmp_path / "apart", [hostile, "dull"])]
    found = run(*arguments, "--method", "raw_attention,gradient_x_input", "--out", page, "--json")
    assert found.exit_code == 0, found.output
    first, second = json.loads(found.stdout)
    assert first["text"] == hostile and second["target"]["name"].startswith("label ")
    words = first["methods"]["gradient_x_input"]
    assert all(hostile[w["start"] : w["end"]] == w["word"] for w in words) and len(words) > 10
    html = page.read_text("utf-8")
    assert "alert(1)</script>" not in html and "&lt;</span>" in html
    settings = settings_of(page)
    scores = settings["scores"]
    assert len(scores) == 2 and len(scores[0]) == 5
    assert settings["signed"] == {"raw_attention": False, "gradient_x_input": True}
    assert (
        first["target"]["class"] != second["target"]["class"] and settings["first"] == ""
    )  # each begins with its own
    for entry, result in zip(settings["texts"], (first, second), strict=True):
        assert settings["classes"][entry["own"]] == result["target"]["name"]
        assert entry["probability"][entry["own"]] == pytest.approx(result["target"]["probability"])
    target = int(first["target"]["class"])
    np.testing.assert_allclose(scores[0][target]["gradient_x_input"], [w["score"] for w in words])

    bars = run("explain-text", "-", "--model", GOLDENS / "distilbert", input="a funny film\n\ndull\n")
    assert bars.exit_code == 0 and "funny" in bars.output and "++" in bars.output
    assert bars.output.count("%") == 2


def test_explain_writes_what_the_library_computes(tmp_path, monkeypatch):
    """The words are printed, and go with their scores to a file for each text, and to one page."""
    monkeypatch.chdir(tmp_path)
    model, texts, methods = GOLDENS / "distilbert", ["a funny film", "dull", "a funny film"], ("tokentm", "gae")
    given = ("explain", "-", "--model", model, "--target", "1,2", "--method", ",".join(methods))
    lines = "\n\n".join(texts)
    found = json.loads(run(*given, "--json", input=lines).stdout)
    assert [entry["text"] for entry in found] == texts
    parts = [f"{m}.label-{k}" for m in methods for k in (1, 2)]
    written = {"texts.html", *(f"text-{i}.{part}.npz" for i in (1, 2, 3) for part in parts)}
    assert {path.name for path in (tmp_path / "explanations").iterdir()} == written
    text = tm.load(model)
    tokens = text.read(texts)
    shares = np.asarray(jax.nn.softmax(text.logits(tokens)))
    for method in methods:
        for place, target in enumerate((1, 2)):
            expected = tm.words(text, texts, tm.explain(text, tokens, method, target))
            for i, (entry, words) in enumerate(zip(found, expected, strict=True)):
                own = entry["targets"][place]
                assert own["probability"] == pytest.approx(shares[i, target], rel=1e-4)
                assert [w["word"] for w in own["methods"][method]] == [w.text for w in words]
                scores = [w.score for w in words]
                np.testing.assert_allclose([w["score"] for w in own["methods"][method]], scores, rtol=1e-4, atol=1e-7)
                stored = np.load(f"explanations/text-{i + 1}.{method}.label-{target}.npz")
                np.testing.assert_allclose(stored["scores"], scores, rtol=1e-4, atol=1e-7)
                assert stored["words"].tolist() == [w.text for w in words] and str(stored["text"]) == texts[i]
    settings = settings_of(tmp_path / "explanations/texts.html")
    assert (settings["classes"], settings["first"]) == (["label 1", "label 2"], "0")
    first = [[w["score"] for w in entry["targets"][0]["methods"]["gae"]] for entry in found]
    assert [scores[0]["gae"] for scores in settings["scores"]] == first
    assert run(*given, input=lines).stdout.count("<- explained") == 6  # and the same command has the same files
    assert {path.name for path in (tmp_path / "explanations").iterdir()} == written


def test_each_text_and_each_question_has_its_files(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "text-1.html").write_text("mine")
    given = ("--model", GOLDENS / "distilbert", "--out", out, "--method", "rollout")
    for text in ("a film", "a film", "dull"):
        assert run("explain", text, *given).exit_code == 0
    names = lambda: {path.name for path in out.iterdir()}  # noqa: E731
    assert names() == {"text-1.html", *(f"text-{i}.{kind}" for i in (2, 3) for kind in ("html", "npz"))}
    assert (out / "text-1.html").read_text() == "mine"
    found = run("explain", "dull", " ", "a \x1b[2Jfilm", *given, "--format", "svg", "--versus", "4")
    assert found.exit_code == 2 and "text 2 must be a text with a word" in found.output and "\x1b" not in found.output
    assert "1 of 3 texts failed" in found.output and "<- compared with" in found.output
    assert names() >= {"sheet.svg", "text-1.npz", "text-5.npz"}
    assert "label 3 " in (out / "sheet.svg").read_text()
    for more in (("--format", "html", "--squares"), ("--colours", "magma")):
        assert "--format html is for texts" in run("explain", "dull", *given, *more).output


@pytest.mark.filterwarnings("ignore:.*left out of its weights")  # a pooler
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--model", "/nowhere"], "unknown model"),
        (["a", "--model", GOLDENS / "distilbert", "--method", "gea"], "did you mean 'gae'"),
        (["a", "--model", GOLDENS / "distilbert", "--method", "smooth_grad", "--option", "noise=1e38"], "no finite"),
        (["a", "--model", GOLDENS / "distilbert", "--target", "9"], "out of range"),
        (["a", "--model", GOLDENS / "bert_encoder"], "gives features and no classes"),
        ([" ", "--model", GOLDENS / "distilbert"], "text 1 must be a text with a word"),
        (["-", "--model", GOLDENS / "distilbert"], "must be a text or a list of texts"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message):
    found = run("explain-text", *arguments)
    assert found.exit_code == 2 and message in found.output and "Traceback" not in found.output


@pytest.fixture
def promotion():
    """Optax mixes integer counts with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_fine_tuning_resumes_and_gives_a_folder(tmp_path, monkeypatch, promotion):
    train = tmp_path / "train.tsv"
    train.write_text("a fun film\t1\nnot fun\t0\ndull film\t0\na funny film at all\t1\n" * 4)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from models.training.recipe import TextTrainConfig\n"
        f"config = TextTrainConfig('tiny', {str(GOLDENS / 'bert_encoder')!r}, {str(train)!r}, {str(train)!r}, "
        "('bad', 'good'), epochs=30, batch_size=4, learning_rate=5e-3, pool='avg', checkpoint_epochs=10)\n"
    )
    whole = run("train", recipe, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert "test accuracy 100.00%" in whole.output
    text = tm.load(tmp_path / "whole")
    assert text.class_names == ("bad", "good") and (text.module.pool, text.module.pooler) == ("avg", None)
    assert np.asarray(text.logits(text.read(["a fun film", "dull film"]))).argmax(-1).tolist() == [1, 0]

    from models.training import loop

    saved = loop._save

    def stops(manager, step, state):
        saved(manager, step, state)
        if step == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", stops)
    run("train", recipe, "--out", tmp_path / "parts")
    monkeypatch.undo()
    parts = run("train", recipe, "--out", tmp_path / "parts")
    assert "resumed at step 40 of 120" in parts.output, parts.output
    for leaf, other in zip(*(jax.tree.leaves(tm.load(tmp_path / n).params) for n in ("whole", "parts")), strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert jnp.isfinite(text.logits(text.read("dull"))).all()
