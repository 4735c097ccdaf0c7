"""LoRA: trained weights, copies saved for backward, checkpoints and resume."""

from __future__ import annotations

import pytest
import torch
import yaml
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import run
from coconut import Coconut
from components.lora import add_lora, merge_adapters, parameter_groups
from helpers import (
    byte_tokenizer,
    exact_model,
    llama_sizes,
    make_problems,
    save_model,
    tiny_gemma3,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3,
    training_state,
    write_json,
)
from helpers.batches import END, EOS, LATENT, START, wrap
from helpers.faults import launch

NEW_IDS = [START, END, LATENT]
TABLES = ("wte.weight", "embed_tokens.weight", "lm_head.weight")


def tiny_phi():
    """A random Phi; its LM head has a bias."""
    lm = PhiForCausalLM(PhiConfig(**llama_sizes(50, 64)))
    torch.nn.init.normal_(lm.lm_head.bias)
    return lm


def tiny_moe():
    """A random mixture of experts, whose expert weights are outside of linear layers."""
    sizes = llama_sizes(50, 64, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def tiny_tied_llama():
    return tiny_llama(tie_word_embeddings=True)


MAKERS = [tiny_gpt2, tiny_llama, tiny_tied_llama, tiny_qwen3, tiny_gemma3, tiny_phi, tiny_moe]


def batch(thoughts: int = 2) -> dict:
    """Two sequences (2, 11 + thoughts) with thoughts, and with new tokens among inputs and targets."""
    rows = [[1, 2, start, *[LATENT] * thoughts, END, 5, start, START, END, 7, END, EOS] for start in (START, 9)]
    input_ids = torch.tensor(rows)
    labels = input_ids.clone()
    labels[:, : 3 + thoughts] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def step(lm, optimizer, bf16: bool = False, thoughts: int = 2) -> torch.Tensor:
    """Takes an optimizer step and returns its loss."""
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = wrap(lm)(**batch(thoughts)).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def trained(lm, bf16: bool = False):
    """The model after three optimizer steps with LoRA."""
    add_lora(lm, 4, NEW_IDS, bf16)
    optimizer = torch.optim.AdamW(parameter_groups(lm, weight_decay=0.1), lr=1e-2)
    for _ in range(3):
        step(lm, optimizer, bf16)
    return lm.eval()


# --- trained weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_new_token_rows_match_full_tables_with_masked_gradients(kind):
    """The reference trains both embedding tables; a hook zeroes the gradients of all rows but the new ones."""
    simple, ours = exact_model(kind), exact_model(kind)
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), simple)
    tables = {simple.get_input_embeddings().weight, simple.get_output_embeddings().weight}
    is_new = torch.zeros(50, 1, dtype=torch.float64).index_fill(0, torch.tensor(NEW_IDS), 1)
    for table in tables:
        table.requires_grad_(True)
        table.register_hook(lambda gradient: gradient * is_new)
    adapters = [p for p in simple.parameters() if p.requires_grad and p not in tables]
    groups = [{"params": adapters, "weight_decay": 0.1}, {"params": list(tables), "weight_decay": 0.0}]
    torch.manual_seed(0)
    add_lora(ours, 4, NEW_IDS)
    optimizers = [torch.optim.AdamW(g, lr=1e-2) for g in (groups, parameter_groups(ours, weight_decay=0.1))]
    for _ in range(3):
        losses = [step(lm, optimizer) for lm, optimizer in zip((simple, ours), optimizers, strict=True)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
        for get in ("get_input_embeddings", "get_output_embeddings"):
            table, new = getattr(simple, get)().weight, getattr(ours, get)().new_rows
            torch.testing.assert_close(new.grad, table.grad[NEW_IDS], rtol=1e-9, atol=1e-12)
            assert new.grad.abs().max() > 1e-4
    theirs, mine = merge_adapters(simple, simple.state_dict()), merge_adapters(ours, ours.state_dict())
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_adapters_and_new_token_rows_train_and_merge(make, bf16):
    lm = make()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    lm = trained(lm, bf16)
    after = merge_adapters(lm, lm.state_dict())
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values()} == {torch.float32}
    for name in (name for name in before if name.endswith(TABLES)):
        changed = (after[name] != before[name]).any(1).nonzero().flatten().tolist()
        assert set(changed) <= set(NEW_IDS) and len(changed) >= 2, name  # <|latent|> is no input but a place
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            assert name.endswith(".new_rows") or ".lora_" in name
            assert parameter.dtype == torch.float32
        elif bf16:
            owner = lm.get_submodule(name.rpartition(".")[0])  # a router or experts may be no linear layers
            is_layer = ".base_layer." in name and isinstance(owner, torch.nn.Linear | Conv1D)
            assert parameter.dtype == (torch.bfloat16 if is_layer else torch.float32), name
    plain = make().eval()
    plain.load_state_dict(after)
    if bf16:  # its own arithmetic rounds, and that of merged weights elsewhere; both compute in float32 here
        for parameter in lm.parameters():
            parameter.data = parameter.data.float()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    logits = [wrap(model)(**inputs).logits for model in (lm, plain)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_frozen_bf16_weights_match_autocast_over_float32(make):
    """Storing frozen layers in bfloat16 only saves the casts: losses and trained weights are bit-identical."""
    models, losses = [], []
    for stored in (False, True):
        torch.manual_seed(0)
        lm = make()
        add_lora(lm, 4, NEW_IDS, bf16=stored)
        optimizer = torch.optim.AdamW(parameter_groups(lm, 0.1), lr=1e-2)
        losses.append([step(lm, optimizer, bf16=True).item() for _ in range(3)])
        models.append({name: p for name, p in lm.named_parameters() if p.requires_grad})
    assert losses[0] == losses[1]
    assert [name for name in models[0] if not torch.equal(models[0][name], models[1][name])] == []


# --- memory -----------------------------------------------------------------------------------------------------------


def copied_bytes(model: Coconut, thoughts: int) -> int:
    """Bytes of copies of frozen matrices that a training forward with thoughts saves for backward.

    Tensors that share storage with a parameter are not counted.
    """
    frozen = {p for p in model.parameters() if not p.requires_grad and p.ndim > 1}
    shapes = {shape for p in frozen for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # storage -> tensor, which keeps the storage from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        computed = tensor.requires_grad or tuple(tensor.shape) not in shapes
        if not computed and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model(**batch(thoughts))
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


@pytest.mark.parametrize("thoughts", [0, 1, 6])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, tiny_tied_llama, tiny_qwen3], ids=lambda make: make.__name__)
def test_forward_saves_no_copies_of_frozen_weights(make, thoughts):
    copied = {}
    for bf16 in (False, True):
        lm = make()
        add_lora(lm, 4, NEW_IDS, bf16)
        copied[bf16] = copied_bytes(wrap(lm).train(), thoughts)
    layers = sum(module.weight.numel() for module in lm.modules() if hasattr(module, "get_delta_weight"))
    before, now = copied[False] / layers, copied[True] / layers
    print(f"\n{make.__name__}, {thoughts} thoughts: {before:g} bytes per frozen weight, {now:g} if stored in bf16")
    assert copied[True] == 0
    assert copied[False] == 2 * layers * (1 + thoughts)  # so the count does find what autocast copies


