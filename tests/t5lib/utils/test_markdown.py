"""What a command writes into a page leaves the words of people as they are."""

from t5lib.utils.markdown import write_page


def test_a_new_page_is_what_was_made(tmp_path):
    write_page(tmp_path / "page.md", "# title\n\n| a |\n")
    assert (tmp_path / "page.md").read_text() == "# title\n\n| a |\n"
    write_page(tmp_path / "page.md", "# title\n\n| b |\n")
    assert (tmp_path / "page.md").read_text() == "# title\n\n| b |\n"


def test_of_a_page_of_people_only_the_marked_part_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A question\n\nAn answer.\n\n<!-- made -->\n<!-- /made -->\n\nLimits.\n")
    for made in ("| a |", "| \\1 |"):
        write_page(page, f"# title\n\n{made}\n")
        expected = f"# A question\n\nAn answer.\n\n<!-- made -->\n\n{made}\n\n<!-- /made -->\n\nLimits.\n"
        assert page.read_text() == expected
