"""Makes data/bpe2048.tiktoken again, from the training parts of PTB and pydoc, in 15 seconds:

python -m data.evidence.vocabulary
"""

import base64
import collections
import re
import sys

import train_small
from data import texts


def learn_vocabulary(text, size):
    """Byte-pair encoding (Sennrich et al., 2016): join the most frequent pair of neighbouring
    tokens into a new one, until there are `size`. Returns the tokens, as bytes, in the order they
    were made."""
    counts = collections.Counter(word.encode() for word in re.findall(texts.PATTERN, text))
    words = {
        word: [bytes([byte]) for byte in word] for word in counts
    }  # each as its present tokens
    vocabulary = [bytes([byte]) for byte in range(256)]
    pairs, users = collections.Counter(), collections.defaultdict(set)  # how often, in which words

    def count(word, sign):
        for pair in zip(words[word], words[word][1:]):
            pairs[pair] += sign * counts[word]
            users[pair].add(word)

    for word in words:
        count(word, +1)
    while len(vocabulary) < size:
        pair = max(
            pairs, key=lambda p: (pairs[p], p)
        )  # of equally frequent ones the last in byte order
        vocabulary.append(pair[0] + pair[1])
        for word in list(users[pair]):
            count(word, -1)
            old, new = words[word], []
            while old:
                n = 2 if tuple(old[:2]) == pair else 1
                new.append(b"".join(old[:n]))
                old = old[n:]
            words[word] = new
            count(word, +1)
    return vocabulary


def main(argv):
    train_small.parse(argv, takes=set(), description=__doc__.split("\n")[0])
    text = texts.load_ptb()["train"] + texts.load_pydoc()["train"]
    lines = [
        f"{base64.b64encode(token).decode()} {rank}\n"
        for rank, token in enumerate(learn_vocabulary(text, 2048))
    ]
    train_small.write_text(texts.VOCABULARY, "".join(lines))


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