@pytest.mark.slow
def test_compiled_forward_saves_no_copies_of_frozen_weights():
    lm = tiny_llama(num_hidden_layers=1)
    add_lora(lm, 4, NEW_IDS, bf16=True)
    model, found = wrap(lm).train(), []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()  # what other tests compiled would count against its limit
            model.compile(backend="aot_eager_decomp_partition")  # what the compiler is given, without compiling it
            assert copied_bytes(model, thoughts=2) == 0
        lm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        found.append([loss.detach(), lm.get_input_embeddings().new_rows.grad, lm.lm_head.new_rows.grad])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2 * eager.abs().max().item())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """A directory with the config of a short LoRA run."""
    tokenizer = byte_tokenizer()
    values = {
        "method": "coconut",
        "max_latent_stage": 1,
        "model_id": save_model(tmp_path / "model", tiny_gpt2(len(tokenizer), dropout=0.1), tokenizer),
        "train_path": write_json(tmp_path / "train.json", make_problems(8)),
        "val_path": write_json(tmp_path / "valid.json", make_problems(2, seed=1)),
        "save_path": str(tmp_path / "runs"),
        "lora_rank": 2,
        "lr": 1e-2,
        "batch_size_training": 4,
        "max_new_tokens": 2,
        "logger": "none",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def start(place, *words: str) -> int:
    """Runs the config in `place` and returns the exit code."""
    return run.main([str(place / "config.yaml"), *words])


def last_weights(place, name: str) -> dict:
    """The merged weights in a run's last checkpoint."""
    return load_file(place / f"runs/{name}/last/model.safetensors")


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("from_scratch", [False, True], ids=["loaded", "from_scratch"])
def test_lora_resume_is_bit_identical(place, bf16, from_scratch):
    for words in (["name=a", "num_epochs=1"], ["name=a", "num_epochs=2"], ["name=b", "num_epochs=2"]):
        assert start(place, *words, f"bf16={bf16}", f"from_scratch={from_scratch}") == 0
    interrupted, whole = (last_weights(place, name) for name in "ab")
    assert interrupted.keys() == whole.keys()
    assert all(torch.equal(interrupted[name], whole[name]) for name in whole)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_lora_checkpoint_holds_merged_model_and_trained_weights(place, bf16):
    assert start(place, "name=a", f"bf16={bf16}") == 0
    checkpoint = place / "runs/a/last"
    lm, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in lm.parameters()} == {torch.float32}  # as config.json says
    training = training_state(checkpoint)
    assert all(".lora_" in name or name == "transformer.wte.new_rows" for name in training["weights"])
    moments = training["optimizer"]
    assert {tuple(m["exp_avg"].shape) for name, m in moments.items() if ".new_rows" in name} == {(3, 16)}
    assert moments.keys() == {f"base_causallm.{name}" for name in training["weights"]}


