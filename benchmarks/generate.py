"""Compare problems per second in validation: batched with a KV cache, and one at a time without.

    python benchmarks/generate.py                                    GPT-2 small, batch 64, 6 thoughts
    python benchmarks/generate.py --device cuda --bf16

Same weights, prompts and number of new tokens; the generated tokens are compared. `single` is the naive loop: it
recomputes the whole sequence for each new token, one problem at a time (two of the batch, of median length). No row
stops early.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from torch import Tensor, nn
from train_step import END, LATENT, START, environment, make_batch, make_model, parse

from coconut import Coconut

NEVER = -1  # an eos id that is never generated


def single(lm: nn.Module, input_ids: Tensor, new_tokens: int) -> Tensor:
    """Decode one prompt (1, length) greedily without a cache."""
    embeds = lm.get_input_embeddings()(input_ids)  # (1, length, hidden)
    for column in (input_ids[0] == LATENT).nonzero().flatten().tolist():
        hidden = lm.base_model(inputs_embeds=embeds[:, :column], use_cache=False).last_hidden_state
        embeds = torch.cat([embeds[:, :column], hidden[:, -1:], embeds[:, column + 1 :]], dim=1)
    for _ in range(new_tokens):
        hidden = lm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        token = lm.get_output_embeddings()(hidden[:, -1]).argmax(-1)[:, None]  # (1, 1)
        input_ids = torch.cat([input_ids, token], dim=1)
        embeds = torch.cat([embeds, lm.get_input_embeddings()(token)], dim=1)
    return input_ids


def seconds(function, device: str) -> tuple[float, object]:
    """Return the wall time of a call and its result."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - started, result


@torch.no_grad()
def compare(lm: nn.Module, batch: dict[str, Tensor], args) -> dict[str, float]:
    """Measure both ways on the prompts of a batch; return problems per second and their ratio (median, least, most).

    args.answer: the number of new tokens. Raises AssertionError if the tokens differ, in float32.
    """
    batch = {key: value.to(args.device) for key, value in batch.items()}
    model = Coconut(lm, LATENT, START, END, NEVER)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    few = inputs["attention_mask"].sum(1).argsort().tolist()[args.batch // 2 :][:2]
    ratios = []
    for number in range(1 + args.repeats):
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            fast, output = seconds(lambda: model.generate(**inputs, max_new_tokens=args.answer), args.device)
            slow = 0.0
            for row in few:
                prompt = batch["input_ids"][row][batch["attention_mask"][row] == 1][None]  # (1, real length)
                took, alone = seconds(lambda: single(lm, prompt, args.answer), args.device)  # noqa: B023
                slow += took
                if not args.bf16:  # bfloat16 may break ties differently
                    assert torch.equal(alone[0, prompt.shape[1] :], output[row, batch["input_ids"].shape[1] :])
        if number > 0:
            ratios.append((slow / len(few)) / (fast / args.batch))
    row = {"batched_per_second": args.batch / fast, "single_per_second": len(few) / slow}
    return row | {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    """Measure and print the comparison; --answer is the number of new tokens."""
    args = parse()
    torch.set_num_threads(args.threads)
    lm = make_model(args).to(args.device).eval()
    row = compare(lm, make_batch(args.batch, args.question, args.thoughts, 0), args)
    text = json.dumps({**environment(args.device), **row}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
