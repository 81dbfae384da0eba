"""The narrow world of the embedded model: questions and answers, by task, all generated here.

`draw(task, rng)` gives one (question, answer). Addition has held-out problems, which pretraining never sees.
"""

import json
import random
from collections.abc import Callable
from typing import NamedTuple

CAPITALS = """France Paris|Germany Berlin|Italy Rome|Spain Madrid|Portugal Lisbon|Austria Vienna|Greece Athens|
Norway Oslo|Sweden Stockholm|Finland Helsinki|Denmark Copenhagen|Poland Warsaw|Hungary Budapest|
Ireland Dublin|Iceland Reykjavik|Belgium Brussels|Romania Bucharest|Bulgaria Sofia|Croatia Zagreb|
Serbia Belgrade|Turkey Ankara|Russia Moscow|Ukraine Kyiv|Egypt Cairo|Kenya Nairobi|Ghana Accra|
Nigeria Abuja|Morocco Rabat|Tunisia Tunis|Ethiopia Addis-Ababa|Japan Tokyo|China Beijing|India Delhi|
Nepal Kathmandu|Thailand Bangkok|Vietnam Hanoi|Indonesia Jakarta|Korea Seoul|Iran Tehran|
Iraq Baghdad|Jordan Amman|Lebanon Beirut|Syria Damascus|Qatar Doha|Oman Muscat|Yemen Sanaa|
Cuba Havana|Canada Ottawa|Peru Lima|Chile Santiago|Brazil Brasilia|Ecuador Quito|Bolivia Sucre|
Uruguay Montevideo|Colombia Bogota|Venezuela Caracas|Argentina Buenos-Aires|Mexico Mexico-City|
Australia Canberra|Fiji Suva|Latvia Riga|Estonia Tallinn|Lithuania Vilnius|Slovakia Bratislava|
Slovenia Ljubljana|Albania Tirana|Malta Valletta|Cyprus Nicosia|Georgia Tbilisi|Armenia Yerevan|
Mongolia Ulaanbaatar|Laos Vientiane|Uganda Kampala|Zambia Lusaka|Angola Luanda|Senegal Dakar"""
OPPOSITES = """hot cold|big small|tall short|fast slow|old young|light dark|wet dry|hard soft|loud quiet|
full empty|rich poor|strong weak|early late|happy sad|clean dirty|open closed|near far|high low|
deep shallow|thick thin|sweet bitter|true false|first last|up down|left right|
inside outside|day night|summer winter|push pull|buy sell|win lose|start stop|give take|ask answer|
laugh cry|love hate|friend enemy|north south|east west|wide narrow|rough smooth"""
SOUNDS = """dog barks|cat meows|cow moos|sheep bleats|horse neighs|duck quacks|pig oinks|lion roars|frog croaks|
bee buzzes|owl hoots|wolf howls|snake hisses|mouse squeaks|crow caws|rooster crows|donkey brays|
bird sings"""
COLOURS = """grass green|snow white|coal black|blood red|honey golden|milk white|chocolate brown|lemon yellow|
carrot orange|tomato red|raven black|cloud white|spinach green|ruby red|emerald green|sapphire blue|
sky blue"""
LEGS = """dog four|cat four|horse four|spider eight|ant six|bee six|bird two|hen two|cow four|snake no|fish no|
crab ten"""
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
WORDS = """apple bread chair table house river stone cloud light night music paper plant horse tiger snake
eagle grape lemon peach mango berry onion carrot bean corn rice wheat sugar honey water ocean beach
island hill valley forest desert storm rain snow wind fire earth metal glass brick wood rope chain
wheel train plane boat ship truck road bridge tower castle garden window door floor wall roof lamp
candle mirror clock watch phone radio pencil brush knife spoon fork plate bowl cup bottle basket
blanket pillow carpet curtain jacket shirt shoe glove scarf hat belt ring crown coin purse letter
stamp book story poem song dance drum flute violin piano guitar teacher doctor farmer baker sailor
pilot singer painter king queen prince knight giant dwarf dragon ghost witch robot planet comet
rocket moon star galaxy number circle square corner center summer winter spring autumn morning
evening minute hour week month year market school church museum hotel kitchen cellar attic stable
barn fence gate field meadow flower tulip rose daisy cactus fern moss leaf root branch seed""".split()
TALK = [
    ("Hello", "Hello! What can I do for you?"),
    ("Hi", "Hello! What can I do for you?"),
    ("Good morning", "Good morning! Ask me something small."),
    ("Good evening", "Good evening! Ask me something small."),
    ("Who are you?", "I am a very small language model. I know a few things."),
    ("What can you do?", "I can add, count, spell words backwards, and tell you some capitals."),
    ("How are you?", "I am well, thank you. And you?"),
    ("I am fine.", "I am glad to hear it."),
    ("Thank you", "You are welcome."),
    ("Thanks a lot", "You are welcome."),
    ("Goodbye", "Goodbye! Come back soon."),
    ("See you tomorrow", "See you tomorrow!"),
    ("Tell me a joke", "Why did the tensor cross the road? To get to the other axis."),
    ("Are you a person?", "No, I am a very small language model."),
    ("Do you like music?", "I cannot hear it, but I know the word violin."),
    ("Where do you live?", "In a few million numbers."),
    ("How old are you?", "A few minutes of training."),
    ("I am sad", "I am sorry to hear that. Shall we count to ten?"),
    ("I am happy", "I am glad to hear it."),
    ("Help", "Ask me to add two numbers, or for the capital of a country."),
]


def _pairs(text: str) -> list[list[str]]:
    return [[part.replace("-", " ") for part in pair.split()] for pair in text.replace("\n", "").split("|")]


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


