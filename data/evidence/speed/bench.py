"""Speed and memory: each table is one run, its rows measured in turns, its ratios
against its first row.

    python -m data.evidence.speed.bench             # packed product, text from a model
    python -m data.evidence.speed.bench training    # a training step with each loss
    python -m data.evidence.speed.bench memory      # the paper's models, on paper
    python -m data.evidence.speed.bench draw        # tables.md: memory, and gpu.json

Any other load on the machine spoils the figures. So does a virtual machine that puts
two threads on one processor, where they wait for each other: OMP_PROC_BIND=true before
the command prevents it."""

import sys
from pathlib import Path

import train_small
from data.evidence import rows
from data.evidence.speed import decoding, gpu, memory, training
from data.lib.devices import choose_device

ROOM = Path(__file__).resolve().parent
WORDS = ("generation", "training", "memory", "draw")


def main(argv):
    parser = rows.words_parser("speed.bench", "Speed and memory.")
    about = "what is measured (default generation); draw makes tables.md"
    parser.add_argument("what", nargs="?", default=WORDS[0], choices=WORDS, help=about)
    what = parser.parse_args(argv).what

    if what == "generation":
        decoding.bench(choose_device(None))
    elif what == "training":
        training.bench()
        training.bench_growth()
    elif what == "memory":
        table = memory.table()
        print(rows.markdown(table.columns, table.lines), end="")
    else:
        rows.write_page(ROOM, page())


def page():
    return rows.page("speed.bench draw", [*gpu.tables(), memory.table()])


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
