"""The web page's shelf: a few pictures of the small world, each with a question.

They are drawn here, with their own seed. None of them is in the data set.
"""

import base64
import io
from random import Random

from PIL import Image

from tiny import world

SKILLS = (
    world.magnets, world.bars, world.compass, world.traffic_light, world.jars, world.flag,
    world.food_chain)


def examples(seed: int = 0) -> list[dict]:
    """[{"question": text, "picture": a PNG in base64}, …], one for each skill."""
    rng = Random(f"{seed} shelf")
    items = [world.things(rng)]
    for skill in SKILLS:
        items.append(skill(rng))
    shown = []
    for item in items:
        picture = to_base64(world.sketch(item, rng))
        shown.append({"question": item.question, "picture": picture})
    return shown


def to_base64(picture: Image.Image) -> str:
    """The picture as a PNG, in base64."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
