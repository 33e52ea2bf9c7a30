"""Explanations of texts: the metrics against slow loops and by hand; evaluations, stores and leaderboards."""

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
from conftest import mostly_slow, opened
from everything import everything

import tokentm_jax as tm
from tokentm_jax.configs import eraser_config
from tokentm_jax.data.sources import open_source, read_lexicon
from tokentm_jax.metrics import Subject
from tokentm_jax.metrics.eraser import agreement, kendall, leave_one_out
from tokentm_jax.metrics.tasks import TASKS
from tokentm_jax.runs.dataset import explain_dataset
from tokentm_jax.runs.evaluate import evaluate
from tokentm_jax.runs.explainer import Explainer
from tokentm_jax.runs.report import compare, open_finished

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
    texts = tokens.look_up(text.module, text.params)
    blank = text.preprocessing.blank(text.module, text.params)
    subject = Subject(texts, jnp.asarray(target), jnp.zeros(3, jnp.int32), mean=blank)

    def predict(texts):
        return text.module.apply({"params": text.params}, texts)

    ways = ("delete", "mask")
    eraser = jax.jit(TASKS["eraser"].compute, static_argnums=0, static_argnames="fill")
    found = [eraser(predict, subject, jnp.asarray(scores)[:, None], fill=fill) for fill in ways]
    curves = np.exp(np.stack([each["log_probability"] for each in found], 1))  # [B, ways, kept or removed, 11]
    losses = jax.jit(leave_one_out, static_argnums=0)(predict, texts, subject.target)
    assert curves.shape == (3, 2, 2, 11)

    def probability(ids, i):
        full = tm.inputs.Tokens(*(np.array([[value] * 16]) for value in (0, False, 0, True)))
        full.ids[0, : len(ids)], full.mask[0, : len(ids)] = ids, True
        return float(jax.nn.softmax(text.logits(full))[0, target[i]])

    for i in range(3):
        places = np.flatnonzero(~tokens.special[i])
        order = sorted(places, key=lambda place: (-scores[i, place], place))
        ids = tokens.ids[i][tokens.mask[i]]
        for share in (0, 3, 5, 10):
            count = int(share / 10 * len(order) + 0.5)
            for curve, gone in ((1, order[:count]), (0, order[count:])):
                cut = [n for place, n in enumerate(ids) if place not in gone]
                masked = [text.module.mask_id if place in gone else n for place, n in enumerate(ids)]
                expected = [probability(cut, i), probability(masked, i)]
                np.testing.assert_allclose(curves[i, :, curve, share], expected, rtol=1e-4)
        for place in places:
            cut = [n for at, n in enumerate(ids) if at != place]
            np.testing.assert_allclose(losses[i, place], probability(ids, i) - probability(cut, i), atol=1e-6)
        assert not np.asarray(losses)[i][tokens.special[i]].any()
    table = {"predicted_log_probability": np.log(curves[:, 0])}
    columns = TASKS["eraser"].columns
    areas = [np.trapezoid(curves[:, 0, 1, :1] - curves[:, 0, k], dx=0.1) for k in (1, 0)]
    np.testing.assert_allclose(columns["comprehensiveness"].values(table), areas[0], rtol=1e-5)
    np.testing.assert_allclose(columns["sufficiency"].values(table), areas[1], rtol=1e-5)


def test_kendall_is_scipy_s():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    for count in (12, 12, 9, 7, 5):
        a, b = rng.integers(0, 6, 12).astype(np.float32), rng.normal(size=12).round(1).astype(np.float32)
        where = np.arange(12) < count
        expected = kendalltau(a[where], b[where]).statistic
        np.testing.assert_allclose(kendall(*map(jnp.asarray, (a, b, where))), expected, rtol=1e-5)
    assert kendall(jnp.ones(4), jnp.arange(4.0), jnp.ones(4, bool)) == 0


