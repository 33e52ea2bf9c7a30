"""Vision-language models: what `transformers` answers, prompts with an image, and maps of image and words."""

from pathlib import Path

import numpy as np
import pytest

import tokentm_jax as tm

pytest.importorskip("tokenizers")
GOLDENS = Path(__file__).parent / "goldens/vision"
ANSWERS = dict(np.load(GOLDENS / "answers.npz"))
KINDS = ["gemma3", "paligemma", "paligemma2"]


def asked(kind):
    model = tm.load(GOLDENS / kind)
    return model, model.read((ANSWERS[f"{kind}/pixels"][0], "the capital of France"))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_words_are_those_of_the_library(kind):
    model, prompt = asked(kind)
    known, more = ANSWERS[f"{kind}/ids"], ANSWERS[f"{kind}/more"]
    n = known.shape[1]
    np.testing.assert_array_equal(prompt.ids[0, :n], known[0])
    assert prompt.mask.sum() == n
    longer = model.preprocessing.answered(prompt, more.astype(np.int32), np.zeros(4, bool))
    np.testing.assert_allclose(model.logits(longer)[:, : n + 4], ANSWERS[f"{kind}/logits"], atol=3e-5)
    model = tm.Model(model.module.clone(end=()), model.params, model.preprocessing, None, kind)
    written = tm.models.generate(model, prompt, 8)
    np.testing.assert_array_equal(written.ids[0, n : n + 8], ANSWERS[f"{kind}/greedy"])
