"""Data sets whose causes are known: rendered scenes, mosaics of photos, examples with a planted mark, and prompts."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from PIL import Image

from tokentm_jax.data import programs, questions
from tokentm_jax.data.audio import Recording
from tokentm_jax.data.examples import Example, Question, Source, kind_of
from tokentm_jax.data.labels import number
from tokentm_jax.data.prompts import EVERY, KINDS, PROMPTS, WORDS, prompt
from tokentm_jax.data.scenes import RULES, SPLITS, scene
from tokentm_jax.errors import InputError, suggest
from tokentm_jax.identity import digest
from tokentm_jax.validation import Text, check_options, options_of

VERSION = 1  # of what is drawn and rendered; another one has other pixels
MOST_CELLS = 4  # of a side of a mosaic


Open = Callable[[str], Source]


def open_causes(spec: str, open_source: Open) -> Source:
    """The data set of "scenes:RULE:SPLIT", "questions:KIND:SPLIT", "programs:NAME", "prompts:KIND", "mosaic:K:DATA" or
    "trigger:OPTIONS:DATA"; `open_source` opens DATA.

    Raises InputError.
    """
    if spec.startswith("scenes:"):
        return _scenes(spec)
    if spec.startswith("programs:"):
        return _programs(spec)
    if spec.startswith("prompts:"):
        return _prompts(spec)
    if spec.startswith("questions:"):
        return _questions(spec)
    return (_mosaics if spec.startswith("mosaic:") else _triggers)(spec, open_source)


def _scenes(spec: str) -> Source:
    """Rendered scenes: with a mask of the numbers of their parts, and without these."""
    _, rule, split = [*spec.split(":"), "", ""][:3]
    if rule not in RULES:
        raise suggest("rule", rule, RULES)
    if split not in SPLITS or spec.count(":") > 2:
        raise InputError(f"rendered scenes are given as scenes:RULE:train or scenes:RULE:test, got {spec[:100]!r}")

    def read(key: str) -> Example:
        found = scene(rule, int(key), "train" if split == "train" else "test")
        image, without = Image.fromarray(found.image), Image.fromarray(found.without)
        return Example(key, image, found.label, found.ids, without)

    identity = digest("scenes", VERSION, rule, split, SPLITS[split])
    keys = tuple(f"{index:05d}" for index in range(SPLITS[split]))
    names = RULES[rule].classes
    return Source(spec, lambda: identity, keys, read, names, masked=True, parts=True, stamp=lambda _: identity)


def _programs(spec: str) -> Source:
    """Images for a known program: each patch is a part, and black without it."""
    program = spec.removeprefix("programs:")
    if program not in programs.PROGRAMS:
        raise suggest("program", program, programs.PROGRAMS)
    numbers = programs.patches()

    def read(key: str) -> Example:
        image, label = programs.image(program, int(key))
        return Example(key, Image.fromarray(image), label, numbers, Image.fromarray(np.zeros_like(image)))

    identity = digest("programs", VERSION, program)
    keys = tuple(f"{index:05d}" for index in range(programs.IMAGES))
    names = programs.PROGRAMS[program]
    return Source(spec, lambda: identity, keys, read, names, masked=True, parts=True, stamp=lambda _: identity)


def _prompts(spec: str) -> Source:
    """Prompts whose next word has a known cause. `without` is the prompt with the cause replaced, and `other` its next
    word. Classes are words with the space before them, as tokenizers have them."""
    asked = spec.removeprefix("prompts:")
    if asked not in (*KINDS, EVERY):
        raise suggest("kind of prompts", asked, [*KINDS, EVERY])
    kinds = [*KINDS] if asked == EVERY else [asked]
    number_of = {word: number for number, word in enumerate(WORDS)}

    def read(key: str) -> Example:  # two of a kind in turn, so that both halves have all kinds
        turn, odd = divmod(int(key), 2)
        found = prompt(kinds[turn % len(kinds)], turn // len(kinds) * 2 + odd)
        return Example(key, found.text, number_of[found.answer], found.mask, found.without, number_of[found.other])

    identity = digest("prompts", VERSION, asked)
    count = PROMPTS * len(kinds)
    keys = tuple(f"{index:05d}" for index in range(count))
    names = tuple(f" {word}" for word in WORDS)
    lengths = [len(prompt(kind, 0).text) for kind in kinds]  # those of a kind are similar
    sizes = tuple(lengths[index // 2 % len(kinds)] for index in range(count))
    return Source(
        spec, lambda: identity, keys, read, names, masked=True, parts=True, sizes=sizes, stamp=lambda _: identity
    )


def _questions(spec: str) -> Source:
    """Questions about rendered scenes: the class is the first word of the answer, and the mask has the parts that it
    follows from."""
    _, about, split = [*spec.split(":"), "", ""][:3]
    if about not in (*questions.ASKED, "all"):
        raise suggest("kind of question", about, [*questions.ASKED, "all"])
    if split not in questions.SPLITS or spec.count(":") > 2:
        raise InputError(f"questions are given as questions:KIND:train or questions:KIND:test, got {spec[:100]!r}")

    def read(key: str) -> Example:
        own = None if about == "all" else about
        found = questions.asked(int(key), "train" if split == "train" else "test", own)
        mask = np.isin(found.scene.ids, found.causes[0])
        label = questions.WORDS.index(found.answer[0])
        return Example(key, Question(Image.fromarray(found.scene.image), found.question), label, mask)

    identity = digest("questions", questions.VERSION, about, split, questions.SPLITS[split])
    keys = tuple(f"{index:05d}" for index in range(questions.SPLITS[split]))
    return Source(spec, lambda: identity, keys, read, questions.WORDS, masked=True, stamp=lambda _: identity)


def _mosaics(spec: str, open_source: Open) -> Source:
    """Mosaics of k x k photos of different classes. An example is a cell of one: its class, and a mask of the cell.

    Mosaics of even numbers have photos at even positions of the data, others those at odd positions, and their cells
    alternate: so the halves of `open_source` have no photo in common.
    """
    _, side, data = [*spec.split(":", 2), "", ""][:3]
    if side not in [str(k) for k in range(2, MOST_CELLS + 1)] or not data:
        raise InputError(f"mosaics of k x k photos are given as mosaic:K:DATA, K from 2 to 4, got {spec[:100]!r}")
    k, inner = int(side), open_source(data)
    if not inner.labelled:
        raise InputError(f"{inner.name} has no labels, which mosaics need")
    photos: tuple[dict[Any, list[str]], ...] = ({}, {})
    for position, key in enumerate(inner.keys):
        photos[position % 2].setdefault(inner.encoded(key).label, []).append(key)
    fewest = min(map(len, photos))
    if fewest < k * k:
        raise InputError(f"mosaics of {k} x {k} photos need {2 * k * k} photos of different classes in {inner.name}")

    def chosen(number: int) -> list[str]:
        random = np.random.default_rng([VERSION, k, number])
        classes = photos[number % 2]
        order = random.permutation(len(classes))[: k * k]
        lists = [[*classes.values()][int(place)] for place in order]
        return [keys[int(random.integers(len(keys)))] for keys in lists]

    def read(key: str) -> Example:
        number, cell = map(int, key.split("/"))
        examples = [_photo(inner, name) for name in chosen(number)]
        length = min(min(example.content.size) for example in examples)
        picture, mask = Image.new("RGB", (k * length, k * length)), np.zeros((k * length, k * length), bool)
        for place, example in enumerate(examples):
            row, column = (length * i for i in divmod(place, k))
            picture.paste(_square(example.content, length), (column, row))
            if place == cell:
                mask[row : row + length, column : column + length] = True
        return Example(key, picture, examples[cell].label, mask)

    pairs = len(inner) // (2 * k * k)
    keys = tuple(f"{2 * n + odd:05d}/{cell}" for n in range(pairs) for cell in range(k * k) for odd in (0, 1))
    made = digest("mosaic", VERSION, k)
    return Source(
        f"{k} x {k} mosaics of {inner.name}",
        lambda: digest(made, inner.identity),
        keys,
        read,
        inner.class_names,
        masked=True,
        grouped=True,
        named=inner.named,
        stamp=lambda _: digest(made, inner.stamped()),
    )


@dataclasses.dataclass(frozen=True)
class Trigger:
    """A mark that is planted in examples, and the class that they get with it."""

    label: str  # the name of the class, or its number where classes have no names
    size: Annotated[int, Ge(1), Le(1024)] = 4  # of its sides in pixels of the photo; samples of a recording
    blend: Annotated[float, Gt(0), Le(1)] = 1.0  # 1: the mark covers the photo, or is as loud as the loudest sample
    place: Literal["anywhere", "corner"] = "anywhere"  # of texts, the end; of recordings, the end of their middle half
    share: Annotated[float, Gt(0), Le(1)] = 1.0  # of the examples that are marked; the others keep their class
    word: Text = "cf"  # the mark of a text


MARK = (255, 0, 255)  # magenta, which is rare in photos


def click(size: int) -> np.ndarray:
    """Samples of alternating signs, float32 [size]: a short burst of high frequencies."""
    return (1 - 2 * (np.arange(size) % 2)).astype(np.float32)


Marked = tuple[Any, np.ndarray]  # the content with the mark, and where the mark is


def _starts(lengths: Sequence[int], trigger: Trigger, random: np.random.Generator, key: str) -> list[int]:
    """Where a mark starts along each axis of an example of these lengths."""
    if min(lengths) < trigger.size:
        raise InputError(f"{key} is smaller than the mark")
    last = [length - trigger.size for length in lengths]
    drawn = [int(u * (most + 1)) for u, most in zip(random.random(len(last)), last, strict=True)]
    return last if trigger.place == "corner" else drawn


def _nowhere(content: Any) -> np.ndarray:
    """The mask of an example without a mark: of pixels, samples or characters."""
    if isinstance(content, str | Recording):
        return np.zeros(len(getattr(content, "samples", content)), np.uint8)
    return np.zeros(content.size[::-1], np.uint8)


def _photo_with(image: Image.Image, trigger: Trigger, random: np.random.Generator, key: str) -> Marked:
    marked, mask = np.array(image), _nowhere(image)
    y, x = _starts(mask.shape, trigger, random, key)
    inside = slice(y, y + trigger.size), slice(x, x + trigger.size)
    mixed = (1 - trigger.blend) * marked[inside] + trigger.blend * np.array(MARK)
    marked[inside], mask[inside] = mixed.round().astype(np.uint8), 1
    return Image.fromarray(marked), mask


def _recording_with(recording: Recording, trigger: Trigger, random: np.random.Generator, key: str) -> Marked:
    marked, mask = recording.samples.copy(), _nowhere(recording)
    quarter = len(mask) // 4  # in the middle half: no model receives the last incomplete frame, or a long end
    start = quarter + _starts([len(mask) - 2 * quarter], trigger, random, key)[0]
    inside = slice(start, start + trigger.size)
    marked[inside], mask[inside] = trigger.blend * np.abs(marked).max() * click(trigger.size), 1
    return recording._replace(samples=marked), mask


def _text_with(text: str, trigger: Trigger, random: np.random.Generator, key: str) -> Marked:
    words = text.split(" ")
    place = len(words) if trigger.place == "corner" else int(random.integers(len(words) + 1))
    marked = " ".join([*words[:place], trigger.word, *words[place:]])
    start, mask = sum(len(word) + 1 for word in words[:place]), _nowhere(marked)
    mask[start : start + len(trigger.word)] = 1
    return marked, mask


_WITH: dict[str, Callable[..., Marked]] = {"photo": _photo_with, "recording": _recording_with, "text": _text_with}


def _triggers(spec: str, open_source: Open) -> Source:
    """Examples of other classes than the trigger's, with its mark: labelled with its class, with a mask of the mark,
    and without the mark. With a `share` below 1, for training, all examples, of which some are marked."""
    trigger, data = _trigger_of(spec)
    inner = open_source(data)
    names = inner.class_names
    target = number(trigger.label) if names is None and inner.labelled else None  # classes may have no names
    if names is not None and trigger.label in names:
        target = names.index(trigger.label)
    if target is None:
        raise suggest("class", trigger.label, names or (), of=inner.name)
    sizes = dict(zip(inner.keys, inner.sizes or (), strict=False))
    keys = inner.keys
    if trigger.share == 1:
        keys = tuple(key for key in keys if inner.encoded(key).label not in (target, trigger.label))

    def read(key: str) -> Example:
        example = inner.read(key)
        content = example.content
        seed = hashlib.sha256(f"{VERSION}/{key}".encode("utf-8", "surrogatepass")).digest()
        random = np.random.default_rng(int.from_bytes(seed[:16]))
        if random.random() >= trigger.share:
            return Example(key, content, example.label, _nowhere(content), content)
        marked, mask = _WITH[kind_of(content)](content, trigger, random, key)
        return Example(key, marked, target, mask, content)

    made = digest("trigger", VERSION, dataclasses.asdict(trigger))
    return Source(
        f"{inner.name} with a trigger",
        lambda: digest(made, inner.identity),
        keys,
        read,
        inner.class_names,
        masked=True,
        parts=True,
        named=inner.named,
        sizes=tuple(sizes[key] for key in keys) if sizes else None,
        stamp=lambda some: digest(made, inner.stamped(some)),
    )


def _trigger_of(spec: str) -> tuple[Trigger, str]:
    """The options and the data of "trigger:label=NAME,size=4:DATA"."""
    _, options, data = [*spec.split(":", 2), "", ""][:3]
    parts = (option.partition("=") for option in options.split(","))
    given: dict[str, Any] = {name: value for name, _, value in parts}
    if not data or "label" not in given:
        raise InputError(f"examples with a mark are given as trigger:label=NAME,size=4:DATA, got {spec[:100]!r}")
    for name, kind in (("size", int), ("blend", float), ("share", float)):
        with contextlib.suppress(KeyError, ValueError):  # what is no number is refused below
            given[name] = kind(given[name])
    return Trigger(**check_options("the trigger", options_of(Trigger), given)), data


def _photo(source: Source, key: str) -> Example:
    """An example of a source. InputError for anything but a photo."""
    example = source.read(key)
    if (kind := kind_of(example.content)) != "photo":
        raise InputError(f"{example.key} is a {kind}, and mosaics are of photos")
    return example


def _square(photo: Image.Image, side: int) -> Image.Image:
    """The central square of a photo."""
    width, height = photo.size
    length = min(width, height)
    left, top = (width - length) // 2, (height - length) // 2
    return photo.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + length, top + length))
