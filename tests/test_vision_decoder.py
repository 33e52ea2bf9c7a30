"""Vision-language models: what `transformers` answers, prompts with an image, and maps of image and words."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import mostly_slow

import tokentm_jax as tm
from tokentm_jax.cli.main import main
from tokentm_jax.errors import InputError
from tokentm_jax.inputs.prompts import IMAGE, PROMPT, WRITTEN

pytest.importorskip("tokenizers")
GOLDENS = Path(__file__).parent / "goldens/vision"
ANSWERS = dict(np.load(GOLDENS / "answers.npz"))
KINDS = ["gemma3", "paligemma", "paligemma2"]
TEXT = "the capital of France"


def asked(kind, text=TEXT):
    model = tm.load(GOLDENS / kind)
    return model, model.read((ANSWERS[f"{kind}/pixels"][0], text))


def after(model, prompt, *ids):
    """A prompt and some tokens after it."""
    return model.preprocessing.answered(prompt, np.array(ids, np.int32), np.zeros(len(ids), bool))


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ["gemma3"]))
def test_logits_and_words_are_those_of_the_library(kind):
    model, prompt = asked(kind)
    known, more = ANSWERS[f"{kind}/ids"], ANSWERS[f"{kind}/more"]
    n = known.shape[1]
    np.testing.assert_array_equal(prompt.ids[0, :n], known[0])
    assert prompt.mask.sum() == n
    logits = model.logits(after(model, prompt, *more))
    np.testing.assert_allclose(logits[:, : n + 4], ANSWERS[f"{kind}/logits"], atol=3e-5)
    endless = dataclasses.replace(model, module=model.module.clone(end=()))
    written = tm.models.generate(endless, prompt, 8)
    np.testing.assert_array_equal(written.ids[0, n : n + 8], ANSWERS[f"{kind}/greedy"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sees"), [("gemma3", {IMAGE}), ("paligemma", {IMAGE, PROMPT})])
def test_tokens_see_later_ones_of_the_types_that_the_layout_names(kind, sees):
    """By the logits at each token where one token's embedding is changed."""
    model, prompt = asked(kind)
    whole = after(model, prompt, 9, 10)
    texts = jax.tree.map(jnp.asarray, model.prepare(whole)).look_up(model.module, model.params)
    n, types = int(whole.mask.sum()), np.asarray(whole.tokens.types[0])

    def logits(embeddings):
        return model.module.apply({"params": model.params}, texts._replace(embeddings=embeddings))[0]

    changed = jnp.stack([texts.embeddings.at[0, place].add(1.0) for place in range(n)])
    moved = np.asarray(jnp.abs(jax.lax.map(logits, changed) - logits(texts.embeddings)).max(-1) > 1e-6)[:, :n]
    assert set(types[:n]) == {IMAGE, PROMPT, WRITTEN}
    for place in range(n):  # two blocks: what a token reads through others is within reach, too
        both = types[place] in sees
        first = min(np.flatnonzero(np.isin(types[:n], list(sees)))) if both else place
        assert not moved[place, :first].any()
        assert moved[place, place] and (not both or moved[place, first])


