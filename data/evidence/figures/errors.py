"""Figures 1 and 2: how far a student is from its teacher, at each position of the
sequence, and in the distribution of each token."""

import statistics

import torch

import tsld
from data.evidence.figures.common import COLOURS, NAMES, SHOWN, Figure

OUTPUTS = ("attention output", "logits")
STUDENTS = ("without training", "l2l", "logit")


class ErrorByPosition(Figure):
    name = "1-error-by-position"

    def __init__(self, subject):
        super().__init__(subject)
        self.errors = {}  # student -> output -> (T,)

    def look_at(self, name, student):
        if name in STUDENTS:
            ids = self.subject.ids[:SHOWN]
            self.errors[name] = error_by_position(student, self.subject.teacher, ids)

    def tables(self):
        columns = {"position": range(1, self.subject.ids.shape[1] + 1)}
        for name, errors in self.errors.items():
            for output in OUTPUTS:
                columns[f"{name}, {output}"] = errors[output].tolist()

        return {self.name: columns}

    def draw(self, *axes):
        for axis, output in zip(axes, OUTPUTS):
            for name, errors in self.errors.items():
                values = errors[output].tolist()
                style = {"color": COLOURS[name], "label": NAMES[name]}
                axis.plot(range(1, len(values) + 1), values, **style)

            axis.set(title=output, xlabel="position in the sequence, tokens")
            axis.set_ylim(0, None)

        axes[0].set_ylabel("relative squared error")
        axes[1].legend()

        values = self.errors["without training"]["attention output"]
        quarter = max(1, len(values) // 4)
        growth = (values[-quarter:].mean() / values[:quarter].mean()).item()
        l2l = self.errors["l2l"]["logits"].mean()
        ratio = (l2l / self.errors["logit"]["logits"].mean()).item()

        return (
            "Untrained, attention's error in the last quarter is "
            f"{growth:.1f} times the first's;\n"
            f"L2L leaves {ratio:.1f} times logit distillation's error in the logits"
        )


class DistanceToTeacher(Figure):
    name = "2-distance-to-teacher"
    size = (6.5, 3.8)
    widths = (1,)

    def __init__(self, subject):
        super().__init__(subject)
        self.distances = {}  # student -> its tokens' distances, sorted

    def look_at(self, name, student):
        if name in STUDENTS:
            ids = self.subject.ids[:SHOWN]
            distances = distance_by_token(student, self.subject.teacher, ids)
            self.distances[name] = sorted(distances.flatten().tolist())

    def tables(self):
        return {self.name: self.distances}

    def draw(self, axis):
        means = {name: statistics.mean(x) for name, x in self.distances.items()}
        for name, values in self.distances.items():
            shares = [(i + 1) / len(values) for i in range(len(values))]
            label = f"{NAMES[name]}: mean {means[name]:.3f}"
            axis.plot(values, shares, color=COLOURS[name], label=label)

        axis.set_xlabel("KL(teacher ‖ student) of a token, nats")
        axis.set(ylabel="share of tokens below", xscale="log", xlim=(1e-3, None))
        axis.legend()
        closer, other = (NAMES[x] for x in sorted(("l2l", "logit"), key=means.get))
        nearer = f"{closer} distillation ends nearer to the teacher's distribution"

        return f"{nearer} than {other}"


@torch.no_grad()
def error_by_position(student, teacher, ids):
    """How far the student is from the teacher at each position of the sequence:
    Σ (student - teacher)² / Σ teacher², summed over the sequences and the channels: the
    paper's cumulative quantization error.

    ids: int64 (B, T). Returns {"attention output": (T,), "logits": (T,)}, the former a
    mean over layers."""
    errors = {}
    outputs = zip(OUTPUTS, outputs_of(student, ids), outputs_of(teacher, ids))

    for name, of_student, of_teacher in outputs:  # each (layers, B, T, channels)
        wrong = (of_student - of_teacher).float().square().sum((1, 3))  # (layers, T)
        size = of_teacher.float().square().sum((1, 3))
        errors[name] = (wrong / size).mean(0)

    return errors


def outputs_of(model, ids):
    """What the attentions and the head give: (n_layer, B, T, C) and (1, B, T, V)."""
    caught = []

    def catch(module, inputs, output):
        y, _ = output  # without the scores
        caught.append(y)

    hooks = [block.attn.register_forward_hook(catch) for block in model.h]
    logits = model(ids)
    for hook in hooks:
        hook.remove()

    return torch.stack(caught), logits[None]


@torch.no_grad()
def distance_by_token(student, teacher, ids):
    """KL(P^T ‖ P^S) = Σ_i P^T_i (log P^T_i - log P^S_i) of each token, in nats.
    (B, T) -> (B, T)."""
    teacher_logits = teacher(ids)

    # kd does not depend on the targets: ids stand in for them.
    entropy = tsld.per_token_terms(teacher_logits, teacher_logits, ids).kd
    return tsld.per_token_terms(student(ids), teacher_logits, ids).kd - entropy
