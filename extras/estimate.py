"""Compute the GPU memory and the arithmetic that training needs, on a machine without a GPU.

The model takes a training step on fake tensors. PyTorch's FakeTensorMode gives tensors a shape and
a dtype, but no values and no memory, so 7B runs on any machine. LiveBytes adds up the tensors that
would be alive, and its peak is the peak of the step. These tensors are on the CPU, not on a GPU.
Where that matters:

    attention       takes the GPU's path (fast.ops.acting_as_gpu). The CPU's fused kernel keeps the
                    same tensors for backward as the GPU's flash kernel: the output, and one fp32
                    number for each head and token
    the loss        takes it too: it computes as many rows of logits at a time as on a GPU
    --compile       is not simulated; it would fuse operations and keep fewer tensors between them
    UNSEEN          is added for memory that belongs to no tensor

All layers are alike, so memory grows linearly with their number. We measure three models of full
width with few layers and extrapolate. The result is exact to one block of the allocator
(tests/test_estimate.py).
"""

import dataclasses
import math
import os
import weakref
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
from adapters import AdapterConfig
from checkpoints import (
    allocate, begin_with, check_context, load_tokenizer, modules_outside_blocks, open_llama,
    read_clip, read_params)
from extras import runs
from fast.ops import acting_as_gpu
from fast.quantize import quantize
from fast.ranks import gradient_buffer
from files import DTYPES, LavinError
from model import LaVIN, LLaMAConfig
from vit import ViTConfig

# GPU memory (bytes) that a process takes in addition to its tensors. First, the CUDA context with
# its loaded kernels: PyTorch's developers report 300 to 400 MB (pytorch issues 107667 and 109888),
# and 450 MB were measured on an RTX 6000 Ada (unslothai/unsloth-zoo, pull request 1053); rounded
# up. Second, the workspaces of cuBLAS and cuBLASLt: 32 MiB each on Hopper, less on other GPUs
# (aten/src/ATen/cuda in PyTorch's source).
UNSEEN = 500 * 10**6 + 2 * 2**25
BLOCK = 512                         # the CUDA allocator rounds every tensor up to a multiple of it
CARDS = (8, 12, 16, 24, 40, 80)     # GB of common GPUs
# (Layers of LLaMA, layers of the ViT) of the small models. The ViT gives a feature per 4 layers.
CORNERS = ((1, 4), (2, 4), (1, 8))
# The lowest and the highest share of the hardware's matmul rate that bench/speed.py has measured in
# a training step: in bf16 on a CPU with fast bf16 products, and in fp32 (docs/speed.md).
SHARES = (0.27, 0.70)


def is_missing(device: str) -> bool:
    """Is this a GPU, on a machine that has none?"""
    if torch.cuda.is_available():
        return False
    try:
        return torch.device(device).type == "cuda"
    except RuntimeError:            # not the name of a device; "auto" is not one either
        return False


# Memory


@dataclass
class Memory:
    """The bytes that are alive at the peak of a training step, by purpose."""
    weights: float          # frozen
    trained: float          # parameters, their gradients, AdamW's moments
    activations: float      # includes their gradients and temporary tensors
    logits: float
    loading: float          # the peak before the first step, while quantizing weights

    @property
    def peak(self) -> float:
        """The most bytes of tensors at any time."""
        step = self.weights + self.trained + self.activations + self.logits
        return max(step, self.loading)

    @property
    def needed(self) -> float:
        """The GPU memory that this needs, in bytes."""
        return self.peak + UNSEEN


class LiveBytes(TorchDispatchMode):
    """A context manager that adds up the storages created inside it, as long as they are alive.

    live and peak are in bytes. logits_at_peak is the part of the peak in tensors that are
    `vocab_size` wide. A tensor and its views share one storage, which counts once. The size of a
    storage is rounded up to a multiple of `block` bytes.
    """

    def __init__(self, vocab_size: int, block: int = 1):
        super().__init__()
        self.vocab_size = vocab_size
        self.block = block
        self.sizes = {}             # by storage: (bytes, bytes of logits)
        self.live = 0
        self.live_logits = 0
        self.restart()

    def restart(self) -> None:
        """Start looking for a new peak."""
        self.peak = self.live
        self.logits_at_peak = self.live_logits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self.count(output)
        return outputs

    def count(self, tensor):
        storage = tensor.untyped_storage()
        key = id(storage)           # the Python object lives as long as the storage itself
        if key in self.sizes:
            return
        size = rounded(storage.nbytes(), self.block)
        is_logits = tensor.dim() == 2 and tensor.shape[1] == self.vocab_size
        self.sizes[key] = size, size if is_logits else 0
        weakref.finalize(storage, self.forget, key)
        self.live += size
        self.live_logits += self.sizes[key][1]
        if self.live > self.peak:
            self.restart()

    def forget(self, key):
        size, logits = self.sizes.pop(key)
        self.live -= size
        self.live_logits -= logits


