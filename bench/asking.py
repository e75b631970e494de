"""Questions without choices about new scenes of the small world, for a trained model to answer.

    python -m bench.asking FOLDER           draw 600 scenes, and write FOLDER/questions.jsonl
    python generate.py --data jsonl:FOLDER/questions.jsonl --by style

In training, all problems have lettered choices. A user just asks. An answer counts as right if it
is the whole sentence that explains the scene. Half of the scenes are in pencil, like the problems'
pictures. The other half are flat, like a picture that is made with a drawing program. The field
"style" says which.
"""

from pathlib import Path
from random import Random

from extras.instructions import write_rows
from extras.terminal import Parser, run
from tiny import world

N_SCENES = 600


def make(folder: Path) -> None:
    """Write the pictures, and questions.jsonl with a row for each of them."""
    rng = Random("asking")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(N_SCENES):
        item = world.picture_item(rng)
        if i % 2:
            style = "pencil"
            picture = world.sketch(item, rng)
        else:
            style = "flat"
            picture = world.render(item, rng)
        picture.save(folder / f"{i}.png")
        row = {
            "prompt": item.question,
            "image": f"{i}.png",
            "answer": item.solution,
            "style": style,
            "skill": item.skill,
        }
        rows.append(row)
    write_rows(folder / "questions.jsonl", rows)
    print(f"written: {folder / 'questions.jsonl'}")


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    make(parser.parse_args().folder)


if __name__ == "__main__":
    run(main)
