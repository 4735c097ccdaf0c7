"""Tiny tokenizers, models, problems and runs for the tests."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from curriculum import END, LATENT, PAUSE, START

REPOSITORY = Path(__file__).resolve().parents[2]
EOS, BOS = "<|endoftext|>", "<|bos|>"


# --- tokenizers -------------------------------------------------------------------------------------------------------


def byte_tokenizer(bos: bool = False, pad: bool = False, arrows: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with eos; `arrows` adds the token "<<" (as in GPT-2), `bos` prepends bos to every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(["<<"] if arrows else []), EOS]
    ids = {token: id for id, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[("<", "<")] if arrows else []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"eos_token": EOS}
    if bos:
        tokenizer.add_special_tokens([BOS])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
        named["bos_token"] = BOS
    if pad:
        named["pad_token"] = "<|pad|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def show(ids, tokenizer) -> str:
    """Token ids as text, special tokens as one character: S, L, E, P are the markers, ^ bos, $ eos, . is -100."""
    short = {START: "S", LATENT: "L", END: "E", PAUSE: "P", BOS: "^", EOS: "$"}
    pieces = ["." if id == -100 else tokenizer.convert_ids_to_tokens(id) for id in ids]
    return "".join(short.get(piece, piece) for piece in pieces).replace("Ċ", "\n").replace("Ġ", " ")


# --- models -----------------------------------------------------------------------------------------------------------


def tiny_gpt2(vocabulary: int = 50, positions: int = 64, dropout: float = 0.0, **options) -> GPT2LMHeadModel:
    """A random GPT-2 of 2 layers, width 16; weights are large enough that every token affects the output."""
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"vocab_size": vocabulary, "n_positions": positions, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **drops, **ends, "initializer_range": 0.3, **options}))


def llama_sizes(vocabulary: int, positions: int, **options) -> dict:
    """Config values of a tiny model of the Llama family."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": positions}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return {**sizes, **heads, **ends, "initializer_range": 0.3, "tie_word_embeddings": False, **options}


def tiny_llama(vocabulary: int = 50, positions: int = 64, **options) -> LlamaForCausalLM:
    """A random Llama of 2 layers, width 16, with grouped-query attention and an untied LM head."""
    return LlamaForCausalLM(LlamaConfig(**llama_sizes(vocabulary, positions, **options)))


def tiny_qwen3(vocabulary: int = 50, positions: int = 64, **options) -> Qwen3ForCausalLM:
    """A random Qwen3 of 2 layers and width 16, with QK normalization."""
    return Qwen3ForCausalLM(Qwen3Config(**llama_sizes(vocabulary, positions, head_dim=4, **options)))


def tiny_gemma3() -> Gemma3ForCausalLM:
    """A random Gemma 3 of 2 layers and width 16, with scaled embeddings."""
    sizes = llama_sizes(50, 64, head_dim=4, query_pre_attn_scalar=4, tie_word_embeddings=True)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


def tiny_qwen2(vocabulary: int = 50, positions: int = 64, **options) -> Qwen2ForCausalLM:
    """A random Qwen2 of width 16, with a layer of full attention and one with a sliding window of 4."""
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**llama_sizes(vocabulary, positions, **window, **options)))


def tiny_opt(vocabulary: int = 50, positions: int = 64) -> OPTForCausalLM:
    """A random OPT of 2 layers and width 16: its position table has an offset of 2, its blocks no submodule mlp."""
    sizes = {"vocab_size": vocabulary, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
        "word_embed_proj_dim": 16,
        "init_std": 0.3,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return OPTForCausalLM(OPTConfig(**sizes, **ends, dropout=0.0))


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "qwen3": tiny_qwen3, "qwen2": tiny_qwen2, "opt": tiny_opt}


def exact_model(kind: str, seed: int = 0, **options):
    """A tiny model in float64. RMSNorm of transformers rounds to float32, so it is replaced by that of torch."""
    torch.manual_seed(seed)
    lm = MODELS[kind](**options).double().eval()
    for parent in list(lm.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64)
                setattr(parent, name, norm)
    return lm


def saved_bytes(lm, forward) -> int:
    """The bytes that `forward` saves for backward, without the model's parameters."""
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (
            tensor.untyped_storage().nbytes(),
            tensor,
        )  # alive: no address twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for address, (size, _) in kept.items() if address not in own)


def save_model(folder: Path, lm=None, tokenizer=None, seed: int = 0) -> str:
    """Saves a model and its tokenizer for from_pretrained; by default a tiny byte-level GPT-2."""
    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(seed)
    (lm or tiny_gpt2(len(tokenizer), positions=128)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- problems ---------------------------------------------------------------------------------------------------------


def make_problems(count: int, steps: int = 2, seed: int = 0) -> list[dict]:
    """Sums of single digits: the question "1+2+3", the steps "1+2=3" and "3+3=6", the answer "6"."""
    rng, problems = random.Random(seed), []
    for _ in range(count):
        digits = [rng.randint(0, 9) for _ in range(steps + 1)]
        sums = [sum(digits[: i + 1]) for i in range(steps + 1)]
        lines = [f"{sums[i]}+{digits[i + 1]}={sums[i + 1]}" for i in range(steps)]
        problems.append({"question": "+".join(map(str, digits)), "answer": str(sums[-1]), "steps": lines})
    return problems


def write_json(path: Path, value) -> str:
    """Writes a value as JSON and returns the path."""
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


# --- runs -------------------------------------------------------------------------------------------------------------


def words(values: dict) -> list[str]:
    """Config values as key=value arguments."""
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def run_script(config, *overrides: str, processes: int = 0, timeout: int = 240, cwd=None, env=None):
    """Starts run.py by python, or with `processes` by torchrun. Returns the CompletedProcess."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes else []), str(REPOSITORY / "run.py"), str(config), *overrides]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env={**environment, **(env or {})}, **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.terminate()  # torchrun ends its workers, the hanging ones after 30 s
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def read_lines(path: Path) -> list[dict]:
    """The objects in a JSON Lines file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def snapshot(directory: Path) -> dict[str, tuple]:
    """Content and mtime of every file and link under a directory: equal only if nothing changed."""
    return {
        str(path.relative_to(directory)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(Path(directory).rglob("*"))
    }


def training_state(checkpoint: Path) -> dict:
    """The training state of a checkpoint, with the optimizer state (if retained) as {parameter: {key: tensor}}."""
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)
    assert "optimizer" not in state  # it is in optimizer.safetensors
    state["optimizer"] = {}
    if (checkpoint / "optimizer.safetensors").exists():
        for name, value in load_file(checkpoint / "optimizer.safetensors").items():
            parameter, _, key = name.rpartition(".")
            state["optimizer"].setdefault(parameter, {})[key] = value
    return state