def rounded(size: int, block: int) -> int:
    """The next multiple of `block`."""
    return math.ceil(size / block) * block


class StandInTokenizer:
    """Replaces sentencepiece where no text is read. The prefix of a picture has three tokens."""

    def encode(self, text: str) -> list[int]:
        return [1, 2, 3]

    def eos_id(self) -> int:
        return -1               # no real token, so no answer ends early


@dataclass
class Shape:
    """Everything that determines the sizes of a LaVIN."""
    llama: LLaMAConfig
    vit: ViTConfig
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    tokenizer: object = field(default_factory=StandInTokenizer)
    max_seq_len: int = 512

    def on_meta(self) -> LaVIN:
        """The model on the meta device, where it takes no memory."""
        with torch.device("meta"):
            return LaVIN(self.llama, self.vit, self.adapters, self.tokenizer, self.max_seq_len)

    def with_layers(self, n_llama: int, n_vit: int) -> "Shape":
        """The same widths, with these numbers of layers."""
        llama = dataclasses.replace(self.llama, n_layers=n_llama)
        vit = dataclasses.replace(self.vit, layers=n_vit)
        return dataclasses.replace(self, llama=llama, vit=vit)

    def extrapolate(self, values: list[float]) -> float:
        """The value for this shape, from the values of the small models at CORNERS."""
        first, more_llama, more_vit = values
        llama = (self.llama.n_layers - 1) * (more_llama - first)
        vit = (self.vit.layers - 4) / 4 * (more_vit - first)
        return first + llama + vit


# Named shapes, for the scripts in bench/.
MODEL_SHAPES = {
    "7B": Shape(LLaMAConfig(), ViTConfig()),
    "13B": Shape(LLaMAConfig(dim=5120, n_layers=40, n_heads=40), ViTConfig()),
    "mid": Shape(LLaMAConfig(dim=512, n_layers=8, n_heads=8), ViTConfig(width=512, layers=12)),
}


def read_shape(settings) -> Shape:
    """The shape of a run's model. LLaMA's tensors are not read and need not exist.

    If CLIP's file does not exist, the ViT is ViT-L/14. Raises LavinError as checkpoints.load does.
    """
    fresh = runs.fresh_adapters(settings)
    _, adapters, _ = begin_with(settings.adapter, fresh, settings.dropout)
    llama_source = open_llama(settings.llama)
    tokenizer = load_tokenizer(llama_source)
    if os.path.exists(settings.vit):
        _, vit = read_clip(settings.vit)
    else:
        vit = ViTConfig()
        print(f"there is no {settings.vit}; assuming the shape of ViT-L/14")
    llama = read_params(llama_source, tokenizer.vocab_size())
    check_context(settings.max_seq_len, tokenizer, vit)
    return Shape(llama, vit, adapters, tokenizer, settings.max_seq_len)


def give_memory(lavin: LaVIN, dtype: torch.dtype, bits: int) -> None:
    """Allocate a model that is on the meta device, in the same order as checkpoints.load."""
    cpu = torch.device("cpu")
    allocate(modules_outside_blocks(lavin), cpu, dtype)
    for block in lavin.llama.layers:
        allocate(block.modules(), cpu, dtype)
        if bits < 16:
            with torch.no_grad():
                quantize(block, bits)
    lavin.init_trained()


def with_features(batch: data.Batch, n_features: int) -> data.Batch:
    """The batch for a model with n_features per picture. No token is added or removed."""
    n_pictures = len(batch.pixels)
    if n_pictures == 0:
        return batch
    starts = batch.feature_indices.unflatten(0, (n_pictures, -1))[:, :1]        # (N, 1)
    indices = starts + torch.arange(n_features)                                 # (N, F)
    return dataclasses.replace(batch, feature_indices=indices.flatten())


def copy(batch: data.Batch) -> data.Batch:
    """The batch with copied tensors: LiveBytes counts them, and FakeTensorMode makes them fake.

    Lengths are not copied, since Python loops over them.
    """
    copies = {}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor) and name != "lengths":
            copies[name] = value.clone()
    return dataclasses.replace(batch, **copies)


def take_step(lavin: LaVIN, optimizer: torch.optim.Optimizer, gradients: torch.Tensor,
              batch: data.Batch) -> None:
    """train.train_step for a single micro-batch. It reads no values: fake tensors have none."""
    gradients.zero_()
    routed = lavin.route()
    leaf = routed.detach().requires_grad_()
    loss = lavin(batch, leaf)
    loss.backward()
    if routed.requires_grad:
        routed.backward(leaf.grad)
    optimizer.step()


