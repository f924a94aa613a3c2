"""Passages and questions of our own, for RULER's two QA tasks where SQuAD and HotpotQA are not at hand.

Every place, river and person is invented and put together from syllables by a fixed seed, so no model
knows an answer from elsewhere. Scores on them are not comparable with scores on the real data sets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

NUM_REGIONS = 100
TOWNS_OF_A_REGION = 12
NUM_PEOPLE = 400
NUM_DISTRACTORS = 8

_STARTS = "Bar Cal Dor El Fen Gar Hol Ist Jor Kel Lom Mar Nor Ost Pel Quin Ros Sel Tor Ul Var Wes Yar Zan"
_ENDS = {
    "region": "land mark moor shire vale wold",
    "town": "bury dale ford grad holm mere mouth ness port stead vik wick",
    "river": "dris len mo na pel ra sk strom ta th ver wyn",
    "first": "bel dan lia min nor ric sa tha vin",
    "last": "berg croft dotter feld gard hart hull lund man quist son stone",
}
_CRAFTS = (
    "bells",
    "clocks",
    "gloves",
    "ink",
    "kites",
    "lanterns",
    "maps",
    "paper",
    "rope",
    "salt",
    "violins",
)
_SIGHTS = ("a glass bridge", "a round chapel", "a stone windmill", "an old observatory", "a sunken garden")
_TRADES = ("a botanist", "a cartographer", "a composer", "a diver", "an engineer", "a painter", "a surgeon")
_FEATS = (
    "charted the northern reefs",
    "wrote twelve plays",
    "designed a folding telescope",
    "bred a blue rose",
    "crossed the salt desert on foot",
)


def _names(rng: random.Random, kind: str) -> Iterator[str]:
    """Names of that kind at random, none of them twice."""
    names = [
        start + vowel + end for start in _STARTS.split() for vowel in "aeiou" for end in _ENDS[kind].split()
    ]
    rng.shuffle(names)
    yield from names


def _towns() -> list[dict[str, str]]:
    rng = random.Random("towns")
    regions, towns, rivers, founders = (_names(rng, kind) for kind in ("region", "town", "river", "last"))
    return [
        {
            "region": region,
            "name": next(towns),
            "river": next(rivers),
            "founder": next(founders),
            "year": str(rng.randint(1105, 1899)),
            "people": f"{rng.randint(12, 980)},{rng.randint(0, 999):03}",
            "craft": rng.choice(_CRAFTS),
            "sight": rng.choice(_SIGHTS),
        }
        for region in (next(regions) for _ in range(NUM_REGIONS))
        for _ in range(TOWNS_OF_A_REGION)
    ]


def _people(towns: list[dict[str, str]]) -> list[dict[str, str]]:
    rng = random.Random("people")
    first, last = _names(rng, "first"), _names(rng, "last")
    return [
        {
            "name": f"{next(first)} {next(last)}",
            "town": town["name"],
            "year": str(rng.randint(1801, 1969)),
            "trade": rng.choice(_TRADES),
            "feat": rng.choice(_FEATS),
        }
        for town in rng.sample(towns, NUM_PEOPLE)
    ]


def _about_town(town: dict[str, str]) -> list[str]:
    return [
        f"{town['name']} is a town in the region of {town['region']}, and home to {town['people']} people.",
        f" It was founded in {town['year']} by the merchant {town['founder']}, who had lost a wager.",
        f" The river {town['river']} runs through it, and floods the lower streets in most springs.",
        f" Its workshops are known for {town['craft']}, which are sold as far away as the coast.",
        f" Visitors come to see {town['sight']}, although the road up to it is closed in winter.",
    ]


def _about_person(person: dict[str, str]) -> list[str]:
    return [
        f"{person['name']} was {person['trade']}, born in {person['town']} in {person['year']}.",
        " The family moved often, and little is known of the early years.",
        f" Later, {person['name']} {person['feat']}, and is remembered for it.",
    ]


# A question about a town, the fact that answers it; {} stands for the town.
_QUESTIONS = (
    ("Which river runs through {}?", "river"),
    ("In which year was {} founded?", "year"),
    ("Who founded {}?", "founder"),
    ("How many people live in {}?", "people"),
    ("What are the workshops of {} known for?", "craft"),
)


def squad_like() -> dict[str, Any]:
    """1200 passages about towns with a question each, in the form of SQuAD's JSON; an article is a region."""
    towns = _towns()
    articles = []
    for start in range(0, len(towns), TOWNS_OF_A_REGION):
        paragraphs = []
        for number, town in enumerate(towns[start : start + TOWNS_OF_A_REGION], start):
            question, fact = _QUESTIONS[number % len(_QUESTIONS)]
            answers = [{"text": town[fact]}]
            asked = {"question": question.format(town["name"]), "answers": answers, "is_impossible": False}
            paragraphs.append({"context": "".join(_about_town(town)), "qas": [asked]})
        articles.append({"title": towns[start]["region"], "paragraphs": paragraphs})
    return {"data": articles}


def hotpotqa_like() -> list[dict[str, Any]]:
    """400 questions about the town where a person was born, in the form of HotpotQA's JSON.

    Of each question's ten passages two are needed: the person's, and the town's.
    """
    towns = _towns()
    people = _people(towns)
    by_name = {town["name"]: town for town in towns}
    rng = random.Random("hotpotqa")
    entries = []
    for number, person in enumerate(people):
        town = by_name[person["town"]]
        question, fact = _QUESTIONS[number % len(_QUESTIONS)]
        others = [other for other in people if other is not person]
        passages = [(person["name"], _about_person(person)), (town["name"], _about_town(town))]
        for other in rng.sample(others, NUM_DISTRACTORS // 2):
            home = by_name[other["town"]]
            passages += [(other["name"], _about_person(other)), (home["name"], _about_town(home))]
        rng.shuffle(passages)
        entries.append(
            {
                "question": question.format(f"the town where {person['name']} was born"),
                "answer": town[fact],
                "context": [[title, sentences] for title, sentences in passages],
            }
        )
    return entries
