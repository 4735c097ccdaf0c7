"""Only rank 0 reads and holds full tensors; spread broadcasts or shards them, collect gathers them for saving."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components.files import verify_manifest
from components.parallelize import full_tensors, named_tensors, tensor_from_rank0
from components.pretrained import build_on_meta, load_pretrained
from config import Config, load_config
from helpers import byte_tokenizer, make_problems, save_model, tiny_gpt2, tiny_llama, words, write_json
from helpers.faults import free_port, server


def on_ranks(function, ranks: int, folder: Path, *arguments) -> list:
    """Calls function(processes, *arguments) on each rank of a new process group and returns the (JSON) results."""
    names = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    names |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = []
    for rank in range(ranks):
        environment = {**names, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        target = (function, environment, str(folder / f"result-{rank}"), arguments)
        started.append(server().Process(target=member, args=target))
        started[-1].start()
    for process in started:
        process.join(100)
    for process in started:
        process.kill()
        process.join()
    assert [process.exitcode for process in started] == [0] * ranks
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(ranks)]


def member(function, environment: dict[str, str], result: str, arguments: tuple) -> None:
    """One rank of the process group."""
    from components.distributed import init_distributed

    os.environ.update(environment)
    Path(result).write_text(json.dumps(function(init_distributed(), *arguments)))
    os._exit(0)


# --- spread and collect -----------------------------------------------------------------------------------------------


def there_and_back(processes) -> list[str]:
    """The shapes and dtypes of tensors that `tensor_from_rank0` and `full_tensors` do not return as they were."""
    mesh = torch.distributed.init_device_mesh("cpu", (processes.world_size,))
    wrong = []
    for shape in [(6, 2), (7, 3), (4,), (1, 5), (2, 0), ()]:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            whole = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
            likes = [torch.empty(shape, dtype=dtype, device="meta")]
            if shape:
                likes.append(distribute_tensor(torch.zeros(shape, dtype=dtype), mesh, [Shard(0)]))
            for like in likes:
                part = tensor_from_rank0(whole.clone() if processes.is_rank0 else None, like, processes)
                back = full_tensors({"tensor": part}, processes).get("tensor")
                expected = distribute_tensor(whole, mesh, [Shard(0)]).to_local() if isinstance(like, DTensor) else whole
                local = part.to_local() if isinstance(part, DTensor) else part
                right = torch.equal(local, expected) and part.dtype == dtype and part.shape == whole.shape
                if not right or (back is not None) != processes.is_rank0:
                    wrong.append(f"{shape} {dtype} {type(like).__name__}")
                elif processes.is_rank0 and not torch.equal(back, whole):
                    wrong.append(f"{shape} {dtype} {type(like).__name__} back")
    return wrong


def test_spread_and_collect_round_trip(tmp_path):
    assert on_ranks(there_and_back, 3, tmp_path) == [[], [], []]


# --- meta device ------------------------------------------------------------------------------------------------------

V = len(byte_tokenizer())
MODELS = {
    "tied": lambda: tiny_gpt2(V, 128),
    "untied": lambda: tiny_llama(V, 128),
    "spare rows": lambda: tiny_llama(V + 40, 128, tie_word_embeddings=True),
}


@pytest.mark.parametrize("method", ["cot", "coconut", "pause_token"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("source", ["model_id", "from_scratch", "directory", "file"])
def test_build_on_meta_matches_load_pretrained(tmp_path, kind, method, source):
    lm = MODELS[kind]()
    folder = save_model(tmp_path / "model", lm)
    config = Config({"method": method, "model_id": folder, "from_scratch": source == "from_scratch"})
    torch.save(lm.state_dict(), tmp_path / "file")
    path = {"directory": folder, "file": tmp_path / "file"}.get(source)
    loaded = load_pretrained(config, path)
    tables = [loaded.lm.get_input_embeddings().weight, loaded.lm.get_output_embeddings().weight]
    sketch = build_on_meta(config, path, len(tables[0]), tables[0] is tables[1])
    assert all(tensor.is_meta for _, tensor in named_tensors(sketch.lm))
    shapes = [[(n, t.shape, t.dtype) for n, t in named_tensors(lm)] for lm in (loaded.lm, sketch.lm)]
    assert shapes[0] == shapes[1]
    assert sketch.lm.config.vocab_size == loaded.lm.config.vocab_size
    assert sketch.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert sketch.tokenizer.pad_token_id == loaded.tokenizer.pad_token_id
    assert sketch.description == loaded.description


# --- files and memory per rank ----------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor (not on the meta device) that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor) and not leaf.is_meta:
                self.bytes = max(self.bytes, leaf.nbytes)
        return result


def start_and_save(processes, command: list[str]) -> dict:
    """Starts or resumes a run and saves without training; returns what this rank held and read."""
    import safetensors
    import transformers.modeling_utils

    import run
    from components import checkpoint
    from components.run_directory import Claim
    from utils import StopRequest

    opened = []

    def watched(function):
        def patched(source, *arguments, **options):
            if isinstance(source, str | Path):  # torch.load unpickles messages, too
                opened.append(Path(source).name)
            return function(source, *arguments, **options)

        return patched

    transformers.modeling_utils.safe_open = watched(safetensors.safe_open)
    checkpoint.load_file = watched(checkpoint.load_file)
    torch.load = watched(torch.load)
    real, load = [], run.load

    def watched_load(*arguments):
        pretrained = load(*arguments)
        real.extend(name for name, tensor in named_tensors(pretrained.lm) if not tensor.is_meta)
        return pretrained

    run.load = watched_load
    with Largest() as largest:
        trainer = run.set_up(load_config(command[0], command[1:]), processes, StopRequest())
    if not trainer.state.epoch:
        for parameter in trainer.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        trainer.optimizer.step()
    trainer.state.epoch += 1
    claim = Claim()
    processes.run_on_rank0(lambda: trainer.open_log(claim))
    with largest:
        trainer.save()
    tensors = [*trainer.model.parameters(), *(v for s in trainer.optimizer.state.values() for v in s.values())]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    head, embedding = trainer.pretrained.lm.get_output_embeddings(), trainer.pretrained.lm.get_input_embeddings()
    return {
        "real": len(real),
        "largest": largest.bytes,
        "held": sum(tensor.nbytes for tensor in local if tensor.ndim),
        "opened": sorted(set(opened)),
        "tied": head.weight is embedding.weight,
        "buffers": [buffer.double().sum().item() for buffer in trainer.model.buffers()],
    }


@pytest.mark.parametrize(("strategy", "tied"), [("fsdp", False), ("fsdp", True), ("ddp", True)])
def test_only_rank_0_reads_files_and_holds_full_tensors(tmp_path, strategy, tied):
    lm = tiny_llama(V, 128, tie_word_embeddings=tied, hidden_size=64, intermediate_size=128)
    values = {"method": "coconut", "model_id": save_model(tmp_path / "model", lm), "save_path": str(tmp_path)}
    values |= {key: write_json(tmp_path / "data.json", make_problems(4)) for key in ("train_path", "val_path")}
    values |= {"name": "run", "logger": "none", "parallel": strategy, "num_epochs": 5}
    (tmp_path / "config.yaml").write_text("method: coconut\n")
    command = [str(tmp_path / "config.yaml"), *words(values)]
    lm.resize_token_embeddings(V + 3)
    largest = max(p.nbytes for p in lm.parameters())
    whole = 3 * sum(p.nbytes for p in lm.parameters())  # and two moments
    for checkpoint in (None, "checkpoint_1"):
        main, *others = on_ranks(start_and_save, 3, tmp_path, command)
        state = ["optimizer.safetensors", "training_state.pt"] if checkpoint else []
        assert main["opened"] == ["model.safetensors", *state]
        for other in others:
            assert (other["real"], other["opened"]) == (0, [])
            assert other["largest"] <= largest or strategy == "ddp"
            assert other["buffers"] == main["buffers"] and other["tied"] == main["tied"] == tied
        held = [process["held"] for process in (main, *others)]
        assert sum(held) == whole * (1 if strategy == "fsdp" else 3) and max(held) - min(held) < whole / 20
    first, second = tmp_path / "run" / "checkpoint_1", tmp_path / "run" / "checkpoint_2"
    assert verify_manifest(first) is None and verify_manifest(second) is None
    for file in ("model.safetensors", "optimizer.safetensors"):  # nothing was trained in between
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert load_file(first / "optimizer.safetensors")["base_causallm.model.norm.weight.exp_avg"].any()


def fail(processes, command: list[str]) -> str:
    """The error of a run whose tokenizer one process alone cannot read."""
    from components import pretrained
    from config import UserError
    from run import set_up
    from utils import StopRequest

    if processes.rank == 1:
        pretrained.AutoTokenizer.from_pretrained = None
    try:
        set_up(load_config(command[0], command[1:]), processes, StopRequest())
    except UserError as error:
        return str(error)
    return ""


def test_load_error_on_one_rank_stops_all_ranks(tmp_path):
    values = {"method": "coconut", "model_id": save_model(tmp_path / "model", tiny_llama(V, 128)), "name": "run"}
    values |= {key: write_json(tmp_path / "data.json", make_problems(4)) for key in ("train_path", "val_path")}
    (tmp_path / "config.yaml").write_text("method: coconut\n")
    messages = on_ranks(fail, 3, tmp_path, [str(tmp_path / "config.yaml"), *words(values)])
    assert len(set(messages)) == 1 and "model_id" in messages[0] and "cannot be loaded" in messages[0]
    (tmp_path / "model" / "model.safetensors").write_bytes(b"torn")
    messages = on_ranks(fail, 2, tmp_path, [str(tmp_path / "config.yaml"), *words(values)])
    assert len(set(messages)) == 1 and "cannot be loaded" in messages[0]
