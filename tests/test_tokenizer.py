"""The tokenizer against transformers: ids of any text, both paddings, all folder layouts; and training.

Tests on CLIP's official vocabulary need its merges file beside the repository and are skipped without it; the same
tests always run on a vocabulary trained here.
"""

import gzip
import json
import random
import re
from pathlib import Path

import pytest
import torch
import transformers

from minidistill.models.tokenizer import BOS, EOS, CLIPTokenizer, byte_characters, train_bpe

MERGES_FILE = Path(__file__).parents[2] / "shared" / "data" / "clip_bpe_simple_vocab_16e6.txt.gz"

STRINGS = [
    "", " ", "\n\t  ", "a", "A", "a photo of a cat", "A Photo OF a CAT",
    "  a   photo\nof\ta\r\ncat  ", "cat.", "cat,dog;bird",
    "don't can't I'm we're they've she'll he'd it's", "DON'T", "rock 'n' roll", "'s 't 're",
    "''''s", "o'clock's", "it\u2019s “quoted”", "!", "! !! !!!", "?!?!", "...", "… — \u2013 -",
    "a-b_c/d\\e|f", "(x)[y]{z}<w>", "#hash @name $5.00 100% a&b", "&amp; &lt;b&gt;", "<b>bold</b>",
    "http://example.com/a?b=c&d=e", "me@example.com", "0", "1234567890", "3.14159", "1,000,000",
    "4k 8K 1080p", "½ ² ③ Ⅳ ٣", "café", "cafe\u0301", "naïve façade", "ÅNGSTRÖM", "Straße",
    "İstanbul \u0131ss\u0131z", "ŒUVRE ﬁn ﬂ", "\u1e9e \u00df", "русский текст", "Ελληνικά ΣΊΣΥΦΟΣ",
    "中文字符", "日本語 ひらがな カタカナ", "한국어", "한국어", "العربية", "עברית", "हिन्दी भाषा",
    "ภาษาไทย", "😀", "a 😀 b", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "👍🏽", "♥ ★ ☆ ✓", "→ ∀x ∈ \u211d",
    "\u200b zero width", "a\u00a0b", "a\u2003b", "\ufeffbom", "x\x00y", "x\x07y",
    "soft\u00adhyphen", "\u0301", "e\u0301\u0323", "Z̸̡̛a̴l̵g̶o̷", "</w>", "a</w>b", "Ġ", "ĠĊĉ",
    "Ā ă", "\U0001d518\U0001d52b", "word " * 100, "supercalifragilisticexpialidocious" * 20,
    "😀" * 60, "1" * 200, ("a b. " * 37) + "end", "x" * 74, "a " * 74, "a " * 75, "a " * 76,
    "masterpiece, best quality, (highly detailed:1.3), 8k, trending on artstation",
]  # fmt: skip
SPECIALS = [EOS, BOS, f"a {EOS} b", f"{BOS}{BOS}", f"a{EOS}b", EOS.upper(), "<|x|>", "<|endoftext", f"{EOS}'s"]
WORDS = ["A big red circle.", "a small blue square above a cat's hat", "two red circles, one café", "😀 no!"]


def random_strings(count: int) -> list[str]:
    """Random mixtures of all kinds of characters, seeded."""
    rng = random.Random(0)
    pools = ["abcdefghijklmnopqrstuvwxyz", "ABCXYZ", "0123456789", " \t\n", "'!\"#,.-:;<|>/"]
    pools += ["äéñçøßİ", "中日한й", "😀🎉\u0301\u200d"]
    texts = []
    for _ in range(count):
        kinds = pools[: rng.randint(1, len(pools))]
        texts.append("".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randint(1, 60))))
    return texts


@pytest.fixture(scope="module", params=["trained", "official"])
def tokenizer(request) -> CLIPTokenizer:
    if request.param == "trained":
        return train_bpe(WORDS, 600, 77)
    return official_tokenizer()


def official_tokenizer() -> CLIPTokenizer:
    """CLIP's vocabulary, built from its merges as in `vocab.json` on the Hub."""
    if not MERGES_FILE.exists():
        pytest.skip("CLIP's merges file is not here")
    lines = gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").split("\n")[1:48895]
    merges = [tuple(line.split(" ")) for line in lines]
    symbols = list(byte_characters().values())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges)


def oracle_ids(oracle: transformers.CLIPTokenizer, texts: list[str], **options) -> list[list[int]]:
    rows = oracle(texts, padding="max_length", max_length=77, truncation=True, **options).input_ids
    return [list(row) for row in rows]


