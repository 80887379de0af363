"""Makes data/bpe2048.tiktoken again, from the training parts of the Penn Treebank and
of pydoc, in 15 seconds:

    python -m data.evidence.vocabulary"""

import base64
import collections
import re
import sys

import train_small
from data import texts
from data.evidence.rows import words_parser
from data.lib.files import write_text


def main(argv):
    words_parser("vocabulary", "Makes data/bpe2048.tiktoken again.").parse_args(argv)
    text = texts.load_ptb()["train"] + texts.load_pydoc()["train"]
    lines = []
    for rank, token in enumerate(learn_vocabulary(text, 2048)):
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    write_text(texts.VOCABULARY, "".join(lines))


def learn_vocabulary(text, size):
    """Byte-pair encoding (Sennrich et al., 2016): join the most frequent pair of
    neighbouring tokens into a new one, until there are `size`. Returns the tokens, as
    bytes, in the order in which they were made."""
    counts = collections.Counter(
        word.encode() for word in re.findall(texts.PATTERN, text)
    )
    tokens_of = {word: [bytes([byte]) for byte in word] for word in counts}
    vocabulary = [bytes([byte]) for byte in range(256)]

    # How often each pair occurs, and in which words.
    pairs = collections.Counter()
    users = collections.defaultdict(set)

    def count(word, sign):
        tokens = tokens_of[word]
        for pair in zip(tokens, tokens[1:]):
            pairs[pair] += sign * counts[word]
            users[pair].add(word)

    for word in tokens_of:
        count(word, +1)

    while len(vocabulary) < size:
        # Of equally frequent pairs the last one in byte order.
        pair = max(pairs, key=lambda pair: (pairs[pair], pair))
        vocabulary.append(pair[0] + pair[1])

        for word in list(users[pair]):
            count(word, -1)
            tokens_of[word] = join(tokens_of[word], pair)
            count(word, +1)

    return vocabulary


def join(tokens, pair):
    """The tokens of a word, with each such pair joined, from left to right."""
    joined = []
    i = 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            joined.append(pair[0] + pair[1])
            i += 2
        else:
            joined.append(tokens[i])
            i += 1

    return joined


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
