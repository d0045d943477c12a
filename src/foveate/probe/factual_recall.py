"""Factual recall: well-known facts about countries, asked for by a sentence that stops before the answer.

For the heads of "Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models".
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from foveate.core.errors import BadParameter
from foveate.core.params import bounded, check_bounds
from foveate.probe.distinct import distinct
from foveate.tasks.examples import Example

__all__ = ["FACTS", "FactualRecall"]

CHOICES = 4

# Every country is one token, with its space, in the vocabularies of GPT-2 and SmolLM2, so that a prompt and its
# corrupted form align. Countries with two common answers are left out of a relation.
FACTS: dict[str, dict[str, str]] = {
    "capital": {
        "Argentina": "Buenos Aires",
        "Austria": "Vienna",
        "Belgium": "Brussels",
        "Canada": "Ottawa",
        "Chile": "Santiago",
        "China": "Beijing",
        "Cuba": "Havana",
        "Denmark": "Copenhagen",
        "Egypt": "Cairo",
        "Finland": "Helsinki",
        "France": "Paris",
        "Germany": "Berlin",
        "Greece": "Athens",
        "Hungary": "Budapest",
        "Iran": "Tehran",
        "Iraq": "Baghdad",
        "Ireland": "Dublin",
        "Italy": "Rome",
        "Japan": "Tokyo",
        "Kenya": "Nairobi",
        "Lebanon": "Beirut",
        "Nepal": "Kathmandu",
        "Norway": "Oslo",
        "Peru": "Lima",
        "Poland": "Warsaw",
        "Portugal": "Lisbon",
        "Romania": "Bucharest",
        "Russia": "Moscow",
        "Spain": "Madrid",
        "Sweden": "Stockholm",
        "Syria": "Damascus",
        "Thailand": "Bangkok",
        "Turkey": "Ankara",
        "Vietnam": "Hanoi",
    },
    "language": {
        "Argentina": "Spanish",
        "Australia": "English",
        "Austria": "German",
        "Brazil": "Portuguese",
        "Bulgaria": "Bulgarian",
        "Chile": "Spanish",
        "China": "Chinese",
        "Colombia": "Spanish",
        "Cuba": "Spanish",
        "Denmark": "Danish",
        "Egypt": "Arabic",
        "France": "French",
        "Germany": "German",
        "Greece": "Greek",
        "Hungary": "Hungarian",
        "Iran": "Persian",
        "Israel": "Hebrew",
        "Italy": "Italian",
        "Japan": "Japanese",
        "Libya": "Arabic",
        "Mexico": "Spanish",
        "Poland": "Polish",
        "Portugal": "Portuguese",
        "Romania": "Romanian",
        "Russia": "Russian",
        "Spain": "Spanish",
        "Sweden": "Swedish",
        "Syria": "Arabic",
        "Thailand": "Thai",
        "Turkey": "Turkish",
        "Venezuela": "Spanish",
        "Vietnam": "Vietnamese",
    },
    "currency": {
        "Argentina": "peso",
        "Australia": "dollar",
        "Austria": "euro",
        "Brazil": "real",
        "Canada": "dollar",
        "Chile": "peso",
        "China": "yuan",
        "Colombia": "peso",
        "Denmark": "krone",
        "Egypt": "pound",
        "Finland": "euro",
        "France": "euro",
        "Germany": "euro",
        "Greece": "euro",
        "India": "rupee",
        "Iran": "rial",
        "Iraq": "dinar",
        "Israel": "shekel",
        "Italy": "euro",
        "Japan": "yen",
        "Mexico": "peso",
        "Nepal": "rupee",
        "Norway": "krone",
        "Pakistan": "rupee",
        "Poland": "zloty",
        "Portugal": "euro",
        "Russia": "ruble",
        "Spain": "euro",
        "Switzerland": "franc",
        "Syria": "pound",
        "Thailand": "baht",
        "Turkey": "lira",
        "Vietnam": "dong",
    },
    "continent": {
        "Argentina": "South America",
        "Austria": "Europe",
        "Bangladesh": "Asia",
        "Belgium": "Europe",
        "Bolivia": "South America",
        "Brazil": "South America",
        "Cambodia": "Asia",
        "Canada": "North America",
        "Chile": "South America",
        "China": "Asia",
        "Colombia": "South America",
        "Ecuador": "South America",
        "Ethiopia": "Africa",
        "France": "Europe",
        "Germany": "Europe",
        "Ghana": "Africa",
        "India": "Asia",
        "Italy": "Europe",
        "Japan": "Asia",
        "Kenya": "Africa",
        "Libya": "Africa",
        "Mexico": "North America",
        "Morocco": "Africa",
        "Nepal": "Asia",
        "Nigeria": "Africa",
        "Norway": "Europe",
        "Peru": "South America",
        "Poland": "Europe",
        "Portugal": "Europe",
        "Thailand": "Asia",
        "Uganda": "Africa",
        "Venezuela": "South America",
        "Vietnam": "Asia",
    },
}
"""What is asked: by relation, each country's answer."""
TEMPLATES = {
    "capital": ("The capital of {country} is", "The capital city of {country} is"),
    "language": ("The main language of {country} is", "Most people in {country} speak"),
    "currency": ("The currency of {country} is the", "In {country}, people pay with the"),
    "continent": ("The continent of {country} is", "The country of {country} is located in"),
}


