"""Read GGUF, llama.cpp's file format: one file with a model's sizes, vocabulary and weights.

The model is a LLaMA or a Qwen2, often quantized. The library `gguf` dequantizes the weights (pip
install gguf). We read the header ourselves: the library takes seconds, and never returns if a
length is damaged. The rows of wq and wk are in Meta's order in a LLaMA, and in Hugging Face's in a
Qwen2. There are two kinds of vocabulary. LLaMA 1 and 2 have sentencepiece's ("llama"); we rebuild
the sentencepiece model from it. The others have byte pairs ("gpt2"), which need pip install
tokenizers.
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

# llama.cpp's name -> Meta's. In a layer, the names begin with "blk.N." and "layers.N.".
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
# llama.cpp's name of a size, without "llama." or "qwen2." -> the field of LLaMAConfig.
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
ROPE_SCALES = "rope_freqs.weight"   # LLaMA 3.1: what each RoPE frequency is divided by

# {the name in the file: how to cut a text before its byte pairs are merged}.
CUTS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CONTROL = 3                         # token types have the same numbers as in sentencepiece
USER_DEFINED = 4
# The types of values: numbers, with struct's letter for each, and two more.
NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT = 8
LIST = 9


class Header:
    """Reads what precedes the weights, in order. Raises ValueError if the file ends too early."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.left = size            # unread bytes in the file

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        if n > self.left:
            raise ValueError("it ends too early")
        self.left -= n
        return self.file.read(n)

    def numbers(self, letter: str, n: int) -> list:
        """The next n numbers. letter: their type, as in struct."""
        content = self.take(n * struct.calcsize(f"<{letter}"))
        return list(struct.unpack(f"<{n}{letter}", content))

    def number(self, letter: str) -> int | float:
        """The next number."""
        return self.numbers(letter, 1)[0]

    def text(self) -> str:
        """The next text. Its length is stored before it."""
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> object:
        """The next value, of type `kind`: a number, a text, or a list of values of one type."""
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
    """Return ({name: value} describing the model, {a tensor's name in llama.cpp: (its type, the
    shape of its bytes, their place in the file)}).

    Damaged bytes raise ValueError or another exception.
    """
    header = Header(file, size)
    if header.take(4) != b"GGUF" or header.number("I") not in (2, 3):
        raise ValueError("it is not GGUF version 2 or 3")
    n_tensors = header.number("Q")
    n_fields = header.number("Q")
    fields = {}
    for _ in range(n_fields):
        name = header.text()
        fields[name] = header.value(header.number("I"))
    described = {}
    for _ in range(n_tensors):
        name = header.text()
        shape = header.numbers("Q", header.number("I"))     # the fastest-varying dimension first
        kind = library.GGMLQuantizationType(header.number("I"))
        described[name] = (kind, shape[::-1], header.number("Q"))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError("wrong general.alignment")
    start = math.ceil((size - header.left) / alignment) * alignment
    tensors = {}
    for name, (kind, shape, offset) in described.items():
        n_numbers, n_bytes = library.GGML_QUANT_SIZES[kind]         # in a block
        *rows, width = shape
        if width % n_numbers:
            raise ValueError(f"{name} is {width} wide, which is no multiple of {n_numbers}")
        stored = (*rows, width // n_numbers * n_bytes)
        if start + offset + math.prod(stored) > size:
            raise ValueError(f"it ends within {name}")
        tensors[name] = (kind, stored, start + offset)
    return fields, tensors


def import_gguf(path: str | Path):
    """Import the library `gguf`. If it is not installed, LavinError names `path`."""
    try:
        import gguf                             # an optional package, only for such files
    except ImportError as error:
        raise LavinError(f"{path}: pip install gguf to read such files") from error
    return gguf


class File:
    """A GGUF file. A tensor is read only when it is asked for.

    fields: {name: value}, describing the model. tensors: {Meta's name: (its type, the shape of its
    bytes, their place)}. is_hf: are the rows of wq and wk in Hugging Face's order?
    """

    def __init__(self, path: str | Path):
        """Raises LavinError if it is not a GGUF file of a model that we support."""
        check_regular(path)
        self.library = import_gguf(path)
        self.path = path
        self.directory = path       # named as in checkpoints.MappedShards
        self.files = [path]
        try:
            with open(path, "rb") as opened:
                size = os.path.getsize(path)
                self.fields, tensors = read_header(opened, size, self.library)
        except OSError as error:
            raise LavinError(f"{path}: cannot be read ({error.strerror})") from error
        except Exception as error:  # damaged bytes may raise any exception
            reason = short(str(error))
            raise LavinError(f"{path}: not a readable GGUF file ({reason}); truncated? fetch it "
                             "again") from error
        self.check_architecture()
        self.is_hf = self.fields["general.architecture"] == "qwen2"
        self.tensors = {self.name_of(name): tensor for name, tensor in tensors.items()}

    def check_architecture(self) -> None:
        """Raises LavinError for anything that our model does not support."""
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
        """Meta's name for a tensor. Raises LavinError if it has none."""
        if name == ROPE_SCALES:
            return name
        known = meta_name(name, r"blk\.(\d+)\.(.+)", NAMES)
        if known is None:
            raise LavinError(f"{self.path}: {name} is not a tensor of a LLaMA in GGUF")
        return known

    def names(self) -> list[str]:
        """The weights, by Meta's names."""
        return [name for name in self.tensors if name != ROPE_SCALES]

    def read(self, name: str) -> torch.Tensor:
        """A tensor by Meta's name, dequantized to fp32.

        It is read, not mapped: pages of a map would count as memory while the file is open.
        """
        kind, shape, place = self.tensors[name]
        try:
            stored = np.fromfile(self.path, np.uint8, math.prod(shape), offset=place)
            numbers = self.library.dequantize(stored.reshape(shape), kind)
        except NotImplementedError as error:
            raise LavinError(f"{self.path}: {name} is of type {kind.name}, which the library gguf "
                             "does not dequantize; use a file of another type") from error
        except (OSError, ValueError) as error:
            raise LavinError(f"{self.path}: {name} cannot be read ({error})") from error
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32))

    def slices(self, name: str, target: torch.Tensor) -> list[torch.Tensor]:
        """The tensor for `target`, as a list of one slice: GGUF does not split tensors."""
        tensor = self.read(name)
        check_tensor(self.path, name, tensor, target.shape, target.dtype)
        return [tensor]

    def params(self) -> dict:
        """{field of LLaMAConfig: value}, types and ranges checked. Raises LavinError."""
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
        """The factor of LLaMA 3.1's scaled RoPE, found from the divisors in the file."""
        scales = self.read(ROPE_SCALES).flatten()
        factor = scales.max().item() if len(scales) else 1.0
        plain = LLaMAConfig(**params)
        scaled = LLaMAConfig(**params | {"rope_factor": factor})
        expected = rope_frequencies(plain) / rope_frequencies(scaled)
        if scales.shape != expected.shape or not torch.allclose(scales, expected, rtol=1e-3):
            raise LavinError(f"{self.path}: {ROPE_SCALES} does not scale RoPE as LLaMA 3.1 does, "
                             "and no other scaling is supported")
        return factor

    def tokenizer(self) -> Tokenizer:
        """The tokenizer for the vocabulary. Raises LavinError."""
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
                 and all(isinstance(token, str) for token in tokens)
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
        except BaseException as error:          # a panic in a library is not an Exception
            raise LavinError(f"{self.path}: its vocabulary is damaged ({short(str(error))})"
                             ) from error

    def byte_pairs(self, tokens: list[str], types: list[int], bos: int, eos: int) -> JsonTokenizer:
        """The tokenizer for a vocabulary of kind "gpt2"."""
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
        if cut == "smollm":         # single digits, the rest as in GPT-2
            first = cutters.Digits(individual_digits=True)
            bytes_of = cutters.ByteLevel(add_prefix_space=False)
        else:
            first = cutters.Split(tokenizers.Regex(CUTS[cut]), "isolated")
            bytes_of = cutters.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = cutters.Sequence([first, bytes_of])
        model.decoder = tokenizers.decoders.ByteLevel()
        added = {CONTROL: [], USER_DEFINED: []}             # they are found before a text is cut
        for token, kind in zip(tokens, types):
            if kind in added:
                added[kind].append(tokenizers.AddedToken(token, normalized=False))
        model.add_special_tokens(added[CONTROL])
        model.add_tokens(added[USER_DEFINED])
        ends = []                   # tokens that end a turn; a chat model may have one besides EOS
        end = self.fields.get("tokenizer.ggml.eot_token_id")
        if type(end) is int and 0 <= end < len(tokens):
            ends.append(end)
        return JsonTokenizer(model, bos, eos, ends)

    def sentencepiece(self, tokens: list[str], types: list[int], bos: int,
                      eos: int) -> SentencePieceProcessor:
        """The tokenizer for a vocabulary of kind "llama"."""
        scores = self.fields.get("tokenizer.ggml.scores", [0.0] * len(tokens))
        pieces = []
        for token, score, kind in zip(tokens, scores, types, strict=True):
            piece = protobuf(1, token.encode()) + protobuf(2, score) + protobuf(3, kind)
            pieces.append(protobuf(1, piece))
        unknown = tokens[self.fields.get("tokenizer.ggml.unknown_token_id", 0)]
        # The fields of TrainerSpec and NormalizerSpec are numbered in sentencepiece_model.proto.
        # Model type 2 is BPE.
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
    """A whole number as in protocol buffers: 7 bits in each byte, the lowest bits first."""
    content = b""
    while number >= 128:
        content += bytes([number % 128 + 128])
        number //= 128
    return content + bytes([number])


def protobuf(number: int, value: int | float | bytes) -> bytes:
    """A field of a protocol buffer: its number, how its value is encoded, and the value."""
    if isinstance(value, bytes):
        return varint(number * 8 + 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    return varint(number * 8) + varint(value)
