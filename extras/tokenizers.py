"""Read tokenizer.json, and give it the methods of sentencepiece that we use (data.Tokenizer).

LLaMA 1 and 2 come with a sentencepiece model (data.load_sentencepiece). LLaMA 3, SmolLM2 and Qwen2
come with tokenizer.json, which the library `tokenizers` reads (pip install tokenizers). The files
next to it name BOS, EOS and the other tokens that end an answer.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import Tokenizer
from extras.values import short
from files import LavinError, check_regular, read_json, write_atomically


class JsonTokenizer:
    """A Tokenizer of the `tokenizers` library, with sentencepiece's methods."""

    def __init__(self, model: object, bos: int, eos: int, ends: Iterable[int] = ()):
        """model: a tokenizers.Tokenizer. This object changes its settings.

        ends: other tokens that end an answer, as EOS does.
        """
        self.model = model
        self.bos = bos
        self.eos = eos
        self.ends = {eos, *ends}
        self.n_tokens = max(model.get_vocab(with_added_tokens=True).values()) + 1
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True      # "<|endoftext|>" in a text is plain text

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS and EOS."""
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without BOS, EOS and other special tokens."""
        return self.model.decode(tokens, skip_special_tokens=True)

    def bos_id(self) -> int:
        return self.bos

    def eos_id(self) -> int:
        return self.eos

    def vocab_size(self) -> int:
        return self.n_tokens

    def id_to_piece(self, token: int) -> str:
        """A token in readable form, with a space written as ▁, as in sentencepiece."""
        text = self.decode([token])
        piece = self.model.id_to_token(token) or ""
        if not text or "▁" in piece:
            return piece
        return text.replace(" ", "▁")

    def serialized_model_proto(self) -> bytes:
        """The bytes of tokenizer.json."""
        return self.model.to_str().encode()


def import_tokenizers(path: str | Path):
    """Import the library `tokenizers`. If it is not installed, LavinError names `path`."""
    try:
        import tokenizers                       # an optional package, only for such files
    except ImportError as error:
        raise LavinError(f"{path}: pip install tokenizers to read such tokenizers") from error
    return tokenizers


def load_json(path: str | Path) -> JsonTokenizer:
    """Load tokenizer.json, with BOS and EOS from the files next to it. Raises LavinError."""
    check_regular(path)
    tokenizers = import_tokenizers(path)
    try:
        model = tokenizers.Tokenizer.from_buffer(Path(path).read_bytes())
        if not model.get_vocab():
            raise ValueError("it has no tokens")
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror})") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:              # the library's panics are not Exceptions
        reason = short(str(error))
        raise LavinError(f"{path}: not a tokenizer.json that `tokenizers` can read ({reason})"
                         ) from error
    folder = Path(path).parent
    eos = find_special(folder, "eos", model)
    bos = find_special(folder, "bos", model)
    if eos is None:
        raise LavinError(f"{path}: no EOS token is named in {', '.join(NAMED_IN)} next to it; "
                         "fetch these files too")
    if bos is None:                             # then EOS alone separates texts
        bos = eos
    return JsonTokenizer(model, bos, eos, find_ends(folder, model))


NAMED_IN = ("tokenizer_config.json", "config.json", "generation_config.json")


def named_beside(folder: Path) -> Iterator[tuple[Path, dict]]:
    """Yield (path, content) of each NAMED_IN file in the folder. Raises LavinError."""
    for file in NAMED_IN:
        path = folder / file
        if os.path.exists(path):
            content = read_json(path)
            if not isinstance(content, dict):
                raise LavinError(f"{path}: not a configuration; it must be a JSON object")
            yield path, content


def check_special(path: Path, kind: str, number: object, model, named: object) -> int:
    """Return the id of a BOS or EOS token. Raises LavinError if it is not in the vocabulary.

    named: the id or the text that the file gives, for this error.
    """
    if type(number) is not int or not 0 <= number < 2**32 or model.id_to_token(number) is None:
        raise LavinError(f"{path}: its {kind.upper()} token {short(named)} is not in the "
                         "vocabulary")
    return number


def find_special(folder: Path, kind: str, model) -> int | None:
    """The id of the BOS or EOS token (kind: "bos" or "eos") that the folder's files name, or None.

    Raises LavinError if it is not in the vocabulary.
    """
    for path, content in named_beside(folder):
        token = content.get(f"{kind}_token")    # "</s>" or {"content": "</s>", …}
        if isinstance(token, dict):
            token = token.get("content")
        number = content.get(f"{kind}_token_id")
        if isinstance(number, list) and number: # several that end an answer, the usual one first
            number = number[0]
        if token is not None:
            its_number = model.token_to_id(token) if isinstance(token, str) else None
            return check_special(path, kind, its_number, model, token)
        if number is not None:
            return check_special(path, kind, number, model, number)
    return None


def find_ends(folder: Path, model) -> set[int]:
    """The ids that the folder's files call EOS. Many chat models have several.

    Raises LavinError if one is not in the vocabulary.
    """
    ends = set()
    for path, content in named_beside(folder):
        numbers = content.get("eos_token_id")
        if numbers is None:
            continue
        if not isinstance(numbers, list):
            numbers = [numbers]
        for number in numbers:
            ends.add(check_special(path, "eos", number, model, number))
    return ends


def is_tiktoken(path: str | Path) -> bool:
    """Is it Meta's tokenizer.model of LLaMA 3, with lines of a base64 text and a number?"""
    check_regular(path)
    try:
        with open(path, "rb") as opened:
            first = opened.read(256)
    except OSError as error:
        raise LavinError(f"{path}: cannot be read ({error.strerror})") from error
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\n", first) is not None


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer into a LLaMA's folder. Raises LavinError if this fails."""
    content = tokenizer.serialized_model_proto()
    if not isinstance(tokenizer, JsonTokenizer):
        write_atomically(folder / "tokenizer.model", lambda path: path.write_bytes(content))
        return
    special = {
        "bos_token": tokenizer.model.id_to_token(tokenizer.bos),
        "eos_token": tokenizer.model.id_to_token(tokenizer.eos)}
    write_atomically(folder / "tokenizer.json", lambda path: path.write_bytes(content))
    ends = {"eos_token_id": sorted(tokenizer.ends)}
    for name, named in [("tokenizer_config.json", special), ("generation_config.json", ends)]:
        text = json.dumps(named)
        write_atomically(folder / name,
                         lambda path, text=text: path.write_text(text, encoding="utf-8"))
