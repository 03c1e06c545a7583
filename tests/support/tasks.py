"""Documents in the form of HellaSwag and LAMBADA, written for the tests."""

import json
from pathlib import Path

ACTIVITIES = [
    ("Washing", "A woman fills the sink with water.", "she", ["dries a plate.", "sings.", "runs to a bus.", "is"]),
    ("Painting", "A boy holds a brush.", "the boy", ["dips it into paint.", "eats it.", "flies.", "swims home."]),
    ("Baking", "[header] How to bake bread [title] Mix flour and water [step] Use a bowl.", "",
     ["[substeps] Stir  it well.", "Drive north [title] Sleep.", "Count to ten.", "Sell the bowl."]),
    ("Rowing", "Two men sit in a boat. ", "they", ["pull the oars.", "peel onions.", "knit.", "paint it red."]),
    ("Reading", "A girl opens a book.", "the girl", ["turns a page.", "plants it.", "boils it.", "wears it."]),
]  # fmt: skip
PASSAGES = [
    "Anna gave Ben the key, and at the gate she asked him again for the key",
    "They packed bread and cheese, and at noon they ate the bread",
    "The cat slept on the mat. Nobody dared to wake the cat",
    "First came the rain, then the wind, and after the wind more rain",
    "word after word after word,  and then a word",
]


def write_lines(path: Path, documents: list) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def hellaswag_documents(labels=(0, "1", 2, 0, 3)) -> list[dict]:
    """Return five items; labels are numbers or texts, as in the file of its authors and on the Hub."""
    return [
        {
            "activity_label": activity,
            "ctx_a": first,
            "ctx_b": second,
            "ctx": f"{first} {second}".strip(),
            "endings": endings,
            "label": label,
        }
        for (activity, first, second, endings), label in zip(ACTIVITIES, labels, strict=True)
    ]


def write_hellaswag(path: Path) -> Path:
    return write_lines(path, hellaswag_documents())


def write_lambada(path: Path) -> Path:
    return write_lines(path, [{"text": text} for text in PASSAGES])
