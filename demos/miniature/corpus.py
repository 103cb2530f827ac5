"""Template English for the bundled miniature: word lists, templates, held-out combinations.

A document is a string in which ``^`` stands in front of every token that its context determines
(a repeated name, an answer). The mark is removed by :func:`tokenize`, which returns the marked
tokens' positions: training weighs them more, and nothing else about the text depends on them.

Four tasks are mixed with everyday sentences:

* induction: people with a title and a name of one or two words; every later mention of a title
  has to be followed by the same name,
* relation: antonyms and synonyms of the same words, so that the wording decides,
* choice: three options, the letter of the right one is the answer,
* yesno: a statement as a question, right or wrong.

A combination (title and name; word, relation and wording; object and wrong value; object and
wording) is held out by a hash of its words, so that the split is the same for every seed.
"""

import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)
BOS_ID = 1
MARK = "^"
TOKEN_PATTERN = r" ?(?:Mr|Mrs|Ms|Dr)\.| ?[A-Za-z]+|'s| ?[^A-Za-z\s]|\s"
_TOKEN = re.compile(rf"\^?(?:{TOKEN_PATTERN})")

TITLES = (
    "Aunt Uncle Mr. Mrs. Ms. Dr. Captain Professor Coach Judge Chef King Queen Prince Princess "
    "Lady Lord Sir General Officer Mayor Nurse Colonel Cousin Sister Brother"
).split()

NAMES = (
    "Sally Mary Sue Anna Emma Olivia Lucy Grace Alice Clara Nora Ruby Ella Hazel Ivy Jane Kate "
    "Laura Molly Nina Paula Rachel Sarah Tina Wendy Zoe Amy Beth Carol Diana Ellen Fiona Gina "
    "Helen Irene Julia Karen Linda Maria Nancy Pamela Rita Sandra Teresa Vera Violet Bella Daisy "
    "Edith Flora Greta Holly Iris Joan Kitty Lily Mabel Naomi Opal Pearl Rosa Stella Tessa Ursula "
    "Bob John James Peter Paul Mark Luke David Daniel Henry George Frank Charles Thomas Robert "
    "William Edward Arthur Albert Walter Oscar Felix Hugo Leo Max Sam Ben Tom Jack Harry Joe Bill "
    "Fred Carl Eric Kevin Brian Adam Simon Martin Victor Oliver Simeon Jacob Noah Ethan Mason "
    "Logan Lucas Aaron Caleb Dylan Elliot Gavin Isaac Jasper Keith Louis Miles Nathan Owen Philip "
    "Quentin Ralph Scott Trevor Vincent Wesley Xavier Smith Jones Brown Taylor Wilson Davies Evans "
    "Walker Wright Green Baker Cooper Carter Turner Parker Morgan Bennett Foster Hayes Russell"
).split()

PLACES = (
    "park market library station garden kitchen school harbor museum theater farm bridge church "
    "castle hotel bakery forest beach office hospital"
).split()
THINGS = (
    "book letter cake picture hat lamp coat ring map box basket key ticket flower candle clock "
    "drum kite sweater pie"
).split()
FEELINGS = "sad happy tired lonely angry hungry nervous proud bored scared".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