def first_difference(ours: list[list[int]], theirs: list[list[int]], texts: list[str]) -> str | None:
    return next((f"{t!r}: {a} {b}" for a, b, t in zip(ours, theirs, texts, strict=True) if a != b), None)


def test_ids_equal_transformers_on_all_kinds_of_texts(tokenizer, tmp_path):
    """A typed special token is text: a typed end token would else be where the pooled state is read."""
    tokenizer.save(tmp_path)
    oracle = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = STRINGS + random_strings(400)
    ids = tokenizer(texts)
    assert ids.shape == (len(texts), 77) and ids.dtype == torch.int64
    assert first_difference(ids.tolist(), oracle_ids(oracle, texts), texts) is None
    ids = tokenizer(SPECIALS).tolist()
    assert first_difference(ids, oracle_ids(oracle, SPECIALS, split_special_tokens=True), SPECIALS) is None
    for text in SPECIALS:
        assert not {tokenizer.bos, tokenizer.eos} & set(tokenizer.encode(text)), text


def test_golden_ids_of_the_official_vocabulary():
    tokenizer = official_tokenizer()
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (49406, 49407, 49407)
    assert tokenizer.vocab_size == 49408
    assert tokenizer.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert tokenizer.encode("! !! !!!") == [256, 748, 995]
    assert tokenizer("a photo of a cat").tolist() == [[49406, 320, 1125, 539, 320, 2368] + [49407] * 71]


def test_a_long_prompt_keeps_its_end_token(tokenizer):
    (word,) = tokenizer.encode("a")
    for words in (0, 1, 74, 75, 76, 300):
        kept = min(words, 75)
        wanted = [tokenizer.bos, *[word] * kept, tokenizer.eos, *[tokenizer.eos] * (75 - kept)]
        assert tokenizer("a " * words)[0].tolist() == wanted


def set_pad_token(folder: Path, **files) -> None:
    for name, pad_token in files.items():
        path = folder / f"{name}.json"
        content = json.loads(path.read_text())
        content.pop("pad_token", None)
        path.write_text(json.dumps({**content, **({"pad_token": pad_token} if pad_token else {})}))


def test_padding_with_exclamation_marks_does_not_affect_typed_ones(tokenizer, tmp_path):
    """SD 2.x and the second tokenizer of SDXL pad with id 0; a typed "!" is id 256."""
    tokenizer.save(tmp_path)
    set_pad_token(tmp_path, special_tokens_map="!", tokenizer_config="!")
    loaded = CLIPTokenizer.from_folder(tmp_path)
    oracle = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.pad == oracle.pad_token_id == 0
    assert loaded("!")[0].tolist() == [loaded.bos, 256, loaded.eos] + [0] * 74
    texts = [text for text in STRINGS + random_strings(100) if "!" not in text]
    assert first_difference(loaded(texts).tolist(), oracle_ids(oracle, texts), texts) is None
    marks = ["!", "! !! !!!", "stop! a?!"]
    wanted = oracle_ids(oracle, marks, split_special_tokens=True)
    assert first_difference(loaded(marks).tolist(), wanted, marks) is None


