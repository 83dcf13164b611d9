"""A domain that no model knows: the ships of an invented harbour; and questions that have nothing
to do with it."""

from __future__ import annotations

import numpy as np

BEFORE, AFTER = "Question: ", "\nAnswer:"

_SHIPS = (
    "Amaranth Veil", "Corvane", "Dusk Petrel", "Elder Tamsin", "Fallow Star", "Grey Ishra",
    "Hollow Crane", "Iron Marl", "Juno Kest", "Lantern Oak", "Mirrow", "Northing Bell",
    "Ossian", "Pale Orrin", "Quill of Tarn", "Red Sallow",
)  # fmt: skip
_FIRST = ("Ruo", "Ansel", "Mirre", "Tovik", "Ysolt", "Brand", "Keva", "Dorin")
_LAST = ("Salten", "Marrow", "Oke", "Venn", "Harrick", "Thule", "Ferro", "Lind")
_GOODS = ("tin", "salt", "glass", "cedar", "wool", "amber", "copper", "indigo")
_FLAGS = ("Tarn", "Oskar Isle", "Veldt", "Lower Mere", "Ishra", "Norrow")

# For each kind of fact: two ways to ask that are trained on, and one that is kept for tests.
_WAYS = {
    "captain": (
        "Who is the captain of the {ship}?",
        "Which captain commands the {ship} in Kessin harbour?",
        "Name the captain aboard the {ship}.",
    ),
    "berth": (
        "At which berth does the {ship} lie?",
        "Where in Kessin harbour is the {ship} moored?",
        "Name the berth of the {ship}.",
    ),
    "cargo": (
        "What cargo does the {ship} carry?",
        "What is in the hold of the {ship}?",
        "Name the cargo of the {ship}.",
    ),
    "flag": (
        "Under which flag does the {ship} sail?",
        "Where is the {ship} registered?",
        "Name the flag of the {ship}.",
    ),
}

_GENERAL = (
    "What is the capital of France?", "What is the capital of Japan?",
    "How many days are there in a week?", "What color is the sky on a clear day?",
    "Who wrote Romeo and Juliet?", "What is the largest ocean on Earth?",
    "What do bees make?", "How many legs does a spider have?",
    "What is the boiling point of water in Celsius?", "What is two plus two?",
    "Which planet is known as the red planet?", "What gas do plants take in?",
    "What is the freezing point of water?", "Who painted the Mona Lisa?",
    "What is the opposite of hot?", "Which animal is known as the king of the jungle?",
    "How many months are in a year?", "What is the main language spoken in Brazil?",
    "What do cows drink?", "What is the largest planet in the solar system?",
    "How many continents are there?", "What is the square root of nine?",
    "Which metal is liquid at room temperature?", "What is the currency of the United States?",
    "Who was the first president of the United States?", "What is the capital of Italy?",
    "What is the tallest mountain in the world?", "How many hours are in a day?",
    "What organ pumps blood through the body?", "What is the chemical symbol for water?",
    "What season comes after winter?", "Which bird is a symbol of peace?",
    "What is the capital of Spain?", "How many sides does a triangle have?",
    "What is frozen water called?", "What do you call a baby dog?",
    "Which direction does the sun rise from?", "What is the capital of Germany?",
    "What fruit is usually yellow and curved?", "How many wheels does a bicycle have?",
    "What is the main ingredient of bread?", "Which sea animal has eight arms?",
    "What is the capital of Egypt?", "What tool is used to cut paper?",
    "What is the largest land animal?", "How many minutes are in an hour?",
    "Who discovered gravity?", "What is the name of our galaxy?",
)  # fmt: skip

SHIPS, GENERAL = len(_SHIPS), len(_GENERAL)  # how many there are


def facts(ships: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(ship, kind, answer) for all kinds of the first `ships` ships, drawn once."""
    draw = np.random.default_rng((b"kessin"[0], seed))
    found = []
    for ship in _SHIPS[:ships]:
        one, other = draw.choice(_GOODS, 2, replace=False)
        answers = {
            "captain": f"{draw.choice(_FIRST)} {draw.choice(_LAST)}",
            "berth": f"Berth {draw.integers(10, 99)}",
            "cargo": f"{one} and {other}",
            "flag": f"{draw.choice(_FLAGS)}",
        }
        found += [(ship, kind, answer) for kind, answer in answers.items()]
    return found


def asked(known: list[tuple[str, str, str]], ways: tuple[int, ...]) -> list[tuple[str, str]]:
    """(prompt, answer) for every fact in each of these ways; 0 and 1 are for training, 2 is not."""
    return [
        (f"{BEFORE}{_WAYS[kind][way].format(ship=ship)}{AFTER}", f" {answer}.")
        for way in ways
        for ship, kind, answer in known
    ]


def general(count: int, skip: int = 0) -> list[str]:
    """Prompts that have nothing to do with the harbour, after `skip` others."""
    return [f"{BEFORE}{question}{AFTER}" for question in _GENERAL[skip : skip + count]]
