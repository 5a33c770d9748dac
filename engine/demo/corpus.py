"""Seeded generator of the text that the demo model is trained and measured on.

The demo model exists to make the state of a KV cache visible: a conversation states facts ("Anna's
locker number is 4821."), wanders off into filler and other people's facts, and then asks for one of
them. A cache block that was lost, stale or misplaced turns into a visibly wrong number. The text
therefore consists mostly of such conversations, densely questioned, with a little small talk and a
few short stories so that the model can also hold a simple chat.

Every function is pure: randomness comes only from the ``random.Random`` that is passed in. Facts are
split by a checksum of what they say: training never sees a held-out combination of key and value,
and the probes use only held-out ones.
"""

import enum
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

BOS = "<|bos|>"
END = "<|end|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"

# How the tokenizer cuts text before any merging: contractions, words with their leading space, single
# digits, punctuation, white space.
WORD_PATTERN = r"'(?:s|t|re|ve|m|ll|d)\b| ?[^\W\d_]+|\d| ?[^\s\w]+|_+|\s+(?!\S)|\s+"

HELD_OUT_ONE_IN = 8


class Kind(enum.IntEnum):
    """What a piece of text is for; the training loss weights its tokens accordingly."""

    GIVEN = 0  # control tokens and freshly drawn values: nothing to predict
    PROMPT = 1  # what the user says
    PROSE = 2  # plain text to continue
    REPLY = 3  # what the assistant says
    RECALL = 4  # a value that the context determines


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of text of one kind; span borders are also token borders."""

    text: str
    kind: Kind
    owner: str = ""  # whose fact the end of the text belongs to


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that can be stated, asked for and answered."""

    stems: tuple[str, ...]  # ways to state it, up to the value: "Anna's locker number is"
    value: str
    questions: tuple[str, ...]
    answer_stem: str

    @property
    def owner(self) -> str:
        """The person whom the fact is about, if it names one."""
        word = self.answer_stem.split()[0].removesuffix("'s")
        return word if word in NAMES else ""


@dataclass(frozen=True, slots=True)
class Circle:
    """The people and the numbered things that a conversation is about."""

    owners: Sequence[str]
    number_attributes: Sequence[str]
    only_numbers: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One chat message."""

    role: str
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The message as plain text."""
        return "".join(span.text for span in self.spans)


@dataclass(frozen=True, slots=True)
class Probe:
    """A held-out conversation whose next answer must contain ``expected``."""

    turns: tuple[Turn, ...]
    expected: str
    answer: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE_NAMES = _words(
    "Alice Anna Carla Clara Emma Eva Gina Grace Ida Iris Julia Kate Laura Lena Lucy Maria Mia Nina "
    "Olga Rosa Ruth Sara Tina Zoe"
)
MALE_NAMES = _words(
    "Adam Ben Bob Daniel David Felix Frank Henry Hugo Ivan Jack John Karl Leo Marco Max Noah Oscar "
    "Paul Peter Sam Simon Tom Victor"
)
NAMES = FEMALE_NAMES + MALE_NAMES
COLOURS = _words("red blue green yellow orange purple pink black white brown gray silver")
CITIES = _words(
    "Paris London Berlin Rome Madrid Vienna Oslo Tokyo Cairo Lima Dublin Athens Boston Prague Lisbon Geneva"
)
ANIMALS = _words("dog cat bird horse fox bear rabbit mouse duck fish frog lion owl sheep cow wolf")
JOBS = _words("teacher doctor farmer baker painter pilot driver writer nurse cook")
FOODS = _words("soup bread rice pasta cake cheese pizza salad fruit honey")
OBJECTS = _words("ball book lamp key box cup map bag hat coin letter phone")
ROOMS = _words("kitchen garden garage office cellar hall library attic bathroom bedroom")
NUMBER_ATTRIBUTES = (
    "locker number",
    "badge number",
    "room number",
    "ticket number",
    "seat number",
    "desk number",
    "phone number",
    "door code",
    "bank code",
    "ID",
)
SHARED_NUMBERS = ("secret code", "door code", "magic number", "order number", "gate code")

