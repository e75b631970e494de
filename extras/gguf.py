"""GGUF, llama.cpp's single file: the sizes of a LLaMA or Qwen2, its vocabulary, quantized weights.

The library `gguf` dequantizes (pip install gguf). It could find out what is in the file as well,
but takes seconds for that, and for ever where a length is damaged. In wq and wk of a LLaMA the rows
stand in Meta's order, in those of a Qwen2 in Hugging Face's. Vocabularies are of two kinds. LLaMA 1
and 2 have sentencepiece's ("llama"), from which a sentencepiece model is put together again. The
others have pairs of bytes ("gpt2"): pip install tokenizers.
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from data import Tokenizer
from extras.tokenizers import JsonTokenizer, import_tokenizers
from extras.values import LLAMA_PARAMS, check_supported, check_values, meta_name, short
from files import LavinError, check_regular, check_tensor
from model import LLaMAConfig, rope_frequencies

# llama.cpp's name -> Meta's. Those of a layer stand behind "blk.N." and "layers.N.".
NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
# llama.cpp's name of a size, behind "llama." or "qwen2." -> the field of LLaMAConfig.
FIELDS = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "hidden_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
ROPE_SCALES = "rope_freqs.weight"   # LLaMA 3.1's: by how much each pair of channels is slowed down

# How a text is cut before its bytes are paired, by the name that the file gives it.
CUTS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CONTROL = 3                         # the types of tokens have sentencepiece's numbers
USER_DEFINED = 4
# The types of values: numbers, by struct's letters for them, and two more.
NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT = 8
LIST = 9


class Header:
    """What stands in front of the weights, read in order. ValueError if the file ends before."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.left = size            # bytes, up to the file's end

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        if n > self.left:
            raise ValueError("it ends too early")
        self.left -= n
        return self.file.read(n)

    def numbers(self, letter: str, n: int) -> list:
        """The next n numbers, of the type that is struct's letter."""
        content = self.take(n * struct.calcsize(f"<{letter}"))
        return list(struct.unpack(f"<{n}{letter}", content))

    def number(self, letter: str) -> int | float:
        """The next number."""
        return self.numbers(letter, 1)[0]

    def text(self) -> str:
        """The next text, which begins with its length."""
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> object:
        """The next value of a type: a number, a text, or a list of values of one type."""
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.number(NUMBERS[kind])
        kind = self.number("I")
        n = self.number("Q")
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], n)
        return [self.value(kind) for _ in range(n)]