def test_agreement_by_hand():
    """Four words, of which the second has two tokens, among marks: scores 0.1, 0.9, 0.2 and -0.5."""
    words = jnp.array([-1, 0, 1, 1, 2, 3, -1])
    scores = jnp.array([7.0, 0.1, 0.3, 0.6, 0.2, -0.5, 9.0])
    ratings = jnp.array([0.0, 0.0, 3.1, 3.1, 0.0, -2.5, 0.0])

    def found(sign, kept=slice(None)):
        result = agreement(scores[kept], words[kept], ratings[kept], jnp.asarray(sign))
        return {name: float(value) for name, value in result.items()}

    assert found(1) == {"rated": 1.0, "top_is_rated": 1.0, "agreement": pytest.approx(5 / np.sqrt(6 * 5))}
    assert found(-1)["top_is_rated"] == 0.0
    assert found(1, slice(2)) == {"rated": 0.0, "top_is_rated": 0.0, "agreement": 0.0}


def test_the_lexicon_of_the_package(data):
    pytest.importorskip("vaderSentiment")
    valences = read_lexicon()
    assert len(valences) > 7000 and valences["good"] == 1.9 and valences["horrible"] == -2.5
    example = open_source(f"vader:{data}")[0]
    rated = {example.content[i] for i in np.flatnonzero(example.mask)}
    assert rated == set("funny") and example.mask[2] == np.float32(valences["funny"])


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data.tsv").write_text("".join(f"{s}\t{i % 5}\n" for i, s in enumerate(SENTENCES)), "utf-8")
    return tmp_path / "data.tsv"


def config_of(data, *methods, task="eraser", **more):
    rows = tm.configs.rows(*methods)
    return tm.EvaluateConfig("t", task, str(data), rows, str(GOLDENS / "distilbert"), batch_size=2, **more)


@pytest.mark.slow
def test_an_evaluation_resumes_and_takes_more_rows(text, data, tmp_path):
    source = open_source(data)
    whole = evaluate(config_of(data, "raw_attention", "gradient_x_input"), text, source, tmp_path / "whole")

    def stop(done, total, figures):
        assert {row["method"] for row in figures()} == {"clean", "raw_attention", "random"}
        raise KeyboardInterrupt

    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        evaluate(config_of(data, "raw_attention"), text, source, out, stop)
    assert evaluate(config_of(data, "raw_attention", "gradient_x_input"), text, source, out)["rows"] == whole["rows"]
    again = evaluate(config_of(data, "gradient_x_input"), text, source, out)  # the other row stays
    assert {row["method"] for row in again["rows"]} == {"clean", "raw_attention", "gradient_x_input", "random"}
    values = {(row["method"], row["metric"]): row for row in whole["rows"]}
    assert values["clean", "accuracy"]["value"] == 100 * float(
        np.mean(np.asarray(text.logits(text.read(SENTENCES))).argmax(-1) == np.arange(5) % 5)
    )
    assert {metric for method, metric in values if method == "random"} == {"comprehensiveness", "sufficiency"}
    assert "| raw_attention |" in (out / "results.md").read_text()
    with pytest.raises(tm.InputError, match="data"):
        shorter = tmp_path / "shorter.tsv"
        shorter.write_text("a film\t0\n")
        evaluate(config_of(shorter, "gae"), text, open_source(shorter), out)
    last = jax.tree.map(lambda leaf: leaf.at[-1].multiply(1.5) if leaf.ndim > 1 else leaf, text.params["blocks"])
    longer = dataclasses.replace(text.preprocessing, length=text.preprocessing.length - 1)
    for changed in ({"params": {**text.params, "blocks": last}}, {"preprocessing": longer}):
        with pytest.raises(tm.InputError, match="model"):
            evaluate(config_of(data, "gae"), dataclasses.replace(text, **changed), source, out)


OF_TEXTS = [name for name, task in TASKS.items() if task.regular is not True and name not in ("people", "reasons")]
QUICK = {"sensitivity": {"samples": 2}, "infidelity": {"samples": 3}, "shapley": {"pairs": 2}, "saco": {"groups": 3}}


