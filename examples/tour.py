"""A tour of LaVIN's core. It shows the real objects and what is in them, one screen per file.

    python -m examples.tour                     all six stops, in a few seconds
    python -m examples.tour router              or one: router, adapters, vit, data, model, train

Each stop shows one file. Keep that file open next to the screen. The models are those of the small
world (tiny/world.py), and all numbers are computed while you watch. The tour writes no files.
"""

import argparse
import inspect
import os
import textwrap
from collections import Counter
from pathlib import Path
from random import Random

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoints
import data
import train
from adapters import Adapter, AdapterConfig
from extras.terminal import Parser, run
from fast.ops import add_experts
from fast.ranks import gradient_buffer
from files import fingerprint
from model import LaVIN, LLaMAConfig
from tiny import world
from vit import ViTConfig

CHECKPOINT = Path("out/checkpoint.pth")


def compare(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
    print(f"{what:56} largest difference {(a - b).abs().max():.1g}")


def shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def load_lavin() -> LaVIN:
    """The small world's models, with trained adapters if there are any, otherwise fresh ones."""
    adapter = None
    if CHECKPOINT.exists():
        _, config, settings = checkpoints.read_adapter(CHECKPOINT)
        llama = settings.get("llama") or ""
        is_ours = (os.path.abspath(llama) == str(world.PATHS["llama"])
                   and settings.get("vit_hash") == fingerprint(world.PATHS["vit"]))
        if is_ours and config.experts == 2:         # the tour shows how two are mixed
            adapter = CHECKPOINT
    if adapter:
        print(f"The adapters are trained. They come from {CHECKPOINT}.")
    else:
        print(f"The adapters are fresh: {CHECKPOINT} is missing or not of this small world.\n"
              "`python train.py` makes one in two to three minutes. Then take the tour again.")
    torch.manual_seed(0)
    return checkpoints.load(world.PATHS["llama"], world.PATHS["vit"], adapter,
                            max_seq_len=world.DEFAULTS["max_seq_len"], dropout=0.0)


def load_7b() -> LaVIN:
    """LaVIN-7B on the meta device: all of its shapes, but none of its 28 GB."""
    with torch.device("meta"):
        return LaVIN(LLaMAConfig(), ViTConfig(), AdapterConfig(), None, 512)


def make_sample(item: world.Item, rng: Random) -> data.Sample:
    prompt, answer = data.sqa_prompt(world.problem(item, rng, "train"))
    image = world.sketch(item, rng) if item.draw else None
    return data.Sample(prompt, answer, image)


def two_samples() -> list[data.Sample]:
    """A problem without a picture, and one with a picture."""
    rng = Random("two samples")
    text = make_sample(world.opposites(rng), rng)
    picture = make_sample(world.bars(rng), rng)
    return [text, picture]


# The stops. Each screen begins with the docstring of its function.


def print_weights(name: str, text: torch.Tensor, picture: torch.Tensor) -> None:
    line = f"{name:8}"
    for w in (text, picture):
        line += f"{w[0]:14.3f}{w[1]:8.3f}{w.sum():8.3f}"
    print(line)


def weights_in_front_of(lavin: LaVIN, sample: data.Sample) -> torch.Tensor:
    """The routing weights (L, 2) if the modality token stands in front of a real sequence.

    Here the other tokens see the modality token, which LaVIN forbids. But the modality token does
    not see them, so its weights stay the same.
    """
    batch = lavin.batch([sample])
    token = lavin.modality_embedding[batch.modality[:1]]            # (1, C)
    x = torch.cat([token[None], lavin.embed(batch)], dim=1)         # (1, 1 + T, C)
    rope = lavin.llama.rope(torch.arange(x.shape[1]))
    weights = []
    for layer in lavin.llama.layers:
        w = layer.adapter.router(layer.attention_norm(x[:, :1]))    # (1, 1, 2)
        x = layer(x, w, rope)
        weights.append(w[0, 0])
    return torch.stack(weights)


@torch.no_grad()
def show_router(lavin: LaVIN) -> None:
    """router.py: route

    LaVIN puts a small adapter in front of every attention. An adapter has two experts, and a
    router computes their weights: w = softmax((y W + b) / τ). In LLaMA, y is the hidden state
    of a learned token at that layer: "text only" or "text and a picture" (section 3.2 of the
    paper). So LLaMA can treat a problem with a picture differently from one without.
    """
    routed = lavin.route()                                          # (L, 2 modalities, 2 experts)
    print(f"{'text only':>32}{'with a picture':>32}")
    print(f"{'w0':>20}{'w1':>8}{'sum':>9}{'w0':>13}{'w1':>8}{'sum':>9}")
    for i, (text, picture) in enumerate(routed, 1):
        print_weights(f"layer {i}", text, picture)
    print("Fresh routers weight both experts about equally. "
          "Training gives each modality its own weights.\n")

    router = lavin.llama.layers[2].adapter.router
    print(f"The temperature τ is {router.tau:g}. A larger τ makes the weights more equal. Layer 3:")
    logits = routed[2].log() * router.tau       # up to a constant, which softmax ignores
    for tau in (1, 10, 100):
        print_weights(f"τ = {tau}", *torch.softmax(logits / tau, dim=-1))

    print("\nThe token attends only to itself, so the weights depend only on the modality.\n"
          "If a real problem follows the token, the weights are still those of the table:")
    for modality, sample in enumerate(two_samples()):
        question = sample.prompt.splitlines()[0]
        compare(question, weights_in_front_of(lavin, sample), routed[:, modality])
    print("\nNext: read `route`. It saves work: each token is a sequence of length 1.")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_parts(lavin: LaVIN) -> dict[str, int]:
    """How many parameters each part of the model has."""
    adapter = lavin.llama.layers[0].adapter
    return {
        "  down": count(adapter.down),
        "  two experts": adapter.up.numel() + adapter.up_bias.numel(),
        "  router": count(adapter.router),
        "one adapter of LLaMA": count(adapter),
        "all adapters of LLaMA": sum(count(block.adapter) for block in lavin.llama.layers),
        "all adapters of the ViT": sum(count(block.adapter) for block in lavin.vit.resblocks),
        "projector": count(lavin.projector),
        "two modality tokens": lavin.modality_embedding.numel(),
        "trained in all": sum(p.numel() for p in lavin.parameters() if p.requires_grad),
        "the whole model": count(lavin),
    }


@torch.no_grad()
def show_adapters(lavin: LaVIN) -> None:
    """adapters.py: Adapter

    LLaMA and CLIP stay frozen. LaVIN trains a small adapter in front of every attention:
    A(y; w) = y + s (w0 up0(h) + w1 up1(h)) with h = dropout(down(y)). It is a bottleneck of
    r = 8 channels (section 3.2 of the paper). Apart from the adapters, only the projector
    and the two modality tokens are trained.
    """
    text, _ = two_samples()
    y = lavin.llama.layers[0].attention_norm(lavin.embed(lavin.batch([text])))
    w = lavin.route()[0, :1, None]                                  # (1, 1, 2), text only
    adapter = Adapter(y.shape[-1], AdapterConfig()).eval()
    h = adapter.down(y)
    print(f"shapes: y {shape(y)}   h {shape(h)}   w {shape(w)}   A(y; w) {shape(adapter(y, w))}\n")
    compare("a fresh adapter is the identity: A(y; w) and y", adapter(y, w), y)
    nn.init.normal_(adapter.up)
    nn.init.normal_(adapter.up_bias)
    fused = add_experts(y, adapter.scale, h, w, adapter.up, adapter.up_bias)
    plain = y + adapter.scale * adapter.mixed(h, w)
    compare("the formula with Adapter.mixed and the faster add_experts", plain, fused)

    small = count_parts(lavin)
    large = count_parts(load_7b())
    print(f"\n{'parameters':24}{'small world':>14}{'LaVIN-7B':>18}")
    for part in small:
        print(f"{part:24}{small[part]:14,}{large[part]:18,}")
    small_share = small["trained in all"] / small["the whole model"]
    large_share = large["trained in all"] / large["the whole model"]
    print(f"{'trained share':24}{small_share:14.2%}{large_share:18.2%}")
    print("\nNext: read `Adapter.expert`. How do its two groups halve an expert's parameters?")


def print_shapes(name: str, lavin: LaVIN, pixels: torch.Tensor) -> None:
    patches = lavin.vit.conv1(pixels).flatten(2).transpose(1, 2)
    positions = lavin.vit.positional_embedding[None]        # (1, T, V), the class token included
    features = lavin.vit(pixels)
    print(f"{name:13}{shape(pixels):18}{shape(patches):16}{shape(positions):16}"
          f"{shape(features):14}{shape(lavin.projector(features))}")


@torch.no_grad()
def show_vit(lavin: LaVIN) -> None:
    """vit.py: VisionTransformer

    CLIP's ViT cuts a picture into patches and puts a class token in front of them. LaVIN takes
    the class token after every fourth block as one feature of the picture. The projector then
    maps each feature to LLaMA's width, and LLaMA reads it like a text token.
    """
    vit = lavin.vit
    rng = Random("pictures")
    samples = [make_sample(world.bars(rng), rng) for _ in range(3)]
    pixels = lavin.batch(samples).pixels
    print(f"{'':13}{'pixels':18}{'patches':16}{'+ class token':16}{'features':14}for LLaMA")
    print_shapes("small world", lavin, pixels[:1])
    print_shapes("LaVIN-7B", load_7b(), torch.empty(1, 3, 224, 224, device="meta"))

    features = lavin.image_features(pixels)                         # (3 pictures, F, V)
    patches = vit.conv1(pixels).flatten(2).transpose(1, 2)
    class_token = vit.class_embedding.expand(len(pixels), 1, -1)
    x = vit.ln_pre(torch.cat([class_token, patches], dim=1) + vit.positional_embedding)
    print(f"\nThe small world's ViT has {len(vit.resblocks)} blocks, "
          f"so a picture has {lavin.n_features} features:")
    for i, block in enumerate(vit.resblocks, 1):
        x = block(x)
        for f in range(lavin.n_features):
            if torch.equal(x[:, 0], features[:, f]):
                print(f"    feature {f + 1} is the class token after block {i}")

    print("\nEach token of a picture gets its routing weights from its own hidden state. So the\n"
          "features of a picture do not depend on the other pictures of a batch:")
    alone = lavin.image_features(pixels[:1])
    compare("a picture alone and in a batch of three", alone, features[:1])
    print("\nNext: read `Block`. Its docstring says how the authors' code differs.")


def print_pieces(name: str, encoded: data.Encoded, part: slice, lavin: LaVIN) -> None:
    pieces = []
    for token, is_feature in zip(encoded.tokens[part].tolist(), encoded.is_feature[part]):
        if is_feature:
            pieces.append("<feature>")
        else:
            pieces.append(lavin.tokenizer.id_to_piece(token).replace("\n", "\\n"))
    indent = " " * 9
    print(textwrap.fill(f"{name:9}" + " ".join(pieces), 92, subsequent_indent=indent))


@torch.no_grad()
def show_data(lavin: LaVIN) -> None:
    """data.py: encode, collate

    `encode` turns a sample into one sequence of tokens. Only the tokens of the answer carry
    loss: LaVIN learns to answer, not to ask. A picture's features replace the <feature>
    tokens. (SentencePiece writes a space as ▁.)
    """
    samples = two_samples()
    for sample in samples:
        encoded = lavin.encode(sample)
        answer_start = (encoded.labels != data.IGNORED).argmax()
        print_pieces("no loss", encoded, slice(answer_start), lavin)
        print_pieces("loss", encoded, slice(answer_start, None), lavin)
        print()

    batch = lavin.batch(samples)
    n = batch.lengths[0]
    print("`collate` concatenates both into one Batch, without padding:")
    rows = {
        "tokens": "the tokens of both samples",
        "positions": f"0 to {batch.positions[n - 1]}, then 0 to {batch.positions[-1]}",
        "modality": f"{batch.modality[0]} for {n} tokens, then {batch.modality[-1]} (a picture)",
        "answer_indices": f"tokens that carry loss; the last is token {batch.answer_indices[-1]}",
        "feature_indices": f"where the features go: {batch.feature_indices.tolist()}",
        "lengths": f"tokens of each sample: {batch.lengths.tolist()}",
    }
    for name, meaning in rows.items():
        print(f"    {name:17}{shape(getattr(batch, name)):10}{meaning}")
    print("\nNext: read `tokenize`. Why does it not tokenize prompt and answer separately?")


@torch.no_grad()
def show_model(lavin: LaVIN) -> None:
    """model.py: LaVIN.forward

    We follow one problem from start to end. `embed` looks up the embeddings of the tokens and
    inserts the picture's features. LLaMA treats both alike. `output` predicts each token of the
    answer.
    """
    text, picture = two_samples()
    batch = lavin.batch([picture])
    x = lavin.embed(batch)
    w = lavin.expert_weights(batch)
    hidden = lavin.llama(x, w)
    before = batch.answer_indices - 1           # the token before predicts the answer's token
    logits = lavin.llama.output(hidden[0, before])
    print(f"embeddings         {shape(x):16}{lavin.n_features} of the rows are picture features")
    print(f"experts' weights   {shape(w):16}for every layer and token")
    print(f"hidden state       {shape(hidden):16}LLaMA's last hidden state of every token")
    print(f"logits             {shape(logits):16}answer tokens × vocabulary")
    by_hand = F.cross_entropy(logits, batch.labels[batch.answer_indices])
    print(f"The loss of lavin(batch) is {lavin(batch):.6f}. F.cross_entropy gives {by_hand:.6f}.\n")

    question, _, options, _ = picture.prompt.splitlines()
    print(f"{question}  {options}  Right: {data.LETTERS[data.sqa_answer(picture.answer)]}\n"
          "The five most likely tokens after \"The answer is\":")
    begun = data.Sample(picture.prompt + "The answer is", image=picture.image)
    next_token = lavin.logits(lavin.batch([begun], prompt_only=True))[0, -1]
    probabilities, tokens = next_token.softmax(-1).topk(5)
    for p, token in zip(probabilities.tolist(), tokens.tolist()):
        print(f"    {lavin.tokenizer.id_to_piece(token):8}{p:.3f}")
    print("With fresh adapters LaVIN can only guess. With trained ones it sees the picture.\n")

    alone = lavin.logits(batch)[0]
    in_company = lavin.logits(lavin.batch([text, picture]))[1, :len(alone)]
    compare("the logits of this sample, alone and after another one", alone, in_company)
    print("\nNext: read `Block.forward`. Then find out in `attend` why samples do not mix.")


def part_of(name: str) -> str:
    """The part of the model that has this parameter: "llama", …, or "router" in an adapter."""
    return name.split(".adapter.")[-1].split(".")[0]


def print_steps(lavin: LaVIN, optimizer, scaler, gradients, batch: data.Batch) -> None:
    """Take two steps on one batch, and print which tensors had a gradient and which changed."""
    parameters = dict(lavin.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    steps = []          # for each step, how many tensors of each part had a gradient
    for step in (1, 2):
        lr = optimizer.param_groups[0]["lr"]
        loss, norm = train.train_step(lavin, optimizer, scaler, gradients, [batch])
        print(f"step {step}   loss {loss:.3f}   gradient norm {norm:.3f}   learning rate {lr:.4f}")
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        steps.append(Counter(part_of(name) for name, p in trained.items() if p.grad.any()))
    changed = Counter(part_of(name) for name, p in parameters.items() if not p.equal(before[name]))

    print(f"\n{'part':20}{'tensors':>9}{'gradient in step 1':>22}{'in step 2':>12}{'changed':>9}")
    tensors = Counter(part_of(name) for name in parameters)
    for part, n in sorted(tensors.items()):
        print(f"{part:20}{n:9}{steps[0][part]:22}{steps[1][part]:12}{changed[part]:9}")


def show_train(lavin: LaVIN) -> None:
    """train.py: train_step

    An optimizer step takes one global batch, here 32 problems. We start with fresh adapters and
    take two steps on the same batch, at the peak learning rate.
    """
    torch.manual_seed(0)
    lavin.init_trained()
    lavin.train()
    rng = Random("train")
    samples = [make_sample(world.random_item(rng, i, "train"), rng) for i in range(32)]
    whole = lavin.batch(samples)
    settings = train.Settings(**world.DEFAULTS)
    optimizer = train.make_optimizer(lavin, settings)
    for group in optimizer.param_groups:
        group["lr"] = settings.lr
    scaler = torch.amp.GradScaler("cpu", enabled=False)             # fp32 needs none
    gradients = gradient_buffer(lavin)
    print_steps(lavin, optimizer, scaler, gradients, whole)
    print("\nLLaMA and the ViT never change. The adapters' experts (up) start at zero. So in\n"
          "step 1 no gradient flows through them to down, the router or the modality tokens.\n")

    for group in optimizer.param_groups:
        group["lr"] = 0.0                                           # no weight changes any more
    train.train_step(lavin, optimizer, scaler, gradients, [whole])
    at_once = gradients.clone()
    halves = [lavin.batch(samples[:16]), lavin.batch(samples[16:])]
    train.train_step(lavin, optimizer, scaler, gradients, halves)
    print("To save memory, a batch may be split into micro-batches. The gradient stays the same,\n"
          f"up to rounding (its largest entry is {at_once.abs().max():.2g}):")
    compare("with one micro-batch and with two", gradients, at_once)
    print("\nNext: read `train_step`. Find the two stages of its backward pass.")


STOPS = {
    "router": show_router,
    "adapters": show_adapters,
    "vit": show_vit,
    "data": show_data,
    "model": show_model,
    "train": show_train,
}


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stop", nargs="?", choices=list(STOPS), help="default: all, in this order")
    args = parser.parse_args()
    lavin = load_lavin()
    for name, show in STOPS.items():
        if args.stop in (None, name):
            title, _, text = inspect.getdoc(show).partition("\n\n")
            print(f"\n{title}\n{'-' * len(title)}\n{text}\n")
            show(lavin)


if __name__ == "__main__":
    run(main)
