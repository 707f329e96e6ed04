"""Write plain.txt: prompts of everyday things, a line each, for a text-to-image model to draw samples of.

    python data/prompts/make.py

The order is mixed, so that the first lines stand for all. The same words and seed give the same file.
"""

import argparse
import random
import re
from pathlib import Path

FILE = Path(__file__).with_name("plain.txt")

# What a prompt may be; a {name} takes one of the words of that name.
KINDS = (
    "a {colour} {thing} on a {surface}",
    "a {thing} and a {other} on a {surface}",
    "{number} {many} in a {container}",
    "a {animal} {doing} {place}",
    "a photo of a {animal} {place}",
    "a {person} {acting} {place}",
    "a portrait of a {person}, {light}",
    "{scene} {weather}",
    "{scene}, {style}",
    "a plate of {food}, seen from above",
    "a close-up of {detail}",
    "a {vehicle} {route}, {light}",
    "a {room} with {furnishing}",
    "a sign that says {word}, {light}",
)
WORDS = {
    "colour": "red, blue, green, yellow, white, black, orange, purple, pink, brown, grey",
    "thing": "cup, vase, book, teapot, candle, clock, umbrella, suitcase, guitar, lamp, camera, bottle, hat, chair",
    "other": "bowl, pencil, plant, key, newspaper, spoon, scarf, phone, ball, mirror",
    "surface": "wooden table, stone floor, white shelf, kitchen counter, park bench, striped rug",
    "number": "two, three, four, five, several",
    "many": "apples, oranges, eggs, seashells, marbles, tulips, lemons, tomatoes, pine cones",
    "container": "glass bowl, wicker basket, cardboard box, blue bucket, metal tray",
    "animal": "dog, cat, horse, fox, owl, rabbit, elephant, duck, sheep, cow, parrot, turtle, bear, deer, squirrel",
    "doing": "sleeping, running, sitting, looking up, drinking water, playing, standing still",
    "place": "in a garden, on a beach, in a forest, by a lake, in front of a house, on a city street, in the snow",
    "person": "young woman, old man, child, baker, farmer, musician, fisherman, nurse, cyclist, dancer, carpenter",
    "acting": "reading a book, walking, holding an umbrella, laughing, carrying a basket, waiting, taking a picture",
    "light": "in soft morning light, at sunset, at night, under a cloudy sky, in bright sunlight",
    "scene": "a mountain valley, a harbour with small boats, a village street, a field of wheat, a waterfall, "
    "a railway station, a desert road, a market square, a river with a stone bridge, a lighthouse, an orchard",
    "weather": "in the fog, after rain, in winter, on a summer day, in autumn, during a storm, at dawn",
    "style": "oil painting, pencil drawing, watercolour, black and white photograph, woodcut print, seen from the air",
    "food": "pasta with basil, pancakes and berries, grilled fish, rice and vegetables, cheese and grapes, fresh bread",
    "detail": "a butterfly on a leaf, rain drops on a window, an eye, tree bark, a spider web, an old coin, a feather",
    "vehicle": "bus, tram, sailing boat, bicycle, red car, steam train, truck, small plane",
    "route": "in a tunnel, by the sea, on a country road, in heavy traffic, between tall trees, in the rain",
    "room": "kitchen, bedroom, library, workshop, classroom, living room, bathroom, cafe",
    "furnishing": "large windows, a round table, old wooden shelves, many plants, a tiled floor, a blue sofa",
    "word": "open, hello, coffee, library, stop, books, welcome",
}


def prompts(count: int, seed: int) -> list[str]:
    """So many different ones."""
    rng, choices = random.Random(seed), {name: words.split(", ") for name, words in WORDS.items()}
    made: dict[str, None] = {}
    while len(made) < count:
        drawn = rng.choice(KINDS).format_map({name: rng.choice(words) for name, words in choices.items()})
        made[re.sub(r"\ba (?=[aeiou])", "an ", drawn)] = None
    return list(made)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.write_text("".join(f"{prompt}\n" for prompt in prompts(args.count, args.seed)), encoding="utf-8")


if __name__ == "__main__":
    main()