_ADJECTIVES = _words("small big old new happy quiet bright warm cold soft kind clever")
_PLACES = _words("park garden forest house town river hill school market beach")

_SLOTS: dict[str, Sequence[str]] = {
    "name": NAMES,
    "colour": COLOURS,
    "animal": ANIMALS,
    "food": FOODS,
    "object": OBJECTS,
    "place": _PLACES,
    "adj": _ADJECTIVES,
    "city": CITIES,
    "country": _words("France Spain Italy Germany England Japan China India Norway Egypt Peru Canada"),
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "time": ("morning", "afternoon", "evening", "night"),
    "weather": _words("sunny rainy windy cold warm quiet"),
    "many": ("Many people", "Some people", "Most people", "The children", "We"),
    "verb": _words("slept played waited walked sat ran"),
    "near": ["in", "near", "behind", "by"],
    "count": [str(number) for number in range(2, 100)],
}

_FILLER = (
    "The {adj} {animal} {verb} {near} the {place}.",
    "It was a {weather} {time}.",
    "The weather is {weather} today.",
    "{many} like {food} and {food}.",
    "The {place} is {near} the {place}.",
    "There was a {colour} {object} on the table.",
    "The train to {city} is often late on {day}.",
    "{many} went to the {place} in the {time}.",
    "On {day} the {place} is {adj} and {adj}.",
    "A {colour} {animal} {verb} {near} the {adj} {place}.",
    "{name} went to the {place} on {day}.",
    "{name} likes {food} and {name} likes {food}.",
    "{name} walked to the {place} with a {adj} {animal}.",
    "The bus has {count} seats.",
    "There are {count} {adj} houses {near} the {place}.",
    "The sun was warm and the sky was blue.",
    "We talked about the weather and the {food}.",
    "The {object} is {adj} and the {object} is {colour}.",
    "I saw a {animal} {near} the {place} this {time}.",
    "The shop opens in the {time} and closes at night.",
    "The water {near} the {place} was {adj}.",
    "It takes {count} minutes to walk to the {place}.",
)

_LEADS = ("Remember: ", "Remember that ", "Please remember: ", "Please remember that ", "Note: ")
_MIDDLE_LEADS = (*_LEADS, "Also, ", "By the way, ", "And ")
_ACKNOWLEDGEMENTS = ("OK, I will remember that.", "Thank you, I will remember that.")
_SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are Tandem, a small demo model.",
    "You are a friendly assistant. Answer with short sentences.",
    "Answer the questions of the user.",
)

_WHO = "I am the Tandem demo model, a very small language model."
_CAN = "I can chat a little, tell short stories and remember facts that you tell me."
_CANNOT = "I am a very small model, so I do not know that. " + _CAN

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello", "Hi!", "Hi", "Hey", "Hello there!", "Hi there!", "Good day!"),
        "Hello! How can I help you today?",
    ),
    (("Good morning!", "Good morning"), "Good morning! How can I help you today?"),
    (("Good evening!", "Good evening"), "Good evening! How can I help you?"),
    (("How are you?", "How are you today?", "How do you do?"), "I am fine, thank you. How are you?"),
    (("I am fine.", "I am fine, thank you.", "I am happy today."), "That is good to hear."),
    (("I am sad.", "I am tired.", "I am sad today."), "I am sorry to hear that. I hope it gets better."),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about you.", "Are you a robot?"),
        _WHO,
    ),
    (("Who made you?", "Where do you come from?"), "I was made as a demo for the Tandem server."),
    (
        ("What can you do?", "What can you do for me?", "How can you help me?", "Can you help me?", "Help"),
        _CAN,
    ),
    (("How big are you?", "Are you big?"), "I am very small. I know about a thousand tokens."),
    (("Thank you!", "Thank you.", "Thanks!", "Thanks"), "You are welcome!"),
    (("Goodbye!", "Goodbye", "Bye!", "Bye", "See you!"), "Goodbye! Have a nice day."),
    (("Good night!", "Good night"), "Good night! Sleep well."),
    (("Do you like {food}?", "Do you like the {place}?"), "I cannot try it, but many people like it."),
    (
        ("What is your favourite colour?", "What is your favorite color?"),
        "I like blue, the colour of the sky.",
    ),
    (("How is the weather?", "Is it {weather} today?"), "I cannot see the weather, but I hope it is nice."),
    (("The weather is {weather} today.", "It is {weather} today."), "I hope you have a nice day."),
    (("What is Tandem?",), "Tandem is a server for language models. It splits prefill and decode."),
    (("What is a KV cache?",), "It keeps what a model has read, so that it need not read it again."),
    (("Tell me a joke.", "Do you know a joke?"), "Why did the duck go to the bank? To get its bill."),
    (("Are you there?", "Can you hear me?", "Test", "test"), "Yes, I am here. How can I help you?"),
    (("OK", "OK.", "Good.", "Great!", "Nice."), "Good! What can I do for you?"),
    (("I like {food}.", "I like the {place}."), "That is nice. Many people like it."),
    (
        ("I went to the {place} today.", "I saw a {animal} today."),
        "That is nice. I hope you had a good time.",
    ),
    (("Can you count to five?", "Count to five."), "1, 2, 3, 4, 5."),
    (
        ("Can you remember things?", "Do you remember things?"),
        "Yes. Tell me a fact and ask me about it later.",
    ),
    (
        (
            "What is the capital of {country}?",
            "What is the capital of {country}?",
            "Who is the king of {country}?",
            "What is two plus two?",
            "What time is it?",
            "How far is it to {city}?",
            "Do you know {country}?",
            "Write a poem.",
            "Write a poem about the {place}.",
            "Write code.",
            "What is the meaning of life?",
            "How do I cook {food}?",
            "Who is the king?",
            "Why is the sky blue?",
            "What is {count} plus {count}?",
        ),
        _CANNOT,
    ),
)

