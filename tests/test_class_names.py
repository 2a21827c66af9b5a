"""A class is called by its name or by a word that the name lists, in the data, the command and the service alike."""

import pytest

from distillers.cli.arguments import label_of
from distillers.data import open_data
from distillers.errors import BadInput
from distillers.models.class_names import class_number

IMAGENET = ["tench, Tinca tinca", "crane", "wading bird, crane", "crane, machine", "Crane"]


@pytest.mark.parametrize(
    ("called", "number"),
    [("tench", 0), ("Tinca tinca", 0), ("TINCA TINCA", 0), ("tench, Tinca tinca", 0), ("crane", 1), ("Crane", 4),
     ("wading bird", 2), ("wading bird, crane", 2), ("machine", 3), ("bird", None), ("", None)],
)  # fmt: skip
def test_a_class_has_its_name_and_its_words(called: str, number: int | None) -> None:
    assert class_number(called, IMAGENET) == number
    if number is not None:
        assert label_of(called, IMAGENET) == number


def test_numbers_and_names_of_the_command() -> None:
    assert label_of("3", IMAGENET) == 3 and label_of("3", ["3", "2", "1", "0"]) == 0
    for given in ("5", "bird"):
        with pytest.raises(BadInput, match="label: got"):
            label_of(given, IMAGENET)


def test_data_of_fixed_classes_keep_their_numbers() -> None:
    shapes = open_data("shapes", size=16)
    assert open_data("shapes", size=16, labels=shapes.labels[::-1]).labels == shapes.labels