def read_header(file: BinaryIO, size: int, library) -> tuple[dict, dict]:
    """-> ({name: value} of what is said of the model, {llama.cpp's name of a tensor: (its type, the
    shape of its bytes, their place in the file)}). ValueError and others for damaged bytes.
    """
    header = Header(file, size)
    if header.take(4) != b"GGUF" or header.number("I") not in (2, 3):
        raise ValueError("it is not GGUF of version 2 or 3")
    n_tensors = header.number("Q")
    n_fields = header.number("Q")
    fields = {}
    for _ in range(n_fields):
        name = header.text()
        fields[name] = header.value(header.number("I"))
    tensors = {}
    for _ in range(n_tensors):
        name = header.text()
        shape = header.numbers("Q", header.number("I"))     # the fastest dimension first
        kind = library.GGMLQuantizationType(header.number("I"))
        tensors[name] = (kind, shape[::-1], header.number("Q"))
    alignment = fields.get("general.alignment", 32)
    start = math.ceil((size - header.left) / alignment) * alignment
    for name, (kind, shape, offset) in tensors.items():
        n_numbers, n_bytes = library.GGML_QUANT_SIZES[kind]         # of a block
        *rows, width = shape
        stored = (*rows, width // n_numbers * n_bytes)
        if width % n_numbers or start + offset + math.prod(stored) > size:
            raise ValueError(f"it ends within {name}")
        tensors[name] = (kind, stored, start + offset)
    return fields, tensors


def import_gguf(path: str | Path):
    """The library `gguf`. LavinError, about `path`, where it is not installed."""
    try:
        import gguf                             # an optional package, needed for such files alone
    except ImportError as error:
        raise LavinError(f"{path}: pip install gguf, which reads such files") from error
    return gguf


class File:
    """A GGUF file, opened. Of its weights, only what is asked for is read.

    fields: what the file says of the model, {name: value}. tensors: {Meta's name: (the type, the
    shape of the bytes, their place)}. is_hf: are the rows of wq and wk in Hugging Face's order?
    """

    def __init__(self, path: str | Path):
        """LavinError if it is not a GGUF file of a model of ours."""
        check_regular(path)
        self.library = import_gguf(path)
        self.path = path
        self.directory = path       # as checkpoints.MappedShards calls them
        self.files = [path]
        try:
            with open(path, "rb") as opened:
                size = os.path.getsize(path)
                self.fields, tensors = read_header(opened, size, self.library)
        except OSError as error:
            raise LavinError(f"{path}: cannot be read ({error.strerror})") from error
        except Exception as error:  # damaged bytes make it raise anything
            reason = short(str(error))
            raise LavinError(f"{path}: not a readable GGUF file ({reason}); truncated? fetch it "
                             "again") from error
        self.check_supported()
        self.is_hf = self.fields["general.architecture"] == "qwen2"
        self.tensors = {self.name_of(name): place for name, place in tensors.items()}

    def check_supported(self) -> None:
        """LavinError for what our model cannot do."""
        fields = self.fields
        architecture = fields.get("general.architecture")
        check_supported(self.path, {"general.architecture": architecture or "none"}, {
            "general.architecture": ("llama", "qwen2")})
        width = fields.get(f"{architecture}.attention.key_length")
        n_heads = fields.get(f"{architecture}.attention.head_count")
        dim = fields.get(f"{architecture}.embedding_length")
        if not width and type(n_heads) is int and n_heads > 0 and type(dim) is int:
            width = dim // n_heads
        check_supported(self.path, fields, {
            f"{architecture}.expert_count": (0,),
            f"{architecture}.rope.scaling.type": ("none",),
            f"{architecture}.rope.dimension_count": (width,),
            f"{architecture}.attention.value_length": (width,),
            "split.count": (0, 1),
        })

    def name_of(self, name: str) -> str:
        """Meta's name of a tensor. Raises LavinError."""
        if name == ROPE_SCALES:
            return name
        known = meta_name(name, r"blk\.(\d+)\.(.+)", NAMES)
        if known is None:
            raise LavinError(f"{self.path}: {name} is no name of a LLaMA in GGUF")
        return known

    def names(self) -> list[str]:
        """Meta's names of the weights."""
        return [name for name in self.tensors if name != ROPE_SCALES]

    def read(self, name: str) -> torch.Tensor:
        """A tensor by Meta's name, dequantized: fp32.

        It is read, not mapped: pages of a map would count as memory as long as the file is open.
        """
        kind, shape, place = self.tensors[name]
        try:
            stored = np.fromfile(self.path, np.uint8, math.prod(shape), offset=place)
            numbers = self.library.dequantize(stored.reshape(shape), kind)
        except NotImplementedError as error:
            raise LavinError(f"{self.path}: {name} is of type {kind.name}, which the library gguf "
                             "does not dequantize; take the model in another type") from error
        except (OSError, ValueError) as error:
            raise LavinError(f"{self.path}: {name} cannot be read ({error})") from error
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))

    def slices(self, name: str, target: torch.Tensor) -> list[torch.Tensor]:
        """The tensor that goes into `target`, in a list: such a file has a single slice of it."""
        tensor = self.read(name)
        check_tensor(self.path, name, tensor, target.shape, target.dtype)
        return [tensor]

    def params(self) -> dict:
        """{field of LLaMAConfig: value}, of the right kinds. Raises LavinError."""
        prefix = self.fields["general.architecture"] + "."
        kinds = {prefix + name: LLAMA_PARAMS[field] for name, field in FIELDS.items()}
        needed = [prefix + name for name in FIELDS if name not in OPTIONAL]
        check_values(self.path, self.fields, kinds, needed)
        params = {}
        for name, field in FIELDS.items():
            if prefix + name in self.fields:
                params[field] = self.fields[prefix + name]
        if "tok_embeddings.weight" not in self.tensors:
            raise LavinError(f"{self.path}: tok_embeddings.weight is missing")
        _, shape, _ = self.tensors["tok_embeddings.weight"]
        params["vocab_size"] = shape[0]
        params["attention_bias"] = prefix == "qwen2."
        params["tied_embeddings"] = "output.weight" not in self.tensors
        if ROPE_SCALES in self.tensors:
            params["rope_factor"] = self.rope_factor(params)
        return params

    def rope_factor(self, params: dict) -> float:
        """The factor of LLaMA 3.1's scaled RoPE, of which the file holds what it comes to."""
        scales = self.read(ROPE_SCALES).flatten()
        factor = scales.max().item()
        plain = LLaMAConfig(**params)
        scaled = LLaMAConfig(**params | {"rope_factor": factor})
        expected = rope_frequencies(plain) / rope_frequencies(scaled)
        if scales.shape != expected.shape or not torch.allclose(scales, expected, rtol=1e-3):
            raise LavinError(f"{self.path}: {ROPE_SCALES} does not scale RoPE as LLaMA 3.1 does, "
                             "and nothing else is supported")
        return factor

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the vocabulary. Raises LavinError."""
        kind = self.fields.get("tokenizer.ggml.model", "none")
        check_supported(self.path, {"tokenizer.ggml.model": kind}, {
            "tokenizer.ggml.model": ("llama", "gpt2")})
        tokens = self.fields.get("tokenizer.ggml.tokens")
        types = self.fields.get("tokenizer.ggml.token_type")
        special = {}
        for name in ("bos", "eos"):
            special[name] = self.fields.get(f"tokenizer.ggml.{name}_token_id")
        special["bos"] = special["eos"] if special["bos"] is None else special["bos"]
        sound = (isinstance(tokens, list) and isinstance(types, list)
                 and len(types) == len(tokens) == len(set(tokens)))
        for number in special.values():
            sound = sound and type(number) is int and 0 <= number < len(tokens)
        if not sound:
            raise LavinError(f"{self.path}: its vocabulary is damaged, or names no EOS token")
        try:
            if kind == "llama":
                return self.sentencepiece(tokens, types, **special)
            return self.byte_pairs(tokens, types, **special)
        except (LavinError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:          # of the two libraries; a panic is no Exception
            raise LavinError(f"{self.path}: its vocabulary is damaged ({short(str(error))})"
                             ) from error

    def byte_pairs(self, tokens: list[str], types: list[int], bos: int, eos: int) -> JsonTokenizer:
        """The tokenizer of a vocabulary of kind "gpt2"."""
        cut = self.fields.get("tokenizer.ggml.pre", "none")
        check_supported(self.path, {"tokenizer.ggml.pre": cut}, {
            "tokenizer.ggml.pre": ("smollm", *CUTS)})
        tokenizers = import_tokenizers(self.path)
        merges = [tuple(pair.split(" ")) for pair in self.fields["tokenizer.ggml.merges"]]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        model = tokenizers.Tokenizer(tokenizers.models.BPE(
            vocabulary, merges, ignore_merges=cut == "llama-bpe"))
        if cut == "qwen2":
            model.normalizer = tokenizers.normalizers.NFC()
        cutters = tokenizers.pre_tokenizers
        if cut == "smollm":         # every digit alone, the rest as GPT-2 does
            first = cutters.Digits(individual_digits=True)
            bytes_of = cutters.ByteLevel(add_prefix_space=False)
        else:
            first = cutters.Split(tokenizers.Regex(CUTS[cut]), "isolated")
            bytes_of = cutters.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = cutters.Sequence([first, bytes_of])
        model.decoder = tokenizers.decoders.ByteLevel()
        added = {CONTROL: [], USER_DEFINED: []}             # these are found before a text is cut
        for token, kind in zip(tokens, types):
            if kind in added:
                added[kind].append(tokenizers.AddedToken(token, normalized=False))
        model.add_special_tokens(added[CONTROL])
        model.add_tokens(added[USER_DEFINED])
        ends = []                   # of a turn: chat models may name another token than EOS
        end = self.fields.get("tokenizer.ggml.eot_token_id")
        if type(end) is int and 0 <= end < len(tokens):
            ends.append(end)
        return JsonTokenizer(model, bos, eos, ends)

    def sentencepiece(self, tokens: list[str], types: list[int], bos: int,
                      eos: int) -> SentencePieceProcessor:
        """The tokenizer of a vocabulary of kind "llama"."""
        scores = self.fields.get("tokenizer.ggml.scores", [0.0] * len(tokens))
        pieces = []
        for token, score, kind in zip(tokens, scores, types, strict=True):
            piece = protobuf(1, token.encode()) + protobuf(2, score) + protobuf(3, kind)
            pieces.append(protobuf(1, piece))
        unknown = tokens[self.fields.get("tokenizer.ggml.unknown_token_id", 0)]
        # TrainerSpec and NormalizerSpec of sentencepiece_model.proto. Model type 2 is BPE.
        trainer = protobuf(3, 2) + protobuf(35, 1)                          # 35: byte_fallback
        trainer += protobuf(45, unknown.encode())
        trainer += protobuf(46, tokens[bos].encode()) + protobuf(47, tokens[eos].encode())
        add_space = int(self.fields.get("tokenizer.ggml.add_space_prefix", True))
        normalizer = protobuf(1, b"identity") + protobuf(3, add_space) + protobuf(4, 0)
        tokenizer = SentencePieceProcessor()
        tokenizer.LoadFromSerializedProto(
            b"".join(pieces) + protobuf(2, trainer) + protobuf(3, normalizer))
        return tokenizer


def varint(number: int) -> bytes:
    """A whole number as protocol buffers write it: 7 bits in each byte, the lowest first."""
    content = b""
    while number >= 128:
        content += bytes([number % 128 + 128])
        number //= 128
    return content + bytes([number])


def protobuf(number: int, value: int | float | bytes) -> bytes:
    """A field of a protocol buffer: its number, how its value is written, the value."""
    if isinstance(value, bytes):
        return varint(number * 8 + 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    return varint(number * 8) + varint(value)