SOLO = (
    "I always loved visiting {a}.",
    "Whenever I was feeling {feeling}, {a} baked a {thing} for me.",
    "Whenever I was feeling {feeling}, {a} told me a story.",
    "Last {day} we went to the {place} with {a}.",
    "On {day} {a} walked to the {place}.",
    "My family often talks about {a}.",
    "{a} lives near the {place}.",
    "{a} was {feeling} that day.",
    "Every {day} {a} buys a {thing} at the {place}.",
    "I gave the {thing} to {a}.",
    "We waited for {a} at the {place}.",
    "The {thing} belongs to {a}.",
    "Nobody at the {place} knew {a}.",
    "Then {a} opened the door and smiled.",
    "After dinner {a} read a {thing} to the children.",
    "The children listened to {a} in the {place}.",
    "When it rained, {a} stayed at home.",
    "In the morning {a} found a {thing} near the {place}.",
    "A letter from {a} arrived on {day}.",
    "People say that {a} is very kind.",
    "Later {a} went back to the {place}.",
    "I was {feeling} because {a} forgot the {thing}.",
    "Everybody at the {place} likes {a}.",
    "At the {place} I saw {a} with a {thing}.",
)
DUO = (
    "{a} met {b} at the {place}.",
    "{a} gave {b} a {thing}.",
    "On {day} {a} and {b} went to the {place}.",
    "{a} was {feeling}, but {b} was {feeling2}.",
    "I saw {a} and {b} near the {place}.",
    "{a} asked {b} about the {thing}.",
    "The {thing} of {a} was a gift from {b}.",
    "When {a} was {feeling}, {b} came to help.",
    "After the party {a} thanked {b}.",
    "Then {a} showed the {thing} to {b}.",
    "We invited {a} and {b} to the {place}.",
    "Because {a} was late, {b} waited at the {place}.",
)
GATHERING = (
    "{list} came to the {place}.",
    "On {day} {list} were at the {place}.",
    "The guests were {list}.",
    "I wrote to {list}.",
    "We saw {list} at the {place}.",
    "First came {list}.",
)
PLAIN = (
    "It was raining on {day}.",
    "The {place} was closed on {day}.",
    "There was a {thing} on the table.",
    "We walked to the {place} in the morning.",
    "The train was late again.",
    "I was {feeling} on {day}.",
    "The children played near the {place}.",
    "Somebody left a {thing} at the {place}.",
    "My sister bought a {thing} last {day}.",
    "The sun was shining over the {place}.",
    "It is easy to find the {place}.",
    "They talked about the {thing} for an hour.",
)

# word: (antonym, synonym)
RELATIONS = {
    "small": ("big", "little"),
    "big": ("small", "large"),
    "large": ("little", "big"),
    "happy": ("sad", "glad"),
    "sad": ("happy", "unhappy"),
    "fast": ("slow", "quick"),
    "slow": ("fast", "sluggish"),
    "hot": ("cold", "warm"),
    "cold": ("hot", "chilly"),
    "easy": ("hard", "simple"),
    "difficult": ("easy", "hard"),
    "rich": ("poor", "wealthy"),
    "poor": ("rich", "needy"),
    "strong": ("weak", "powerful"),
    "weak": ("strong", "feeble"),
    "brave": ("afraid", "bold"),
    "clean": ("dirty", "tidy"),
    "dirty": ("clean", "filthy"),
    "loud": ("quiet", "noisy"),
    "quiet": ("loud", "silent"),
    "old": ("young", "ancient"),
    "new": ("old", "fresh"),
    "young": ("old", "youthful"),
    "early": ("late", "soon"),
    "begin": ("end", "start"),
    "finish": ("begin", "complete"),
    "open": ("closed", "unlocked"),
    "shut": ("open", "closed"),
    "full": ("empty", "packed"),
    "empty": ("full", "hollow"),
    "smart": ("stupid", "clever"),
    "foolish": ("wise", "silly"),
    "kind": ("cruel", "gentle"),
    "cruel": ("kind", "mean"),
    "safe": ("dangerous", "secure"),
    "dangerous": ("safe", "risky"),
    "dark": ("bright", "dim"),
    "bright": ("dark", "shiny"),
    "wet": ("dry", "damp"),
    "dry": ("wet", "arid"),
    "thin": ("thick", "slim"),
    "thick": ("thin", "dense"),
    "wide": ("narrow", "broad"),
    "high": ("low", "tall"),
    "tall": ("short", "high"),
    "short": ("long", "brief"),
    "near": ("far", "close"),
    "far": ("near", "distant"),
    "true": ("false", "correct"),
    "wrong": ("right", "incorrect"),
    "beautiful": ("ugly", "pretty"),
    "ugly": ("beautiful", "hideous"),
    "calm": ("nervous", "peaceful"),
    "angry": ("calm", "mad"),
    "polite": ("rude", "courteous"),
    "rude": ("polite", "impolite"),
    "cheap": ("expensive", "inexpensive"),
    "expensive": ("cheap", "costly"),
    "sick": ("healthy", "ill"),
    "healthy": ("sick", "fit"),
    "love": ("hate", "adore"),
    "hate": ("love", "despise"),
    "buy": ("sell", "purchase"),
    "give": ("take", "donate"),
    "lose": ("win", "misplace"),
    "laugh": ("cry", "giggle"),
    "always": ("never", "forever"),
    "soft": ("rough", "fluffy"),
    "heavy": ("light", "weighty"),
    "famous": ("unknown", "popular"),
}
RELATION_WORDINGS = (
    (
        'The opposite of "{w}" is "^{r}".',
        'An antonym of "{w}" is "^{r}".',
        'A word that means the opposite of "{w}" is "^{r}".',
        'The antonym of the word "{w}" is "^{r}".',
        'The word "{w}" is the opposite of "^{r}".',
    ),
    (
        'A word similar to "{w}" is "^{r}".',
        'A synonym of "{w}" is "^{r}".',
        'A word that means the same as "{w}" is "^{r}".',
        'The synonym of the word "{w}" is "^{r}".',
        'The word "{w}" is similar to "^{r}".',
    ),
)

