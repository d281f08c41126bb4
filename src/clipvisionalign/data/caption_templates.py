"""Templates that make captions of class names: "a photo of a {}." of "dog" is "a photo of a dog."."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.text_files import decode, split_lines

#: What stands for the name of a class.
PLACEHOLDER = "{}"

#: The template of CLIP (Radford et al., arXiv:2103.00020, section 3.1.4), and of the captions of class folders.
DEFAULT_TEMPLATE = "a photo of a {}."

#: The template of SigLIP's model cards, in small letters as its tokenizers have them.
SIGLIP_TEMPLATE = "this is a photo of {}."

#: The model's own template, by the name that `--templates` takes.
OWN = "own"

#: Sets of templates of the package open_clip, by the names that `--templates` takes, with its name for each.
TEMPLATE_SETS = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def fill_template(template: str, class_name: str) -> str:
    """Return the caption that a template makes of the name of a class.

    Args:
        template: A template with one `{}`.
        class_name: The name.

    Returns:
        The caption.

    >>> fill_template("a photo of a {}.", "dog")
    'a photo of a dog.'
    """
    return template.replace(PLACEHOLDER, class_name)


def read_templates(source: str) -> list[str]:
    """Read templates by name or from a file.

    Args:
        source: A name from `TEMPLATE_SETS`, or a text file with a template in each line; empty lines are ignored.

    Returns:
        The templates, each with one `{}`.

    Raises:
        DataError: No such file, no template in it, or a line that is none: it has no `{}`, or is there twice.
        ModuleNotFoundError: A set by name without the package open_clip.
    """
    if source in TEMPLATE_SETS:
        import open_clip

        return [template(PLACEHOLDER) for template in getattr(open_clip, TEMPLATE_SETS[source])]
    path = Path(source)
    if not path.is_file():
        sets = ", ".join([OWN, *TEMPLATE_SETS])
        raise DataError(f"--templates {source}: no such file, and none of {sets}")
    lines = {
        number: line.strip()
        for number, line in enumerate(split_lines(decode(path.read_bytes()).text), 1)
        if line.strip()
    }
    if not lines:
        raise DataError(f"{path}: no template in it; a line is one, such as: {DEFAULT_TEMPLATE}")
    check_templates(list(lines.values()), [f"{path}, line {number}" for number in lines])
    return list(lines.values())


def check_templates(templates: Sequence[str], locations: Sequence[str] = ()) -> None:
    """Check that each template has one place for the name of a class, and none is there twice.

    Args:
        templates: The templates.
        locations: Where each of them was read, for the message; by default its number.

    Raises:
        DataError: One of them does not.
    """
    where = list(locations) or [f"template {number}" for number in range(1, len(templates) + 1)]
    first_location: dict[str, str] = {}
    for template, location in zip(templates, where, strict=True):
        count = template.count(PLACEHOLDER)
        if count != 1 or set(template.replace(PLACEHOLDER, "")) & set("{}"):
            reason = f"{count} times {PLACEHOLDER}" if count != 1 else "another brace"
            raise DataError(
                f"{location}: '{template[:60]}' has {reason}: a template has one {PLACEHOLDER} where the name of the "
                f"class stands, such as: {DEFAULT_TEMPLATE}"
            )
        if (previous := first_location.setdefault(template, location)) != location:
            raise DataError(f"{location}: '{template[:60]}' is {previous} again: it would count twice; remove one")
