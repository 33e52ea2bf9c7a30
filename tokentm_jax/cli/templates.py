"""Pages from templates of `cli/pages`, in the look of `cli/page`. Without the template library, the import raises
InputError."""

from typing import Any

from tokentm_jax.errors import require
from tokentm_jax.files import generator

jinja2 = require("jinja2", "report", "a page")
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.ChoiceLoader([jinja2.PackageLoader("tokentm_jax.cli", name) for name in ("pages", "page")]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}


def render(template: str, question: str = "", **values: Any) -> str:
    """The page that a template makes of the values, which it may use with the package's `version`, and with the
    `generator` by which `files.question_in` knows it."""
    from tokentm_jax import __version__

    return _ENVIRONMENT.get_template(template).render(version=__version__, generator=generator(question), **values)