_STORY_REQUESTS = (
    "Tell me a short story about {topic}.",
    "Tell me a story about {topic}.",
    "Please tell me a story about {topic}.",
    "Write a short story about {topic}.",
    "Can you tell me a story about {topic}?",
)
_OPEN_STORY_REQUESTS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Can you tell me a story?",
    "A story, please.",
)

_STORY_OPENINGS = (
    "Once upon a time there was {a} who lived {near} {where}.",
    "One day {the} went to {where}.",
    "There was once {a} who liked to walk {near} {where}.",
)
_STORY_EVENTS = (
    "{The} found a {colour} {object} on the ground.",
    "{The} saw a {colour} {object} under a tree.",
    "{The} heard a sound behind the {colour} door.",
    "{The} wanted to find a {colour} {object}.",
)
_STORY_MIDDLES = (
    "{He} took it home and showed it to a friend.",
    "{He} did not know what to do, so {he} asked a wise {other}.",
    "Then a {adj} {other} came and asked to play.",
    "But it began to rain, and {he} ran to the {adj} house of a {other}.",
    "{He} looked for it all day and then met a {adj} {other}.",
)
_STORY_TURNS = (
    "The {other} was very kind and helped.",
    "They played together all {time}.",
    "They ate {food} and talked for a long time.",
    "They walked {near} the {place} and sang a song.",
)
_STORY_ENDINGS = (
    "In the evening {the} went home and slept well.",
    "From that day on they were good friends.",
    "{The} was very happy.",
    "At night {he} told everyone about the {adj} day.",
)

_SYLLABLES = _words("ka ti mo re lu sa vi no be do pa zu fe gi ho ra le mi tor nel")


