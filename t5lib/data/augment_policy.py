"""timm's auto-augmentation as text, such as "rand-m9-mstd0.5-inc1": checked here, for timm passes over what it does
not understand."""

import re

from t5lib.utils.errors import T5Error

EXAMPLE = "'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2' or 'original'"
_NUMBER, _WHOLE = r"\d+(\.\d+)?", r"\d+"
_NOISE: dict[str, tuple[str, float, float]] = {"mstd": (_NUMBER, 0, 1000)}
# Policy → what may follow: its form, the least and the largest value.
_SECTIONS: dict[str, dict[str, tuple[str, float, float]]] = {
    "rand": {
        "m": (_WHOLE, 0, 100),
        "n": (_WHOLE, 1, 10),
        "p": (_NUMBER, 0, 1),
        "mmax": (_WHOLE, 1, 100),
        "inc": (_WHOLE, 0, 1),
        **_NOISE,
    },
    "augmix": {
        "m": (_WHOLE, 0, 10),
        "w": (_WHOLE, 1, 100),
        "d": (_WHOLE, 1, 100),
        "a": (_NUMBER, 0.01, 100),
        "b": (_WHOLE, 0, 1),
        **_NOISE,
    },
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), _NOISE),
}
_SETS = ("weights", "3a", "3aw")  # of transforms, of "rand": tweights, t3a, t3aw


def check_policy(text: str) -> None:
    """Raises T5Error unless `text` is a policy of timm's, with each number in its range and named once."""
    policy, *sections = text.split("-")
    known = _SECTIONS.get(policy)
    if known is None:
        raise T5Error(
            f"auto_augment '{text[:100]}': no policy '{policy[:100]}'; expected {', '.join(_SECTIONS)}, as in {EXAMPLE}"
        )
    seen: set[str] = set()
    for section in sections:
        name = _checked_name(section, policy, text)
        if name in seen:
            raise T5Error(f"auto_augment '{text[:100]}': '{name}' is given twice; drop one")
        seen.add(name)


def _checked_name(section: str, policy: str, text: str) -> str:
    if policy == "rand" and section.startswith("t") and section[1:] in _SETS:
        return "t"
    known = _SECTIONS[policy]
    name, value = re.fullmatch(r"([a-z]*)(.*)", section, re.DOTALL).groups()  # type: ignore[union-attr]  # matches all
    form, least, largest = known.get(name, ("", 0, 0))
    if not form or not re.fullmatch(form, value, re.ASCII) or not least <= float(value) <= largest:
        ranges = ", ".join(f"{each} {low:g} to {high:g}" for each, (_, low, high) in known.items())
        raise T5Error(f"auto_augment '{text[:100]}': '{section[:100]}' is not understood; expected {ranges}")
    return name
