"""Captions of emoji scenes: what a scene is, the English for it, and every caption there is.

A scene is one emoji, one to four copies of it, on one of eight backgrounds. Four phrasings say it:

    two red apples on a blue background          blue background with two red apples
    two red apples, blue background              a picture of two red apples on blue

The English is mechanical (a plural for every name, "a bread"), but always in the same way.
"""

import unicodedata

# Names and RGB of the backgrounds, far apart, so that the mean colour of a picture's border tells which one it is.
COLOURS = {
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "red": (215, 50, 45),
    "yellow": (250, 215, 60),
    "green": (60, 160, 75),
    "blue": (55, 100, 215),
    "pink": (245, 160, 200),
}
COUNTS = ("one", "two", "three", "four")
PHRASINGS = (
    "{things} on a {colour} background",
    "{things}, {colour} background",
    "{colour} background with {things}",
    "a picture of {things} on {colour}",
)
IRREGULAR = {
    "leaf": "leaves",
    "knife": "knives",
    "mouse": "mice",
    "wolf": "wolves",
    "ox": "oxen",
    "die": "dice",
    **{word: f"{word}es" for word in ("tomato", "potato", "mosquito", "mango")},
    **{word: word for word in ("deer", "bison", "shrimp", "squid", "rhinoceros", "arts")},
}
AFTER_HEAD = (" with ", " of ", " in ", " on ", " without ", " fluttering ")


def plain(name: str) -> str:
    """A Unicode name in lower-case ASCII words: "piñata" -> "pinata", "T-Rex" -> "t rex"."""
    ascii_only = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join(ascii_only.lower().replace("-", " ").replace(".", "").split())


def is_plural(name: str) -> bool:
    """Whether a name means several things already ("grapes", "french fries")."""
    word = _head(name)[0].split()[-1]
    return word.endswith("s") and not word.endswith(("ss", "us", "os", "is"))


def plural(name: str) -> str:
    """Plural of a plain name: its head noun, before "with", "of" ..., takes the ending: "ears of corn"."""
    head, rest = _head(name)
    *before, word = head.split()
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith(("ss", "us", "x", "ch", "sh")) and not word.endswith("fish"):
        word += "es"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ies"
    elif not word.endswith(("s", "fish")):
        word += "s"
    return " ".join([*before, word]) + rest


def things(name: str, count: int, article: bool) -> str:
    """The subject of a caption: "a red apple" or "one red apple", "two red apples"."""
    if count > 1:
        return f"{COUNTS[count - 1]} {plural(name)}"
    if not article:
        return f"one {name}"
    return name if is_plural(name) else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(name: str, count: int, colour: str, phrasing: int) -> str:
    """The caption of `count` (1 to 4) copies of an emoji on `colour`, in one of the phrasings 0 to 3.

    A single copy is "one ..." in phrasing 1 and 2 and has an article in the others.
    """
    subject = things(name, count, article=phrasing in (0, 3))
    return PHRASINGS[phrasing].format(things=subject, colour=colour)


def every_caption(names: list[str]) -> list[str]:
    """All captions in the order of `caption_index`; the empty one, which stands for no condition, comes last."""
    return [
        caption(name, count, colour, phrasing)
        for name in names
        for count in range(1, len(COUNTS) + 1)
        for colour in COLOURS
        for phrasing in range(len(PHRASINGS))
    ] + [""]


def caption_index(emoji, count, colour, phrasing):
    """Where a scene's caption stands in `every_caption`; numbers or tensors, `count` from 1, the others from 0."""
    return ((emoji * len(COUNTS) + count - 1) * len(COLOURS) + colour) * len(PHRASINGS) + phrasing


def _head(name: str) -> tuple[str, str]:
    cut = min((at for at in map(name.find, AFTER_HEAD) if at >= 0), default=len(name))
    return name[:cut], name[cut:]
