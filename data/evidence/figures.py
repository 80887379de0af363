"""The paper's figures in kind, from one teacher and its five ternary students:

    python -m data.evidence.figures --data ptb --teacher-steps 5000

writes their numbers as CSV beside this file, and draws PNG files where matplotlib is installed. The
bars of the first one are means over the seeds of data/evidence/table.json."""

import collections
import copy
import importlib.util
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

import train_small
import tsld
from data.evidence.table import check_model
from data.files import read_json
from data.texts import UserError

FOLDER = Path(__file__).resolve().parent
SHOWN = 64  # blocks of text in figures 1, 2 and 4; the means of figure 4 are of the whole text
SURE = 0.5  # the top probability that parts low confidence from high
STYLES = {  # name in a figure, and colour
    "without training": ("without training", "C7"),
    "gt": ("ground truth", "C4"),
    "l2l": ("L2L+logit", "C1"),
    "logit": ("logit", "C0"),
    "logit_gt": ("logit+GT", "C3"),
    "tsld": ("TSLD", "C2"),
}


# --------------------------------------------------------------------------------------------------
# What is looked at


@torch.no_grad()
def error_by_position(student, teacher, ids):
    """How far the student is from the teacher at each position of the sequence: Σ (student -
    teacher)² / Σ teacher², summed over the sequences and the channels: the paper's cumulative
    quantization error.

    ids: int64 (B, T). Returns {"attention output": (T,), "logits": (T,)}, the former a mean over
    layers.
    """
    outputs = []
    for model in (student, teacher):
        caught = []
        catch = lambda module, inputs, output: caught.append(output[0])  # without the scores
        hooks = [block.attn.register_forward_hook(catch) for block in model.h]
        logits = model(ids)
        for hook in hooks:
            hook.remove()
        outputs.append((torch.stack(caught), logits[None]))  # (n_layer, B, T, C) and (1, B, T, V)
    error = {}
    for name, ours, theirs in zip(("attention output", "logits"), *outputs):
        wrong, size = ((x.float() ** 2).sum((1, 3)) for x in (ours - theirs, theirs))  # (layers, T)
        error[name] = (wrong / size).mean(0)
    return error


@torch.no_grad()
def distance_by_token(student, teacher, ids):
    """KL(P^T ‖ P^S) = Σ_i P^T_i (log P^T_i - log P^S_i) of each token, in nats. (B, T) -> (B,
    T)."""
    theirs = teacher(ids)  # kd does not depend on the targets: ids stand in for them
    own = tsld.per_token_terms(theirs, theirs, ids).kd
    return tsld.per_token_terms(student(ids), theirs, ids).kd - own


