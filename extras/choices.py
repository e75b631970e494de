"""Choose the most likely of several given answers, without generating.

The score of an answer is the summed log-probability of its tokens and EOS, given the prompt. This
equals the training loss of the same sample, summed over tokens, with the opposite sign. The prompt
is read once into the cache of fast/engine.py. Each answer then continues from there.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data
from data import Encoded, Sample
from extras.evaluate import (Answers, by_modality, decode_pictures, encode_prompts,
                             progress_bar)
from fast.engine import Engine
from fast.fold import fold
from files import LavinError
from model import LaVIN, check_logits

MOST_TOKENS = 1024          # read at a time; each gives logits for the whole vocabulary


@dataclass(frozen=True)
class Branch:
    """The part of one answer's sequence that follows the part shared by all answers."""
    tokens: tuple           # the last shared token, then the answer's own
    labels: tuple           # of the same length, as in data.Encoded


def split_sequences(lavin: LaVIN, sample: Sample,
                    choices: list[str]) -> tuple[Encoded, tuple[Branch, ...]]:
    """A prompt and its possible answers -> (the shared start, a Branch for each answer).

    Prompt and answer are tokenized as one string, so the tokens at the seam are the same as in
    training. Raises LavinError if an answer does not fit the context.
    """
    sequences = []
    for choice in choices:
        sequence = lavin.encode(dataclasses.replace(sample, answer=choice))
        if sequence.tokens[-1] != lavin.tokenizer.eos_id():
            raise LavinError(f"{choice!r} does not fit the context")
        sequences.append(sequence)
    # A branch begins with the last shared token, because that token predicts the next one.
    shared = min(first_label(sequence) for sequence in sequences)
    first = sequences[0].tokens
    for sequence in sequences:
        differs = np.flatnonzero(sequence.tokens[:shared] != first[:shared])
        if len(differs) > 0:
            shared = int(differs[0])
    n_start = shared - 1
    branches = []
    for sequence in sequences:
        tokens = sequence.tokens[n_start:].tolist()
        labels = sequence.labels[n_start:].tolist()
        branches.append(Branch(tuple(tokens), tuple(labels)))
    return data.cut(sequences[0], n_start), tuple(branches)


def first_label(sequence):
    """The position of the first token that carries loss, or of EOS if none does."""
    has_loss = sequence.labels != data.IGNORED
    has_loss[-1] = True
    return int(has_loss.argmax())


def in_parts(branches: list[tuple[int, Branch]]) -> Iterator[list[tuple[int, Branch]]]:
    """Split [(row, Branch)] into lists of at most MOST_TOKENS tokens, or of a single branch."""
    part = []
    n_tokens = 0
    for row, branch in branches:
        if part and n_tokens + len(branch.tokens) > MOST_TOKENS:
            yield part
            part = []
            n_tokens = 0
        part.append((row, branch))
        n_tokens += len(branch.tokens)
    yield part


def branch_scores(engine: Engine, branches: list[tuple[int, Branch]]) -> list[float]:
    """The log-probability of each (row, Branch). The engine's rows hold the shared starts."""
    scores = []
    for part in in_parts(branches):
        read = []
        targets = []
        for row, branch in part:
            read.append((row, list(branch.tokens[:-1])))    # EOS predicts nothing
            targets += branch.labels[1:]
        logits = engine.branch(read)                                            # (T, vocabulary)
        check_logits(logits)
        targets = torch.tensor(targets, device=logits.device)
        losses = F.cross_entropy(
            logits, targets, ignore_index=data.IGNORED, reduction="none")       # (T,)
        sizes = [len(tokens) for _, tokens in read]
        for own in losses.cpu().double().split(sizes):
            scores.append(-own.sum().item())
    return scores


def choose_group(lavin, group, branches, answers, modality, batch_size, workers):
    """Yield (id of a sample, index of its most likely answer)."""
    if not group:
        return
    n_rows = min(batch_size, len(group))
    longest = 0
    for prompt in group:
        longest_branch = max(len(branch.tokens) for branch in branches[prompt.id])
        longest = max(longest, len(prompt.tokens) + longest_branch)
    engine = Engine(fold(lavin, modality), n_rows, longest)
    prompts = decode_pictures(lavin, group, answers, workers, each=n_rows)
    while batch := list(itertools.islice(prompts, n_rows)):
        engine.prefill(data.collate(batch, lavin.resolution))
        waiting = []
        for row, prompt in enumerate(batch):
            waiting += [(row, branch) for branch in branches[prompt.id]]
        scores = branch_scores(engine, waiting)
        engine.lengths.clear()                              # the rows are free for the next batch
        begin = 0
        for prompt in batch:
            end = begin + len(branches[prompt.id])
            yield prompt.id, int(np.argmax(scores[begin:end]))
            begin = end


def choose_all(lavin: LaVIN, samples: list[Sample], answers: Answers,
               choices: dict[str, list[str]], batch_size: int = 32, workers: int = 0) -> None:
    """Add the most likely of each sample's choices to `answers`. choices: {sample's id: [text]}.

    The answer is "" if the prompt with one of the choices does not fit the context. If several
    choices have the same score, the first one is taken.
    """
    branches = {}
    known = {}                          # most samples have the same branches: keep them once

    def encode(sample):
        start, own = split_sequences(lavin, sample, choices[sample.id])
        branches[sample.id] = known.setdefault(own, own)
        return start

    groups = by_modality(encode_prompts(lavin, samples, answers, encode))
    with progress_bar(groups, "choosing") as bar:
        for modality, group in enumerate(groups):
            chosen = choose_group(lavin, group, branches, answers, modality, batch_size, workers)
            for identity, index in chosen:
                answers.add(identity, choices[identity][index])
                bar.update()
    answers.gather()