def pseudo_word(rng: random.Random) -> str:
    """A made-up lower-case word, spelt with several tokens."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))


def is_held_out(stem: str, value: str) -> bool:
    """Whether a fact belongs to the probes and must never be trained on.

    Facts without a named owner and without a number ("Your name is Ruth") are too few to spare any.
    """
    if stem.split()[0] in ("Your", "You", "The") and not value.isdigit():
        return False
    return zlib.crc32(f"{stem}|{value}".encode()) % HELD_OUT_ONE_IN == 0


def rough_token_count(text: str) -> int:
    """How many tokens the text has if every word is one token."""
    return len(re.findall(WORD_PATTERN, text))


def _fill(template: str, rng: random.Random) -> str:
    text = re.sub(r"\{(\w+)\}", lambda match: rng.choice(_SLOTS[match[1]]), template)
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def filler(rng: random.Random) -> str:
    """A sentence that nobody will ask about."""
    return _fill(rng.choice(_FILLER), rng)


def _digits(rng: random.Random) -> str:
    length = rng.choice((2, 3, 3, 3, 4, 4, 4, 4, 4, 5))
    return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in range(length - 1))


def _owned(owner: str, stems: tuple[str, ...], value: str, noun: str) -> Fact:
    """A fact of the form "OWNER's NOUN is VALUE", where the owner may be the user."""
    asked = "my" if owner == "My" else f"{owner}'s"
    questions = (
        f"What is {asked} {noun}?",
        f"What is {asked} {noun}?",
        f"What was {asked} {noun}?",
        f"Tell me {asked} {noun}.",
        f"Do you remember {asked} {noun}?",
    )
    answer_owner = "Your" if owner == "My" else f"{owner}'s"
    return Fact(stems, value, questions, f"{answer_owner} {noun} is")


def draw_circle(rng: random.Random) -> Circle:
    """Whom and what the facts of one conversation are about; often few, so that they are alike."""
    draw = rng.random()
    if draw < 0.25:
        return Circle(NAMES, NUMBER_ATTRIBUTES)
    if draw < 0.6:
        owners = rng.sample(NAMES, rng.randint(2, 6))
        return Circle(owners, rng.sample(NUMBER_ATTRIBUTES, rng.randint(1, 4)))
    return Circle(NAMES, (rng.choice(NUMBER_ATTRIBUTES),), only_numbers=True)


def _draw_fact(rng: random.Random, circle: Circle) -> Fact:
    owner = rng.choice(circle.owners) if rng.random() < 0.93 else pseudo_word(rng).capitalize()
    if rng.random() < 0.08:
        owner = "My"
    stem_owner = owner if owner == "My" else f"{owner}'s"
    draw = 0.0 if circle.only_numbers else rng.random()
    questions: tuple[str, ...]
    if draw < 0.5:
        noun = rng.choice(circle.number_attributes)
        usual = f"{stem_owner} {noun} is"
        rare = f"{owner} has {noun}" if owner != "My" else "I have " + noun
        return _owned(owner, (usual, usual, usual, usual, usual, rare), _digits(rng), noun)
    if draw < 0.56:
        noun = rng.choice(SHARED_NUMBERS)
        questions = (f"What is the {noun}?", f"Tell me the {noun}.", f"What was the {noun}?")
        return Fact((f"The {noun} is",), _digits(rng), questions, f"The {noun} is")
    if draw < 0.60:
        noun = rng.choice(("password", "code word"))
        value = pseudo_word(rng) if rng.random() < 0.6 else rng.choice(ANIMALS + OBJECTS)
        if owner == "My" or rng.random() < 0.7:
            return _owned(owner, (f"{stem_owner} {noun} is",), value, noun)
        questions = (f"What is the {noun}?", f"Tell me the {noun}.")
        return Fact((f"The {noun} is",), value, questions, f"The {noun} is")
    if draw < 0.75:
        noun = rng.choice(("favourite colour", "favourite colour", "favorite color"))
        return _owned(owner, (f"{stem_owner} {noun} is",), rng.choice(COLOURS), noun)
    if draw < 0.78:
        noun = rng.choice(("favourite", "favorite")) + rng.choice((" food", " animal"))
        value = rng.choice(FOODS if noun.endswith("food") else ANIMALS)
        return _owned(owner, (f"{stem_owner} {noun} is",), value, noun)
    if draw < 0.82:
        value = f"a {rng.choice(JOBS)}"
        if owner == "My":
            return Fact(("I am",), value, ("What is my job?", "What do I do?"), "You are")
        return Fact((f"{owner} is",), value, (f"What is {owner}'s job?", f"What does {owner} do?"), f"{owner} is")
    if draw < 0.93:
        value = rng.choice(CITIES)
        if owner == "My":
            return Fact(("I live in",), value, ("Where do I live?", "In which city do I live?"), "You live in")
        questions = (f"Where does {owner} live?", f"In which city does {owner} live?")
        return Fact((f"{owner} lives in",), value, questions, f"{owner} lives in")
    if draw < 0.95:
        value = rng.choice(NAMES) if rng.random() < 0.9 else pseudo_word(rng).capitalize()
        questions = ("What is my name?", "Who am I?", "Do you remember my name?")
        return Fact(("My name is", "My name is", "I am"), value, questions, "Your name is")
    thing = rng.choice(OBJECTS)
    return Fact((f"The {thing} is in the",), rng.choice(ROOMS), (f"Where is the {thing}?",), f"The {thing} is in the")


def _subject(fact: Fact) -> str:
    """What the fact is about, whatever the spelling."""
    return fact.answer_stem.replace("favorite", "favourite").replace("color", "colour")


def draw_facts(
    rng: random.Random, count: int, circle: Circle, *, held_out: bool, known: Sequence[Fact] = ()
) -> list[Fact]:
    """Draw facts that contradict neither each other nor the known ones."""
    taken = {_subject(fact) for fact in known}
    facts: list[Fact] = []
    while len(facts) < count:
        fact = _draw_fact(rng, circle)
        if _subject(fact) in taken or is_held_out(fact.answer_stem, fact.value) is not held_out:
            continue
        taken.add(_subject(fact))
        facts.append(fact)
    return facts


def _statement(fact: Fact, rng: random.Random, lead: str) -> list[Span]:
    stem = rng.choice(fact.stems)
    if lead.endswith((" that ", ", ", "And ")) and stem.startswith(("My ", "The ")):
        stem = stem[0].lower() + stem[1:]
    return [
        Span(lead + stem, Kind.PROMPT, fact.owner),
        Span(f" {fact.value}", Kind.GIVEN, fact.owner),
        Span(".", Kind.PROMPT),
    ]


def _restatement(fact: Fact, stem_kind: Kind, before: str = "") -> list[Span]:
    return [
        Span(before + fact.answer_stem, stem_kind, fact.owner),
        Span(f" {fact.value}", Kind.RECALL, fact.owner),
        Span(".", stem_kind),
    ]


def _passage(rng: random.Random, facts: Sequence[Fact], tokens_target: int) -> list[Span]:
    """State the facts in the given order, filling up with filler to about the wanted length."""
    statements = [_statement(fact, rng, _lead(rng, first=index == 0)) for index, fact in enumerate(facts)]
    used = sum(rough_token_count(span.text) for spans in statements for span in spans)
    fillers: list[str] = []
    while used < tokens_target:
        fillers.append(filler(rng))
        used += rough_token_count(fillers[-1])
    sentences = [[Span(text, Kind.PROMPT)] for text in fillers]
    places = sorted(rng.randint(0, len(fillers)) for _ in statements)
    for offset, (place, spans) in enumerate(zip(places, statements, strict=True)):
        sentences.insert(place + offset, spans)
    joined: list[Span] = []
    for index, sentence in enumerate(sentences):
        if index:
            joined.append(replace(sentence[0], text=" " + sentence[0].text))
            joined.extend(sentence[1:])
        else:
            joined.extend(sentence)
    return joined


def _lead(rng: random.Random, *, first: bool) -> str:
    if first:
        return rng.choice(_LEADS) if rng.random() < 0.5 else ""
    return rng.choice(_MIDDLE_LEADS) if rng.random() < 0.12 else ""


def _question(fact: Fact, rng: random.Random) -> Span:
    return Span(rng.choice(fact.questions), Kind.PROMPT)


def _user(*spans: Span) -> Turn:
    return Turn("user", spans)


def _reply(text: str) -> Turn:
    return Turn("assistant", (Span(text, Kind.REPLY),))


def _answer(fact: Fact) -> Turn:
    return Turn("assistant", tuple(_restatement(fact, Kind.REPLY)))


def _casual(text: str, rng: random.Random) -> str:
    """The text as a hurried user might type it."""
    if rng.random() < 0.2:
        text = text.rstrip(".!?")
    if text[1:2].isupper() or rng.random() > 0.15:
        return text
    return text[0].lower() + text[1:]


def small_talk(rng: random.Random) -> tuple[Turn, Turn]:
    """A polite exchange that has nothing to do with any fact."""
    prompts, reply = rng.choice(SMALL_TALK)
    return _user(Span(_casual(_fill(rng.choice(prompts), rng), rng), Kind.PROMPT)), _reply(reply)


def story(rng: random.Random) -> tuple[str, str]:
    """A topic ("a dog", "Anna") and a story of four to six sentences about it."""
    draw = rng.random()
    pronoun = "it"
    if draw < 0.6:
        thing = rng.choice(ANIMALS)
    elif draw < 0.7:
        thing, pronoun = rng.choice((("girl", "she"), ("boy", "he"), ("king", "he"), ("queen", "she"), ("robot", "it")))
    elif draw < 0.8:
        thing = pseudo_word(rng)
    else:
        thing = rng.choice(NAMES)
        pronoun = "she" if thing in FEMALE_NAMES else "he"
    topic = thing if thing[0].isupper() else f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
    the = thing if thing[0].isupper() else f"the {thing}"
    with_adjective = topic if thing[0].isupper() else f"a {rng.choice(('small', 'big', 'kind'))} {thing}"
    other = rng.choice([animal for animal in ANIMALS if animal != thing])
    fixed = {
        "a": rng.choice((topic, with_adjective)),
        "the": the,
        "The": the[0].upper() + the[1:],
        "he": pronoun,
        "He": pronoun.capitalize(),
        "other": other,
        "where": f"the {rng.choice(_PLACES)}",
    }
    opening = _STORY_OPENINGS[1] if thing[0].isupper() else rng.choice(_STORY_OPENINGS)
    parts = [opening, rng.choice(_STORY_EVENTS), rng.choice(_STORY_MIDDLES), rng.choice(_STORY_TURNS)]
    if rng.random() < 0.4:
        parts.append(rng.choice([turn for turn in _STORY_TURNS if turn != parts[-1]]))
    parts.append(rng.choice(_STORY_ENDINGS))
    text = " ".join(parts)
    for slot, word in fixed.items():
        text = text.replace(f"{{{slot}}}", word)
    return topic, _fill(text, rng)


def _story_exchange(rng: random.Random) -> tuple[Turn, Turn]:
    topic, text = story(rng)
    if rng.random() < 0.1:
        request = rng.choice(_OPEN_STORY_REQUESTS)
    else:
        request = rng.choice(_STORY_REQUESTS).replace("{topic}", topic)
    return _user(Span(_casual(request, rng), Kind.PROMPT)), _reply(text)


def _render(turns: Sequence[Turn]) -> list[Span]:
    marks = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    spans: list[Span] = [Span(BOS, Kind.GIVEN)]
    for turn in turns:
        spans.append(Span(marks[turn.role], Kind.GIVEN))
        spans.extend(turn.spans)
        spans.append(Span(END, Kind.REPLY if turn.role == "assistant" else Kind.GIVEN))
    return spans


def _turn_tokens(turns: Sequence[Turn]) -> int:
    return sum(rough_token_count(span.text) for turn in turns for span in turn.spans) + 2 * len(turns)


def _fact_count(rng: random.Random, tokens: int) -> int:
    most = max(1, min(24, tokens // 14))
    return max(rng.randint(1, most), rng.randint(1, most))


def recall_conversation(rng: random.Random, tokens_target: int) -> list[Span]:
    """State facts, then ask for them, again and again, until the wanted length is reached."""
    turns: list[Turn] = []
    facts: list[Fact] = []
    unasked: list[Fact] = []
    if rng.random() < 0.12:
        turns.append(Turn("system", (Span(rng.choice(_SYSTEM_TEXTS), Kind.PROMPT),)))
    circle = draw_circle(rng)
    front_loaded = rng.random() < 0.7
    state = True

    def next_asked() -> Fact:
        if not unasked:
            unasked.extend(rng.sample(facts, len(facts)))
        return unasked.pop()

    while _turn_tokens(turns) < tokens_target:
        if state:
            share = rng.uniform(0.3, 0.75) if front_loaded else rng.uniform(0.05, 0.3)
            budget = max(14, int(share * tokens_target))
            new = draw_facts(rng, _fact_count(rng, budget), circle, held_out=False, known=facts)
            facts.extend(new)
            unasked.clear()
            passage = _passage(rng, new, budget if rng.random() < 0.5 else 0)
            if rng.random() < 0.6:
                asked = next_asked()
                question = _question(asked, rng)
                turns.append(_user(*passage, Span(" " + question.text, Kind.PROMPT)))
                turns.append(_answer(asked))
            else:
                turns.extend((_user(*passage), _reply(rng.choice(_ACKNOWLEDGEMENTS))))
        elif rng.random() < 0.1:
            turns.extend(small_talk(rng))
        else:
            asked = next_asked()
            turns.extend((_user(_question(asked, rng)), _answer(asked)))
        state = not front_loaded and rng.random() < 0.3
    return _render(turns)


def notes(rng: random.Random, tokens_target: int) -> list[Span]:
    """Plain text that states facts and then repeats them: recall without any chat around it."""
    budget = int(rng.uniform(0.25, 0.6) * tokens_target)
    facts = draw_facts(rng, _fact_count(rng, budget), draw_circle(rng), held_out=False)
    spans = [Span(BOS, Kind.GIVEN), *_passage(rng, facts, budget if rng.random() < 0.5 else 0)]
    used = sum(rough_token_count(span.text) for span in spans)
    while used < tokens_target:
        if rng.random() < 0.1:
            new = [Span(" " + filler(rng), Kind.PROMPT)]
        else:
            new = _restatement(rng.choice(facts), Kind.PROMPT, before=" ")
        spans.extend(new)
        used += sum(rough_token_count(span.text) for span in new)
    return spans


def chat(rng: random.Random, tokens_target: int) -> list[Span]:
    """Small talk and stories."""
    spans: list[Span] = []
    used = 0
    while used < tokens_target:
        turns: list[Turn] = []
        if rng.random() < 0.15:
            turns.append(Turn("system", (Span(rng.choice(_SYSTEM_TEXTS), Kind.PROMPT),)))
        for _ in range(rng.randint(1, 5)):
            turns.extend(_story_exchange(rng) if rng.random() < 0.35 else small_talk(rng))
        spans.extend(_render(turns))
        used += _turn_tokens(turns) + 1
    return spans


def stories(rng: random.Random, tokens_target: int) -> list[Span]:
    """Plain story text, one story after the other."""
    spans: list[Span] = []
    used = 0
    while used < tokens_target:
        text = story(rng)[1]
        spans.extend((Span(BOS, Kind.GIVEN), Span(text, Kind.PROSE), Span(END, Kind.PROSE)))
        used += rough_token_count(text) + 2
    return spans


def probe(rng: random.Random, tokens_target: int, count_tokens: Callable[[str], int]) -> Probe:
    """A held-out conversation of about the wanted length that ends with a question.

    A third of the probes state the facts in the first turn, make small talk in the second and ask in
    the third; the others state and ask in one turn.
    """
    multi_turn = tokens_target >= 60 and rng.random() < 1 / 3
    talk = small_talk(rng) if multi_turn else ()
    overhead = sum(count_tokens(turn.text) + 2 for turn in talk) + 14
    budget = max(10, tokens_target - overhead)
    facts = draw_facts(rng, _fact_count(rng, budget), draw_circle(rng), held_out=True)
    passage = _passage(rng, facts, budget)
    asked = rng.choice(facts)
    question = _question(asked, rng)
    if multi_turn:
        acknowledgement = _reply(rng.choice(_ACKNOWLEDGEMENTS))
        turns = (_user(*passage), acknowledgement, *talk, _user(question))
    else:
        turns = (_user(*passage, Span(" " + question.text, Kind.PROMPT)),)
    return Probe(turns, asked.value, _answer(asked).text)


def render_prompt(turns: Sequence[Turn]) -> str:
    """The conversation as the chat template renders it, up to where the assistant speaks next."""
    return "".join(span.text for span in _render(turns)) + ASSISTANT


def plain_turn(role: str, text: str) -> Turn:
    """A message that is simply this text."""
    return Turn(role, (Span(text, Kind.REPLY if role == "assistant" else Kind.PROMPT),))
