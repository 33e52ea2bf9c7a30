"""Questions about rendered scenes: their answers, derived again from the parts, and the model that learns them."""

import numpy as np
import pytest

import tokentm_jax as tm
from tokentm_jax.data.questions import ASKED, WORDS, asked
from tokentm_jax.data.scenes import COLOURS
from tokentm_jax.data.sources import open_source
from tokentm_jax.errors import InputError


def properties(part):
    """The words that are true of a part."""
    noun = "circle" if part.kind.shape == "disc" else part.kind.shape
    return {noun, part.kind.colour, "large" if part.half > 6 else "small", "shape"}


def singular(word):
    return {"crosses": "cross"}.get(word, word.removesuffix("s"))


@pytest.mark.parametrize("about", ASKED)
def test_answers_follow_from_the_parts(about):
    kinds = set()
    for index in range(200):
        found = asked(index, "test", about)
        kinds.add(found.about)
        parts = list(found.scene.parts)
        verb, *words = found.question.lower().replace("?", "").split()
        assert {*found.question.lower().replace("?", " ?").split(), *found.answer} <= set(WORDS)
        if verb == "how":
            wanted = {singular(word) for word in words[1:-2]}
            named = [number for number, part in enumerate(parts, 1) if wanted <= properties(part)]
            assert found.answer == (["zero", "one", "two", "three", "four", "five"][len(named)],)
        else:
            wanted = set(words[words.index("the") + 1 :])
            named = [number for number, part in enumerate(parts, 1) if wanted <= properties(part)]
            assert len(named) == 1
            part = parts[named[0] - 1]
            row, column = part.place
            expected = {
                "colour": (part.kind.colour,),
                "shape": tuple(w for w in (part.kind.colour, *properties(part)) if w not in (*wanted, "shape")),
                "place": ("top" if row < 2 else "bottom", "left" if column < 2 else "right"),
            }[found.about]
            if found.about == "shape":  # the shape, after the colour where that is not in the question
                expected = tuple(word for word in expected if word not in ("small", "large"))
                expected = tuple(w for w in expected if w in COLOURS)[:1] + tuple(
                    w for w in expected if w not in COLOURS
                )
            assert found.answer == expected
        assert found.causes == (tuple(named),) * len(found.answer)
        assert (np.unique(found.scene.ids) == np.arange(len(parts) + 1)).all()
    assert kinds <= {about, "number"}  # of which parts cannot be set apart, the number is asked


def test_a_question_does_not_depend_on_others():
    first, again = asked(11, "test"), asked(11, "test")
    assert first.question == again.question and (first.scene.image == again.scene.image).all()
    assert (asked(11, "train").scene.image != first.scene.image).any()


@pytest.mark.parametrize("half", [0, 1])
def test_even_and_odd_questions_are_of_all_kinds(half):
    assert {asked(index, "test").about for index in range(half, 16, 2)} == {*ASKED}


def test_questions_are_a_source():
    source = open_source("questions:colour:test")
    assert source.class_names == WORDS and len(source) == 2000 and source.masked
    example, found = source[3], asked(3, "test", "colour")
    assert isinstance(example.label, int)
    assert example.content.text == found.question and WORDS[example.label] == found.answer[0]
    np.testing.assert_array_equal(example.mask, np.isin(found.scene.ids, found.causes[0]))
    for spec, message in (("questions:size:test", "colour"), ("questions:all:dev", "questions:KIND:test")):
        with pytest.raises(InputError, match=message):
            open_source(spec)
    with pytest.raises(InputError, match="photo with a question"):
        tm.load().preprocessing.levels(example)


@pytest.mark.slow
def test_a_folder_has_the_parameters_and_reads_as_the_training_does(tmp_path):
    pytest.importorskip("tokenizers")
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    from models.training.recipes.scenes_words import config
    from models.training.train_questions import NUMBERS, model_of, write_vision_folder

    module = model_of(config)
    params = tm.models.init_params(module, jax.random.key(0))
    params = jax.tree.map(lambda a: np.asarray(a, np.float16).astype(np.float32), params)
    write_vision_folder(tmp_path, module, params, {"accuracy": 0.5})
    loaded = tm.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(loaded.params))
    same = module.clone(local_rope_base=loaded.module.local_rope_base, attention_scale=loaded.module.attention_scale)
    assert loaded.module == same
    found = asked(4, "test", "colour")
    prompt = loaded.read((found.scene.image, found.question))
    words = found.question.lower().replace("?", " ?").split()
    n = int(prompt.mask.sum())
    assert prompt.ids[0, n - len(words) : n].tolist() == [NUMBERS[word] for word in words]
    whole = loaded.preprocessing.answered(prompt, np.array([NUMBERS["red"]], np.int32), np.zeros(1, bool))
    assert loaded.preprocessing.pieces(whole.ids[0, n - 3 : n + 1])[-2:] == ["?", " red"]


@pytest.mark.slow
def test_an_evaluation_explains_the_first_word_of_the_answer(tmp_path):
    """Its predictions are those of `generate`, and its maps those of `explain_words`."""
    pytest.importorskip("tokenizers")
    from tokentm_jax.configs import EvaluateConfig, rows
    from tokentm_jax.runs.evaluate import evaluate

    data = "questions:colour:test"
    config = EvaluateConfig("q", "pointing", data, rows("gae"), model="scenes_words", limit=4, batch_size=4)
    results = {(row["method"], row["metric"]): row["value"] for row in evaluate(config, out=tmp_path / "q")["rows"]}
    model, source, shares, right = tm.load("scenes_words"), open_source(data, limit=4, seed=0), [], []
    for index in range(4):
        example = source[index]
        found = tm.explain_words(
            model, example.content.text, method="gae", image=np.asarray(example.content.image), most=1
        )
        right.append(found.answer.strip() == WORDS[example.label])
        inside = example.mask.reshape(8, 8, 8, 8).mean((1, 3))
        heat = np.maximum(found.image_maps[0], 0)
        shares.append((heat * inside).sum() / heat.sum())
    assert results["clean", "accuracy"] == pytest.approx(100 * np.mean(right))
    assert all(right) and results["gae", "share"] == pytest.approx(np.mean(shares), abs=2e-3)
