"""Facts that tiny-chat knows. Tables only; the questions about them are in `facts_topics`."""

OPPOSITES = """hot cold, big small, up down, fast slow, old young, happy sad, full empty,
open closed, wet dry, hard soft, rich poor, early late, left right, high low, strong weak,
loud quiet, clean dirty, near far, thick thin, true false, first last, good bad, long short,
buy sell"""

PLURALS = """cat cats, dog dogs, house houses, tree trees, book books, box boxes, bus buses,
mouse mice, foot feet, tooth teeth, goose geese, child children, man men, woman women, baby babies,
city cities, leaf leaves, knife knives, wolf wolves, sheep sheep, fox foxes, berry berries,
cup cups, key keys, star stars, glass glasses, story stories, shelf shelves"""

COUNTRIES = """France Paris Europe, Spain Madrid Europe, Italy Rome Europe, Germany Berlin Europe,
Poland Warsaw Europe, Greece Athens Europe, Norway Oslo Europe, Portugal Lisbon Europe,
Austria Vienna Europe, Ireland Dublin Europe, Japan Tokyo Asia, China Beijing Asia,
Thailand Bangkok Asia, India Delhi Asia, Egypt Cairo Africa, Kenya Nairobi Africa,
Ghana Accra Africa, Morocco Rabat Africa, Canada Ottawa America, Cuba Havana America,
Peru Lima America, Chile Santiago America"""

COLOURS = """grass green, snow white, coal black, blood red, chocolate brown, milk white,
a banana yellow, a carrot orange, a tomato red, a lemon yellow, a frog green, a crow black,
a flamingo pink, a swan white, a strawberry red, a pumpkin orange, spinach green, salt white,
tar black, a cucumber green, the sea blue, the sun yellow"""

# name: what it says, how many legs it has, what its young is called
ANIMALS = """cow moo 4 calf, dog woof 4 puppy, cat meow 4 kitten, duck quack 2 duckling,
sheep baa 4 lamb, pig oink 4 piglet, lion roar 4 cub, horse neigh 4 foal, goat bleat 4 kid,
frog croak 4 tadpole, hen cluck 2 chick, goose honk 2 gosling"""

# word: what it is (the last word is the one that must appear)
DEFINITIONS = """a hammer: a tool for driving nails, a clock: a device that shows the time,
a library: a place full of books, a baker: a person who makes bread,
a teacher: a person who works in a school, an island: land with water around it,
a desert: a very dry place with sand, a pillow: a soft rest for your head,
an umbrella: a shield against rain, a spoon: a thing for eating soup,
a farmer: a person who works on a farm, a pilot: a person who flies planes,
a bridge: a road over a river, a triangle: a shape with three sides,
a garden: a place to grow flowers, a stove: a device to cook food,
a lamp: a thing that gives light, a kettle: a pot to boil water,
a wallet: a small case for money, a shoe: a thing you wear on your foot"""

LISTS = {
    "fruits": "apple, banana, cherry, grape, mango, melon, orange, peach, pear, plum",
    "colours": "black, blue, brown, green, pink, purple, red, white, yellow",
    "animals": "bear, cat, cow, dog, duck, fox, horse, lion, pig, sheep",
    "vegetables": "bean, cabbage, carrot, leek, onion, pea, potato, radish, spinach",
    "tools": "axe, drill, hammer, knife, pliers, saw, shovel, wrench",
    "instruments": "drum, flute, guitar, harp, piano, trumpet, violin, cello",
    "countries": "Spain, France, Italy, Japan, China, India, Egypt, Kenya, Peru, Chile",
    "drinks": "coffee, juice, lemonade, milk, tea, water, cocoa",
}

SPELLED = """cat dog sun hat pen cup red bus map fox cow egg ice key leg net owl pig rat toy van zoo
bird book cake door fish game hand king lamp milk moon nose rain ship star tree wind"""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# answer: its questions
SMALL_TALK = """
Hello: Hello! | Hi! | Hey! | Hi there! | Good morning! | Good evening! | Hello there! | Greetings!
I am fine: How are you? | How are you today? | How do you do? | How is it going? | How are things?
My name is Tiny: What is your name? | Who are you? | Tell me your name. | What are you called?
Goodbye: Bye! | Goodbye! | See you! | I have to go. | Good night! | See you later! | Bye bye!
I am a small language model: What are you? | Are you a person? | Are you a robot? | Are you alive?
I can answer short questions: What can you do? | How can you help me? | What can I ask you?
I live in a computer: Where are you? | Where do you live? | Where is your home?
"""
LEADS = ("", "OK. ", "Well. ", "Now. ", "One thing. ", "Right. ")


def rows(table: str) -> list[list[str]]:
    """`a b, c d` -> [[a, b], [c, d]]."""
    return [entry.split() for entry in table.replace("\n", " ").split(",")]


def subject_rows(table: str) -> list[tuple[str, str]]:
    """`a banana yellow` -> (a banana, yellow): all but the last word, and the last word."""
    return [(" ".join(row[:-1]), row[-1]) for row in rows(table)]
