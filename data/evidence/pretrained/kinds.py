"""What becomes of every kind of causal language model that transformers has.

    pip install transformers
    python -m data.evidence.pretrained.kinds [KIND ...]

builds each kind small, with random weights and a tokenizer of bytes, saves it as
transformers does, and gives the folder to train_small.py: its teacher is trained for a
step, its student for two, both write text, and the packed student is exported. What was
exported has to compute what the packed student does. Without words it writes kinds.md
beside this file; with some it only shows what becomes of these."""

import contextlib
import importlib.util
import io
import sys
import tempfile
import traceback
from pathlib import Path

import torch

import train_small
from data.evidence.rows import where_and_when, words_parser
from data.lib import hf
from data.lib.errors import UserError
from data.lib.files import load_packed, write_text

PAGE = Path(__file__).with_name("kinds.md")
TEXT = "The quick brown fox jumps over the lazy dog, and the cat sat on a mat.\n" * 60
FLAGS = "--steps 2 --teacher-steps 1 --block-size 16 --batch-size 2 --device cpu"

# --------------------------------------------------------------------------------------
# Small models

# A value for each size that a configuration has by one of these names.
SIZES = {
    256: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size "
    "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab "
    "ngram_vocab_size_base",
    80: "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions "
    "max_target_positions context_length model_max_length max_sequence_length "
    "original_max_position_embeddings seq_length",
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size lru_width "
    "input_embedding_size output_embedding_size word_embed_proj_dim "
    "attention_hidden_size backbone_hidden_size router_hidden_size dim_model_base "
    "pronunciation_embed_dim shape_embed_dim",
    96: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dff dim_ff d_inner "
    "ffn_hidden_size feed_forward_size intermediate_size_mlp n_inner "
    "dense_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size "
    "shared_experts_intermediate_size shared_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size prompt_mid_dim "
    "hidden_size_per_layer_input",
    16: "head_dim kv_channels attention_head_dim attention_head_size dim_head d_head "
    "qk_head_dim v_head_dim swa_head_dim linear_head_dim linear_key_head_dim "
    "linear_value_head_dim index_head_dim global_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank o_lora_rank "
    "rotary_dim mamba_chunk_size chunk_size gated_norm_rank",
    4: "num_hidden_layers n_layer n_layers num_layers num_blocks num_experts "
    "n_routed_experts num_local_experts moe_num_experts num_attention_heads n_head "
    "n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads "
    "n_mamba_heads",
    2: "decoder_layers encoder_layers num_encoder_layers num_decoder_layers "
    "num_experts_per_tok moe_topk top_k moe_k num_experts_per_token "
    "num_key_value_heads swa_num_key_value_heads linear_num_key_heads state_size "
    "mamba_d_state ssm_state_size num_layers_per_stack",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups",
}
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}

# Settings that are not there by default, or that keep a model from being causal.
OTHERS = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "is_decoder": True,
}
# Where keys and values are compressed.
COMPRESSED = {"head_dim": 8, "num_key_value_heads": 4}
# What some kinds need beside them.
OF_KIND = {
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_theta": 1e4, "rope_type": "default"}
            for name in ("full_attention", "sliding_attention")
        }
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "falcon_mamba": {"time_step_rank": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
}


def small(kind):
    """A model of a kind, with random weights."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    of_class = CONFIG_MAPPING[kind]
    usual = of_class().to_dict()
    values = small_values(usual) | OF_KIND.get(kind, {})
    if "pad_token_id" not in usual:  # which some models ask for all the same
        values["pad_token_id"] = None
    config = of_class(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > 2e7:
        raise ValueError(f"it has {parameters:,} parameters")

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def small_values(values):
    """The settings to change, from all of a configuration. A list that has a value for
    each layer is left to the class."""
    changed = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            changed[name] = small_values(value) | {"model_type": value["model_type"]}
        elif name in ("layer_types", "mlp_layer_types"):
            changed[name] = None
        elif type(value) is int and name in SIZES:
            changed[name] = SIZES[name]
        elif name in OTHERS and value in (None, False):
            changed[name] = OTHERS[name]
        elif type(value) is int and name.endswith("token_id") and value > 255:
            changed[name] = 3

    if "qk_rope_head_dim" in values:
        changed |= COMPRESSED
    return changed


def tokenizer_of_bytes():
    """Each of the 256 bytes is a token."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: rank for rank, letter in enumerate(alphabet)}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.pre_tokenizer = byte_level
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise)