@pytest.mark.slow
def test_the_effects_of_image_and_words_are_gradients_of_their_embeddings():
    model, prompt = asked("gemma3")
    found = tm.explain_words(model, prompt, [9, 10], "gradient_x_input")
    n = int(prompt.mask.sum())
    assert found.start == n and found.maps.shape == (2, n + 2)
    texts = jax.tree.map(jnp.asarray, model.prepare(after(model, prompt, 9, 10))).look_up(model.module, model.params)

    def logit(embeddings, place, token):
        outputs = model.module.apply({"params": model.params}, texts._replace(embeddings=embeddings))
        return outputs[0, place - 1, token]

    for row, token in enumerate((9, 10)):
        gradient = jax.grad(logit)(texts.embeddings, n + row, token)
        expected = (gradient * texts.embeddings).sum(-1)[0, : n + 2]
        np.testing.assert_allclose(found.maps[row], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert (found.maps[row, n + row :] == 0).all()
    assert found.image_maps.shape == (2, 2, 2)
    np.testing.assert_array_equal(found.image, [[3, 4], [5, 6]])
    np.testing.assert_array_equal(found.image_maps[1], found.maps[1, 3:7].reshape(2, 2))


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_an_image_may_be_in_the_middle_of_a_prompt():
    model, before = asked("gemma3")
    _, inside = asked("gemma3", "the capital <boi> of France")
    image = [5, 6, 32, 32, 32, 32, 7, 5]
    np.testing.assert_array_equal(before.ids[0, :13], [2, *image, 8, 9, 10, 11])
    np.testing.assert_array_equal(inside.ids[0, :13], [2, 8, 9, *image, 10, 11])
    special = [place for place in range(13) if inside.tokens.special[0, place]]
    assert special == [0, 3, 4, 9, 10]  # not the image's tokens, which can be removed
    assert not np.allclose(model.logits(before)[0, 12], model.logits(inside)[0, 12])


def test_prompts_need_an_image_and_a_text():
    model, prompt = asked("gemma3")
    image = ANSWERS["gemma3/pixels"][0]
    for given in ("the capital", [image], [(image, TEXT), TEXT]):
        with pytest.raises(InputError, match=r"image with a text|pairs \(image, text\)"):
            model.read(given)
    with pytest.raises(InputError, match="more than the 48 tokens"):
        model.read((image, "the " * 60))
    with pytest.raises(InputError, match="with a word"):
        model.read((image, " "))
    with pytest.raises(InputError, match="needs an image"):
        tm.explain_words(model, TEXT)
    with pytest.raises(InputError, match="has an image"):
        tm.explain_words(model, prompt, image=image)
    with pytest.raises(InputError, match="must have 4 tokens of its image"):
        model.logits(prompt._replace(tokens=prompt.tokens._replace(types=np.zeros_like(prompt.ids))))
    with pytest.raises(InputError, match="expected what its `read` gives"):
        model.logits(prompt.tokens)
    with pytest.raises(InputError, match="this prompt has no image"):
        dataclasses.replace(tm.explain_words(model, prompt, [9], "raw_attention"), image=None).image_maps  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_tokens_per_image": 5}, "must be a square that divides"),
        ({"text_config": {"model_type": "llama"}}, "'model_type' must be gemma3_text"),
        ({"image_token_index": None}, "lacks 'image_token_index'"),
        ({"architectures": ["Gemma3ForCausalLM"]}, "is not supported; known: Gemma3ForConditionalGeneration"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, change, message):
    folder = Path(shutil.copytree(GOLDENS / "gemma3", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    if "text_config" in change:
        change = {"text_config": config["text_config"] | change["text_config"]}
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        tm.load(folder)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ask_writes_a_picture_and_maps(tmp_path):
    from PIL import Image

    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray((ANSWERS["gemma3/pixels"][0] * 255).astype(np.uint8)).resize((64, 64)).save(photo)
    question = ["explain", str(photo), "--ask", TEXT, "--out", str(out)]
    command = [*question, "--model", str(GOLDENS / "gemma3"), "--method", "tokentm,attn_lrp"]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, done.output
    (result,) = json.loads(done.output)
    assert result["path"] == str(photo) and result["question"] == TEXT
    assert [Path(file).name for file in result["files"]] == ["photo.png", "photo.npz"]
    word = result["words"][0]
    assert result["answer"].split()[0] == word["word"] and np.shape(word["methods"]["attn_lrp"]["map"]) == (2, 2)
    assert [each["token"] for each in word["methods"]["tokentm"]["words"]] == TEXT.split()
    with np.load(out / "photo.npz", allow_pickle=False) as saved:
        assert saved["map"].shape == (2, len(result["words"]), 2, 2)
        np.testing.assert_allclose(saved["map"][1, 0], word["methods"]["attn_lrp"]["map"], atol=1e-5)
    assert (out / "photo.png").stat().st_size > 5000
    assert CliRunner().invoke(main, command).exit_code == 0  # replaces its own files
    assert sorted(path.name for path in out.iterdir()) == ["photo.npz", "photo.png"]
    refused = CliRunner().invoke(main, [*question, "--model", "cifar10_distilled"])
    assert refused.exit_code == 2 and "answers no questions" in refused.output
    refused = CliRunner().invoke(main, [*question, "--target", "cat"])
    assert refused.exit_code == 2 and "leave out --target" in refused.output