def test_lora_resume_reloads_load_model_path(place):
    """The frozen weights come from load_model_path when the run is resumed, too."""
    assert start(place, "name=base", "lora_rank=null") == 0
    for words in (["name=a", "num_epochs=1"], ["name=a", "num_epochs=2"], ["name=b", "num_epochs=2"]):
        assert start(place, *words, f"load_model_path={place}/runs/base/last") == 0
    interrupted, whole = (last_weights(place, name) for name in "ab")
    assert all(torch.equal(interrupted[name], whole[name]) for name in whole)


def test_lora_resume_with_changed_base_model_is_refused(place, capsys):
    assert start(place, "name=a") == 0
    weights = load_file(place / "model/model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"][0, 0] += 0.01
    save_file(weights, place / "model/model.safetensors", {"format": "pt"})
    before = last_weights(place, "a")
    assert start(place, "name=a", "num_epochs=2") == 2
    message = capsys.readouterr().err
    assert [part for part in ("model_id", "load_model_path=", "checkpoint_1") if part not in message] == []
    assert sorted(path.name for path in (place / "runs/a").glob("checkpoint_*")) == ["checkpoint_1"]
    assert all(torch.equal(value, before[name]) for name, value in last_weights(place, "a").items())


@pytest.mark.parametrize("method", ["cot", "pause_token"])
def test_lora_with_zero_and_four_new_tokens(place, method):
    assert start(place, "name=a", "bf16=True", f"method={method}") == 0


@pytest.mark.slow
def test_lora_resume_on_two_ranks_is_bit_identical(place):
    options = ["bf16=True", "batch_size_training=2"]
    for words in (["name=a", "num_epochs=1"], ["name=a", "num_epochs=2"], ["name=b", "num_epochs=2"]):
        outcome = launch([str(place / "config.yaml"), *words, *options], ranks=2)
        assert outcome.codes == [0, 0], outcome.output
    interrupted, whole = (last_weights(place, name) for name in "ab")
    assert all(torch.equal(interrupted[name], whole[name]) for name in whole)
