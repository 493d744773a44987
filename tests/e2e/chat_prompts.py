"""Fifty conversations for the default model: short and long, one turn and several, prose, code, numbers, other scripts.

Owns the texts; must not know models. The long ones are put together from sentences, so that they are readable, repeat
themselves as documents do, and are the same in every run.
"""

from __future__ import annotations

from itertools import cycle, islice

Chat = list[dict[str, str]]

QUESTIONS = (
    "What is the capital of Japan?",
    "What is the capital of Germany? Answer with one word.",
    "Name the four seasons.",
    "Hi!",
    "Why is the sky blue?",
    "Write a haiku about a mountain lake in winter.",
    "Explain photosynthesis to a ten-year-old child.",
    "Give me three synonyms of the word 'happy'.",
    "What is 17 + 25?",
    "A train leaves at 14:10 and arrives at 16:45. How long does the journey take?",
    "Translate 'good morning, my friend' into Spanish.",
    "Übersetze ins Englische: Der Zug hat heute leider Verspätung.",
    "¿Cuál es el río más largo de América del Sur?",
    "日本で一番高い山は何ですか。",
    "Quelle est la différence entre un roman et une nouvelle ?",
    "List five fruits in alphabetical order, separated by commas.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What does this do?\n\n```python\nprint(sum(x * x for x in range(10) if x % 2))\n```",
    "Fix the bug: `for i in range(len(xs)): xs.pop(i)`",
    "Write a SQL query for the ten customers who spent most last year.",
    'Turn this into JSON: name Ada, born 1815, fields mathematics and "computing".',
    "What is the difference between TCP and UDP?",
    "Who wrote 'Pride and Prejudice', and when was it published?",
    "Tell me a short story about a lighthouse keeper and a lost whale.",
    "Complete the sentence: The quick brown fox",
    "Is a tomato a fruit or a vegetable? Give a reason.",
    "Give me a recipe for pancakes with exact amounts.",
    "Suggest a name for a small bakery by the sea.",
    "How do I boil an egg?",
    "What are prime numbers? Give the first ten.",
    "Describe the taste of a lemon without the words 'sour' and 'acid'.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Write an e-mail that asks my landlord to repair the heating.",
    "🙂🙃 What do these two emoji express?",
    "Convert 72 degrees Fahrenheit to Celsius, step by step.",
    "Write one sentence in which every word begins with the letter s.",
)

CONVERSATIONS: tuple[Chat, ...] = (
    [
        {"role": "system", "content": "You are a pirate. Answer in one sentence."},
        {"role": "user", "content": "Where can I buy bread?"},
    ],
    [
        {"role": "system", "content": "Answer with a single number and nothing else."},
        {"role": "user", "content": "How many legs do three spiders have together?"},
    ],
    [
        {"role": "user", "content": "My name is Ingrid and I have two cats, Tom and Mia."},
        {"role": "assistant", "content": "Nice to meet you, Ingrid! How old are Tom and Mia?"},
        {"role": "user", "content": "Tom is four and Mia is nine. Which of my cats is older?"},
    ],
    [
        {"role": "user", "content": "Let us count. One."},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three."},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Five."},
    ],
)

PLACES = (
    "Harbour Street",
    "the old mill",
    "North Gate",
    "the ferry landing",
    "Chapel Hill",
    "the glass works",
    "Elm Row",
)
PEOPLE = ("Marta", "Oskar", "Liv", "Jonas", "Priya", "Tomás", "Wei")
EVENTS = (
    "{person} counted {n} bicycles near {place} before the rain began.",
    "A delivery of {n} crates reached {place}; {person} signed for it.",
    "The lamp at {place} was out again, and {person} reported it for the {n}th time.",
    "{person} sold {n} loaves at {place}, more than on any other day that week.",
    "At {place} the water stood {n} centimetres high, wrote {person}.",
    "Only {n} visitors came to {place}, although {person} had hoped for many more.",
    "{person} walked from {place} to the station in {n} minutes.",
)


def chronicle(sentences: int, offset: int = 0) -> str:
    """So many sentences of a small town's diary; `offset` begins it elsewhere."""
    rows = zip(cycle(EVENTS), cycle(islice(cycle(PEOPLE), 3, 8)), cycle(islice(cycle(PLACES), 1, 7)), strict=False)
    return " ".join(
        event.format(person=person, place=place, n=7 + (number * 37) % 90)
        for number, (event, person, place) in enumerate(islice(rows, offset, offset + sentences))
    )


# (sentences of the chronicle, what is asked about it); a sentence is about 20 tokens
DOCUMENTS = (
    (6, "Summarize this diary in one sentence."),
    (10, "Who is mentioned most often?"),
    (14, "List all the places that are named."),
    (18, "Which day was the most unusual, and why?"),
    (24, "Write a headline for this report."),
    (32, "What happened at the old mill?"),
    (48, "Summarize the report in three points."),
    (60, "Is there any problem that keeps coming back?"),
    (80, "Continue the diary with two more sentences."),
    (104, "Which numbers occur in the text? Name five of them."),
)


def chats() -> list[Chat]:
    """All fifty, the long ones between the short ones."""
    short: list[Chat] = [[{"role": "user", "content": question}] for question in QUESTIONS]
    long: list[Chat] = [
        [{"role": "user", "content": f"{question}\n\n{chronicle(sentences, offset)}"}]
        for offset, (sentences, question) in enumerate(DOCUMENTS)
    ]
    rest = [*CONVERSATIONS, *short]
    mixed: list[Chat] = []
    for number, chat in enumerate(long):
        mixed += [*rest[number * 4 : number * 4 + 4], chat]
    return mixed + rest[len(long) * 4 :]
