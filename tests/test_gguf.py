"""A GGUF file gives the same model and the same tokens as the layout that it was made from.

They need the package gguf, and tokenizers for vocabularies of byte pairs. A real file is read in
test_smollm2.py.
"""

import sys
from random import Random

import numpy as np
import pytest
import torch

import checkpoints
import generate
from bench import peak_memory
from bench.peak_memory import gguf_name
from conftest import LLAMA, VIT, difference
from data import answer_ends
from extras.gguf import File
from files import LavinError
from helpers import AWKWARD, ask
from hf_layout import qwen_tensors, to_hf
from model import LLaMAConfig, rope_frequencies


@pytest.fixture(scope="session")
def library():
    return pytest.importorskip("gguf", reason="needs pip install gguf")


def golden_tensors():
    """LLAMA's tensors, as {llama.cpp's name: array}."""
    tensors = {}
    for name, tensor in torch.load(LLAMA / "consolidated.00.pth", weights_only=True).items():
        if name != "rope.freqs":
            tensors[gguf_name(name)] = tensor.float().numpy()
    return tensors


def sentencepiece_fields():
    """The fields with the vocabulary of LLAMA's tokenizer."""
    tokenizer = checkpoints.load_tokenizer(LLAMA)
    tokens = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    types = []
    for i in range(len(tokens)):
        kinds = {2: tokenizer.is_unknown(i), 3: tokenizer.is_control(i), 6: tokenizer.is_byte(i)}
        types.append(next((number for number, is_kind in kinds.items() if is_kind), 1))
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [tokenizer.get_score(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def sizes(architecture="llama"):
    """The fields with LLAMA's sizes."""
    values = {
        "embedding_length": 64, "block_count": 4, "feed_forward_length": 192,
        "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0}
    return {f"{architecture}.{name}": value for name, value in values.items()}


def write(library, path, tensors, fields):
    """Write a GGUF file of fields {name: value}, tensors {name: array or (array, type)} -> path."""
    fields = dict(fields)
    writer = library.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, array in tensors.items():
        kind = None
        if isinstance(array, tuple):
            array, kind = array
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def golden(library, tmp_path):
    """golden(tensors={…}, fields={…}): LLAMA as a GGUF file with these changes -> its path.

    A tensor or field whose value is None is left out.
    """
    def golden(tensors={}, fields={}):
        kept = {}
        for name, array in (golden_tensors() | tensors).items():
            if array is not None:
                kept[name] = array
        fields = sizes() | sentencepiece_fields() | fields
        return write(library, tmp_path / "golden.gguf", kept, fields)

    return golden


def test_it_is_the_same_model_with_the_same_tokens(golden):
    path = golden()
    lavin = checkpoints.load(path, VIT)
    expected = checkpoints.load(LLAMA, VIT)
    ours = checkpoints.frozen_parameters(lavin.llama)
    for name, p in checkpoints.frozen_parameters(expected.llama).items():
        assert torch.equal(ours[name], p), name
    assert lavin.llama.config.rope_theta == 10000 and not lavin.llama.config.attention_bias
    for text in AWKWARD:
        assert lavin.tokenizer.encode(text) == expected.tokenizer.encode(text), text
    tokens = expected.tokenizer.encode("A kettle.")
    assert lavin.tokenizer.decode(tokens) == "A kettle."
    for name in ("bos_id", "eos_id", "vocab_size"):
        assert getattr(lavin.tokenizer, name)() == getattr(expected.tokenizer, name)()


def test_it_is_asked_like_any_other(golden, call):
    code, stdout, stderr = call(generate, *ask(llama=golden()))
    assert (code, stderr) == (0, "")
    expected = call(generate, *ask())
    assert stdout.splitlines()[-1] == expected[1].splitlines()[-1]


def test_quantized_weights_are_dequantized(golden, library):
    kind = library.GGMLQuantizationType.Q8_0
    tensors = {}
    for name in ("blk.0.attn_q.weight", "blk.3.ffn_down.weight", "token_embd.weight"):
        tensors[name] = (library.quantize(golden_tensors()[name], kind), kind)
    llama = checkpoints.load(golden(tensors), VIT, dtype=torch.bfloat16).llama
    expected = torch.from_numpy(library.dequantize(*tensors["blk.0.attn_q.weight"])).bfloat16()
    assert torch.equal(llama.layers[0].attention.wq.weight, expected)


def test_peak_memory_of_loading(library):
    """The model, one tensor as it is stored and in fp32, and 8 MB for modules and kernels."""
    measured = peak_memory.measure("bf16", as_gguf=True)
    taken = measured["after"] - measured["before"]
    assert taken < measured["model"] + measured["one tensor, stored and fp32"] + 8, measured


def test_without_an_output_the_embeddings_are_tied(golden):
    llama = checkpoints.load(golden({"output.weight": None}), VIT, bits=8).llama
    assert llama.output.weight is llama.tok_embeddings.weight


def test_qwen2s_rows_are_in_hugging_faces_order(library, tmp_path):
    tensors, biases = qwen_tensors()
    stored = {}
    for name, array in golden_tensors().items():
        meta_name = next(meta for meta in meta_names() if gguf_name(meta) == name)
        _, tensor = to_hf(meta_name, torch.from_numpy(array))
        stored[name] = tensor.contiguous().numpy()
    for name, bias in tensors.items():
        part = {"q": "attn_q", "k": "attn_k", "v": "attn_v"}[name.split("_proj")[0][-1]]
        stored[f"blk.{name.split('.')[2]}.{part}.bias"] = bias.numpy()
    fields = {"general.architecture": "qwen2"} | sizes("qwen2") | sentencepiece_fields()
    path = write(library, tmp_path / "qwen.gguf", stored, fields)
    llama = checkpoints.load(path, VIT).llama
    expected = checkpoints.frozen_parameters(checkpoints.load(LLAMA, VIT).llama) | biases
    ours = checkpoints.frozen_parameters(llama)
    assert ours.keys() == expected.keys()
    for name, p in expected.items():
        assert torch.equal(ours[name], p), name


def meta_names():
    """Meta's names of the tensors of LLAMA."""
    state = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
    return [name for name in state if name != "rope.freqs"]


def test_scaled_rope(golden):
    """The file does not hold the settings, but the factor that divides each frequency."""
    shape = {"dim": 64, "n_heads": 4, "rope_theta": 10000.0}
    plain = rope_frequencies(LLaMAConfig(**shape))
    scales = plain / rope_frequencies(LLaMAConfig(**shape, rope_factor=8.0))
    assert scales.min() == 1 and 7.99 < scales.max() < 8.01
    config = checkpoints.load(golden({"rope_freqs.weight": scales.numpy()}), VIT).llama.config
    assert difference(rope_frequencies(config), plain / scales) < 1e-7
    for other in (np.full(8, 4.0, np.float32), np.ones(7, np.float32), np.zeros(0, np.float32)):
        with pytest.raises(LavinError, match="does not scale RoPE as LLaMA 3.1 does"):
            checkpoints.load(golden({"rope_freqs.weight": other}), VIT)


def test_an_alignment_that_is_no_whole_number(golden, fails):
    path = golden(fields={"general.alignment": 32.5})
    fails(generate, *ask(llama=path), says=[f"{path}: ", "wrong general.alignment"])


# Vocabularies of byte pairs


@pytest.fixture
def byte_pairs(library, tmp_path):
    """byte_pairs(name of the pre-tokenizer) -> the tokenizer of a file that names it.

    Its pairs merge digits, letters and spaces into words as far as the pre-tokenizer allows.
    """
    tokenizers = pytest.importorskip("tokenizers", reason="needs pip install tokenizers")

    def byte_pairs(cut, **changes):
        tokens = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
        merges = []
        for word in ("1234", "Ġab", "ĠĠĠ", "ĊĊ", "é"):
            for end in range(2, len(word) + 1):
                tokens.append(word[:end])
                merges.append(f"{word[:end - 1]} {word[end - 1]}")
        fields = sizes() | {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut,
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
            "tokenizer.ggml.eos_token_id": 0} | changes
        path = write(library, tmp_path / "pairs.gguf", golden_tensors(), fields)
        return File(path).tokenizer()

    return byte_pairs


@pytest.mark.parametrize("cut, digits", [
    ("smollm", ["1", "2", "3", "4"]), ("qwen2", ["1", "2", "3", "4"]),
    ("llama-bpe", ["123", "4"])])
def test_how_a_text_is_cut(byte_pairs, cut, digits):
    tokenizer = byte_pairs(cut)

    def pieces(text):
        return [tokenizer.id_to_piece(token) for token in tokenizer.encode(text)]

    assert pieces("1234") == digits
    assert pieces(" ab") == ["▁ab"]
    assert pieces("  ab") == ["▁", "▁ab"]
    assert tokenizer.bos_id() == tokenizer.eos_id() == 0
    for text in AWKWARD:
        expected = text
        if cut == "qwen2":                      # Qwen2 composes accents
            expected = text.replace("e\u0301", "\u00e9")
        assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert 0 not in tokenizer.encode("<|endoftext|>")
    assert answer_ends(tokenizer) == {0}
    tokenizer = byte_pairs(cut, **{"tokenizer.ggml.eot_token_id": 5})
    assert answer_ends(tokenizer) == {0, 5}


# What is refused


@pytest.mark.parametrize("tensors, fields, said", [
    ({}, {"general.architecture": "gemma"}, "general.architecture 'gemma' is not supported"),
    ({}, {"llama.expert_count": 8}, "llama.expert_count 8"),
    ({}, {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn'"),
    ({}, {"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8"),
    ({}, {"split.count": 3}, "split.count 3"),
    ({}, {"llama.block_count": None}, "llama.block_count is missing"),
    ({}, {"llama.block_count": 0}, "llama.block_count is 0"),
    ({}, {"llama.attention.head_count": "4"}, "llama.attention.head_count is '4'"),
    ({}, {"llama.attention.head_count": 3}, "must divide"),
    ({}, {"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert'"),
    ({}, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o"}, "pre 'gpt-4o'"),
    ({}, {"tokenizer.ggml.tokens": None}, "its vocabulary is damaged"),
    ({}, {"tokenizer.ggml.tokens": [[1], [2]]}, "its vocabulary is damaged"),
    ({}, {"tokenizer.ggml.eos_token_id": None}, "names no EOS token"),
    ({}, {"tokenizer.ggml.eos_token_id": 512}, "its vocabulary is damaged"),
    ({}, {"tokenizer.ggml.token_type": [1]}, "its vocabulary is damaged"),
    ({"blk.2.attn_v.weight": None}, {}, "layers.2.attention.wv.weight is missing"),
    ({"token_embd.weight": None}, {}, "tok_embeddings.weight is missing"),
    ({"blk.4.attn_v.weight": np.zeros((64, 64), np.float32)}, {}, "has no place in this model"),
    ({"attn_sinks.weight": np.zeros(4, np.float32)}, {}, "attn_sinks.weight is not a tensor"),
    ({"blk.1.attn_k.weight": np.zeros((32, 64), np.float32)}, {}, r"wk.weight is \(32, 64\)"),
    ({"output_norm.weight": np.full(64, np.nan, np.float32)}, {}, "not finite"),
    ({"output_norm.weight": np.zeros(64, np.int32)}, {}, "norm.weight is of type I32"),
])
def test_what_is_not_supported_is_named(golden, tensors, fields, said):
    if fields.get("tokenizer.ggml.model") == "gpt2":
        pytest.importorskip("tokenizers", reason="needs pip install tokenizers")
    with pytest.raises(LavinError, match=f"golden.gguf: .*{said}"):
        checkpoints.load(golden(tensors, fields), VIT)


def test_damaged_files(golden, fails):
    path = golden()
    content = path.read_bytes()
    for damaged in (content[:len(content) // 2], content[:1000], content[:4], b"", b"no GGUF"):
        path.write_bytes(damaged)
        fails(generate, *ask(llama=path), says=[f"{path}: not a readable GGUF file"])
    path.unlink()
    fails(generate, *ask(llama=path), says=["missing", path, "--llama FILE.gguf"])


def test_damaged_bytes_end_in_one_line(golden):
    """Damage that is not noticed gives a model. There is no other error, and nothing takes long."""
    path = golden()
    content = path.read_bytes()
    rng = Random(0)
    n_refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 8))):
            damaged[rng.randrange(12_000)] = rng.choice((0, 1, 9, 127, 255))
        path.write_bytes(damaged)
        try:
            opened = File(path)
            opened.tokenizer()
            checkpoints.read_params(opened, 512)
        except LavinError as error:
            assert len(str(error).splitlines()) == 1
            n_refused += 1
    assert n_refused > 20


def test_what_to_install(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    fails(generate, *ask(llama=path), says=[f"{path}: pip install gguf"])