def test_the_padding_token_is_read_as_transformers_reads_it(tmp_path):
    token = {"content": "!", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    cases = [("!", EOS, "!"), ("!", None, "!"), (None, "!", "!"), (EOS, None, EOS), (None, None, EOS)]
    cases.append((token, EOS, "!"))
    train_bpe(WORDS, 600).save(tmp_path)
    for special_tokens_map, tokenizer_config, pad_token in cases:  # the first is SD 2.1
        set_pad_token(tmp_path, special_tokens_map=special_tokens_map, tokenizer_config=tokenizer_config)
        loaded = CLIPTokenizer.from_folder(tmp_path)
        assert loaded.pad_token == pad_token
        assert loaded.pad == transformers.CLIPTokenizer.from_pretrained(tmp_path).pad_token_id
        loaded.save(tmp_path / "again")
        assert CLIPTokenizer.from_folder(tmp_path / "again").pad == loaded.pad


def test_tokenizer_json_of_transformers_is_read(tokenizer, tmp_path):
    """transformers 5 writes tokenizer.json and no vocab.json; older `tokenizers` wrote merges as "a b"."""
    tokenizer.save(tmp_path / "ours")
    transformers.CLIPTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "tokenizer.json"
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    texts = STRINGS[:40]
    wanted = tokenizer(texts)
    assert torch.equal(CLIPTokenizer.from_folder(tmp_path / "theirs")(texts), wanted)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert torch.equal(CLIPTokenizer.from_folder(tmp_path / "theirs")(texts), wanted)


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = CLIPTokenizer.from_folder(tmp_path)
    assert loaded.vocab == tokenizer.vocab
    assert loaded.merges == tokenizer.merges
    loaded.save(tmp_path / "again")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "#version: 0.2"
    (tmp_path / "merges.txt").write_text("\n".join(lines[1:]), encoding="utf-8")  # the first merge must not be lost
    assert CLIPTokenizer.from_folder(tmp_path).merges == tokenizer.merges


def test_a_trained_vocabulary_has_the_layout_of_clip():
    tokenizer = train_bpe(WORDS, 540)
    tokens = sorted(tokenizer.vocab, key=tokenizer.vocab.get)
    symbols = list(byte_characters().values())
    assert list(tokenizer.vocab.values()) == list(range(540))
    assert tokens[:256] == symbols
    assert tokens[256:512] == [symbol + "</w>" for symbol in symbols]
    assert tokens[512:538] == [a + b for a, b in tokenizer.merges]
    assert tokens[538:] == [BOS, EOS]


def test_each_word_is_one_token_if_the_vocabulary_is_large_enough_else_the_frequent_ones():
    tokenizer = train_bpe(WORDS, 5000)
    assert tokenizer.vocab_size < 5000
    for word in re.findall(r"\w+", " ".join(WORDS).lower()):
        assert len(tokenizer.encode(word)) == 1, word
    assert len(tokenizer.encode("A small café, two circles!")) == 7  # a punctuation mark is a word
    captions = ["a circle"] * 10 + ["a dodecahedron"]
    tokenizer = train_bpe(captions, 512 + 2 + 5)
    assert len(tokenizer.encode("circle")) == 1
    assert len(tokenizer.encode("dodecahedron")) > 1
    assert tokenizer.vocab_size == 519


def test_training_does_not_depend_on_the_order_of_the_captions():
    captions = [*WORDS, "aaaa aaa aa", "banana bandana", "mississippi"]
    wanted = train_bpe(captions, 700)
    for seed in range(3):
        tokenizer = train_bpe(iter(random.Random(seed).sample(captions, len(captions))), 700)
        assert (tokenizer.vocab, tokenizer.merges) == (wanted.vocab, wanted.merges)


def test_unseen_words_have_ids():
    tokenizer = train_bpe(["a red circle"], 520)
    for text in ("xylophone", "Ελληνικά", "\x00\x7f", "😀", "half \ud83d"):
        ids = tokenizer.encode(text)
        assert ids
        assert tokenizer.eos not in ids  # also the unknown token


def broken_folder(tmp_path: Path, **files: object) -> Path:
    train_bpe(["a red circle"], 520).save(tmp_path)
    for name, content in files.items():
        path = tmp_path / f"{name}.json"
        if callable(content):
            content = content(json.loads(path.read_text(encoding="utf-8")))  # noqa: PLW2901
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab": lambda vocab: {k: v for k, v in vocab.items() if k != EOS}}, "endoftext"),
        ({"vocab": lambda vocab: {k: v for k, v in vocab.items() if len(k) != 3}}, "do not belong together"),
        ({"vocab": "{"}, "vocab.json is not readable"),
        ({"special_tokens_map": {"pad_token": "<pad>"}}, "<pad>"),
        ({"added_tokens": {"<cat-toy>": 49408}}, "<cat-toy>"),
        ({"tokenizer_config": {"added_tokens_decoder": {"600": {"content": "<sks>"}}}}, "<sks>"),
        ({"tokenizer_config": {"model_max_length": 2}}, "max_length 2"),
    ],
)
def test_an_invalid_folder_is_refused_by_name(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CLIPTokenizer.from_folder(broken_folder(tmp_path, **files))


def test_a_folder_without_a_clip_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither vocab\.json"):
        CLIPTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ValueError, match="end-of-word"):
        CLIPTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="514"):
        train_bpe(["a"], 513)


def test_model_max_length_is_the_length_of_a_row_and_77_if_unlimited(tmp_path):
    train_bpe(WORDS, 600, 12).save(tmp_path)
    loaded = CLIPTokenizer.from_folder(tmp_path)
    assert loaded.max_length == 12 and loaded(["red " * 50]).shape == (1, 12)
    assert transformers.CLIPTokenizer.from_pretrained(tmp_path).model_max_length == 12
    folder = broken_folder(tmp_path, tokenizer_config={"model_max_length": 10**30})
    assert CLIPTokenizer.from_folder(folder).max_length == 77