@dataclass(frozen=True)
class FactualRecall:
    """Asks for a fact about a country.

    The choices are four answers of the same relation. The corrupted prompt names another country, whose answer is the
    next choice after the answer (the first after the last).

    Args:
        relations: What to ask for: capital, language, currency, continent; the examples take turns.
        shots: Sentences with their answers before the question, of the same relation and about other countries.

    Example:
        >>> from foveate.probe import FactualRecall
        >>> example = FactualRecall(relations=("capital",)).examples(1)[0]
        >>> example.prompt, example.choices[example.answer], example.corrupted
        ('The capital city of Germany is', ' Berlin', 'The capital city of Romania is')
    """

    relations: tuple[str, ...] = tuple(FACTS)
    shots: int = bounded(0, 0, 8)

    def __post_init__(self) -> None:
        check_bounds(self)
        known = isinstance(self.relations, tuple) and all(r in FACTS for r in self.relations)
        if not known or not self.relations or len(set(self.relations)) < len(self.relations):
            raise BadParameter(
                f"FactualRecall(relations={self.relations!r}): relations must be a tuple of one or more of "
                + ", ".join(repr(r) for r in FACTS)
                + ", each once"
            )

    def examples(self, count: int, seed: int = 0) -> tuple[Example, ...]:
        """Makes `count` different prompts; the same seed gives the same prompts."""
        return distinct(
            "factual_recall", count, seed, self.draw, lambda e: e.prompt, "name more relations, or set shots"
        )

    def draw(self, rng: random.Random, number: int) -> Example:
        """The example of a number, which says the relation and the place of the answer among the choices."""
        relation = self.relations[number // CHOICES % len(self.relations)]
        facts = FACTS[relation]
        template = rng.choice(TEMPLATES[relation])
        country = rng.choice(list(facts))
        rest = sorted(set(facts.values()) - {facts[country]})
        # In a ring that starts with the answer, the corrupted prompt's answer comes second.
        ring = [facts[country], *rng.sample(rest, CHOICES - 1)]
        other = rng.choice([c for c in facts if facts[c] == ring[1]])
        answer = number % CHOICES
        choices = tuple(f" {ring[(i - answer) % CHOICES]}" for i in range(CHOICES))
        shown = rng.sample([c for c in facts if c not in (country, other)], self.shots)
        head = "".join(f"{template.format(country=c)} {facts[c]}.\n" for c in shown)
        return Example(head + template.format(country=country), choices, answer, head + template.format(country=other))
