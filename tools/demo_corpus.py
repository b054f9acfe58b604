"""The demo pair's little world: chats made from a grammar, seeded, with nothing downloaded.

Knows nothing of tokenizers, tensors or chat templates. A `Chat` holds messages in the OpenAI form; its answers are
correct by construction. Prompts are split by a hash of their text, so a held-out prompt is never trained on in any turn.
"""

# ruff: noqa: E501  (tables of sentences and words)

import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
HELD_OUT_SHARE = 24  # one prompt of so many is held out


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question with its answer, the answer's core in a word or two, and a brief thought that leads to it."""

    prompt: str
    answer: str
    word: str | None = None
    thought: str


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One conversation. The last message is the assistant's; `thinking` and `tools` go to the chat template."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    prompts: list[str] = field(default_factory=list)


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out split (a hash of its letters, so case and marks do not matter)."""
    key = "".join(c for c in prompt.lower() if c.isalnum())
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


NAMES = "Tom Anna Ben Lucy Max Mia Sam Nora Leo Ella Jack Rosa Paul Emma Finn Clara Hugo Ada Otto Lily".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
# animal | name in stories | plural | sound | home | food | body | baby
ANIMALS = _rows("""
fox|Ruby|foxes|barks|in a den in the forest|mice and berries|red fur and a bushy tail|kit
owl|Oscar|owls|hoots|in a hollow tree|mice and insects|soft feathers and big round eyes|owlet
cat|Luna|cats|meows|in a warm house|fish and mice|soft fur and long whiskers|kitten
dog|Buddy|dogs|barks|in a house with a garden|meat and bones|a wet nose and a wagging tail|puppy
bear|Bruno|bears|growls|in a cave in the mountains|honey and fish|thick brown fur and strong paws|cub
rabbit|Daisy|rabbits|squeaks|in a burrow under the meadow|grass and carrots|long ears and a short tail|bunny
mouse|Pip|mice|squeaks|in a small hole in the wall|seeds and cheese|tiny paws and a long tail|pup
frog|Fred|frogs|croaks|in a green pond|flies and worms|smooth green skin and long legs|tadpole
duck|Dora|ducks|quacks|on a quiet lake|plants and snails|a flat bill and webbed feet|duckling
horse|Storm|horses|neighs|in a stable on the farm|grass and oats|a long mane and four strong legs|foal
cow|Molly|cows|moos|in a barn on the farm|grass and hay|two horns and a big body|calf
sheep|Wooly|sheep|bleats|on a green hill|grass and leaves|thick white wool|lamb
lion|Leon|lions|roars|on the wide savanna|meat|a golden mane and sharp teeth|cub
wolf|Greta|wolves|howls|in a den in the hills|meat and fish|grey fur and sharp teeth|pup
elephant|Ella|elephants|trumpets|on the warm savanna|leaves and fruit|a long trunk and large ears|calf
hedgehog|Hanna|hedgehogs|snuffles|in a nest under the leaves|worms and beetles|many sharp spines|hoglet
squirrel|Nutty|squirrels|chatters|in a nest in a tall tree|nuts and seeds|a big bushy tail|kit
penguin|Pablo|penguins|honks|on a cold icy coast|fish and krill|black and white feathers|chick
whale|Willa|whales|sings|in the deep blue ocean|krill and small fish|a huge smooth body and two fins|calf
turtle|Tilly|turtles|hisses|on a sandy beach|plants and shrimp|a hard round shell|hatchling
bee|Bella|bees|buzzes|in a hive in the garden|nectar and pollen|four thin wings and yellow stripes|larva
crow|Carl|crows|caws|in a nest on a high roof|seeds and insects|shiny black feathers|chick
""")
# country | capital | continent | language
COUNTRIES = _rows("""
France|Paris|Europe|French
Italy|Rome|Europe|Italian
Spain|Madrid|Europe|Spanish
Germany|Berlin|Europe|German
Portugal|Lisbon|Europe|Portuguese
Greece|Athens|Europe|Greek
Austria|Vienna|Europe|German
Poland|Warsaw|Europe|Polish
Sweden|Stockholm|Europe|Swedish
Norway|Oslo|Europe|Norwegian
Finland|Helsinki|Europe|Finnish
Denmark|Copenhagen|Europe|Danish
Hungary|Budapest|Europe|Hungarian
Ireland|Dublin|Europe|English
Japan|Tokyo|Asia|Japanese
China|Beijing|Asia|Chinese
India|New Delhi|Asia|Hindi
Thailand|Bangkok|Asia|Thai
Vietnam|Hanoi|Asia|Vietnamese
Turkey|Ankara|Asia|Turkish
Egypt|Cairo|Africa|Arabic
Kenya|Nairobi|Africa|Swahili
Morocco|Rabat|Africa|Arabic
Canada|Ottawa|North America|English
Mexico|Mexico City|North America|Spanish
Cuba|Havana|North America|Spanish
Brazil|Brasilia|South America|Portuguese
Peru|Lima|South America|Spanish
Chile|Santiago|South America|Spanish
Australia|Canberra|Australia|English
""")
CITIES = [row[1] for row in COUNTRIES if row[1] != "Mexico City"] + ["London", "Boston", "Zurich", "Milan"]
PLANETS = _rows("""
Mercury|first|small and grey, and it is the closest planet to the Sun
Venus|second|hot and covered with thick clouds
Earth|third|blue and green, and it is our home
Mars|fourth|red, cold and dusty
Jupiter|fifth|the largest planet, with a great red spot
Saturn|sixth|a large planet with wide bright rings
Uranus|seventh|a cold blue planet that lies on its side
Neptune|eighth|the farthest planet, blue, cold and windy
""")
OPPOSITES = [pair.split("/") for pair in (
    "hot/cold big/small fast/slow up/down left/right day/night open/closed happy/sad light/dark old/new full/empty "
    "wet/dry hard/soft high/low early/late long/short rich/poor strong/weak loud/quiet clean/dirty near/far in/out "
    "first/last true/false heavy/light thick/thin sweet/sour good/bad young/old wide/narrow"
).split()]  # fmt: skip
PLURALS = [pair.split("/") for pair in (
    "child/children tooth/teeth foot/feet man/men woman/women book/books box/boxes city/cities leaf/leaves "
    "baby/babies apple/apples house/houses tree/trees dish/dishes knife/knives berry/berries star/stars "
    "glass/glasses key/keys story/stories car/cars bus/buses person/people flower/flowers"
).split()]  # fmt: skip
COLOURS = [pair.split("/") for pair in (
    "grass/green snow/white coal/black blood/red milk/white lemon/yellow carrot/orange banana/yellow chocolate/brown "
    "tomato/red cherry/red night/black plum/purple pumpkin/orange cucumber/green strawberry/red"
).split()]  # fmt: skip
WORDS = [triple.split("/") for triple in (
    "house/maison/casa cat/chat/gato dog/chien/perro water/eau/agua bread/pain/pan sun/soleil/sol moon/lune/luna "
    "book/livre/libro red/rouge/rojo green/vert/verde white/blanc/blanco hello/bonjour/hola thanks/merci/gracias "
    "friend/ami/amigo day/jour/día night/nuit/noche tree/arbre/árbol sea/mer/mar school/école/escuela "
    "milk/lait/leche coffee/café/café love/amour/amor"
).split()]  # fmt: skip
LISTS = {
    "fruits": "apple banana cherry lemon orange pear plum".split(),
    "vegetables": "carrot onion potato tomato cucumber pumpkin bean".split(),
    "colours": "red blue green yellow white black orange".split(),
    "animals": "cat dog fox owl bear horse rabbit".split(),
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus".split(),
    "countries": "France Italy Spain Japan Kenya Canada Peru".split(),
    "cities": "Paris Rome Madrid Tokyo Cairo Ottawa Lima".split(),
    "tools": "hammer saw knife needle brush spoon rope".split(),
    "drinks": "water milk tea coffee juice cocoa lemonade".split(),
    "months": MONTHS[:7],
    "days": DAYS,
}
EXPLANATIONS = list(_rows("""
Why is the sky blue?|The light of the Sun holds all colours. When it meets the air, the blue part is scattered far more than the red part. So blue light comes to our eyes from every side, and the sky looks blue.
How does rain form?|The Sun warms the water of seas and lakes, and a part of it rises as vapour. High in the cold air the vapour turns into tiny drops, and the drops make clouds. When the drops grow too heavy, they fall down as rain.
How do plants grow?|A plant starts as a seed in the ground. It needs water, light and air. The roots take water from the soil, and the green leaves use light to make sugar. With this food the plant grows taller day by day.
What is the Moon?|The Moon is a ball of rock that moves around the Earth. It takes about one month for one round. It makes no light of its own: we see it because the Sun shines on it.
What is the Sun?|The Sun is a star. It is a huge ball of hot gas in the middle of our solar system. It gives the Earth light and warmth, and without it there would be no life here.
Why do we sleep?|Sleep gives the body time to rest and to repair itself. The brain sorts what it has learned during the day. After a good night we feel fresh, and we can think and learn better.
How does a bicycle work?|You push the pedals with your feet. The pedals turn a chain, and the chain turns the rear wheel. The handlebar turns the front wheel, so that you can steer, and the brakes make you stop.
What is a computer?|A computer is a machine that follows instructions. It reads data, works with it very fast, and shows the result. The instructions are called a program, and people write them in languages such as Python.
What is a language model?|A language model is a program that has read a lot of text. It looks at the words so far and guesses the next one. It does this again and again, one token at a time, until the answer is complete.
What is speculative decoding?|In speculative decoding a small and fast model guesses several tokens ahead. The large model then checks all the guesses in one step. It keeps the ones it agrees with, so the text is the same, but it comes faster.
What is a drafter?|A drafter is a small model that helps a large one. It guesses the next few tokens quickly. The large model checks them together and keeps the good ones, so no quality is lost and time is saved.
How do birds fly?|Birds have light bones and strong wings. When the wings beat down, they push the air down and the bird goes up. In the air the curved wings give lift, and the tail helps the bird to steer.
Why do leaves fall in autumn?|In autumn the days get shorter and colder. The tree takes the green colour and the food back from its leaves, so they turn yellow and red. Then it drops them to save water in winter.
How is bread made?|Bread is made from flour, water, salt and yeast. You mix them to a dough and let it rest in a warm place, where the yeast makes it rise. Then you bake it in a hot oven until the crust is brown.
Why is the sea salty?|Rain washes small amounts of salt out of the rocks, and the rivers carry it to the sea. The water leaves the sea again as vapour, but the salt stays. So over a very long time the sea became salty.
What is a rainbow?|A rainbow appears when the Sun shines on rain. Each drop of water bends the light and splits it into its colours. We see them as an arc of red, orange, yellow, green, blue and violet.
How does a boat float?|A boat pushes water away, and the water pushes back. As long as the boat with its load weighs less than the water it could push away, it stays on top. That is why even a ship of steel can float.
What is music?|Music is sound in order. It has rhythm, which is the pattern of long and short notes, and melody, which is the pattern of high and low notes. People in every country sing and play it.
Why do we have seasons?|The axis of the Earth is tilted. For one half of the year our side leans to the Sun, the days are long, and it is summer. For the other half it leans away, the days are short, and it is winter.
How do bees make honey?|Bees collect sweet nectar from flowers. In the hive they pass it on from bee to bee and put it into small cells of wax. There the water leaves it slowly, and the nectar becomes thick golden honey.
What is electricity?|Electricity is the flow of tiny charged particles, the electrons, through a wire. A battery or a power plant pushes them along. The flow can light a lamp, heat an oven or run a motor.
What is a volcano?|A volcano is a mountain with an opening to the hot inside of the Earth. Deep below, the rock is so hot that it melts. At times the melted rock rises, breaks out and flows down as lava.
"""))  # fmt: skip
HOW_TO = list(_rows("""
make tea|Boil fresh water.|Put a tea bag into a cup.|Pour the hot water over it.|Wait for three minutes.|Take out the tea bag and enjoy your tea.
boil an egg|Put the egg into a small pot.|Cover it with cold water.|Bring the water to a boil.|Wait for seven minutes.|Cool the egg under cold water.
plant a tree|Choose a sunny place.|Dig a wide hole.|Set the tree into the hole.|Fill the hole with soil.|Give the tree plenty of water.
wash your hands|Wet your hands with warm water.|Take a little soap.|Rub your hands for twenty seconds.|Rinse them with clean water.|Dry them with a towel.
make a sandwich|Take two slices of bread.|Spread butter on both slices.|Add cheese and a slice of tomato.|Put the slices together.|Cut the sandwich in half.
write a letter|Write the date at the top.|Greet the reader by name.|Say what you want to say.|End with kind regards.|Sign the letter and send it.
clean a room|Open the window.|Put all things back in their place.|Wipe the table and the shelves.|Sweep the floor.|Take out the rubbish.
learn a song|Listen to the song a few times.|Read the words aloud.|Sing one line at a time.|Put the lines together.|Sing the song every day.
make a salad|Wash the leaves and the vegetables.|Cut them into small pieces.|Put them into a large bowl.|Add oil, salt and lemon.|Mix the salad and serve it.
"""))  # fmt: skip
JOKES = list(_rows("""
a cow|Why do cows wear bells? Because their horns do not work.
a computer|Why was the computer cold? Because it left its windows open.
a book|Why was the maths book sad? Because it had too many problems.
a bear|What do you call a bear without teeth? A gummy bear.
the sea|What did the sea say to the beach? Nothing, it just waved.
a bicycle|Why did the bicycle fall over? Because it was two tired.
a fish|Where do fish keep their money? In the river bank.
a bee|Why do bees have sticky hair? Because they use honey combs.
"""))  # fmt: skip
PLOTS = {
    "lost": "One evening {n} walked too far and lost the way. The trees looked strange and the wind was cold. Then a {f} "
    "came by and asked what was wrong. \"I cannot find my home,\" said {n}. The {f} knew every path and led {n} back "
    "before the moon was high. From that day on they were good friends.",
    "rain": "One day it began to rain and did not stop. The water rose, and {n} had to climb on a big stone. A {f} saw it "
    "and brought a long branch. {n} held on to it and reached dry ground. They made a small fire, told old stories and "
    "waited together until the sun came back.",
    "gift": "In the morning {n} found a small golden key on the ground. {n} asked everyone, but nobody knew it. At last an "
    "old {f} smiled and said that it was lost long ago. As thanks {n} got a basket of {o}. {n} shared them with all the "
    "neighbours, and there was a feast that night.",
    "race": "Every spring there was a great race to the river. {n} was not the fastest, but {n} trained every day. In the "
    "race a {f} fell and hurt a leg. {n} stopped and helped the {f} to walk. They came in last, but everybody cheered, and "
    "{n} was proud and happy.",
    "star": "One night a star fell from the sky and landed in the grass. It was small and very sad. {n} and a {f} carried it "
    "to the top of the highest hill. There they waited for the wind. When it came, the star rose slowly and went home. Since "
    "then it shines above the hill every night.",
    "song": "{n} loved to sing, but the others laughed about it. So {n} sang alone by the river. One winter a thick fog came, "
    "and a little {f} could not find the way home. {n} sang as loud as possible, and the {f} followed the song. After that "
    "nobody laughed, and all of them sang together.",
}  # fmt: skip
STORY_FOOD = ["apples", "berries", "nuts", "cakes", "pears"]
PLACES = ["forest", "meadow", "village", "valley", "garden", "mountains"]
TRAITS = ["brave", "shy", "clever", "kind", "lazy", "curious"]
PYTHON = _rows("""
prints hello|print("hello")
prints the numbers from 1 to 5|for i in range(1, 6):\\n    print(i)
adds two numbers|def add(a, b):\\n    return a + b
multiplies two numbers|def multiply(a, b):\\n    return a * b
returns the larger of two numbers|def larger(a, b):\\n    return a if a > b else b
squares a number|def square(x):\\n    return x * x
checks if a number is even|def is_even(n):\\n    return n % 2 == 0
reverses a string|def reverse(text):\\n    return text[::-1]
counts the words in a text|def count_words(text):\\n    return len(text.split())
sums a list|def total(values):\\n    return sum(values)
computes the mean of a list|def mean(values):\\n    return sum(values) / len(values)
greets a person|def greet(name):\\n    print("Hello, " + name + "!")
sorts a list|def sort_list(values):\\n    return sorted(values)
reads a file|def read(path):\\n    with open(path) as f:\\n        return f.read()
""")


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _number(r: random.Random) -> int:
    return r.randint(0, r.choice([10, 10, 20, 30]))


def arithmetic(r: random.Random) -> Item:
    kind = r.choice(["add", "add", "sub", "mul", "div", "double", "half"])
    a, b = _number(r), _number(r)
    if kind == "sub":
        a, b = max(a, b), min(a, b)
    elif kind in ("mul", "div"):
        a, b = r.randint(1, 10), r.randint(1, 10)
    if kind == "double":
        a, p = a % 50, r.choice(["What is the double of {a}?", "Double {a}.", "What is twice {a}?"])
        return Item(prompt=p.format(a=a), answer=f"The double of {a} is {2 * a}.", word=str(2 * a),
                    thought=f"I compute {a} + {a} = {2 * a}.")  # fmt: skip
    if kind == "half":
        a, p = 2 * (a % 50), r.choice(["What is half of {a}?", "Halve {a}.", "What is the half of {a}?"])
        return Item(prompt=p.format(a=a), answer=f"Half of {a} is {a // 2}.", word=str(a // 2),
                    thought=f"I compute {a} / 2 = {a // 2}.")  # fmt: skip
    sign, name = {"add": ("+", "plus"), "sub": ("-", "minus"), "mul": ("*", "times"),
                  "div": ("/", "divided by")}[kind]  # fmt: skip
    if kind == "div":
        a = a * b
    value = {"add": a + b, "sub": a - b, "mul": a * b, "div": a // (b or 1)}[kind]
    p = r.choice([f"What is {a} {sign} {b}?", f"What is {a} {name} {b}?", f"{a} {sign} {b}", f"{a} {sign} {b} = ?",
                  f"How much is {a} {name} {b}?", f"Calculate {a} {sign} {b}.", f"Please compute {a} {sign} {b}."])  # fmt: skip
    return Item(prompt=p, answer=f"{a} {sign} {b} = {value}.", word=str(value),
                thought=f"The user asks for {a} {name} {b}. The result is {value}.")  # fmt: skip


def sequence(r: random.Random) -> Item:
    start, step = r.randint(0, 12), r.choice([1, 2, 2, 3, 5, 10])
    if r.random() < 0.4:
        n = r.randint(3, 12)
        seq = [str(start + i) for i in range(n)]
        if r.random() < 0.3:
            seq.reverse()
            p = r.choice(["Count down from {} to {}.", "Please count down from {} to {}."])
        else:
            p = r.choice(["Count from {} to {}.", "Please count from {} to {}.", "List the numbers from {} to {}."])
        return Item(prompt=p.format(seq[0], seq[-1]), answer=", ".join(seq) + ".",
                    thought=f"I start at {seq[0]} and stop at {seq[-1]}.")  # fmt: skip
    seq = [str(start + step * i) for i in range(8)]
    p = r.choice(["Continue the sequence {}.", "What comes next: {}?", "Continue: {}", "Go on: {}"])
    return Item(prompt=p.format(", ".join(seq[:4])), word=seq[4], thought=f"Each number is {step} more than the one before.",
                answer=f"The next numbers are {_join(seq[4:])}. Each step adds {step}.")  # fmt: skip


def compare(r: random.Random) -> Item:
    a, b = r.sample(range(100), 2)
    if r.random() < 0.35:
        kind = "even" if a % 2 == 0 else "odd"
        p = r.choice(["Is {} even or odd?", "Is the number {} even or odd?"]).format(a)
        return Item(prompt=p, answer=f"{a} is {kind}.", word=kind, thought=f"The last digit of {a} is {a % 10}.")
    small = r.random() < 0.4
    word = r.choice(["smaller", "less"] if small else ["bigger", "larger", "greater"])
    best = min(a, b) if small else max(a, b)
    p = r.choice(
        [
            f"Which is {word}, {a} or {b}?",
            f"Which number is {word}: {a} or {b}?",
            f"What is {word}, {a} or {b}?",
        ]
    )
    other = a + b - best
    return Item(prompt=p, answer=f"{best} is {word} than {other}.", word=str(best), thought=f"I compare {a} and {b}.")


def units(r: random.Random) -> Item:
    big, small, k = r.choice([("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("kilograms", "grams", 1000),
                              ("hours", "minutes", 60), ("minutes", "seconds", 60), ("weeks", "days", 7), ("days", "hours", 24),
                              ("years", "months", 12), ("litres", "millilitres", 1000)])  # fmt: skip
    n = r.randint(2, 9)
    p = r.choice([f"How many {small} are {n} {big}?", f"Convert {n} {big} to {small}.", f"How many {small} are in {n} {big}?",
                  f"What are {n} {big} in {small}?"])  # fmt: skip
    return Item(prompt=p, answer=f"{n} {big} are {n * k} {small}.", word=str(n * k),
                thought=f"There are {k} {small} for each of the {big}. {n} * {k} = {n * k}.")  # fmt: skip


def calendar(r: random.Random) -> Item:
    names, noun = r.choice([(DAYS, "day"), (MONTHS, "month")])
    i = r.randrange(len(names))
    if noun == "month" and r.random() < 0.4:
        if r.random() < 0.5:
            p = r.choice(["How many days does {} have?", "How many days are in {}?", "How long is {}?"])
            return Item(prompt=p.format(names[i]), answer=f"{names[i]} has {MONTH_DAYS[i]} days.", word=str(MONTH_DAYS[i]),
                        thought=f"The user asks for the length of {names[i]}.")  # fmt: skip
        p = r.choice(["What number is the month {}?", "Which number does the month of {} have?"])
        return Item(prompt=p.format(names[i]), answer=f"{names[i]} is month number {i + 1} of the year.", word=str(i + 1),
                    thought=f"I count from January to {names[i]}.")  # fmt: skip
    n, sign = r.choice([1, 1, 2, 3]), r.choice([1, -1])
    j, side = (i + n * sign) % len(names), "after" if sign > 0 else "before"
    if n == 1:
        p = r.choice([f"What {noun} comes {side} {names[i]}?", f"Which {noun} is {side} {names[i]}?",
                      f"What is the {noun} {side} {names[i]}?"])  # fmt: skip
        answer = f"The {noun} {side} {names[i]} is {names[j]}."
    else:
        p = r.choice(
            [
                f"What {noun} is {NUMBERS[n]} {noun}s {side} {names[i]}?",
                f"Which {noun} comes {n} {noun}s {side} {names[i]}?",
            ]
        )
        answer = f"{NUMBERS[n].capitalize()} {noun}s {side} {names[i]} is {names[j]}."
    return Item(
        prompt=p,
        answer=answer,
        word=names[j],
        thought=f"I go {n} step{'s' * (n > 1)} from {names[i]} to {names[j]}.",
    )


def words(r: random.Random) -> Item:
    kind = r.choice(["opposite", "plural", "colour", "translate", "translate"])
    if kind == "opposite":
        a, b = r.choice(OPPOSITES)
        if r.random() < 0.5 and a not in ("light",) and b not in ("old", "light"):
            a, b = b, a
        p = r.choice(
            [
                "What is the opposite of {}?",
                "Give me the opposite of {}.",
                "Opposite of {}?",
                "What is the opposite of the word {}?",
            ]
        )
        return Item(
            prompt=p.format(a),
            answer=f"The opposite of {a} is {b}.",
            word=b,
            thought=f"The opposite of {a} is asked. It is {b}.",
        )
    if kind == "plural":
        a, b = r.choice(PLURALS + [[row[0], row[2]] for row in ANIMALS])
        p = r.choice(
            [
                "What is the plural of {}?",
                "Give me the plural of {}.",
                "Plural of {}?",
                "What is the plural of the word {}?",
            ]
        )
        return Item(prompt=p.format(a), answer=f"The plural of {a} is {b}.", word=b, thought=f"One {a}, two {b}.")
    if kind == "colour":
        a, b = r.choice(COLOURS)
        p = r.choice(
            [
                "What colour is {}?",
                "Which colour has {}?",
                "Tell me the colour of {}.",
                "What is the colour of {}?",
            ]
        )
        thing = a if a in ("grass", "snow", "coal", "blood", "milk", "chocolate") else ("the " if a == "night" else "") + (
            a if a == "night" else _a(a))  # fmt: skip
        return Item(prompt=p.format(thing), answer=f"{thing[0].upper() + thing[1:]} is {b}.", word=b,
                    thought=f"I think of {thing}. It is {b}.")  # fmt: skip
    en, fr, es = r.choice(WORDS)
    language, out = r.choice([("French", fr), ("Spanish", es)])
    p = r.choice([f"What is {en} in {language}?", f"Translate {en} to {language}.", f"How do you say {en} in {language}?",
                  f"What is the {language} word for {en}?"])  # fmt: skip
    return Item(
        prompt=p,
        answer=f'In {language}, "{en}" is "{out}".',
        word=out,
        thought=f"The {language} word for {en} is {out}.",
    )


def capital(r: random.Random) -> Item:
    country, city, continent, language = r.choice(COUNTRIES)
    kind = r.choice(["capital", "capital", "continent", "language", "reverse"])
    if kind == "capital":
        p = r.choice(["What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.",
                      "Capital of {}?", "Do you know the capital of {}?"])  # fmt: skip
        return Item(prompt=p.format(country), answer=f"The capital of {country} is {city}.", word=city,
                    thought=f"The user asks for the capital of {country}. It is {city}.")  # fmt: skip
    if kind == "reverse":
        p = r.choice(
            [
                "Of which country is {} the capital?",
                "{} is the capital of which country?",
                "In which country is {}?",
            ]
        )
        return Item(prompt=p.format(city), answer=f"{city} is the capital of {country}.", word=country,
                    thought=f"{city} lies in {country}.")  # fmt: skip
    if kind == "continent":
        p = r.choice(["On which continent is {}?", "Where is {}?", "Which continent does {} belong to?"])
        return Item(prompt=p.format(country), answer=f"{country} is in {continent}.", word=continent,
                    thought=f"I look for {country} on the map. It is in {continent}.")  # fmt: skip
    p = r.choice(
        [
            "Which language do people speak in {}?",
            "What language is spoken in {}?",
            "What do people speak in {}?",
        ]
    )
    return Item(prompt=p.format(country), answer=f"In {country}, people speak {language}.", word=language,
                thought=f"The language of {country} is {language}.")  # fmt: skip


def animal(r: random.Random) -> Item:
    noun, _, plural, sound, home, food, body, baby = r.choice(ANIMALS)
    kind = r.choice(["home", "food", "sound", "baby", "describe", "describe", "describe", "versus", "versus"])
    if kind == "describe":
        p = r.choice(
            [
                "Describe {}.",
                "Tell me about the {n}.",
                "What do you know about {pl}?",
                "What is {}?",
                "Write a few sentences about {pl}.",
            ]
        )
        return Item(prompt=p.format(_a(noun), n=noun, pl=plural), thought=f"The user wants to know about {plural}: body, home, food and young.",
                    answer=f"{_a(noun).capitalize()} is an animal with {body}. It lives {home}"
                    f" and eats {food}. {_a(noun).capitalize()} {sound}, and its young is called {_a(baby)}.")  # fmt: skip
    if kind == "versus":
        other = r.choice([row for row in ANIMALS if row[0] != noun])
        p = r.choice(["Compare {} and {}.", "What is the difference between {} and {}?"]).format(_a(noun), _a(other[0]))
        return Item(prompt=p, thought=f"I compare body, food and sound of {plural} and {other[2]}.",
                    answer=f"The {noun} has {body}, while the {other[0]} has {other[6]}. The {noun} eats {food}, but the {other[0]} eats {other[5]}."
                    f" The {noun} {sound}, and the {other[0]} {other[3]}.")  # fmt: skip
    p, answer, word = {
        "home": (r.choice([f"Where does {_a(noun)} live?", f"Where do {plural} live?"]), f"The {noun} lives {home}.", None),
        "food": (r.choice([f"What does {_a(noun)} eat?", f"What do {plural} eat?"]), f"The {noun} eats {food}.", food.split()[0]),
        "sound": (r.choice([f"What sound does {_a(noun)} make?", f"What does {_a(noun)} do when it calls?"]), f"The {noun} {sound}.", None),
        "baby": (r.choice([f"What is a young {noun} called?", f"What do you call the young of {_a(noun)}?"]), f"A young {noun} is called {_a(baby)}.", baby),
    }[kind]  # fmt: skip
    return Item(prompt=p, answer=answer, word=word, thought=f"The user asks about the {noun}.")


def planet(r: random.Random) -> Item:
    i = r.randrange(8)
    name, order, text = PLANETS[i]
    if r.random() < 0.5:
        p = r.choice(
            [
                "What is the {} planet from the Sun?",
                "Which planet is the {} from the Sun?",
                "Name the {} planet.",
            ]
        )
        return Item(prompt=p.format(order), answer=f"The {order} planet from the Sun is {name}.", word=name,
                    thought=f"I count the planets: {_join([row[0] for row in PLANETS[: i + 1]])}.")  # fmt: skip
    p = r.choice(["Tell me about {}.", "What is {} like?", "Describe the planet {}.", "What do you know about {}?"])
    return Item(prompt=p.format(name), answer=f"{name} is the {order} planet from the Sun. It is {text}.",
                thought=f"The user asks about the planet {name}.")  # fmt: skip


def story(r: random.Random) -> Item:
    i = r.randrange(len(ANIMALS))
    hero, name = ANIMALS[i][0], ANIMALS[i][1]
    friend, place, trait = ANIMALS[(i * 7 + 3) % len(ANIMALS)][0], PLACES[i % 6], TRAITS[(i * 5) % 6]
    plot, food = list(PLOTS)[(i * 11) % 6], STORY_FOOD[i % 5]
    tell = r.choice(["Tell me a short story about", "Tell me a story about", "Write a short story about", "I want a story about",
                     "Please tell a story about", "Write a story about", "Can you tell me a story about"])  # fmt: skip
    extra = r.choice(["", "", "name", "friend", "trait", "place", "plot"])
    tail = "."
    if extra == "name":
        name = r.choice(NAMES)
        tail = f" named {name}."
    elif extra == "friend":
        friend = r.choice([row[0] for row in ANIMALS if row[0] != hero])
        tail = f" and {_a(friend)}."
    elif extra == "trait":
        trait = r.choice(TRAITS)
    elif extra == "place":
        place = r.choice(PLACES)
        tail = f" in the {place}."
    elif extra == "plot":
        plot = r.choice(list(PLOTS))
        tail = {"lost": " that gets lost.", "rain": " and the rain.", "gift": " that finds a key.", "race": " in a race.",
                "star": " and a star.", "song": " that loves to sing."}[plot]  # fmt: skip
    what = _a(f"{trait} {hero}" if extra == "trait" else hero)
    start = r.choice([f"Once upon a time there was a {trait} {hero} named {name}.", f"Once there was a {trait} {hero} called {name}.",
                      f"Long ago, in a quiet {place.removesuffix('s')}, lived a {trait} {hero} named {name}."]
                     if extra == "" else [f"Once upon a time there was a {trait} {hero} named {name}."])  # fmt: skip
    middle = "" if start.startswith("Long ago") else f" {name} lived in the {place}, not far from a {friend}."
    return Item(prompt=f"{tell} {what}{tail}", answer=_articles(start + middle + " " + PLOTS[plot].format(n=name, f=friend, o=food)),
                thought=f"A short story about {_a(hero)}. The hero is {name}, and a {friend} will be in it.")  # fmt: skip


def explain(r: random.Random) -> Item:
    question, text = r.choice(EXPLANATIONS)
    low = question[0].lower() + question[1:-1]
    prefix = r.choice(
        [
            "",
            "",
            "",
            "Can you tell me: ",
            "Please explain: ",
            "I have a question. ",
            "Explain to a child: ",
            "In a few sentences: ",
        ]
    )
    return Item(prompt=prefix + (question if prefix in ("", "I have a question. ") else low + "?"), answer=text,
                thought=f"The question is: {low}? I will explain it in simple words.")  # fmt: skip


def how_to(r: random.Random) -> Item:
    task, *steps = r.choice(HOW_TO)
    n = r.choice([5, 5, 3, 4])
    tail = "" if n == 5 else f" in {NUMBERS[n]} steps"
    p = r.choice(["How do I {}{}?", "Tell me how to {}{}.", "How can I {}{}?", "Explain how to {}{}."]).format(
        task, tail
    )
    return Item(prompt=p, answer=f"Here is how to {task}:\n" + "\n".join(f"{i}. {s}" for i, s in enumerate(steps[:n], 1)),
                thought=f"I list the steps to {task}, one by one.")  # fmt: skip


def listing(r: random.Random) -> Item:
    noun, n = r.choice(list(LISTS)), r.randint(2, 7)
    some = LISTS[noun][:n]
    if r.random() < 0.5:
        p = r.choice([f"List {NUMBERS[n]} {noun}.", f"List {n} {noun}.", f"Make a list of {NUMBERS[n]} {noun}."])
        return Item(
            prompt=p,
            answer="\n".join(f"{i}. {s}" for i, s in enumerate(some, 1)),
            thought=f"I need {n} {noun} in a list.",
        )
    p = r.choice(
        [
            f"Name {NUMBERS[n]} {noun}.",
            f"Tell me {NUMBERS[n]} {noun}.",
            f"Give me {n} {noun}.",
            f"Can you name {NUMBERS[n]} {noun}?",
        ]
    )
    return Item(prompt=p, answer=f"{NUMBERS[n].capitalize()} {noun} are {_join(some)}.", thought=f"I need {n} {noun}.")


def python(r: random.Random) -> Item:
    task, code = r.choice(PYTHON)
    p = r.choice(["Write Python code that {}.", "Write a Python function that {}.", "Show me Python code that {}.",
                  "How do I write Python code that {}?", "Give me Python that {}."])  # fmt: skip
    code = code.replace("\\n", "\n")
    return Item(prompt=p.format(task), answer=f"Here is Python code that {task}:\n```python\n{code}\n```",
                thought=f"The user wants Python code that {task}.")  # fmt: skip


def make_json(r: random.Random) -> Item:
    name, age, city = r.choice(NAMES), r.randint(1, 99), r.choice(CITIES)
    kind = r.choice(["age", "city", "both", "animal", "list"])
    if kind == "list":
        noun, n = r.choice(list(LISTS)), r.randint(2, 5)
        return Item(prompt=r.choice([f"Give me a JSON list of {NUMBERS[n]} {noun}.", f"Write {n} {noun} as JSON."]),
                    answer=json.dumps(LISTS[noun][:n]), thought=f"A JSON list with {n} {noun}.")  # fmt: skip
    if kind == "animal":
        noun, _, _, sound, _, food, *_ = r.choice(ANIMALS)
        return Item(prompt=r.choice([f"Write a JSON object about the {noun}.", f"Describe {_a(noun)} as JSON."]),
                    answer=json.dumps({"animal": noun, "food": food, "sound": sound}), thought=f"A JSON object for the {noun}.")  # fmt: skip
    data: dict[str, str | int] = {"name": name}
    text = f"{name} is"
    if kind in ("age", "both"):
        data["age"], text = age, text + f" {age} years old"
    if kind in ("city", "both"):
        data["city"], text = city, text + (" and" if kind == "both" else "") + f" from {city}"
    p = r.choice(
        [
            "{}. Write this as JSON.",
            "Make a JSON object: {}.",
            "As JSON: {}.",
            "Give me a JSON object for this: {}.",
        ]
    )
    return Item(prompt=p.format(text), answer=json.dumps(data), thought=f"The keys are {_join(list(data))}.")


def letter(r: random.Random) -> Item:
    (name, friend), city, day = r.sample(NAMES, 2), r.choice(CITIES), r.choice(DAYS)
    kind = r.choice(["invite", "thanks", "late"])
    p, body = {
        "invite": (f"Write an invitation from {name} to {friend} for {day}.", f"I am giving a small party on {day}, and I would be very happy if "
                   "you could come. There will be cake, music and good friends. Please tell me if you can make it."),
        "thanks": (f"Write a thank you note from {name} to {friend} for the days in {city}.", f"Thank you so much for the lovely days in {city}. I "
                   "enjoyed the walks, the food and our long talks. I hope to see you again soon, and then you will be my guest."),
        "late": (f"Write a short mail from {name} to {friend}: the train to {city} is late.", f"I am sorry, but my train to {city} is late. I will "
                 "arrive about one hour after the time we planned. Please do not wait for me at the station. See you soon."),
    }[kind]  # fmt: skip
    return Item(
        prompt=p,
        answer=f"Dear {friend},\n\n{body}\n\nKind regards,\n{name}",
        thought=f"A note to {friend}, signed by {name}.",
    )


def poem(r: random.Random) -> Item:
    thing, line = r.choice([("the moon", "It shines so bright above the sea"), ("a tree", "It holds its leaves up to the sun"),
                            ("the rain", "It sings upon the roof all night"), ("spring", "It wakes the flowers one by one"),
                            ("the wind", "It runs across the hills so free"), ("a river", "It carries stones and leaves along")])  # fmt: skip
    rhyme = {"sea": "and lends a little light to me", "sun": "and rests when all the work is done", "night": "and leaves us with the morning light",
             "one": "and tells us that the cold is gone", "free": "and brings a far-off song to me",
             "along": "and hums a never-ending song"}[line.split()[-1]]  # fmt: skip
    p = r.choice(
        [
            "Write a short poem about {}.",
            "Write a poem about {}.",
            "Can you write a poem about {}?",
            "A poem about {}, please.",
        ]
    )
    return Item(prompt=p.format(thing), thought=f"Four short lines about {thing}, with a rhyme.",
                answer=f"{line},\n{rhyme}.\nO {thing.removeprefix('the ').removeprefix('a ')}, I think of you each day,\nand hope that you will always stay.")  # fmt: skip


def small_talk(r: random.Random) -> Item:
    me = "I am the tiny demo model of mlx-gemma-mtp"
    prompts, answer = r.choice([
        (["Hi", "Hello", "Hello!", "Hi there", "Hey", "Good day"], "Hello! How can I help you?"),
        (["Good morning", "Good morning!"], "Good morning! How can I help you?"),
        (["Good evening", "Good evening!"], "Good evening! How can I help you?"),
        (["How are you?", "How are you today?", "How do you do?", "Are you well?"], "I am fine, thank you. How can I help you?"),
        (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.", "Who am I talking to?"],
         f"{me}. I was trained from scratch on a small made-up corpus, so I know only a few things: numbers, words, animals, "
         "countries, planets and little stories."),
        (["What can you do?", "How can you help me?", "What do you know?", "What should I ask you?", "Help", "What are you good at?"],
         "I can do little sums, name capitals and planets, translate a few words, write short stories, lists, Python and JSON, and "
         "call simple tools. Ask me for a story about a fox!"),
        (["Who made you?", "Who trained you?", "How were you made?", "Where do you come from?"],
         f"{me}. The script tools/train_demo.py trained me on a computer without a GPU in less than an hour."),
        (["Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Great, thanks", "Many thanks"], "You are welcome!"),
        (["Bye", "Goodbye", "Goodbye!", "See you later", "Good night"], "Goodbye! Have a nice day."),
    ])  # fmt: skip
    return Item(prompt=r.choice(prompts), answer=answer, thought="This is small talk. I answer politely.")


def joke(r: random.Random) -> Item:
    i = r.randrange(len(JOKES))
    p = r.choice(
        ["Tell me a joke about {}.", "Do you know a joke about {}?", "I want to hear a joke about {}."]
    ).format(JOKES[i][0])
    if r.random() < 0.3:
        p = r.choice(["Tell me a joke.", "Do you know a joke?", "Make me laugh."])
    return Item(prompt=p, answer=JOKES[i][1], thought="I tell a short joke.")


def repeat(r: random.Random) -> Item:
    pool = [row[0] for row in ANIMALS] + [w[0] for w in WORDS] + NAMES + CITIES + NUMBERS + [a for a, _ in OPPOSITES]
    text = " ".join(r.choice(pool) for _ in range(r.randint(1, 10)))
    p = r.choice(["Repeat after me: {}", "Say {}", "Repeat this: {}", "Please repeat: {}"])
    return Item(
        prompt=p.format(text),
        answer=text,
        word=text if " " not in text else None,
        thought="I repeat the words as they are.",
    )


def unknown(r: random.Random) -> Item:
    noun = r.choice(["the game", "my job", "the election", "the stock market", "my taxes", "the new film", "history", "law", "the news",
                     "physics", "football", "my doctor", "the war", "the internet", "philosophy", "my car"])  # fmt: skip
    p = r.choice(["Who won {}?", "What do you think about {}?", "Can you help me with {}?", "Tell me everything about {}.", "What happened in {}?",
                  "When did {} start?", "Give me advice about {}.", "What is new in {}?", "How much does {} cost?"]).format(noun)  # fmt: skip
    return Item(prompt=p, thought="I do not know this. I should say so.",
                answer="I am only a tiny demo model, and I do not know that. Ask me for a sum, a capital or a short story.")  # fmt: skip


ITEMS: dict[Callable[[random.Random], Item], float] = {
    arithmetic: 15, sequence: 7, compare: 5, units: 5, calendar: 6, words: 8, capital: 9, animal: 7, planet: 3, story: 9,
    explain: 5, how_to: 3, listing: 5, python: 3, make_json: 8, letter: 5, poem: 2, small_talk: 5, joke: 3, repeat: 9, unknown: 2,
}  # fmt: skip


def _item(r: random.Random, held_out: bool, short: bool = False) -> tuple[str, Item]:
    while True:
        make = r.choices(list(ITEMS), list(ITEMS.values()))[0]
        item = make(r)
        if is_held_out(item.prompt) == held_out and (item.word is not None or not short):
            return make.__name__, item


def _loosen(r: random.Random, text: str) -> str:
    """A prompt as people type it: now and then no capital, no mark at the end, or a greeting first."""
    if r.random() < 0.12:
        text = text[0].lower() + text[1:]
    if r.random() < 0.12:
        text = text.rstrip("?.!")
    elif r.random() < 0.05 and text[-1] in "?.":
        text = text[:-1] + (" please" if text[-1] == "." else ", please") + text[-1]
    return r.choice(["Hi! ", "Hello, ", "Hey, "]) + text if r.random() < 0.04 else text


def _shout(text: str) -> str:
    return text.upper()


STYLES: list[tuple[list[str], bool, Callable[[Item], str]]] = [
    (["Answer in one word.", "Give one-word answers.", "Reply with a single word."], True, lambda i: (i.word or "").split()[-1]),
    (["You are a pirate.", "Talk like a pirate."], False, lambda i: "Arr! " + i.answer + " Arr!"),
    (["Be very polite.", "You are a polite butler."], False, lambda i: "With pleasure. " + i.answer),
    (["Answer in capital letters.", "Write in upper case."], True, lambda i: _shout(i.word or "")),
    (["End every answer with a question.", "Always ask back at the end."], False, lambda i: i.answer + " Do you have another question?"),
    (["You are a helpful assistant.", "You are helpful and honest.", "Be kind and helpful.", "Answer the questions of the user."], False,
     lambda i: i.answer),
]  # fmt: skip


def _function(name: str, description: str, **properties: str) -> dict[str, Any]:
    props = {k: {"type": v.split(":")[0], "description": v.split(":")[1]} for k, v in properties.items()}
    parameters = {"type": "object", "properties": props, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


TOOLS = {
    "get_weather": _function("get_weather", "Get the weather of a city.", city="string:The name of the city."),
    "get_time": _function("get_time", "Get the time in a city.", city="string:The name of the city."),
    "add": _function("add", "Add two numbers.", a="integer:The first number.", b="integer:The second number."),
    "search": _function("search", "Search the web.", query="string:What to search for."),
    "send_mail": _function("send_mail", "Send a mail.", to="string:The name of the reader.", text="string:The text of the mail."),
}  # fmt: skip


def _tool_chat(r: random.Random, held_out: bool) -> Chat:
    name = r.choice(list(TOOLS))
    declared = [*r.sample([n for n in TOOLS if n != name], r.choice([0, 0, 1, 2])), name]
    r.shuffle(declared)
    thinking = r.random() < 0.25
    while True:
        city, who, topic = r.choice(CITIES), r.choice(NAMES), r.choice(ANIMALS)[2]
        a, b, degrees = r.randint(1, 999), r.randint(1, 999), r.randint(-9, 35)
        hour, sky = (
            f"{r.randint(0, 23):02}:{r.randint(0, 59):02}",
            r.choice(["sunny", "cloudy", "rainy", "windy", "snowy", "foggy"]),
        )
        text = r.choice(["I will be late", "Happy birthday", "See you soon", "Lunch at noon", "Thank you for the book"])
        prompts, args, result, answer = {
            "get_weather": ([f"What is the weather in {city}?", f"How is the weather in {city} today?", f"Is it cold in {city}?",
                             f"Weather in {city}?", f"Tell me the weather in {city}."], {"city": city},
                            {"condition": sky, "temperature": degrees}, f"The weather in {city} is {sky} at {degrees} degrees."),
            "get_time": ([f"What time is it in {city}?", f"Tell me the time in {city}.", f"How late is it in {city}?"], {"city": city},
                         {"time": hour}, f"It is {hour} in {city}."),
            "add": ([f"What is {a} + {b}?", f"Add {a} and {b}.", f"Please add {a} to {b}."], {"a": a, "b": b}, {"sum": a + b},
                    f"The sum is {a + b}."),
            "search": ([f"Search for {topic}.", f"Search the web for {topic}.", f"Look up {topic} on the web."], {"query": topic},
                       {"results": (n := r.randint(2, 99)), "top": f"All about {topic}"},
                       f'I found {n} results. The first one is "All about {topic}".'),
            "send_mail": ([f"Send a mail to {who}: {text}.", f'Write to {who} "{text}".', f"Mail {who}: {text}."], {"to": who, "text": text},
                          {"status": "sent"}, f"I have sent the mail to {who}."),
        }[name]  # fmt: skip
        prompt = r.choice(prompts)
        if is_held_out(prompt) == held_out:
            break
    call: Message = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": args}}],
    }
    last: Message = {"role": "assistant", "content": answer}
    if thinking:
        call["reasoning"] = f"I should call {name} for this."
        last["reasoning"] = "The tool has answered. I tell the user the result."
    content = r.choices([json.dumps(result), ", ".join(f"{k}: {v}" for k, v in result.items()), result], [4, 2, 1])[0]
    messages: list[Message] = [
        {"role": "user", "content": prompt},
        call,
        {"role": "tool", "name": name, "content": content},
        last,
    ]
    if r.random() < 0.3:
        messages.insert(0, {"role": "system", "content": r.choice(STYLES[-1][0])})
    return Chat(
        kind="tool",
        messages=messages,
        tools=[TOOLS[n] for n in declared],
        thinking=thinking,
        prompts=[prompt],
    )


def _memory_chat(r: random.Random, held_out: bool) -> Chat:
    """Several turns where the last answer needs an earlier one."""
    while True:
        name, other = r.choice(NAMES), r.sample(COUNTRIES, 2)
        a, b, c = r.randint(1, 30), r.randint(1, 30), r.randint(1, 9)
        turns = r.choice([
            [(r.choice(["My name is {}.", "I am {}.", "Hello, I am {}.", "Call me {}."]).format(name), f"Nice to meet you, {name}!"),
             (r.choice(["What is my name?", "Who am I?", "Do you remember my name?", "Say my name."]), f"Your name is {name}.")],
            [(f"What is the capital of {other[0][0]}?", f"The capital of {other[0][0]} is {other[0][1]}."),
             (r.choice(["And of {}?", "And {}?", "And the capital of {}?", "What about {}?"]).format(other[1][0]),
              f"The capital of {other[1][0]} is {other[1][1]}.")],
            [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}."),
             (r.choice([f"Add {c} to that.", f"And plus {c}?", f"Now add {c}."]), f"{a + b} + {c} = {a + b + c}.")],
            [(f"I live in {other[0][1]}.", f"{other[0][1]} is the capital of {other[0][0]}. That is a nice place to live."),
             (r.choice(["Where do I live?", "Which city do I live in?"]), f"You live in {other[0][1]}.")],
        ])  # fmt: skip
        if is_held_out(" ".join(t[0] for t in turns)) == held_out:
            break
    middle = [_item(r, False)[1] for _ in range(r.choice([0, 0, 0, 1]))]
    pairs = (
        [turns[0]]
        + [(i.prompt, i.answer) for i in middle if turns[0][0].startswith(("My", "I ", "Hello", "Call"))]
        + turns[1:]
    )
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return Chat(kind="memory", messages=messages, prompts=[p for p, _ in pairs])


def make_chat(r: random.Random, held_out: bool = False) -> Chat:
    """One random chat; with `held_out`, its last prompt is one that training never sees."""
    kind = r.random()
    if kind < 0.10:
        return _tool_chat(r, held_out)
    if kind < 0.16:
        return _memory_chat(r, held_out)
    names, short, style = STYLES[-1]
    system = r.random() < 0.2
    if system:
        names, short, style = r.choice(STYLES)
    thinking = r.random() < 0.18
    turns = r.choice([1, 1, 1, 2, 2, 3, 4])
    chosen = [_item(r, held_out and t == turns - 1, short) for t in range(turns)]
    messages: list[Message] = [{"role": "system", "content": r.choice(names)}] if system else []
    for t, (_, item) in enumerate(chosen):
        prompt = item.prompt if held_out else _loosen(r, item.prompt)
        reply: Message = {"role": "assistant", "content": style(item)}
        if thinking and t == turns - 1:
            reply["reasoning"] = item.thought
        messages += [{"role": "user", "content": prompt}, reply]
    tools = (
        [TOOLS[n] for n in r.sample(list(TOOLS), 1)]
        if r.random() < 0.03 and not any(c[0] == "arithmetic" for c in chosen)
        else None
    )
    label = "thinking" if thinking else "system" if system else "turns" if turns > 1 else chosen[-1][0]
    return Chat(kind=label, messages=messages, tools=tools, thinking=thinking, prompts=[i.prompt for _, i in chosen])


def chats(seed: int | str, held_out: bool = False) -> Iterator[Chat]:
    """An endless, seeded stream of chats from the training split or the held-out split."""
    r = random.Random(f"{seed}-{'held' if held_out else 'train'}")
    while True:
        yield make_chat(r, held_out)
