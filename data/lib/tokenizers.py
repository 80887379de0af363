"""Tokenizers of transformers come in with tiktoken's methods, and those of tiktoken go
out as transformers reads them."""

import json
from pathlib import Path

from data.lib.errors import UserError


class TransformersTokenizer:
    """A tokenizer of transformers with the methods of a tiktoken.Encoding.

    name: what it was loaded from. wrapped: the tokenizer itself. vocab_size: the tokens
    that its model has an embedding of. end_of_text: the token that ends a text, that of
    a zero byte where the tokenizer has none.
    """

    def __init__(self, name, tokenizer, vocab_size):
        self.name = name
        self.wrapped = tokenizer
        self.vocab_size = vocab_size

        self.end_of_text = tokenizer.eos_token_id
        if self.end_of_text is None:
            self.end_of_text = self.encode_ordinary("\0")[-1]

    def encode_ordinary(self, text):
        """The text's ids, a list, without a token for its beginning or end. Raises
        UserError if the model has no embedding of one of them."""
        ids = self.wrapped(text, add_special_tokens=False)["input_ids"]

        largest = max(ids, default=0)
        if largest >= self.vocab_size:
            raise UserError(
                f"the tokenizer of {self.name} makes token {largest}, "
                f"and its model has only {self.vocab_size}"
            )

        return ids

    def decode(self, ids):
        return self.wrapped.decode(ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()


def save_tokenizer(tokenizer, folder):
    """Writes a tokenizer into a folder, as transformers reads it.

    tokenizer: a TransformersTokenizer, or a tiktoken.Encoding, which becomes
    tokenizer.json and tokenizer_config.json.
    """
    if isinstance(tokenizer, TransformersTokenizer):
        tokenizer.wrapped.save_pretrained(folder)
        return

    # What the program needs to make tokens of a text.
    names = tokenizer.special_tokens_set
    special = {tokenizer.encode_single_token(name): name for name in names}
    content = json.dumps(tokenizer_json(tokenizer, special), ensure_ascii=False)
    (Path(folder) / "tokenizer.json").write_text(content, encoding="utf-8")

    # What the file does not say: the class that reads it, and the end of a text.
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in names:  # one at most, in the vocabularies that we have
        config["eos_token"] = name
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