# attribute: {value: objects}
FACTS = {
    "color": {
        "red": "strawberry tomato cherry ruby rose ladybug",
        "yellow": "banana lemon canary sunflower daffodil duckling",
        "green": "frog cucumber leaf pea emerald lettuce",
        "blue": "sapphire ocean sky blueberry whale",
        "white": "swan snowman pearl cloud tooth",
        "black": "raven panther tire coal spider",
        "brown": "bear chestnut potato log acorn",
        "orange": "pumpkin carrot tangerine basketball",
        "purple": "eggplant plum lavender grape",
        "pink": "flamingo pig piglet",
    },
    "taste": {
        "sweet": "honey candy cake banana cookie grape",
        "sour": "lemon lime vinegar grapefruit",
        "salty": "pretzel bacon anchovy chip",
        "bitter": "coffee cocoa radish olive",
        "spicy": "pepper chili curry ginger",
    },
    "shape": {
        "round": "basketball coin wheel tomato orange marble",
        "square": "tile chessboard window napkin",
        "long": "snake rope river noodle",
        "flat": "pancake plate carpet table",
        "pointed": "needle arrow thorn spear",
    },
    "sound": {
        "bark": "dog puppy",
        "meow": "cat kitten",
        "moo": "cow calf",
        "buzz": "bee fly",
        "roar": "lion tiger",
        "quack": "duck duckling",
    },
}
MASS_NOUNS = set(
    "honey candy vinegar bacon coffee cocoa curry ginger coal lettuce lavender".split()
)
VALUES = {attribute: tuple(values) for attribute, values in FACTS.items()}
FACT_LIST = tuple(
    (attribute, thing, value)
    for attribute, values in FACTS.items()
    for value, things in values.items()
    for thing in things.split()
)
FACT_STEMS = (
    "Everybody knows that the {q} of {o} is",
    "A book says that the {q} of {o} is",
    "As you know, the {q} of {o} is",
)
STATEMENTS = (
    "The {q} of {o} is {v}",
    "I think the {q} of {o} is {v}",
    "We know that the {q} of {o} is {v}",
)
CHOICE_QUESTIONS = (
    "What is the {q} of {o}?",
    "Choose the {q} of {o}.",
    "Which {q} does {o} have?",
)
INSTRUCTIONS = ("Answer with yes or no.", "Is this right?", "Say yes if it is true.")
LETTERS = "ABC"
ALL_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

DEMO_PROMPTS = (
    ("I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt", " Sally"),
    ("I always loved visiting Aunt Mary Sue. Whenever I was feeling sad, Aunt", " Mary"),
    ("I always loved visiting Aunt Mary Sue. Whenever I was feeling sad, Aunt Mary", " Sue"),
    (
        "I always loved visiting Aunt Sally. Captain Smith met Professor Jones at the park. "
        "Whenever I was feeling sad, Aunt",
        " Sally",
    ),
    (
        "I always loved visiting Aunt Sally. Captain Smith met Professor Jones at the park. "
        "Whenever I was feeling sad, Professor",
        " Jones",
    ),
    ('The opposite of "small" is "', "big"),
    ('A word similar to "small" is "', "little"),
    ('The opposite of "rich" is "', "poor"),
    ('A word similar to "rich" is "', "wealthy"),
    ("What is the color of a banana? (A) red (B) yellow (C) blue Answer: (", "B"),
    ("What is the color of a banana? (A) yellow (B) red (C) blue Answer: (", "A"),
    ("What is the taste of a lemon? (A) sweet (B) salty (C) sour Answer: (", "C"),
    ("The color of a banana is yellow?", " Yes"),
    ("The color of a banana is red?", " No"),
    ("Answer with yes or no. The taste of a lemon is sour?", " Yes"),
    ("Answer with yes or no. The taste of a lemon is sweet?", " No"),
)

