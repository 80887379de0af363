"""What the map holds: which students, of which teachers, learn from which mixes.

A mix is a loss, the token scale's temperature (None: no token scale) and the ground
truth's weight."""

TEACHERS = (
    3,
    12,
    24,
    1,
    6,
)  # epochs of fine-tuning, in the order in which they are taken
WEIGHTS = {
    0.0: "weight 0",
    1 / 16: "1/16",
    1 / 4: "1/4",
    1.0: "1",
}  # of the ground truth

MIXES = [("tsld", t, weight) for t in (None, 10.0) for weight in WEIGHTS]
LABELS_ALONE = ("gt", None, None)
OPTQ = ("OPTQ", None, None)

# Table 1: what the authors' program runs as each row, TSLD as it is printed, and their
# TSLD without its token scale.
TABLE_1 = {
    "L2L+logit": ("l2l", None, None),
    "logit+GT": ("tsld", None, 1.0),
    "logit": ("tsld", None, 0.0),
    "TSLD as printed": ("tsld", 10.0, 0.0),
    "TSLD as run: + ground truth · 1/4": ("tsld", 10.0, 1 / 4),
    "logit + ground truth · 1/4": ("tsld", None, 1 / 4),
}
AT_4_BITS = [*TABLE_1.values()][1:]  # the paper has no L2L at 4 bits

# The token scale's best chance: other temperatures, and teachers surer of their text.
OTHERS = [("tsld", t, weight) for t in (1.0, 2.0, 5.0, 20.0) for weight in (0.0, 1 / 4)]
AT_2 = [mix for mix in OTHERS if mix[1] == 2.0]
PAIRS = [mix for mix in MIXES if mix[2] in (0.0, 1 / 4)]
# Does the token scale do what a shorter training would?
IS_IT_BREVITY = [("tsld", t, 0.0) for t in (None, 2.0)]

# Bits, what shares a scale, the student's epochs, the teachers, the mixes: of table 1,
# then of all.
TABLE_1_PARTS = (
    (2, "tensor", 16, (12,), TABLE_1.values()),
    (4, "channel", 0, (12,), [OPTQ]),
    (4, "channel", 16, (12,), AT_4_BITS),
    (4, "tensor", 16, (12,), AT_4_BITS),
)
MAP = (
    *TABLE_1_PARTS,
    (2, "tensor", 16, TEACHERS, [*MIXES, LABELS_ALONE]),
    (2, "tensor", 16, (24, 48), OTHERS),
    (2, "tensor", 16, (48, 96), [*PAIRS, TABLE_1["L2L+logit"]]),
    (2, "tensor", 16, (48,), [TABLE_1["logit+GT"]]),
    (2, "tensor", 16, (96,), AT_2),
    (2, "tensor", 16, (12,), AT_2[:1]),
    (2, "tensor", 4, (48,), IS_IT_BREVITY),
    (2, "tensor", 8, (48,), IS_IT_BREVITY),
    (2, "tensor", 32, (48,), IS_IT_BREVITY),
    (4, "tensor", 16, TEACHERS[:3], MIXES),
    (2, "tensor", 64, (3, 24), [mix for mix in MIXES if mix[2] != 1 / 16]),
)
SETTING = ("bits", "granularity", "epochs", "teacher_epochs")
MIX = ("loss", "temperature", "gt_weight")


def settings(seed):
    """The settings of a seed's rows, in the order in which they are measured."""
    wanted = []
    for *student, teachers, mixes in MAP:
        for teacher_epochs in teachers:
            for mix in mixes:
                values = (*student, teacher_epochs, *mix, seed)
                wanted.append(dict(zip((*SETTING, *MIX, "seed"), values)))

    return wanted
