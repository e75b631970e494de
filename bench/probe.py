"""What the small world's CLIP sees, measured by a linear probe on its features.

    pip install easy-vqa
    python -m bench.probe [VIT]             default: tiny/ViT-tiny.pt
    python -m bench.probe --adapter out/checkpoint.pth      the features after training

The probe is multinomial logistic regression on the concatenated features that LaVIN takes. It is
trained on some pictures of a kind and scored on others of the same kind:

- easy-VQA: pictures drawn by others, with one circle, rectangle or triangle in one of eight
  colours. The labels are the answers to the questions that name a shape or a colour.
- Unseen shapes: no picture of the pre-training showed them (tiny/album.py: UNSEEN_SHAPES).
- The world's five shapes, flat and in pencil. No picture of the pre-training was in pencil. The
  pencil drawings are scored twice: with a probe trained on pencil drawings, and with a probe
  trained on flat pictures. The combinations of shape and colour that no training picture shows are
  scored with the probe trained on the others in pencil.
"""

import argparse
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import checkpoints
import data
from extras.terminal import Parser, run
from files import LavinError
from model import LaVIN
from tiny import album, drawing, world

N_TRAIN = 3000          # of our own pictures; easy-VQA has 4000
N_TEST = 1000
EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@torch.no_grad()
def features(lavin: LaVIN, pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures -> the features of each, concatenated: (N, F · V)."""
    batches = []
    for start in range(0, len(pictures), 100):
        pixels = []
        for picture in pictures[start:start + 100]:
            pixels.append(data.load_pixels(picture, lavin.resolution))
        batches.append(lavin.vit(torch.stack(pixels)).flatten(1))
    return torch.cat(batches)


def probe(x: torch.Tensor, labels: list[str], names: list[str]):
    """Fit a linear probe on features x (N, D) -> a function from features to predicted names."""
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    target = torch.tensor([names.index(label) for label in labels])
    linear = torch.nn.Linear(x.shape[1], len(names))
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(linear((x - mean) / std), target)
        value = value + 1e-4 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)

    def predict(x):
        with torch.no_grad():
            return [names[i] for i in linear((x - mean) / std).argmax(1).tolist()]

    return predict


def percent_right(predicted: list[str], labels: list[str]) -> float:
    right = sum(a == b for a, b in zip(predicted, labels))
    return 100 * right / len(labels)


# Pictures and labels


def easy_vqa_split(paths: dict, questions: tuple, names: tuple) -> tuple[list, list[str]]:
    """The pictures with a question whose answer is one of these names, and those answers."""
    pictures = []
    labels = []
    seen = set()
    for _, answer, image in zip(*questions):
        if answer in names and image not in seen:
            seen.add(image)
            pictures.append(Image.open(paths[image]).convert("RGB"))
            labels.append(answer)
    return pictures, labels


def unseen_shapes(n: int, seed: str) -> tuple[list, list[str]]:
    """n pictures of one unseen shape each, drawn like the album's, and the shapes."""
    rng = Random(seed)
    pictures = []
    labels = []
    for _ in range(n):
        shape = rng.choice(album.UNSEEN_SHAPES)
        size = rng.choice(["middle", "large"])
        thing = album.Thing(shape, rng.choice(list(album.COLOURS)), size)
        picture, _ = album.several(rng, thing, 1, rng.choice(list(album.PLACES)))
        pictures.append(picture)
        labels.append(shape)
    return pictures, labels


def world_shapes(n: int, seed: str, with_pencil: bool,
                 new: bool = False) -> tuple[list, list[str]]:
    """n pictures of the world's things, flat or in pencil, and their shapes.

    new: in combinations of shape and colour that are kept for the test split.
    """
    rng = Random(seed)
    pictures = []
    labels = []
    for _ in range(n):
        shape, colour = rng.choice(world.shape_colour_pairs(new))
        position = rng.choice(list(drawing.POSITIONS))
        picture = drawing.blank(rng)
        canvas = ImageDraw.Draw(picture)
        drawing.draw_things(canvas, rng, shape, colour, rng.randrange(1, 5), position)
        if with_pencil:
            picture = drawing.pencil(picture, rng)
        pictures.append(picture)
        labels.append(shape)
    return pictures, labels


# The table


def score(lavin, train: tuple[list, list[str]], test: tuple[list, list[str]]) -> float:
    """Train a probe on `train` -> the percentage of `test` that it gets right."""
    names = sorted(set(train[1]))
    predict = probe(features(lavin, train[0]), train[1], names)
    return percent_right(predict(features(lavin, test[0])), test[1])


def print_easy_vqa(lavin) -> None:
    try:
        import easy_vqa
    except ImportError as error:
        raise LavinError("easy_vqa is missing: pip install easy-vqa") from error
    for kind, names in (("shapes", EASY_SHAPES), ("colours", EASY_COLOURS)):
        train = easy_vqa_split(
            easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions(), names)
        test = easy_vqa_split(easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions(), names)
        percent = score(lavin, train, test)
        print(f"| easy-VQA, {len(names)} {kind} | {len(test[0])} | {percent:.1f} |")


def print_own(lavin) -> None:
    train = unseen_shapes(N_TRAIN, "train")
    test = unseen_shapes(N_TEST, "test")
    n_shapes = len(album.UNSEEN_SHAPES)
    print(f"| {n_shapes} unseen shapes | {N_TEST} | {score(lavin, train, test):.1f} |")
    flat = world_shapes(N_TRAIN, "train", with_pencil=False)
    pencil = world_shapes(N_TRAIN, "train", with_pencil=True)
    flat_test = world_shapes(N_TEST, "test", with_pencil=False)
    pencil_test = world_shapes(N_TEST, "test", with_pencil=True)
    new_test = world_shapes(N_TEST, "new", with_pencil=True, new=True)
    of_flat = score(lavin, flat, flat_test)
    of_pencil = score(lavin, pencil, pencil_test)
    crossed = score(lavin, flat, pencil_test)
    of_new = score(lavin, pencil, new_test)
    print(f"| the world's 5 shapes, flat | {N_TEST} | {of_flat:.1f} |")
    print(f"| the same in pencil | {N_TEST} | {of_pencil:.1f} |")
    print(f"| the same in pencil, with the probe trained on flat ones | {N_TEST} | {crossed:.1f} |")
    print(f"| the same in pencil, in new combinations | {N_TEST} | {of_new:.1f} |")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vit", nargs="?", type=Path, default=world.PATHS["vit"])
    parser.add_argument("--adapter", type=Path, help="a LaVIN checkpoint (default: none)")
    args = parser.parse_args()
    torch.manual_seed(0)
    lavin = checkpoints.load(world.PATHS["llama"], args.vit, args.adapter)
    print("| pictures | test | right, % |\n|---|---|---|")
    print_easy_vqa(lavin)
    print_own(lavin)


if __name__ == "__main__":
    run(main)