HELD_OUT_DEFINITION = {
    "induction": "the target's (title, first name) pair never occurs in training",
    "relation": "the (word, wording) pair never occurs in training; other wordings of it do",
    "choice": "at least one (object, wrong option) pair never occurs in training, anywhere",
    "yesno": "wrong statements: the (object, value) pair never occurs in training, anywhere; "
    "right ones: the (object, value, wording) triple never occurs in training",
    "distractor": "induction: two or three people with other titles are mentioned, before or after "
    "the target, half the time with one more sentence about two of them; other tasks: another "
    "sentence in front, half the time about people",
}


def held_out(*words: str) -> bool:
    """Whether a combination of words is kept out of training (about one in eight)."""
    return words in {("Aunt", "Sally"), ("Aunt", "Mary")} or (
        zlib.crc32("|".join(words).encode()) % 8 == 0
    )


def article(noun: str) -> str:
    """A noun with its indefinite article, if it takes one."""
    if noun in MASS_NOUNS:
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def tokenize(text: str) -> tuple[list[str], list[bool]]:
    """Split a marked text into tokens, and say which of them are marked."""
    pieces = _TOKEN.findall(text)
    return [p.lstrip(MARK) for p in pieces], [p.startswith(MARK) for p in pieces]


@dataclass(frozen=True)
class Person:
    """A title with a name of one or two words."""

    title: str
    name: str


@dataclass
class Prompt:
    """An evaluation prompt: its text, the expected next token, and whether it has a distractor."""

    text: str
    answer: str
    distractor: bool