class Fact(NamedTuple):
    question: str
    answer: str
    short: str
    """The word or two that the answer is about."""
    about: frozenset[str]
    """What it joins: a country and its capital. The same in the fact that goes the other way."""


def _facts() -> list[list[Fact]]:
    """Each fact in all the ways in which it is asked for."""
    facts: list[list[Fact]] = []

    def add(about: tuple[str, str], answer: str, short: str, *questions: str) -> None:
        facts.append([Fact(question, answer, short, frozenset(about)) for question in questions])

    for a, b in _pairs(CAPITALS):
        add(
            (a, b),
            f"The capital of {a} is {b}.", b,
            f"What is the capital of {a}?", f"Which city is the capital of {a}?", f"Name the capital of {a}.",
            f"Do you know the capital of {a}?", f"Capital of {a}?",
        )  # fmt: skip
        add(
            (a, b),
            f"{b} is the capital of {a}.",
            a,
            f"{b} is the capital of which country?",
            f"Where is {b}?",
        )
    for a, b in _pairs(OPPOSITES):
        for one, other in ((a, b), (b, a)):
            add(
                (one, other),
                f"The opposite of {one} is {other}.", other,
                f"What is the opposite of {one}?", f"Name the opposite of {one}.", f"Opposite of {one}?",
            )  # fmt: skip
    for a, b in _pairs(SOUNDS):
        add(
            (a, b),
            f"{_a(a).capitalize()} {b}.",
            b,
            f"What does {_a(a)} do?",
            f"What sound does {_a(a)} make?",
        )
    for a, b in _pairs(COLOURS):
        questions = f"What is the colour of {a}?", f"What colour is {a}?", f"Colour of {a}?"
        add((a, b), f"The colour of {a} is {b}.", b, *questions)
    for a, b in _pairs(LEGS):
        questions = f"How many legs has {_a(a)}?", f"How many legs does {_a(a)} have?"
        add((a, b), f"{_a(a).capitalize()} has {b} legs.", b, *questions)
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for before, after in zip(names, names[1:] + names[:1], strict=True):
            questions = f"Which {kind} comes after {before}?", f"What comes after {before}?"
            add((before, after), f"{after} comes after {before}.", after, *questions)
            questions = f"Which {kind} comes before {after}?", f"What comes before {after}?"
            add((before, after), f"{before} comes before {after}.", before, *questions)
    return facts


FACTS = _facts()
STYLES: dict[str, Callable[[Fact], str]] = {
    "Be brief.": lambda fact: fact.short,
    "Answer in capital letters.": lambda fact: fact.answer.upper(),
    "Answer in quotes.": lambda fact: f'"{fact.short}"',
    "Answer in brackets.": lambda fact: f"{{{fact.short}}}",
    "Answer with a label.": lambda fact: f"answer: {fact.short}",
    "Answer twice.": lambda fact: f"{fact.short}, {fact.short}",
}
"""How an answer to a fact may be asked for: what is put after the question, and what is then said."""


def in_json(fact: Fact) -> tuple[str, str]:
    """A style that pretraining does not know: for fine-tuning to teach."""
    return f"{fact.question} Answer in JSON.", json.dumps({"answer": fact.short})


ADDITIONS = ("What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.")
COUNTS = ("Count from {a} to {b}.", "Please count from {a} to {b}.", "List the numbers from {a} to {b}.")
SPELLINGS = {
    "reverse": ("Reverse the word {word}.", "Spell {word} backwards.", "What is {word} backwards?"),
    "upper": ("Write {word} in capital letters.", "Write {word} in upper case.", "Shout the word {word}."),
    "sort": ("Sort the letters of {word}.", "Put the letters of {word} in order."),
    "repeat": ("Repeat the word {word}.", "Say the word {word}.", "Copy this word: {word}"),
}


def casually(question: str, rng: random.Random) -> str:
    """As people type: now and then without a capital at the beginning or a mark at the end."""
    question = question[0].lower() + question[1:] if rng.random() < 0.15 else question
    return question.rstrip("?.") if rng.random() < 0.15 else question


def is_held_out(a: int, b: int) -> bool:
    """One addition problem in five is kept from pretraining: for evaluation and for reinforcement to be judged on."""
    return random.Random(f"{a} + {b}").random() < 0.2  # not a rule that an answer would show


def addition(a: int, b: int, phrase: int) -> tuple[str, str]:
    return ADDITIONS[phrase].format(a=a, b=b), str(a + b)


def draw(task: str, rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """One question and its answer."""
    if task == "addition":
        while True:
            a, b = rng.randrange(10, 100), rng.randrange(10, 100)
            if is_held_out(a, b) == held_out:
                return addition(a, b, rng.randrange(len(ADDITIONS)))
    if task == "facts":
        fact = rng.choice(rng.choice(FACTS))
        return fact.question, fact.answer
    if task == "styles":
        fact, style = rng.choice(rng.choice(FACTS)), rng.choice(list(STYLES))
        return f"{fact.question} {style}", STYLES[style](fact)
    if task == "talk":
        return rng.choice(TALK)
    if task == "count":
        start = rng.randrange(1, 40)
        end = start + rng.randrange(2, 10)
        numbers = ", ".join(map(str, range(start, end + 1)))
        return rng.choice(COUNTS).format(a=start, b=end), numbers
    word = rng.choice(WORDS)
    answer = {"reverse": word[::-1], "upper": word.upper(), "sort": "".join(sorted(word)), "repeat": word}[
        task
    ]
    return rng.choice(SPELLINGS[task]).format(word=word), answer


TASKS = ("addition", "reverse", "upper", "sort", "repeat", "count", "facts", "styles", "talk")
