"""A question as a model's chat template, which comes with its tokenizer, has it."""

from pathlib import Path
from typing import Any

from tokentm_jax.errors import InputError, require
from tokentm_jax.files import reason
from tokentm_jax.inputs.words import LARGEST_TEXT


def as_chat(template: str, prompt: str, file: Path) -> str:
    """The text of a chat with one message of a user, up to where the answer begins.

    Args:
      template: in Jinja, as `transformers` has them. It is untrusted: it runs in a sandbox, where it can multiply
        nothing, and its text has at most 1,000,000 characters.
      prompt: the message.
      file: that the error names.

    Returns:
      The text, without marks that begin a text, which the tokenizer puts in front.

    Raises:
      InputError: a template that fails, or that is too long; without the extra.
    """
    require("jinja2", "text", "a chat template")
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            raise SecurityError(f"a template may not use {operator!r}")

    def refuse(message: object) -> None:
        raise InputError(f"{file}: its chat template says: {message!s:.200}")

    values = {"messages": [{"role": "user", "content": prompt}], "add_generation_prompt": True}
    values |= {"bos_token": "", "eos_token": "", "tools": None, "raise_exception": refuse}
    found, size = [], 0
    try:
        for part in Sandbox(trim_blocks=True, lstrip_blocks=True).from_string(template).generate(values):
            found.append(part)
            if (size := size + len(part)) > LARGEST_TEXT:
                raise InputError(f"{file}: its chat template makes more than {LARGEST_TEXT} characters")
    except InputError:
        raise
    except Exception as error:  # templates raise anything
        raise InputError(f"{file}: its chat template cannot be used ({reason(error)})") from None
    return "".join(found)
