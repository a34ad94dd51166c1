"""CLIP's tokenizer: text -> token ids for the text encoders of Stable Diffusion; and training of new vocabularies.

One file, on torch and `tokenizers` alone. It reads the `tokenizer/` of a pipeline folder and gives the same ids as
transformers' `CLIPTokenizer`, with two deliberate differences:
- `<|startoftext|>` and `<|endoftext|>` typed in a prompt are ordinary text, never special tokens;
- where a tokenizer pads with "!" (id 0: SD 2.x and the second tokenizer of SDXL), a typed "!" is the word "!" (id 256),
  as in Stability AI's own code. In transformers a typed padding token becomes padding.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_characters() -> dict[int, str]:
    """Byte -> the printable character that represents it in a vocabulary, in the order of CLIP's ids 0..255.

    Printable Latin-1 bytes represent themselves; the other 68 get the code points from 256, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


def _text_pipeline() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """The steps before byte-pair encoding: normalise the text, split it into words of byte characters."""
    clean = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return clean, words


class CLIPTokenizer:
    """Texts -> rows of ids: begin token, at most `max_length` - 2 ids of text, end token, padding.

    `.bos`, `.eos` and `.pad` are ids; `.max_length` is the length of a row, `.vocab_size` that of a token embedding.
    """

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int = 77, pad_token: str = EOS
    ):
        missing = [token for token in (BOS, EOS, pad_token) if token not in vocab]
        if missing:
            raise ValueError(f"not a CLIP vocabulary: it has no {missing[0]!r}")
        if not isinstance(max_length, int) or max_length < 3:
            raise ValueError(f"max_length {max_length} leaves no room for text between begin and end token")
        self.vocab = dict(vocab)
        self.merges = [tuple(pair) for pair in merges]
        self.max_length = max_length
        self.pad_token = pad_token
        self.bos, self.eos, self.pad = vocab[BOS], vocab[EOS], vocab[pad_token]
        self.vocab_size = max(vocab.values()) + 1
        try:
            bpe = models.BPE(
                vocab=self.vocab, merges=self.merges, unk_token=EOS,
                continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD,
            )  # fmt: skip
        except Exception as error:  # `tokenizers` raises the bare class, for a merge whose result has no id
            raise ValueError(f"vocabulary and merges do not belong together: {str(error).splitlines()[0]}") from error
        self._bpe = Tokenizer(bpe)  # has no special tokens, so none can be typed
        self._bpe.normalizer, self._bpe.pre_tokenizer = _text_pipeline()

    @classmethod
    def from_folder(cls, path: str | Path) -> CLIPTokenizer:
        """Read a `tokenizer/` folder: vocab.json and merges.txt, or tokenizer.json.

        `model_max_length` is read from tokenizer_config.json (default: 77), the padding token from
        special_tokens_map.json, else from tokenizer_config.json, else it is the end token. ValueError: the folder has
        no CLIP vocabulary, or tokens that are not in it.
        """
        path = Path(path)
        if (path / "vocab.json").exists() and (path / "merges.txt").exists():
            vocab = _read_json(path / "vocab.json")
            merges = _read_merges(path / "merges.txt")
            added = _read_json(path / "added_tokens.json")
        elif (path / "tokenizer.json").exists():
            vocab, merges, added = _read_tokenizer_json(path / "tokenizer.json")
        else:
            raise ValueError(f"{path} has neither vocab.json and merges.txt nor tokenizer.json")
        config = _read_json(path / "tokenizer_config.json")
        added |= {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
        for token, i in added.items():
            if token in (BOS, EOS):
                vocab.setdefault(token, i)
            if vocab.get(token) != i:  # a word learned by textual inversion, say
                raise ValueError(f"{path}: the added token {token!r} is not in the vocabulary; not supported")
        pad = _read_json(path / "special_tokens_map.json").get("pad_token") or config.get("pad_token") or EOS
        pad = pad["content"] if isinstance(pad, dict) else pad
        max_length = config.get("model_max_length") or 77
        if max_length > 10**6:  # transformers writes 10**30 for "no limit"
            max_length = 77
        return cls(vocab, merges, int(max_length), pad)

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone, not truncated: a prompt of more than `max_length` - 2 ids will be truncated."""
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate (of a split emoji) becomes "?"
        return self._bpe.encode(text, add_special_tokens=False).ids

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Texts -> ids (B, max_length) int64; long texts are truncated, and keep the end token."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.full((len(texts), self.max_length), self.pad, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.bos, *self.encode(text)[: self.max_length - 2], self.eos]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def save(self, folder: str | Path) -> None:
        """Write the four files of the official `tokenizer/` folders."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": self.pad_token}
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            "do_lower_case": True,
            "errors": "replace",
            "add_prefix_space": False,
            **special,
        }
        merges = "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in self.merges)]) + "\n"
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        _write_json(folder / "vocab.json", self.vocab)
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", special)


def _read_json(path: Path) -> dict:
    """The content of a JSON file, {} if there is none."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    # split("\n") and split(" "), not splitlines() and split(): some byte characters count as white space
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    content = _read_json(path)
    model = content.get("model", {})
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
        raise ValueError(f"{path} is not CLIP's byte-pair encoding: no end-of-word suffix {END_OF_WORD!r}")
    # files before tokenizers 0.20 hold merges as "a b", later ones as ["a", "b"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return model["vocab"], merges, added


def train_bpe(captions: Iterable[str], vocab_size: int, max_length: int = 77) -> CLIPTokenizer:
    """Train a CLIP-style vocabulary of at most `vocab_size` tokens on the words of `captions`.

    Byte-pair encoding (Sennrich et al., arXiv 1508.07909): merge the most frequent pair of adjacent tokens until every
    word is one token or the vocabulary is full. Ties are broken by the pair itself, so the order of the captions does
    not matter. Ids are ordered as in CLIP: 256 bytes, 256 bytes that end a word, the merges, begin, end. ValueError:
    `vocab_size` is too small for the bytes.
    """
    symbols = list(byte_characters().values())
    symbols += [char + END_OF_WORD for char in symbols]
    room = vocab_size - len(symbols) - 2
    if room < 0:
        raise ValueError(f"vocab_size {vocab_size} is too small: bytes and special tokens alone need 514")
    merges = _learn_merges(_count_words(captions), room)
    tokens = dict.fromkeys([*symbols, *(a + b for a, b in merges), BOS, EOS])  # two merges may give the same token
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, max_length)


def _count_words(captions: Iterable[str]) -> Counter[str]:
    clean, words = _text_pipeline()
    counts: Counter[str] = Counter()
    for caption, n in Counter(captions).items():
        for word, _ in words.pre_tokenize_str(clean.normalize_str(caption)):
            counts[word] += n
    return counts


def _learn_merges(counts: Counter[str], room: int) -> list[tuple[str, str]]:
    """At most `room` merges, in the order in which they are learned."""
    words = [[*word[:-1], word[-1] + END_OF_WORD] for word in counts]
    weights = list(counts.values())
    pair_counts: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[int]] = defaultdict(set)  # pair -> words that contain or contained it
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += weights[i]
            where[pair].add(i)
    merges = []
    while len(merges) < room and pair_counts:
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        merges.append(best)
        for i in where.pop(best):
            for pair in pairwise(words[i]):
                pair_counts[pair] -= weights[i]
            words[i] = _join(words[i], best)
            for pair in pairwise(words[i]):
                pair_counts[pair] += weights[i]
                where[pair].add(i)
        pair_counts = +pair_counts  # drops pairs with a count of 0
    return merges


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] = joined[-1] + symbol
        else:
            joined.append(symbol)
    return joined