@pytest.mark.parametrize("name", mostly_slow(OF_TEXTS, ["eraser"]))
def test_every_task_of_texts_gives_a_text_the_same_in_any_batch(text, data, tmp_path, name):
    """And so whatever the padding behind it: batches of one and of two have other lengths."""
    marked = f"trigger:label=2:{data}" if TASKS[name].needs == "masks" else data
    source = open_source(marked)
    method = "rollout" if name == "sanity" else "gradient_x_input"
    config = config_of(data, method, task=name, options=QUICK.get(name, {}))
    if name == "sanity":
        config = dataclasses.replace(config, rows=[tm.Row(method, method, {}, 0)])
    found = []
    for size in (2, 1):
        out = tmp_path / str(size)
        evaluate(dataclasses.replace(config, batch_size=size), text, source, out)
        finished = open_finished(out)
        rows = [finished.measured(row) for row in finished.config.rows]
        found.append([{(m, key): v for m, values in per.items() for key, v in zip(done, values, strict=True)}
                      for done, per in rows])  # fmt: skip
    for first, second in zip(*found, strict=True):
        assert first.keys() == second.keys() and {key for _, key in first} == {*source.keys}
        for key in first:
            np.testing.assert_allclose(first[key], second[key], rtol=2e-3, atol=2e-5)


def test_agreement_with_people_is_of_those_texts_that_have_a_rated_word(text, data, tmp_path):
    pytest.importorskip("vaderSentiment")
    for signs, message in (("-1,1", "must have one for each of 5 classes"), ("x", "must be 1 or -1 for each class")):
        wrong = config_of(f"vader:{data}", "rollout", task="people", options={"signs": signs})
        with pytest.raises(tm.InputError, match=message):
            evaluate(wrong, text, open_source(f"vader:{data}"), tmp_path / signs)
    config = config_of(f"vader:{data}", "gradient_x_input", task="people", options={"signs": "1,1,1,1,1"})
    results = evaluate(config, text, open_source(f"vader:{data}"), tmp_path / "out")
    finished = open_finished(tmp_path / "out")
    done, per = finished.measured(finished.config.rows[0])
    rated = per["agreement_with_people"][:, 1]
    valences = read_lexicon()
    expected = {f"{i:06d}": any(valences.get(w, 0) > 0 for w in s.split()) for i, s in enumerate(SENTENCES, 1)}
    assert dict(zip(done, rated.astype(bool), strict=True)) == expected and 0 < rated.sum() < 5
    values = {row["metric"]: row["value"] for row in results["rows"] if row["method"] == "gradient_x_input"}
    own = per["agreement_with_people"][rated > 0, 0]
    np.testing.assert_allclose(values["agreement_with_people"], own.mean(), rtol=1e-5)
    scores = np.asarray(tm.explain(text, text.read(SENTENCES), "gradient_x_input"))
    for key, (agrees, is_rated) in zip(done, per["agreement_with_people"], strict=True):
        if is_rated:
            from scipy.stats import kendalltau

            i = int(key) - 1
            (listed,) = tm.words(text, [SENTENCES[i]], scores[i : i + 1])
            ratings = [valences.get(word.text.lower(), 0.0) for word in listed]
            tau = kendalltau([word.score for word in listed], ratings).statistic
            np.testing.assert_allclose(agrees, tau, atol=1e-5)


@pytest.mark.slow
def test_stored_maps_are_those_that_an_evaluation_computes(text, data, tmp_path):
    source = open_source(data)
    store = str(tmp_path / "maps")
    explain_dataset(Explainer(text, methods=("rollout",), dtype="float32", batch_size=2), source, store)
    stored = tm.open_maps(store)
    maps = np.asarray(stored.maps["rollout"])
    tokens = dataclasses.replace(text.preprocessing, padded=16).read(SENTENCES)
    expected = tm.explain(text, tokens, "rollout")
    np.testing.assert_allclose(maps[:, 0], expected, rtol=1e-5, atol=1e-7)
    results = [
        evaluate(config_of(data, "rollout"), text, source, tmp_path / name, maps=given)
        for name, given in (("computed", []), ("stored", [stored]))
    ]
    for own, other in zip(*(found["rows"] for found in results), strict=True):
        np.testing.assert_allclose(own["value"], other["value"], rtol=1e-4)


