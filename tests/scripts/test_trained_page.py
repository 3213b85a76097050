"""The masks drawn in docs/what_is_trained.md are what the program says."""

from helpers.public import load_script

TRAINED = load_script("trained_page")


def test_the_page_shows_what_data_check_draws():
    assert TRAINED.PAGE.read_text() == TRAINED.page(), "run scripts/trained_page --write"
