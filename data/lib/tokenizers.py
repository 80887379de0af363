"""Tokenizers of tiktoken and of transformers with the same methods. Those of tiktoken
go out as transformers reads them."""

import hashlib
import json
import re
from pathlib import Path

import tiktoken

from data.lib.errors import UserError, reason_of

# What tiktoken's patterns call white space. A run of so much of it is long.
SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG_RUN = re.compile(f"(?<!{SPACE}){SPACE}{{10000,}}")

# Adds no token to a text. The name of a special token that stands in it is text, as
# tiktoken has it.
TEXT_ALONE = {"add_special_tokens": False, "split_special_tokens": True}


class BytePairTokenizer(tiktoken.Encoding):
    """A tokenizer of tiktoken that takes any text, and a token that ends one."""

    end_of_text = None  # a token, which load_tokenizer sets

    def encode_ordinary(self, text):
        """The text's ids, a list. Other than tiktoken's it does not fail where white
        space goes on for a million characters; the ids are the same."""
        ids = []
        start = 0

        for run in LONG_RUN.finditer(text):
            # The pattern takes a run as one word, but for the last character where a
            # word follows, which may begin with it.
            end = run.end()
            if end < len(text):
                end -= 1

            ids += super().encode_ordinary(text[start : run.start()])
            ids += self._encode_single_piece(text[run.start() : end])
            start = end

        return ids + super().encode_ordinary(text[start:])

    def size_before(self, text, ids, count):
        """How many bytes of a text the first `count` of its ids stand for."""
        return len(self.decode_bytes(ids[:count]))


class TransformersTokenizer:
    """A tokenizer of transformers with the methods of a BytePairTokenizer.

    name: what it was loaded from. wrapped: the tokenizer itself. vocab_size: the tokens
    that its model has an embedding of. end_of_text: the token that ends a text, where
    there is none a sentence; None without one.
    """

    def __init__(self, name, tokenizer, vocab_size):
        self.name = name
        self.wrapped = tokenizer
        self.vocab_size = vocab_size

        self.end_of_text = None
        for end in (tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)):
            is_known = end is not None and end < vocab_size
            if is_known and self.end_of_text is None:
                self.end_of_text = end

    def fingerprint(self):
        """16 hexadecimal digits that stand for its tokens, for the order in which they
        are merged, and for what it makes of a text: of the one that they all are."""
        tokens = sorted(self.wrapped.get_vocab().items(), key=lambda item: item[::-1])
        text = self.decode([id for _, id in tokens])
        ids = self.wrapped(text, **TEXT_ALONE)["input_ids"]

        merges = []
        if self.wrapped.is_fast:
            model = json.loads(self.wrapped.backend_tokenizer.to_str())["model"]
            pairs = model.get("merges", [])  # "a b" in some versions, in others a list
            merges = [p if isinstance(p, str) else " ".join(p) for p in pairs]
        content = json.dumps([tokens, merges, ids])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text, **options):
        """What the wrapped tokenizer makes of a text. Raises UserError if it fails."""
        try:
            return self.wrapped(text, **TEXT_ALONE, **options)
        except Exception as error:  # of any type: some are an Exception and no more
            message = f"the tokenizer of {self.name} fails: {reason_of(error)}"
            raise UserError(message) from None

    def encode_ordinary(self, text):
        """The text's ids, a list, without a token for its beginning or end. Raises
        UserError if the model has no embedding of one of them."""
        ids = self.encode(text)["input_ids"]

        largest = max(ids, default=0)
        if largest >= self.vocab_size:
            raise UserError(
                f"the tokenizer of {self.name} makes token {largest}, "
                f"and its model has only {self.vocab_size}"
            )

        return ids

    def decode(self, ids):
        """The text of some ids, which grows as they do: blanks before signs stay."""
        return self.wrapped.decode(ids, clean_up_tokenization_spaces=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def size_before(self, text, ids, count):
        """How many bytes of a text the first `count` of its ids stand for. A text need
        not come back from its tokens as it was, so these are not decoded, unless the
        tokenizer cannot say where in the text they stand."""
        if not ids[:count]:
            return 0
        if not getattr(self.wrapped, "is_fast", False):
            return min(len(self.decode(ids[:count]).encode()), len(text.encode()))

        places = self.encode(text, return_offsets_mapping=True)["offset_mapping"]
        end = places[count - 1][1]
        return len(text[:end].encode())


def save_tokenizer(tokenizer, folder):
    """Writes a tokenizer into a folder, as transformers reads it.

    tokenizer: a TransformersTokenizer, or a BytePairTokenizer, which becomes
    tokenizer.json and tokenizer_config.json.
    """
    if isinstance(tokenizer, TransformersTokenizer):
        for name in ("is_local", "local_files_only"):  # of how it was loaded here
            tokenizer.wrapped.init_kwargs.pop(name, None)
        tokenizer.wrapped.save_pretrained(folder)
        return

    # What the program needs to make tokens of a text.
    names = tokenizer.special_tokens_set
    special = {tokenizer.encode_single_token(name): name for name in names}
    content = json.dumps(tokenizer_json(tokenizer, special), ensure_ascii=False)
    (Path(folder) / "tokenizer.json").write_text(content, encoding="utf-8")

    # What the file does not say: the class that reads it, and the token between texts.
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in names:  # one at most, in the vocabularies that we have
        config |= {"bos_token": name, "eos_token": name}
    content = json.dumps(config, indent=1) + "\n"
    (Path(folder) / "tokenizer_config.json").write_text(content)


def tokenizer_json(tokenizer, special):
    """The content of tokenizer.json for a tiktoken.Encoding. special: id to text."""
    ids = [id for id in range(tokenizer.n_vocab) if id not in special]
    ranks = {tokenizer.decode_single_token_bytes(id): id for id in ids}

    # tiktoken joins the pair whose union has the lowest rank; the file lists the pairs.
    merges = []
    for token in ranks:
        if len(token) > 1:
            first, second = last_merge(token, ranks)
            merges.append(f"{letters(first)} {letters(second)}")

    # A text is cut into words by tiktoken's own pattern, then spelled in letters.
    pattern = {"Regex": tokenizer._pat_str}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    spell = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "use_regex": False,
        "trim_offsets": True,
    }

    # A special token stands in a text exactly as it is written, or it does not.
    strictly = {
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }

    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": s} | strictly for i, s in special.items()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, spell]},
        "decoder": spell,
        "model": {
            "type": "BPE",
            "vocab": {letters(token): rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def last_merge(token, ranks):
    """The two parts of `token` that byte-pair encoding joins last. ranks: bytes to id;
    a lower id is joined earlier."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        unions = [first + second for first, second in zip(parts, parts[1:])]
        union_ranks = [ranks.get(union, len(ranks)) for union in unions]

        i = union_ranks.index(min(union_ranks))
        parts[i : i + 2] = [unions[i]]

    return parts


def letters(token):
    """A token's bytes in the spelling of GPT-2's files, a letter for each byte."""
    return "".join(LETTERS[byte] for byte in token)


# A byte that is a visible character of Latin-1 is spelled as this character, the others
# as the letters from 256 on, in their order.
VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
INVISIBLE = [byte for byte in range(256) if byte not in VISIBLE]
LETTERS = {byte: chr(byte) for byte in VISIBLE}
LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(INVISIBLE)}
