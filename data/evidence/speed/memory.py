"""What the paper's models take in memory, on paper."""

import math
from dataclasses import dataclass

from data.evidence.rows import Table
from data.lib import lean


@dataclass
class Shape:
    """What a model's memory depends on."""

    layers: int
    width: int
    inner: int  # width of the MLP
    vocabulary: int
    positions: int  # learned ones
    matrices: int = 6  # a layer: 4 of width x width, 2 of width x inner (gated MLP: 3)
    biases: int = (
        5  # of `width` a layer: query, key, value, two outputs; 0: none at all
    )
    tied: bool = True  # the head is the token embedding

    def parameters(self):
        """Numbers of linear weights, of embeddings and head, and of biases and
        norms."""
        w = self.width
        matrices = 4 * w * w + (self.matrices - 4) * w * self.inner
        heads = 1 if self.tied else 2
        embeddings = (heads * self.vocabulary + self.positions) * w

        norm = 2 * w if self.biases else w  # RMSNorm has no bias
        vectors = 2 * norm + self.biases * w
        if self.biases:
            vectors += self.inner

        return self.layers * matrices, embeddings, self.layers * vectors + norm


# The models of the paper's tables.
SHAPES = {
    "GPT-2 0.1B": Shape(12, 768, 3072, 50257, 1024),
    "GPT-2 0.3B": Shape(24, 1024, 4096, 50257, 1024),
    "GPT-2 0.8B": Shape(36, 1280, 5120, 50257, 1024),
    "GPT-2 1.5B": Shape(48, 1600, 6400, 50257, 1024),
    "OPT 0.1B": Shape(12, 768, 3072, 50272, 2050),
    "OPT 1.3B": Shape(24, 2048, 8192, 50272, 2050),
    "OPT 2.7B": Shape(32, 2560, 10240, 50272, 2050),
    "OPT 6.7B": Shape(32, 4096, 16384, 50272, 2050),
    "GPT-Neo 1.3B": Shape(24, 2048, 8192, 50257, 2048, biases=2),
    "LLaMA 7B": Shape(32, 4096, 11008, 32000, 0, matrices=7, biases=0, tied=False),
}


def memory_on_paper(shape, batch=4, length=512, dtype="bfloat16", gpus=1):
    """Bytes: the model in FP32, in FP16 and packed, and what training its student under
    TSLD takes on each of `gpus` GPUs.

    Training holds the student with AdamW's two averages, and the teacher; several GPUs
    share these out. On top of them come at first the layers' dequantized weights and
    activations with the lean loss's scratch space and gradient of the head, and at the
    end the gradients of all weights; the larger of the two makes the peak. Of several
    GPUs each has its part of the batch, and gathers the weights that it works with:
    those of two blocks (this one, and the next on its way) and the embeddings, and
    their gradients before these are shared out."""
    linear, embeddings, rest = shape.parameters()
    N = linear + embeddings + rest
    product = {"bfloat16": 2, "float32": 4}[dtype]  # bytes of a number in products
    sequences = math.ceil(batch / gpus)
    student = 4 * N + 8 * N  # weights, and two averages
    teacher = product * N

    # Per token and layer: the residual twice, in float32; both norms, query, key,
    # value, and what attention gives, laid out in two ways; the MLP's inner state
    # before and after its nonlinearity, and in a gated MLP the two factors as well.
    inner_states = 2 if shape.matrices == 6 else 4
    numbers = 7 * shape.width + inner_states * shape.inner
    of_token = 2 * 4 * shape.width + product * numbers
    activations = sequences * length * shape.layers * of_token

    logits = 4 * sequences * length * shape.vocabulary
    scratch = 2 * min(lean.SCRATCH_BYTES, logits)
    gradient_of_head = 4 * shape.vocabulary * shape.width

    gathered = 0
    gathered_gradients = 0

    if gpus > 1:
        blocks = 2 * (linear + rest) / shape.layers
        gathered = (4 + product) * (blocks + embeddings)
        gathered_gradients = 4 * (blocks + embeddings)

    forward = product * linear + activations + scratch + gradient_of_head + gathered
    backward = 4 * N / gpus + gathered + gathered_gradients
    return {
        "FP32": 4 * N,
        "FP16": 2 * N,
        "packed": linear / 4 + 2 * embeddings + 4 * rest,
        "training": (student + teacher) / gpus + max(forward, backward),
    }


def table(gpus=(2, 4, 8), size=80e9):
    """The paper's models. One fits where a tenth of each GPU is left for the rest."""
    lines = []
    for name, shape in SHAPES.items():
        memory = memory_on_paper(shape)
        training = {1: memory["training"]}
        for n in gpus:
            training[n] = memory_on_paper(shape, gpus=n)["training"]
        fitting = [n for n in training if training[n] < 0.9 * size]
        fewest = min(fitting) if fitting else f"more than {gpus[-1]}"

        sizes = [memory["FP32"], memory["FP16"], memory["packed"], *training.values()]
        cells = [f"{value / 1e9:.2f}" for value in sizes]
        lines.append([name, *cells, fewest])

    columns = ["GB", "FP32", "FP16", "packed", "1 GPU", *(f"each of {n}" for n in gpus)]
    text = (
        "The model in FP32, in FP16 and packed; then training a student with TSLD, "
        "bf16, 4 x 512 tokens, on each of so many GPUs, and how many it takes where a "
        "tenth of each is left for the rest. Computed, not measured: no such run has "
        "been made."
    )
    columns.append(f"GPUs of {size / 1e9:.0f} GB")

    return Table("Memory on paper", text, columns, lines)