def steps_memory(lavin: LaVIN, settings, batches: list[data.Batch], live: LiveBytes,
                 ways: tuple[bool, ...] = (False, True)) -> dict[tuple[bool, int], Memory]:
    """Return {(with checkpointing?, index of the batch): Memory} of a model on the meta device.

    Call this inside `with live`. Put that inside a FakeTensorMode, unless the steps should be real.
    ways: the values of `checkpointing` to measure. By default each step is taken with both.
    """
    give_memory(lavin, DTYPES[settings.dtype], settings.bits)
    runs.freeze(lavin, settings)
    lavin.train()
    loading = live.peak
    trained = [p for p in lavin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    gradients = gradient_buffer(lavin)
    optimizer.step()                                    # creates the moments
    weights = 0
    for tensor in [*lavin.parameters(), *lavin.buffers()]:
        if not tensor.requires_grad:
            weights += rounded(tensor.nbytes, live.block)
    before = live.live
    memory = {}
    for checkpointing in ways:
        lavin.llama.checkpointing = checkpointing
        lavin.vit.checkpointing = checkpointing
        for i, batch in enumerate(batches):
            inputs = copy(batch)
            live.restart()
            take_step(lavin, optimizer, gradients, inputs)
            activations = live.peak - before - live.logits_at_peak
            memory[checkpointing, i] = Memory(
                weights, before - weights, activations, live.logits_at_peak, loading)
    return memory


def training_memory(shape: Shape, settings, batches: list[data.Batch],
                    ways: tuple[bool, ...] = (False, True)) -> dict[tuple[bool, int], Memory]:
    """steps_memory for a shape on a GPU, from steps of three small models on fake tensors."""
    at_corners = []
    for n_llama, n_vit in CORNERS:
        lavin = shape.with_layers(n_llama, n_vit).on_meta()
        inputs = [with_features(batch, lavin.n_features) for batch in batches]
        live = LiveBytes(shape.llama.vocab_size, BLOCK)
        with FakeTensorMode(allow_non_fake_inputs=True), acting_as_gpu(), live:
            at_corners.append(steps_memory(lavin, settings, inputs, live, ways))
    return extrapolate_memory(shape, at_corners)


def extrapolate_memory(shape: Shape, at_corners: list[dict]) -> dict[tuple[bool, int], Memory]:
    """steps_memory for a shape, from the results of the small models at CORNERS."""
    memory = {}
    for key in at_corners[0]:
        parts = {}
        for part in dataclasses.fields(Memory):
            values = [getattr(corner[key], part.name) for corner in at_corners]
            parts[part.name] = shape.extrapolate(values)
        memory[key] = Memory(**parts)
    return memory


def blank(samples: list[data.Encoded], resolution: int) -> data.Batch:
    """A batch of these samples with white pictures. Only the sizes matter."""
    white = torch.zeros(3, resolution, resolution)
    without_files = []
    for sample in samples:
        image = None if sample.image is None else white
        without_files.append(dataclasses.replace(sample, image=image))
    return data.collate(without_files, resolution)


def longest_micro_batches(lavin: LaVIN, longest: list[data.Encoded],
                          settings) -> dict[int, list[data.Encoded]]:
    """Return {size: samples of the largest micro-batch} for sizes 1, settings.micro_batch and all.

    longest: the longest samples of a run, enough for one global batch. They are split into
    micro-batches as in training.
    """
    lengths = [len(sample.tokens) for sample in longest]
    n = len(longest)
    chosen = {}
    for size in sorted({1, min(settings.micro_batch, n), n}):
        micro_batches = []
        for indices in data.global_batch(0, lengths, n, size, settings.seed):
            micro_batches.append([longest[i] for i in indices])
        # The one with the most arithmetic also keeps the most tensors for backward.
        chosen[size] = max(micro_batches, key=lambda samples: flops_of(lavin, samples))
    return chosen


def largest_micro_batch(memory: dict[int, float], card: float) -> int:
    """The largest micro-batch that takes at most `card` bytes, or 0 if there is none.

    memory: {micro-batch: bytes} for a few sizes. Sizes in between are interpolated linearly.
    """
    sizes = sorted(memory)
    if memory[sizes[0]] > card:
        return 0
    for smaller, larger in zip(sizes, sizes[1:]):
        if memory[larger] > card:
            slope = (memory[larger] - memory[smaller]) / (larger - smaller)
            return smaller + int((card - memory[smaller]) / slope)
    return sizes[-1]


def print_memory(memory: Memory) -> None:
    """Print the parts of a step's peak."""
    parts = {
        "weights": memory.weights,
        "trained with gradients and moments": memory.trained,
        "activations": memory.activations,
        "logits": memory.logits,
        "CUDA": UNSEEN,
    }
    shown = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    print(f"memory   {memory.needed / 1e9:.1f} GB, computed: {shown}")
    if memory.peak == memory.loading:
        print(f"         the peak is {memory.loading / 1e9:.1f} GB while quantizing the weights, "
              "more than a step takes")


def print_what_fits(bits: int, memory: dict[tuple[bool, int], Memory], sizes: list[int]) -> None:
    """Print the largest micro-batch for each of CARDS, with and without checkpointing.

    memory: what training_memory returns for micro-batches of these sizes.
    """
    for checkpointing in (False, True):
        needed = {}
        for i, micro_batch in enumerate(sizes):
            needed[micro_batch] = memory[checkpointing, i].needed
        line = f"--bits {bits}"
        if checkpointing:
            line += " --checkpointing"
        line = f"         {line:28}"
        for card in CARDS:
            largest = largest_micro_batch(needed, card * 1e9)
            line += f"{largest or '-':>7}"
        print(line)


def print_training_memory(shape: Shape, settings, longest: dict[int, list[data.Encoded]]) -> None:
    """Print how much GPU memory a step takes, and which micro-batches fit common GPUs.

    longest: {micro-batch: its samples}, for the settings' micro-batch, smaller and larger ones.
    """
    sizes = list(longest)
    batches = [blank(samples, shape.vit.resolution) for samples in longest.values()]
    for bits in (16, 8, 4):
        if bits > settings.bits:
            continue
        try:
            memory = training_memory(shape, dataclasses.replace(settings, bits=bits), batches)
        except LavinError as error:         # some matrix sizes cannot be quantized
            if bits == settings.bits:
                raise
            print(f"         {error}")
            continue
        if bits == settings.bits:
            i = sizes.index(min(settings.micro_batch, max(sizes)))
            print_memory(memory[settings.checkpointing, i])
            title = f"--micro-batch of up to {max(sizes)}"
            cards = "".join(f"{card:>4} GB" for card in CARDS)
            print(f"fits     {title:28}{cards}")
        print_what_fits(bits, memory, sizes)


# Arithmetic and time


def flops(lavin: LaVIN, lengths: list[int], n_answer: int, n_pictures: int) -> int:
    """The number of operations for training on these samples, counted from the shapes.

    lengths: the number of tokens of each sample. n_answer: how many tokens carry loss, in total.
    For each token, a matrix of n numbers takes 2 n operations in forward and 2 n in backward, for
    the gradient of its input. A trained matrix takes 2 n more, for its own gradient. Attention
    takes two products in forward and twice as many operations in backward. LLaMA's attention takes
    half of this, since it is causal. Norms and the like are left out, and so is the work that
    checkpointing repeats.
    """
    config = lavin.llama.config
    C = config.dim
    block = lavin.llama.layers[0]
    n_block = 0                             # numbers in the frozen matrices of a block
    for linear in [*block.attention.children(), *block.feed_forward.children()]:
        n_block += linear.in_features * linear.out_features
    V = lavin.vit.class_embedding.numel()
    n_vit_tokens = len(lavin.vit.positional_embedding)
    rank = lavin.adapter_config.rank

    vit_token = 4 * 12 * V * V + 6 * 2 * V * rank + 12 * n_vit_tokens * V
    count = n_pictures * n_vit_tokens * len(lavin.vit.resblocks) * vit_token
    for T in lengths:
        count += config.n_layers * (4 * n_block * T + 6 * 2 * C * rank * T + 6 * T * T * C)
    count += 4 * C * config.vocab_size * n_answer
    return count


def flops_of(lavin: LaVIN, samples: list[data.Encoded]) -> int:
    """`flops` for these samples."""
    lengths = [len(sample.tokens) for sample in samples]
    n_answer = sum(int((sample.labels != data.IGNORED).sum()) for sample in samples)
    n_pictures = sum(sample.image is not None for sample in samples)
    return flops(lavin, lengths, n_answer, n_pictures)


def hours(work: float, tflops: float, share: float) -> float:
    """The hours that `work` operations take at this share of `tflops` TFLOP/s."""
    return work / (share * tflops * 1e12) / 3600


def print_work(epoch: int, n_epochs: float, settings) -> None:
    """Print the arithmetic of a run and, with --tflops, an estimate of its hours.

    epoch: the number of operations per epoch. n_epochs: how many epochs the run has.
    """
    print(f"work     {epoch / 1e15:.4g} PFLOP an epoch, {n_epochs * epoch / 1e15:.4g} in all")
    if settings.tflops is None:
        return
    work = n_epochs * epoch
    if settings.checkpointing:
        work *= 1.5         # forward runs twice; with frozen weights it is as long as backward
    least, most = SHARES
    shortest = hours(work, settings.tflops, most)
    longest = hours(work, settings.tflops, least)
    print(f"time     {shortest:.3g} to {longest:.3g} h, an estimate that assumes {100 * least:.0f} "
          f"to {100 * most:.0f} % of {settings.tflops:g} TFLOP/s, the shares measured on CPUs")