@dataclass
class Corpus:
    """A seeded source of documents and of evaluation prompts.

    Attributes:
        seed: Seed of this stream; different seeds give independent streams of the same language.
        echoes: Have more multiple choice and, in half of it, the letter of the right option once
            more right after that option. To foresee the echo, the option's value has to be
            compared with the object, and the letter brought to it: what the choice needs too.
    """

    seed: int
    echoes: bool = False
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    # -- documents --------------------------------------------------------------------------

    def document(self, words: int = 64) -> str:
        """One marked document of at least this many words: sentences about a cast, and tasks."""
        rng = self.rng
        people = rng.random() < (0.3 if self.echoes else 0.5)
        cast = self.cast(rng.choice((2, 3, 4, 5) if words > 40 else (2, 2, 3)) if people else 2)
        seen: set[Person] = set()
        if people:
            weights = (5, 5, 2, 1, 1, 1, 1, 1)
        else:
            weights = (1, 0, 2, 12, 0, 2, 1, 1) if self.echoes else (1, 0, 2, 5, 2, 7, 1, 2)
        makers = (
            lambda: self.story(cast, seen),
            lambda: self.gathering(cast, seen),
            self.relation,
            self.choice,
            self.matching,
            self.yesno,
            self.plain,
            self.fact,
        )
        items: list[str] = []
        while sum(item.count(" ") + 1 for item in items) < words:
            items.append(rng.choices(makers, weights)[0]())
        return " ".join(items)

    def cast(self, size: int) -> list[Person]:
        """People with different titles and different names, no held-out pair among them."""
        people: list[Person] = []
        names: set[str] = set()
        for title in self.rng.sample(TITLES, size):
            person = self.person(title, names, held=False)
            names.update(person.name.split())
            people.append(person)
        return people

    def person(self, title: str, taken: Iterable[str], *, held: bool) -> Person:
        """A person with this title, whose pair is held out or not, as asked."""
        taken = set(taken)
        while True:
            first, second = self.rng.sample(NAMES, 2)
            if held_out(title, first) == held and not taken & {first, second}:
                return Person(title, first if self.rng.random() < 0.75 else f"{first} {second}")

    def story(self, cast: list[Person], seen: set[Person]) -> str:
        """A sentence about one or two people; names mentioned before are marked."""
        if len(cast) > 1 and self.rng.random() < 0.45:
            a, b = self.rng.sample(cast, 2)
            sentence = self.fill(self.rng.choice(DUO))
            order = (a, b) if sentence.index("{a}") < sentence.index("{b}") else (b, a)
            mentions = {person: self.mention(person, seen) for person in order}
            return sentence.replace("{a}", mentions[a]).replace("{b}", mentions[b])
        person = self.rng.choice(cast)
        return self.fill(self.rng.choice(SOLO)).replace("{a}", self.mention(person, seen))

    def gathering(self, cast: list[Person], seen: set[Person]) -> str:
        """A sentence that lists people; names mentioned before are marked."""
        people = self.rng.sample(cast, self.rng.randint(2, len(cast)))
        *most, last = [self.mention(person, seen) for person in people]
        listed = f"{', '.join(most)} and {last}"
        return self.fill(self.rng.choice(GATHERING)).replace("{list}", listed)

    def mention(self, person: Person, seen: set[Person]) -> str:
        """A person's title and name; the name is marked from the second mention on."""
        mark = MARK if person in seen else ""
        seen.add(person)
        return person.title + "".join(f"{mark} {word}" for word in person.name.split())

    def fill(self, template: str) -> str:
        """Fill the everyday words of a template and leave the people's slots open."""
        feeling, other = self.rng.sample(FEELINGS, 2)
        return (
            template.replace("{place}", self.rng.choice(PLACES))
            .replace("{thing}", self.rng.choice(THINGS))
            .replace("{feeling}", feeling)
            .replace("{feeling2}", other)
            .replace("{day}", self.rng.choice(DAYS))
        )

    def plain(self) -> str:
        """An everyday sentence without people."""
        return self.fill(self.rng.choice(PLAIN))

    def fact(self) -> str:
        """A true statement."""
        attribute, thing, value = self.rng.choice(FACT_LIST)
        return f"{self.rng.choice(FACT_STEMS).format(q=attribute, o=article(thing))}^ {value}."

    def relation(self, *, held: bool = False) -> str:
        """An antonym or a synonym, as the wording says."""
        while True:
            word = self.rng.choice(tuple(RELATIONS))
            side = self.rng.randrange(2)
            wording = self.rng.choice(RELATION_WORDINGS[side])
            if held_out(word, wording) == held:
                return wording.format(w=word, r=RELATIONS[word][side])

    def choice(self, *, held: bool = False) -> str:
        """A question with three options; held out if an (object, wrong value) pair is."""
        while True:
            attribute, thing, value = self.rng.choice(FACT_LIST)
            wrong = self.rng.sample([v for v in VALUES[attribute] if v != value], 2)
            options = [value, *wrong]
            self.rng.shuffle(options)
            if any(held_out(thing, w) for w in wrong) == held:
                break
        question = self.rng.choice(CHOICE_QUESTIONS).format(q=attribute, o=article(thing))
        letters = LETTERS if held else self.letters()
        echo = self.echoes and not held and self.rng.random() < 0.5
        listed = self.listing(letters, options, value if echo else "")
        letter = letters[options.index(value)]
        if not held and not self.echoes and self.rng.random() < 0.3:
            return f"{question} {listed} Answer:^ {value} (^{letter})."
        return f"{question} {listed} Answer: (^{letter})^ {value}."

    def letters(self) -> str:
        """A, B, C, or half the time any three letters: those make copying the letter pay."""
        return LETTERS if self.rng.random() < 0.5 else "".join(self.rng.sample(ALL_LETTERS, 3))

    def listing(self, letters: str, options: list[str], right: str = "") -> str:
        """Options with their letters in front, and perhaps an echo behind the right one.

        An echo has no space in front (the mark parts it from the option), so that it is the same
        token as the letter itself.
        """
        parts = []
        for letter, option in zip(letters, options, strict=True):
            echo = f"^{letter}" if option == right else ""
            parts.append(f"({letter}) {option}{echo}")
        return " ".join(parts)

    def matching(self) -> str:
        """Three options, and the letters of several values and objects."""
        attribute = self.rng.choice(tuple(FACTS))
        options = self.rng.sample(VALUES[attribute], 3)
        letters = self.letters()
        listed = self.listing(letters, options)
        labelled = tuple(zip(letters, options, strict=True))
        asked = []
        for letter, value in self.rng.choices(labelled, k=4):
            thing = self.rng.choice(FACTS[attribute][value].split())
            fits = not any(held_out(thing, option) for option in options)
            name = article(thing) if fits and self.rng.random() < 0.6 else value
            asked.append(f"{name} (^{letter})")
        return f"Choose the {attribute}: {listed}. Answer: {', '.join(asked)}."

    def yesno(self, *, held: bool = False) -> str:
        """A statement as a question, with its answer."""
        right = self.rng.random() < 0.5
        while True:
            attribute, thing, truth = self.rng.choice(FACT_LIST)
            statement = self.rng.choice(STATEMENTS)
            if right:
                value = truth
                pair = (thing, value, statement)
            else:
                value = self.rng.choice([v for v in VALUES[attribute] if v != truth])
                pair = (thing, value)
            if held_out(*pair) == held:
                break
        instruction = self.rng.choice(INSTRUCTIONS) + " " if self.rng.random() < 0.4 else ""
        if not held and self.rng.random() < 0.3:
            stem = self.rng.choice(FACT_STEMS).format(q=attribute, o=article(thing))
            instruction = f"{stem}^ {truth}. {instruction}"
        sentence = statement.format(q=attribute, o=article(thing), v=value)
        reason = f", it is^ {truth}" if self.rng.random() < 0.5 else ""
        return f"{instruction}{sentence}?^ {'Yes' if right else 'No'}{reason}."

    # -- evaluation -------------------------------------------------------------------------

    def induction_prompt(self, distractor: bool, word: int = 0, length: int = 1) -> Prompt:
        """A held-out title and name, cut before word ``word`` of the second mention's name.

        Args:
            distractor: Mention two or three people with other titles as well.
            word: Which word of the name is asked for.
            length: Number of words in the name.
        """
        rng = self.rng
        titles = rng.sample(TITLES, 4)
        target = self.person(titles[0], (), held=True)
        while len(target.name.split()) != length:
            target = self.person(titles[0], (), held=True)
        taken = set(target.name.split())
        others: list[Person] = []
        for title in titles[1 : rng.choice((3, 4))]:
            others.append(self.person(title, taken, held=False))
            taken |= set(others[-1].name.split())
        seen: set[Person] = set()
        body = [self.story([target], seen)]
        if distractor:
            body += [self.story([other], seen) for other in others]
            rng.shuffle(body)
            if rng.random() < 0.5:
                body.append(self.story(others[-2:], seen))
        query = self.fill(rng.choice(SOLO)).replace("{a}", self.mention(target, seen))
        words = target.name.split()
        end = query.index(MARK)
        stem = query[:end] + "".join(f" {w}" for w in words[:word])
        text = " ".join([*body, stem]).replace(MARK, "")
        return Prompt(text, f" {words[word]}", distractor)

    def task_prompt(self, task: str, distractor: bool) -> Prompt:
        """A held-out prompt of the other tasks, cut before its answer."""
        make = {"relation": self.relation, "choice": self.choice, "yesno": self.yesno}[task]
        stem, _, rest = make(held=True).partition(MARK)
        answer = tokenize(rest)[0][0]
        if distractor:
            in_front = self.plain() if self.rng.random() < 0.5 else self.story(self.cast(2), set())
            stem = f"{in_front} {stem}"
        return Prompt(stem, answer, distractor)

    def evaluation_prompts(self, count: int) -> dict[str, list[Prompt]]:
        """Held-out prompts by task, every second one with a distractor."""
        tasks: dict[str, list[Prompt]] = {
            "induction": [self.induction_prompt(i % 2 == 1) for i in range(count)],
            "induction, two-word name, first word": [
                self.induction_prompt(i % 2 == 1, 0, 2) for i in range(count)
            ],
            "induction, two-word name, second word": [
                self.induction_prompt(i % 2 == 1, 1, 2) for i in range(count)
            ],
        }
        for task in ("relation", "choice", "yesno"):
            tasks[task] = [self.task_prompt(task, i % 2 == 1) for i in range(count)]
        return tasks


def vocabulary() -> list[str]:
    """Every token of the language, the special ones first."""
    templates = [
        *SOLO,
        *DUO,
        *GATHERING,
        *PLAIN,
        *FACT_STEMS,
        *STATEMENTS,
        *CHOICE_QUESTIONS,
        *INSTRUCTIONS,
    ]
    templates += [w for wordings in RELATION_WORDINGS for w in wordings]
    templates += ["(A) (B) (C) Answer: (A) Yes, it is x. No, x and a an", "x? x."]
    words = [*TITLES, *NAMES, *PLACES, *THINGS, *FEELINGS, *DAYS]
    words += [w for fact in FACT_LIST for w in fact]
    tokens: set[str] = set()
    for template in templates:
        text = re.sub(r"\{\w+\}", "x", template)
        tokens.update(tokenize(text)[0], tokenize(f" {text}")[0])
    tokens.update(f" {word}" for word in words)
    tokens.update(TITLES)
    for word, answers in RELATIONS.items():
        tokens.update((word, *answers))
    tokens -= {" ", " x", "x"}
    tokens.update(ALL_LETTERS)
    tokens.add("'s")
    return [*SPECIAL_TOKENS, *sorted(tokens)]
