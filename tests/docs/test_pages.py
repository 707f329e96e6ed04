"""What people read: no long sentence, no link that leads nowhere, every page in the contents of the site."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from imports import ROOT
from pages import READ, SITE

LONGEST = 32  # words of a sentence
CODE = re.compile(r"^ *```.*?^ *```|<!--.*?-->", re.MULTILINE | re.DOTALL)
NO_PROSE = re.compile(r"    |\||#|!\[|:::|=== ")  # what a line of code, a table, a heading or a picture begins with
ITEM = re.compile(r"^(?:[-*]|\d+\.) ")
END = re.compile(r"(?<=[.!?])[*_)\"”]*\s+(?=[^a-z\s])")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs and items of lists, each on one line."""
    lines: list[str] = []
    for line in [*CODE.sub("\n\n", text).splitlines(), ""]:
        ends = not line.strip() or NO_PROSE.match(line)
        if (ends or ITEM.match(line.strip())) and lines:
            yield " ".join(lines)
            lines = []
        if not ends:
            lines.append(ITEM.sub("", line.strip(), count=1))


def sentences(text: str) -> Iterator[str]:
    for paragraph in paragraphs(text):
        plain = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "`code`", paragraph))
        yield from END.split(plain)


def words(sentence: str) -> int:
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-") for heading in headings}


def test_sentences_are_told_apart_and_code_does_not_count():
    text = "Two are here, e.g. one of 3.5. Here `a b c` is one.\n\n    not counted\n\n- One [item](x.md)\n  goes on.\n"
    told = list(sentences(text))
    assert told == ["Two are here, e.g. one of 3.5.", "Here `code` is one.", "One [item] goes on."]
    assert [words(sentence) for sentence in told] == [7, 4, 4]


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_is_long(page):
    long = [f"{words(each)} words: {each}" for each in sentences(page.read_text()) if words(each) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_is_there(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_links_of_pages_stay_within_the_site():
    """The site is built from docs/ alone: other files are named, not linked."""
    for page in SITE:
        for link in LINK.findall(CODE.sub("", page.read_text())):
            inside = re.match(r"[a-z]+:|#", link) or (page.parent / link).resolve().is_relative_to(ROOT / "docs")
            assert inside, f"{page.relative_to(ROOT)}: {link}"


def test_every_page_is_in_the_contents_of_the_site():
    def named(entries) -> Iterator[str]:
        for entry in entries:
            for value in [entry] if isinstance(entry, str) else entry.values():
                yield from [value] if isinstance(value, str) else named(value)

    contents = list(named(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    assert sorted(contents) == [str(page.relative_to(ROOT / "docs")) for page in SITE]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
