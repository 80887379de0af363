"""Tokenizers of transformers in, and those of tiktoken out, against tiktoken itself."""

import json
import re

import pytest
import tiktoken

from data.lib.errors import UserError
from data.lib.tokenizers import (
    LETTERS,
    BytePairTokenizer,
    TransformersTokenizer,
    save_tokenizer,
)
from data.tasks import training_text
from data.tests.helpers import WORDS

TEXT = "the quick brown fox wo n't\n\n\t  jump: 1,000 café 中文 🙂 in N "


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def with_end_of_text():
    """A vocabulary of 256 bytes and three merges, and a token for the end of a text."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"ab": 256, b"bc": 257, b"abc": 258}
    return BytePairTokenizer(
        "minute",
        pat_str=r"\w+|\W+",
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 259},
    )


# --------------------------------------------------------------------------------------
# Any text

# How GPT-2's pattern takes white space. Merges of it make its tokens depend on how it
# is cut.
SPACES = {b"  ": 256, b"    ": 257, b"\n\n": 258, b" \n": 259, b" the": 260, b" t": 261}
GPT2_PATTERN = r" ?\p{L}++| ?[^\s\p{L}]++|\s++$|\s+(?!\S)|\s"


@pytest.fixture(params=["bpe2048", "gpt2"])
def tokenizer(request, small_vocabulary):
    """The small vocabulary, and one whose pattern ends as GPT-2's does."""
    if request.param == "bpe2048":
        return small_vocabulary
    ranks = {bytes([byte]): byte for byte in range(256)} | SPACES
    return BytePairTokenizer(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


@pytest.mark.parametrize("space", [" ", "\n", "\t", " \n", "\n  \t", "\xa0", "\x1f"])
def test_a_long_run_of_white_space_has_the_tokens_that_tiktoken_gives(space, tokenizer):
    for length in (10_000, 10_001):  # of which tiktoken takes more
        run = (space * length)[:length]
        for before in ("", "the"):
            for after in ("", "the", "!", "é"):
                text = f"{before}{run}{after}{run}{before}"
                expected = tiktoken.Encoding.encode_ordinary(tokenizer, text)
                assert tokenizer.encode_ordinary(text) == expected


@pytest.mark.parametrize("space", ["\n", "\u2003"])
def test_a_million_characters_of_white_space_are_a_text(space, tokenizer):
    text = f"the{space * 10**6}the"
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


# --------------------------------------------------------------------------------------
# The bytes of a text


def wrapped(vocabulary, normalizer=None, pre_tokenizer=None, decoder=None):
    """A fast tokenizer of transformers that knows these words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    ids = {word: id for id, word in enumerate(["<unk>", *vocabulary])}
    model = tokenizers.models.WordLevel(ids, unk_token="<unk>")
    wordwise = tokenizers.Tokenizer(model)
    if normalizer:
        wordwise.normalizer = getattr(tokenizers.normalizers, normalizer)()
    pre_tokenizer = pre_tokenizer or "Whitespace"
    wordwise.pre_tokenizer = getattr(tokenizers.pre_tokenizers, pre_tokenizer)()
    if decoder:
        wordwise.decoder = getattr(tokenizers.decoders, decoder)()

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=wordwise)
    return TransformersTokenizer("name", fast, 99)


@pytest.mark.parametrize("normalizer", [None, "Lowercase", "BertNormalizer", "NFKC"])
def test_the_bytes_are_those_of_the_text_whatever_comes_back_from_its_tokens(
    normalizer,
):
    tokenizer = wrapped(["the", "cat"], normalizer)
    words = ["The", "Schrödinger", "ﬁne", "cat", "世"]
    text = "   ".join(words) + "\n\n\n"
    ids = tokenizer.encode_ordinary(text)
    sizes = [tokenizer.size_before(text, ids, n) for n in range(len(ids) + 1)]

    assert tokenizer.decode(ids) != text
    ends = [text.index(word) + len(word) for word in words]
    assert sizes == [0, *(len(text[:end].encode()) for end in ends)]


def test_tokens_of_bytes_stand_for_their_bytes(small_vocabulary):
    text = "the 世 cat"
    ids = small_vocabulary.encode_ordinary(text)
    sizes = [small_vocabulary.size_before(text, ids, n) for n in range(len(ids) + 1)]
    contents = [small_vocabulary.decode_single_token_bytes(id) for id in ids]
    assert sizes == [len(b"".join(contents[:n])) for n in range(len(ids) + 1)]


# --------------------------------------------------------------------------------------
# Out


def test_visible_bytes_are_spelled_as_themselves_and_the_others_as_gpt2_does():
    assert len(set(LETTERS.values())) == 256
    spelled = {byte: LETTERS[byte] for byte in b"aZ~! \n\0"}
    assert spelled == dict(zip(b"aZ~! \n\0", "aZ~!ĠĊĀ"))
    # The soft hyphen, 173, is the last byte that cannot be seen.
    assert (LETTERS[161], LETTERS[172], LETTERS[173]) == ("¡", "¬", chr(256 + 67))
    assert (LETTERS[160], LETTERS[174], LETTERS[255]) == (chr(256 + 66), "®", "ÿ")


def test_a_saved_tokenizer_merges_bytes_as_tiktoken_does(small_vocabulary, tmp_path):
    save_tokenizer(small_vocabulary, tmp_path)
    saved = read(tmp_path, "tokenizer.json")
    split, spelled = saved["pre_tokenizer"]["pretokenizers"]
    assert (split["behavior"], split["invert"]) == ("Isolated", False)
    assert (spelled["add_prefix_space"], spelled["use_regex"]) == (False, False)

    vocabulary = saved["model"]["vocab"]
    merges = [tuple(pair.split()) for pair in saved["model"]["merges"]]
    rank_of = {pair: rank for rank, pair in enumerate(merges)}

    # Byte-pair encoding by its definition: the pair of the lowest rank is joined first.
    ids = []
    for word in re.findall(split["pattern"]["Regex"], TEXT):
        parts = [LETTERS[byte] for byte in word.encode()]
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in rank_of]:
            first = min(pairs, key=rank_of.get)
            i = list(zip(parts, parts[1:])).index(first)
            parts[i : i + 2] = ["".join(first)]
        ids += [vocabulary[part] for part in parts]

    assert ids == small_vocabulary.encode_ordinary(TEXT)


def test_a_token_is_merged_of_the_pair_that_was_joined_last(tmp_path):
    save_tokenizer(with_end_of_text(), tmp_path)
    # In "abc" the pair "ab" has the lower rank: it is joined before "bc" could be.
    assert read(tmp_path, "tokenizer.json")["model"]["merges"] == ["a b", "b c", "ab c"]


def test_the_end_of_a_text_is_a_special_token_and_no_part_of_the_merges(tmp_path):
    save_tokenizer(with_end_of_text(), tmp_path)
    saved = read(tmp_path, "tokenizer.json")
    (added,) = saved["added_tokens"]
    assert (added["id"], added["content"]) == (259, "<|endoftext|>")
    assert added["special"] and not added["normalized"]
    assert sorted(saved["model"]["vocab"].values()) == [*range(259)]
    assert read(tmp_path, "tokenizer_config.json")["eos_token"] == "<|endoftext|>"


def test_transformers_reads_a_saved_tokenizer_as_the_same(small_vocabulary, tmp_path):
    transformers = pytest.importorskip("transformers")
    for tokenizer in (small_vocabulary, with_end_of_text()):
        save_tokenizer(tokenizer, tmp_path)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in (WORDS, TEXT, "abcbcab", ""):
            ids = tokenizer.encode_ordinary(text)
            assert again(text, add_special_tokens=False)["input_ids"] == ids
            assert again.decode(ids) == text

    assert again.eos_token_id == 259


def test_a_tokenizer_of_transformers_goes_out_as_it_came_in(tmp_path):
    """transformers says in its file what it did not read there, but not how it did."""
    tokenizer = loaded(save_bytes(tmp_path / "in"))
    save_tokenizer(tokenizer, tmp_path / "out")
    assert loaded(tmp_path / "out").fingerprint() == tokenizer.fingerprint()

    before = read(tmp_path / "in", "tokenizer_config.json")
    after = read(tmp_path / "out", "tokenizer_config.json")
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= {"backend", "model_max_length", "tokenizer_class"}


# --------------------------------------------------------------------------------------
# In


def save_bytes(folder, change=None):
    """Saves a tokenizer of bytes, words in it joined from the left, whose file `change`
    makes another one. Its settings are no more than its class."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(with_end_of_text(), folder)
    content = read(folder, "tokenizer.json")
    if change is not None:
        change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def loaded(folder):
    """A tokenizer of a folder as the command loads it."""
    transformers = pytest.importorskip("transformers")
    options = {"local_files_only": True, "trust_remote_code": False}
    found = transformers.AutoTokenizer.from_pretrained(folder, **options)
    return TransformersTokenizer(str(folder), found, 260)


def swap_ids(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def swap_merges(content):
    content["model"]["merges"] = ["b c", "a bc", "a b"]


def lower(content):
    content["normalizer"] = {"type": "Lowercase"}


def drop_blanks(content):
    content["pre_tokenizer"] = {"type": "Whitespace"}


def rename_the_end(content):
    content["added_tokens"][0]["content"] = "<end>"


CHANGES = [swap_ids, swap_merges, lower, drop_blanks, rename_the_end]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tokenizer_that_makes_other_tokens_has_another_fingerprint(change, tmp_path):
    original = loaded(save_bytes(tmp_path / "original"))
    again = loaded(save_bytes(tmp_path / "again"))
    again.encode_ordinary(TEXT)
    assert re.fullmatch("[0-9a-f]{16}", original.fingerprint())
    assert again.fingerprint() == original.fingerprint()

    other = loaded(save_bytes(tmp_path / "other", change))
    assert other.fingerprint() != original.fingerprint()


def test_the_bytes_of_a_text_with_the_name_of_a_special_token_are_counted(tmp_path):
    tokenizer = loaded(save_bytes(tmp_path))
    text = "<|endoftext|> caf\u00e9"
    ids = tokenizer.encode_ordinary(text)
    sizes = [tokenizer.size_before(text, ids, n) for n in range(len(ids) + 1)]
    assert sizes[:15] == [*range(15)]  # a byte is a token
    assert sizes[-1] == len(text.encode())


class Letters:
    """Looks like a tokenizer of transformers: a character's token is its code, and
    token 1 stands at the beginning of a text where special tokens are wanted."""

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id

    def __call__(self, text, add_special_tokens=True, split_special_tokens=False):
        assert split_special_tokens  # what stands in a text is text
        beginning = [1] if add_special_tokens else []
        return {"input_ids": beginning + [ord(letter) for letter in text]}

    def decode(self, ids, clean_up_tokenization_spaces=True):
        text = "".join(map(chr, ids))
        return text.replace(" !", "!") if clean_up_tokenization_spaces else text


def test_a_tokenizer_of_transformers_has_tiktokens_methods():
    tokenizer = TransformersTokenizer("owner/name", Letters(eos_token_id=7), 0x2000)
    assert tokenizer.name == "owner/name"
    assert tokenizer.encode_ordinary("café") == [99, 97, 102, 233]
    assert tokenizer.encode_ordinary("") == []
    assert tokenizer.decode([99, 233]) == "cé"
    assert tokenizer.decode([99, 32, 33]) == "c !"  # begins as [99, 32] does


def test_where_a_tokenizer_does_not_say_where_its_tokens_stand_they_are_decoded():
    tokenizer = TransformersTokenizer("name", Letters(eos_token_id=7), 0x2000)
    sizes = [tokenizer.size_before("éx!", [233, 120, 33], n) for n in range(4)]
    assert sizes == [0, 2, 3, 4]


def test_the_end_of_text_is_the_tokenizers_own_or_that_of_a_sentence():
    assert TransformersTokenizer("name", Letters(eos_token_id=7), 300).end_of_text == 7
    assert TransformersTokenizer("name", Letters(eos_token_id=0), 300).end_of_text == 0

    of_sentences = Letters()
    of_sentences.sep_token_id = 5
    assert TransformersTokenizer("name", of_sentences, 300).end_of_text == 5

    of_sentences.eos_token_id = 300  # which the model does not know
    assert TransformersTokenizer("name", of_sentences, 300).end_of_text == 5


@pytest.mark.parametrize("pieces", ["Metaspace", "Whitespace"])
def test_a_tokenizer_without_an_end_of_text_has_none(pieces):
    """To one of these a zero byte is a blank, to the other an unknown word."""
    tokenizer = wrapped(["a", "\u2581"], pre_tokenizer=pieces)
    assert tokenizer.end_of_text is None
    with pytest.raises(UserError, match="of name has no token that ends a text"):
        training_text(tokenizer, [])


def test_a_token_without_an_embedding_is_refused_by_name():
    tokenizer = TransformersTokenizer("name", Letters(7), vocab_size=100)
    assert tokenizer.encode_ordinary("abc") == [97, 98, 99]
    with pytest.raises(UserError, match="of name makes token 100, .* has only 100"):
        tokenizer.encode_ordinary("abcd")