@torch.no_grad()
def confidence(model, ids, targets):
    """The probability of the likeliest token, and the cross-entropy of the true one in nats, (B,
    T). model: gives logits, or an object with .logits."""
    found, rows = [], max(1, 2048 // ids.shape[1])  # at a time: bounds the logits' memory
    for some_ids, some_targets in zip(ids.split(rows), targets.split(rows)):
        output = model(some_ids)
        log_p = F.log_softmax(getattr(output, "logits", output).float(), dim=-1)  # (b, T, V)
        found.append((log_p.amax(-1).exp(), -log_p.gather(-1, some_targets[..., None])[..., 0]))
    sure, ce = (torch.cat(parts) for parts in zip(*found))
    return sure, ce


def whole_blocks(setup, part):
    """A text's tokens in whole blocks, and the token after each: int64 (B, T) both."""
    text, T = setup.tokens[part], setup.student.block_size
    B = (len(text) - 1) // T
    if B < 1:
        raise train_small.UserError(f"the {part} text has no whole block of {T} tokens")
    return [text[a : B * T + a].view(B, T).to(setup.device) for a in (0, 1)]


def sure_share(setup, model, part):
    """The share of a text's tokens for which the model has a next one that it finds likelier than
    all others together."""
    return (confidence(model.eval(), *whole_blocks(setup, part))[0] > SURE).float().mean().item()


class Figures:
    """Looks at the students of one run as they come, and writes down what it saw."""

    def __init__(self, setup, teacher):
        self.setup, self.teacher = setup, teacher
        self.ids, self.targets = whole_blocks(setup, "valid")
        self.errors, self.distances, self.histories, self.ce = {}, {}, {}, {}
        self.sure, self.ce["teacher"] = confidence(teacher, self.ids, self.targets)

    def look_at(self, name, student):
        if name in ("without training", "l2l", "logit"):
            shown = self.ids[:SHOWN]
            self.errors[name] = error_by_position(student, self.teacher, shown)
            self.distances[name] = distance_by_token(student, self.teacher, shown)
        if name in ("logit", "tsld"):
            self.ce[name] = confidence(student, self.ids, self.targets)[1]

    def watch(self, loss):
        """For figure 3: 20 times in its training, the student's cross-entropy on its own text and
        another."""
        if loss not in ("logit", "logit_gt", "tsld"):
            return None
        path = Path(self.setup.args.out) / f"student-{loss}.history.json"
        resumed = self.setup.args.resume and path.exists()
        history = self.histories[loss] = read_json(path, {}) if resumed else {}
        steps, block_size = self.setup.student.steps, self.setup.student.block_size
        every = max(1, steps // 20)

        def watch(step, student):
            if step % every == 0 or step == steps:
                texts = (self.setup.tokens[part][:20_000] for part in ("student", "valid"))
                history[str(step)] = [tsld.evaluate(student, text, block_size) for text in texts]
                train_small.write_text(path, json.dumps(history))

        return watch

    def sentence(self):
        """The tokens of the first whole line in the validation text of 12 to 40 tokens and no
        <unk>, what the teacher gave each of them, and how much TSLD makes it count: N times its
        weight."""
        decode = self.setup.source.tokenizer.decode
        scale = tsld.token_scale(self.ce["teacher"], self.setup.student.temperature)
        for block, ids in enumerate(self.targets.tolist()):
            words = [decode([token]) for token in ids]
            ends = [n for n, word in enumerate(words) if "\n" in word]
            for line in (slice(a + 1, b) for a, b in zip(ends, ends[1:])):
                if 12 <= line.stop - line.start <= 40 and "unk" not in "".join(words[line]):
                    p = (-self.ce["teacher"][block, line]).exp().tolist()
                    count = (len(words) * scale[block, line]).tolist()
                    return {"token": words[line], "probability": p, "count": count}
        return {"token": [], "probability": [], "count": []}

    def draw(self):
        positions = range(1, self.ids.shape[1] + 1)
        errors = [
            (f"{name}, {what}", e) for name, both in self.errors.items() for what, e in both.items()
        ]
        error = {title: e.tolist() for title, e in errors}
        write_csv("1-error-by-position", {"position": positions} | error)
        distances = {name: sorted(d.flatten().tolist()) for name, d in self.distances.items()}
        write_csv("2-distance-to-teacher", distances)
        steps = [int(step) for step in self.histories["logit"]]
        curves = {"step": steps}
        for loss, history in self.histories.items():
            curves |= {f"{loss}, training": [history[str(step)][0] for step in steps]}
            curves |= {f"{loss}, validation": [history[str(step)][1] for step in steps]}
        write_csv("3-training-curves", curves)
        # 1 where a token counts as much as it would without scaling.
        scale = self.ids.shape[1] * tsld.token_scale(
            self.ce["teacher"], self.setup.student.temperature
        )
        change = self.ce["tsld"] - self.ce["logit"]
        columns = {"top probability": self.sure, "cross-entropy": self.ce["teacher"]}
        columns |= {"token scale times N": scale, "TSLD minus logit": change}
        tokens = {name: x[:SHOWN].flatten().tolist() for name, x in columns.items()}
        write_csv("4-confidence", tokens)
        regions = [change[self.sure <= SURE], change[self.sure > SURE]]
        changes = {"top probability from": (0, SURE), "tokens": [len(region) for region in regions]}
        changes["mean change"], changes["standard error"] = zip(*map(mean_and_error, regions))
        write_csv("4-change-by-confidence", changes)
        sentence, bars = self.sentence(), bars_of_table(self.setup)
        write_csv("0-sentence", sentence)
        if not importlib.util.find_spec("matplotlib"):
            print(f"figures: the numbers are in {FOLDER}; the package matplotlib would draw them")
            return
        draw_figures(bars, sentence, error, distances, curves, tokens, changes)
        print(f"figures: {FOLDER}")


def bars_of_table(setup):
    """Name to the validation perplexities that table.json has of it at 2 bits, with this run's
    settings and any seed: of the teacher with the most such rows."""
    path, of_teacher = FOLDER / "table.json", collections.defaultdict(list)
    ours = {"teacher_steps": setup.teacher.steps, "student_tokens": len(setup.tokens["student"])}
    student = {"bits": 2, "gt_weight": 0.0}
    student |= {
        key: getattr(setup.student, key) for key in ("steps", "lr", "temperature", "batch_size")
    }
    for row in read_json(path, []):
        untrained = row["method"] in ("teacher", "ternarized")
        if (ours if untrained else ours | student).items() <= row.items():
            of_teacher[row["teacher"]].append(row)
    bars = collections.defaultdict(list)
    for row in max(of_teacher.values(), key=len, default=[]):
        bars[row["method"]].append(row["valid_ppl"])
    return bars


def mean_and_error(values):
    """The mean of a tensor and its standard error; not a number where there are too few values."""
    if len(values) < 2:
        return math.nan, math.nan
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def write_csv(name, columns):
    lines = [",".join(f'"{title}"' for title in columns)]
    form = lambda x: json.dumps(x, ensure_ascii=False) if isinstance(x, str) else f"{x:.6g}"
    lines += [",".join(map(form, row)) for row in zip(*columns.values())]
    train_small.write_text(FOLDER / f"{name}.csv", "\n".join(lines) + "\n")


# --------------------------------------------------------------------------------------------------
# How it is drawn


def draw_figures(bars, sentence, error, distances, curves, tokens, changes):
    """PNG files of what Figures saw. The titles are made of the numbers, so they say what is
    seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures = {
        "0-method": draw_method(plt, bars, sentence),
        "1-error-by-position": draw_error(plt, error),
        "2-distance-to-teacher": draw_distance(plt, distances),
        "3-training-curves": draw_curves(plt, curves),
        "4-confidence": draw_confidence(plt, tokens, changes),
    }
    for name, (figure, title) in figures.items():
        figure.suptitle(title, fontsize=10)
        figure.savefig(FOLDER / f"{name}.png", dpi=110)
        plt.close(figure)


def draw_method(plt, bars, sentence):
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(2, 3)
    )
    names = {"teacher": "teacher (FP32)", "ternarized": "rounded, untrained"}
    names |= {
        loss: f"student: {STYLES[loss][0]}" for loss in ("gt", "l2l", "logit_gt", "logit", "tsld")
    }
    shown = [name for name in names if name in bars]
    means = [statistics.mean(bars[name]) for name in shown]
    spreads = [statistics.stdev(bars[name]) if len(bars[name]) > 1 else 0.0 for name in shown]
    colours = [STYLES[name][1] if name in STYLES else "C7" for name in shown]
    rows = range(len(shown), 0, -1)
    left.barh(rows, means, xerr=spreads, color=colours, capsize=3)
    for row, mean, spread in zip(rows, means, spreads):
        left.text(mean + spread, row, f"  {mean:.1f}", va="center", fontsize=9)
    left.set(
        yticks=rows, yticklabels=[names[name] for name in shown], xlabel="validation perplexity"
    )
    left.set(xlim=(0, 1.25 * max(means, default=1)), title="what a loss wins back")
    draw_sentence(plt, right, **sentence)
    return figure, ""


def draw_sentence(plt, axis, token, probability, count):
    """Tokens in lines as they are read, shaded by what they count, the teacher's probability
    below."""
    width, x, y = 46, 0.0, 0
    norm, colours = (
        plt.Normalize(min(count, default=0), max(count, default=1)),
        plt.get_cmap("YlGn"),
    )
    for word, p, c in zip(token, probability, count):
        size = max(len(word.strip()), 3) + 1.5  # in characters
        if x + size > width:
            x, y = 0.0, y - 1
        axis.add_patch(plt.Rectangle((x, y), size - 0.3, 0.75, color=colours(norm(c))))
        dark = "white" if norm(c) > 0.6 else "black"
        place = {"ha": "center", "va": "center", "family": "monospace", "color": dark}
        axis.text(x + size / 2 - 0.15, y + 0.5, word.strip(), fontsize=10, **place)
        axis.text(
            x + size / 2 - 0.15, y + 0.17, f"{p:.2f}" if p >= 0.01 else "<.01", fontsize=7, **place
        )
        x += size
    axis.set(xlim=(0, width), ylim=(y - 0.2, 1), xticks=[], yticks=[])
    axis.set_title(
        "how much TSLD makes a token count; below: the teacher's probability", fontsize=11
    )
    mappable = plt.cm.ScalarMappable(norm, colours)
    axis.figure.colorbar(mappable, ax=axis, label="N · w_n: 1 is what it counts without scaling")


def draw_error(plt, error):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for label, values in error.items():
        name, what = label.rsplit(", ", 1)
        axis = axes[0 if what == "attention output" else 1]
        title, colour = STYLES[name]
        axis.plot(range(1, len(values) + 1), values, color=colour, label=title)
        axis.set(title=what, xlabel="position in the sequence, tokens", ylim=(0, None))
    axes[0].set_ylabel("relative squared error")
    axes[1].legend()
    values = error["without training, attention output"]
    quarter = max(1, len(values) // 4)
    growth = statistics.mean(values[-quarter:]) / statistics.mean(values[:quarter])
    l2l, logit = (statistics.mean(error[f"{name}, logits"]) for name in ("l2l", "logit"))
    seen = f"Untrained, attention's error in the last quarter is {growth:.1f} times the first's;\n"
    return (
        figure,
        seen + f"L2L leaves {l2l / logit:.1f} times logit distillation's error in the logits",
    )


def draw_distance(plt, distances):
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    means = {name: statistics.mean(values) for name, values in distances.items()}
    for name, values in distances.items():
        title, colour = STYLES[name]
        shares = [(i + 1) / len(values) for i in range(len(values))]
        axis.plot(values, shares, color=colour, label=f"{title}: mean {means[name]:.3f}")
    axis.set(xlabel="KL(teacher ‖ student) of a token, nats", ylabel="share of tokens below")
    axis.set(xscale="log", xlim=(1e-3, None))
    axis.legend()
    closer, other = (STYLES[name][0] for name in sorted(("l2l", "logit"), key=means.get))
    return figure, f"{closer} distillation ends nearer to the teacher's distribution than {other}"


def draw_curves(plt, curves):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    gaps = []
    for name in ("logit", "logit_gt", "tsld"):
        title, colour = STYLES[name]
        for axis, text in zip(axes, ("training", "validation")):
            axis.plot(curves["step"], curves[f"{name}, {text}"], color=colour, label=title)
            axis.set(title=f"{text} text", xlabel="step", ylabel="cross-entropy, nats per token")
        gaps.append(
            f"{title} {curves[f'{name}, validation'][-1] - curves[f'{name}, training'][-1]:.2f}"
        )
    axes[0].legend()
    return figure, f"From training to validation text the students lose, nats: {', '.join(gaps)}"


def draw_confidence(plt, tokens, changes):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", width_ratios=(3, 2))
    sure, ce = tokens["top probability"], tokens["cross-entropy"]
    dots = axes[0].scatter(
        sure, ce, c=tokens["token scale times N"], s=3, cmap="viridis", rasterized=True
    )
    figure.colorbar(dots, ax=axes[0], label="token scale times N")
    axes[0].axvline(SURE, color="C3")
    axes[0].set(
        xlabel="teacher's top probability", ylabel="teacher's cross-entropy, nats", xlim=(0, 1)
    )
    regions = ("low confidence", "high confidence")
    for x, region in zip((0.25, 0.75), regions):  # above the dots, not on them
        axes[0].text(x, 1.02, region, transform=axes[0].transAxes, ha="center", color="C3")
    means, errors = changes["mean change"], changes["standard error"]
    axes[1].bar(regions, means, yerr=errors, color=STYLES["tsld"][1], capsize=4)
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[1].set_ylabel("cross-entropy, TSLD minus logit, nats")
    by = (
        f"{mean:+.3f} ± {error:.3f} at {name}" for name, mean, error in zip(regions, means, errors)
    )
    seen = "Against logit distillation, TSLD changes a token's cross-entropy in nats\nby "
    return figure, seen + " and ".join(by)


def main(argv):
    about = "The paper's figures in kind, to data/evidence."
    takes = train_small.TRAIN - {"loss", "gt-weight", "bits", "task"}
    args = train_small.parse(argv, takes, about, steps=400, **{"tsld-temperature": 10.0})
    args.loss = "all"
    check_model(args)
    read_json(FOLDER / "table.json", [])  # a damaged file is found before anything is trained
    for checkpoint in Path(args.out).glob("student-*.pt") if args.resume else ():
        history = checkpoint.with_suffix(".history.json")
        if checkpoint.stem in ("student-logit", "student-logit_gt", "student-tsld"):
            if read_json(history, None) is None:
                raise UserError(f"{history} is missing: without --resume it is made anew")
    setup = train_small.set_up(args)
    teacher = train_small.train_teacher(setup)
    frozen = train_small.frozen_teacher(
        setup, teacher, train_small.score(setup, teacher, ["valid"])
    )
    figures = Figures(setup, frozen)
    figures.look_at(
        "without training", tsld.quantize_model(copy.deepcopy(teacher), 2, args.granularity)
    )
    for loss in tsld.LOSSES:
        student = tsld.quantize_model(copy.deepcopy(teacher), 2, args.granularity)
        config = replace(setup.student, loss=loss, gt_weight=0.0)
        _, scores = train_small.train_student(
            setup, student, config, frozen, loss, figures.watch(loss)
        )
        print(f"student, {loss}: validation perplexity {scores['valid']['ppl']:.2f}", flush=True)
        figures.look_at(loss, student)
    figures.draw()


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
