"""The narrow world of the embedded model: questions and answers, by task, all generated here.

`draw(task, rng)` gives one (question, answer). Addition has held-out problems, which pretraining never sees.
"""

import random

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
OPPOSITES = """hot cold|big small|tall short|fast slow|old young|new old|light dark|wet dry|hard soft|loud quiet|
full empty|rich poor|strong weak|early late|happy sad|clean dirty|open closed|near far|high low|
deep shallow|thick thin|sweet bitter|true false|right wrong|first last|up down|left right|
inside outside|day night|summer winter|push pull|buy sell|win lose|start stop|give take|ask answer|
laugh cry|love hate|friend enemy|north south|east west|heavy light|wide narrow|rough smooth"""
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


def _facts() -> list[tuple[str, str]]:
    facts = [(f"What is the capital of {a}?", f"The capital of {a} is {b}.") for a, b in _pairs(CAPITALS)]
    facts += [
        (f"{b} is the capital of which country?", f"{b} is the capital of {a}.") for a, b in _pairs(CAPITALS)
    ]
    facts += [(f"What is the opposite of {a}?", f"The opposite of {a} is {b}.") for a, b in _pairs(OPPOSITES)]
    facts += [(f"What does {_a(a)} do?", f"{_a(a).capitalize()} {b}.") for a, b in _pairs(SOUNDS)]
    facts += [(f"What is the colour of {a}?", f"The colour of {a} is {b}.") for a, b in _pairs(COLOURS)]
    facts += [(f"How many legs has {_a(a)}?", f"{_a(a).capitalize()} has {b} legs.") for a, b in _pairs(LEGS)]
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for before, after in zip(names, names[1:] + names[:1], strict=True):
            facts.append((f"Which {kind} comes after {before}?", f"{after} comes after {before}."))
            facts.append((f"Which {kind} comes before {after}?", f"{before} comes before {after}."))
    return facts


FACTS = _facts()


def is_held_out(a: int, b: int) -> bool:
    """One addition problem in five is kept from pretraining: for evaluation and for reinforcement to be judged on."""
    return random.Random(f"{a} + {b}").random() < 0.2  # not a rule that an answer would show


def addition(a: int, b: int, phrase: int) -> tuple[str, str]:
    return (f"What is {a} + {b}?", f"{a} + {b} =", f"Add {a} and {b}.")[phrase], str(a + b)


def draw(task: str, rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """One question and its answer."""
    if task == "addition":
        while True:
            a, b = rng.randrange(10, 100), rng.randrange(10, 100)
            if is_held_out(a, b) == held_out:
                return addition(a, b, rng.randrange(3))
    if task == "facts":
        return rng.choice(FACTS)
    if task == "talk":
        return rng.choice(TALK)
    if task == "count":
        start = rng.randrange(1, 40)
        end = start + rng.randrange(2, 10)
        return f"Count from {start} to {end}.", ", ".join(map(str, range(start, end + 1)))
    word = rng.choice(WORDS)
    return {
        "reverse": (f"Reverse the word {word}.", word[::-1]),
        "upper": (f"Write {word} in capital letters.", word.upper()),
        "sort": (f"Sort the letters of {word}.", "".join(sorted(word))),
    }[task]


TASKS = ("addition", "reverse", "upper", "sort", "count", "facts", "talk")