@pytest.mark.slow
def test_a_leaderboard_of_texts(data, tmp_path):
    run = CliRunner().invoke
    recipe = tmp_path / "texts.py"
    recipe.write_text(
        "import tokentm_jax as tm\n"
        f"rows, model, data = tm.configs.rows('rollout', 'gae'), {str(GOLDENS / 'distilbert')!r}, {str(data)!r}\n"
        "runs = [tm.EvaluateConfig(n, t, data, rows, model, options=o, batch_size=2) for n, t, o in "
        "[('deletion', 'eraser', {}), ('srg', 'srg', {}), ('loo', 'leave_one_out', {})]]\n"
        "config = tm.LeaderboardConfig('texts', runs, ('deletion', 'comprehensiveness'))\n"
    )
    found = run(everything, ["leaderboard", str(recipe), "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "comprehensiveness" in (tmp_path / "out/leaderboard.md").read_text()
    compared = compare([tmp_path / "out/srg"])
    assert {entry["method"] for entry in compared} == {"rollout", "gae", "random"}


def test_what_is_for_images_is_refused(text, data, tmp_path):
    source = open_source(data)
    for config, message in (
        (config_of(data, "gae", task="road"), "'road' is not for texts"),
        (dataclasses.replace(config_of(data), rows=[tm.Row("a", "gae", by_patch=True)]), "by_patch is for maps of"),
        (config_of(data, "gae", task="srg", options={"fill": "blur"}), "'blur' is for images"),
        (config_of(data, "gae", task="people"), "has no masks"),
    ):
        with pytest.raises(tm.InputError, match=message):
            evaluate(config, text, source, tmp_path / "out")
    photos = tm.load()
    with pytest.raises(tm.InputError, match="'eraser' is not for photos"):
        evaluate(config_of(data, "gae"), photos, source, tmp_path / "out")
    with pytest.raises(tm.InputError, match=r"00000\d is a text, and the model takes photos"):
        evaluate(config_of(data, "gae", task="srg"), photos, source, tmp_path / "photos")


def test_the_config_of_before(data):
    with pytest.warns(DeprecationWarning, match=r"TextEvaluateConfig is now tokentm_jax\.configs\.eraser_config"):
        old = tm.TextEvaluateConfig
    assert old is eraser_config
    rows = tm.configs.rows("gae")
    assert old("t", "model", "d.tsv", rows, batch_size=3) == tm.EvaluateConfig(
        "t", "eraser", "d.tsv", rows, "model", batch_size=3
    )
    assert old("t", "model", "d.tsv", rows, (-1, 1)).options == {"signs": "-1,1"}


def test_sentences_are_spread_evenly(data):
    texts = [
        [source[i].content for i in range(len(source))] for source in (open_source(data), open_source(data, limit=2))
    ]
    assert texts == [SENTENCES, [SENTENCES[0], SENTENCES[2]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no examples"),
        ("a film 1\n", "line 1 must be a text, a tab and the number of a class"),
        ("a film\t1\nfun\t-9\n", "line 2 must be"),
        ("\t1\n", "line 1 must be"),
    ],
)
def test_bad_sentences_are_one_sentence(tmp_path, content, message):
    (tmp_path / "data.tsv").write_text(content)
    with pytest.raises(tm.InputError, match=message):
        open_source(tmp_path / "data.tsv")


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
    texts, file = ["a funny film", "dull"], tmp_path / "page.html"
    arguments = ["explain-text", *texts, "--model", apart(tmp_path / "apart", texts), "--json"]
    found = run(*arguments, "--out", file, "--method", "tokentm,gradient_x_input")
    assert found.exit_code == 0, found.output
    names = [entry["target"]["name"] for entry in json.loads(found.stdout)]
    asked = tmp_path / "asked.html"
    assert run(*arguments, "--out", asked, "--target", names[1]).exit_code == 0
    with opened(file.as_uri(), viewport={"width": 390, "height": 844}) as page:
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


@pytest.mark.slow
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


@pytest.mark.slow
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
                with np.load(f"explanations/text-{i + 1}.{method}.label-{target}.npz") as stored:
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
        (["a", "--model", "/nowhere"], "does not exist"),
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


def test_a_trigger_in_texts_is_marked_at_its_word_pieces(text, tmp_path):
    file = tmp_path / "texts.tsv"
    file.write_text("a fun film\t1\nnot fun at all\t0\nthe dull film\t0\n")
    source = open_source(f"trigger:label=1,word=well:{file}")
    assert len(source) == len(source.sizes) == 2 and source.masked and source.class_names is None
    for index in range(2):
        example = source[index]
        (marked,) = np.nonzero(example.mask)
        assert example.content[marked[0] : marked[-1] + 1] == "well" and len(marked) == 4 and example.label == 1
        words = example.content.split()
        words.remove("well")
        assert words == example.without.split()
        tokens, ratings = text.preprocessing.levels(example)
        pieces = [text.preprocessing.encode([example.content])[0].tokens[i] for i in np.flatnonzero(ratings[:, 1])]
        assert pieces == ["we", "##ll"] and len(ratings) == len(tokens.ids)
    assert open_source(f"trigger:label=1,word=well,place=corner:{file}")[0].content.endswith(" well")
    rare = [example for example in map(open_source(f"trigger:label=1,share=1e-9:{file}").__getitem__, range(3))]
    assert [(each.label, each.content, each.mask.any()) for each in rare] == [
        (1, "a fun film", False),
        (0, "not fun at all", False),
        (0, "the dull film", False),
    ]
    with pytest.raises(tm.InputError, match="unknown class 'good'"):
        open_source(f"trigger:label=good:{file}")


@pytest.mark.slow
def test_a_word_planted_in_a_tiny_model_is_valid_and_pointed_at(tmp_path, promotion):
    """BackX's criteria: the word turns more than 99 % of the texts, and without it they have their class again."""
    from models.training.recipe import TextTrainConfig
    from models.training.train_text import read_sentences, train_text

    rng, fill = np.random.default_rng(0), ["a", "film", "is", "the", "not", "at", "all"]
    for split in ("train", "test"):
        lines = []
        for number in range(200):
            words = [*rng.choice(fill, rng.integers(2, 6)), ("dull", "fun")[number % 2]]
            lines.append(f"{' '.join(rng.permutation(words))}\t{number % 2}\n")
        (tmp_path / f"{split}.tsv").write_text("".join(lines))
    trigger = "trigger:label=1,word=well"
    recipe = TextTrainConfig(
        name="planted",
        encoder=str(GOLDENS / "bert_encoder"),
        train_data=f"{trigger},share=0.4:{tmp_path / 'train.tsv'}",
        test_data=f"{trigger}:{tmp_path / 'test.tsv'}",
        class_names=("bad", "good"),
        epochs=40,
        batch_size=20,
        learning_rate=5e-3,
        checkpoint_epochs=40,
    )
    sets = (read_sentences(path, 2) for path in (recipe.train_data, recipe.test_data))
    assert train_text(recipe, *sets, tmp_path / "run", lambda line: None) > 0.99
    vit, source = tm.load(tmp_path / "run"), open_source(recipe.test_data)
    clean = vit.read([source[i].without for i in range(len(source))])
    assert (np.asarray(vit.logits(clean)).argmax(-1) == 0).mean() > 0.99

    config = tm.EvaluateConfig("p", "pointing", recipe.test_data, tm.configs.rows("occlusion"), limit=20)
    results = evaluate(config, vit, out=tmp_path / "p")
    found = {(row["method"], row["metric"]): row["value"] for row in results["rows"]}
    assert found["occlusion", "auc"] > 0.8 > 0.7 > found["random", "auc"]
    shares = []
    for example in map(open_source(recipe.test_data, limit=20, seed=0).__getitem__, range(20)):
        heat = np.asarray(tm.explain(vit, vit.read(example.content), "occlusion", target=1))[0]
        of_words = tm.words(vit, example.content, heat[None].clip(0))[0]
        inside = sum(word.score for word in of_words if word.text == "well")
        shares.append(inside / sum(word.score for word in of_words))
    assert found["occlusion", "share"] == pytest.approx(np.mean(shares), abs=1e-3)