# --------------------------------------------------------------------------------------
# Verdicts


class Refused(Exception):
    """The command has refused a model, in one line."""


def command(words):
    """Runs train_small.py. Raises Refused with its line if it ends with exit code 2,
    and AssertionError if it ends otherwise, or says more than a line."""
    printed = io.StringIO()
    errors = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = train_small.main(words)

    lines = errors.getvalue().strip().splitlines()
    if code == 2 and len(lines) == 1:
        raise Refused(lines[0].removeprefix("error: "))
    assert code == 0 and not lines, f"exit code {code}, {len(lines)} lines: {lines}"


def judge(kind, room):
    """The verdict on a kind, in one line. room: an empty folder."""
    try:
        model = small(kind)
    except Exception as error:  # of any type: the classes' own
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"not built: {reason:.200}"

    folder = str(room / "model")
    try:
        model.save_pretrained(folder)
        tokenizer_of_bytes().save_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"not saved by transformers: {reason:.200}"

    try:
        run(folder, room)
    except Refused as refusal:
        return f"refused: {refusal}".replace(f"{room}/", "")
    except UserError as refusal:
        return f"refused at opening: {refusal}".replace(f"{room}/", "")
    except Exception as error:
        traceback.print_exc()
        return f"TRACEBACK: {type(error).__name__}: {' '.join(str(error).split()):.200}"
    return "works"


def run(folder, room):
    """Trains, exports, opens again, and compares."""
    text = room / "text.txt"
    text.write_text(TEXT)
    out = room / "out"
    words = ["--model", folder, "--data", str(text), "--out", str(out), *FLAGS.split()]
    command(words)

    packed = str(out / "student-tsld.packed")
    exported = str(room / "exported")
    command(["--export", packed, exported, "--model", folder])

    student = load_packed(packed, into=hf.load_model(folder)[0])
    again, _ = hf.load_model(exported)
    ids = torch.tensor([list(TEXT[:16].encode())])
    with torch.no_grad():
        expected = student(ids)
        difference = (again(ids) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-4, f"what was exported differs by {difference:.2g}"


# --------------------------------------------------------------------------------------
# The page


def page(verdicts):
    """kinds.md: its text. verdicts: kind -> line."""
    import transformers

    about = where_and_when("pretrained.kinds")
    counts = {}
    for verdict in verdicts.values():
        word = verdict.partition(":")[0]
        counts[word] = counts.get(word, 0) + 1
    summary = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    text = f"""# Every kind of causal language model of transformers

Made by `{about["command"]}`, commit {about["commit"]}, {about["date"]};
{versions}. Not to be edited by hand.

[kinds.py](kinds.py) says what "works" stands for.
Of {len(verdicts)} kinds: {summary}.

"""
    return text + "".join(f"- {kind}: {line}\n" for kind, line in verdicts.items())


def main(argv):
    parser = words_parser(
        "pretrained.kinds", "Tries all causal models of transformers."
    )
    parser.add_argument("kinds", nargs="*", help="these alone, and writes no page")
    asked_for = parser.parse_args(argv).kinds
    if not importlib.util.find_spec("transformers"):
        raise UserError("it takes the package transformers")

    from transformers.models.auto import modeling_auto

    torch.set_num_threads(1)  # the tensors are tiny
    kinds = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    verdicts = {}
    for kind in asked_for or kinds:
        with tempfile.TemporaryDirectory() as room:
            verdicts[kind] = judge(kind, Path(room))
        print(f"{kind}: {verdicts[kind]}", flush=True)

    if not asked_for:
        write_text(PAGE, page(verdicts))


if __name__ == "__main__":
    sys.exit(train_small.main(sys.argv[1:], main))
