"""Run lm-evaluation-harness (0.4.13) on a checkpoint with its thoughts: its command line, plus `--model coconut`.

    python scripts/lm_eval_coconut.py --model coconut --model_args pretrained=checkpoints/prosqa-coconut/best \
        --include_path scripts/lm_eval_tasks --tasks prosqa_thoughts --batch_size 32

The thoughts follow a request's context; generation and scoring start after them. Model arguments: `pretrained` (the
checkpoint) and `thoughts` (their number; default: as trained). The harness's own tasks use few-shot prompts and answer
formats that these models were not trained on; scripts/lm_eval_tasks/ has tasks in the training format.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed; pip install -r requirements-extra.txt", file=sys.stderr)
    sys.exit(2)

import torch
from tqdm import tqdm

from coconut import plan_batch
from config import UserError
from dataset import MyCollator, make_feature, model_args
from evaluate import open_checkpoint


@register_model("coconut")
class CoconutLM(TemplateLM):
    """A checkpoint of any method as a model of the harness."""

    def __init__(self, pretrained: str, batch_size=16, thoughts: int | None = None, **options):
        super().__init__()
        if not str(batch_size).isdecimal():
            raise UserError(f"batch_size: expected a number, got {batch_size!r}")
        self.checkpoint = open_checkpoint(pretrained, thoughts)
        self.model, self.tokenizer = self.checkpoint.model, self.checkpoint.pretrained.tokenizer
        self.collate = MyCollator(self.tokenizer, self.model.latent_token_id)
        self._device, self.batch_size = self.model.base_causallm.device, int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-text token."""
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
        """Tokenize a text."""
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize a prompt with its thoughts, and the continuation to score, separately: thoughts lie between them."""
        return self.prompt(context)["input_ids"], self.tok_encode(continuation)

    def prompt(self, context: str) -> dict:
        """Build a prompt with thoughts; the context's final newline is the one that ends a question."""
        [prompt] = self.checkpoint.prompts([context.removesuffix("\n")])
        return prompt

    def batches(self, items: list, length, title: str, quiet: bool):
        """Yield batches of indices of items of similar length."""
        order = sorted(range(len(items)), key=lambda index: length(items[index]))
        starts = range(0, len(order), self.batch_size)
        return tqdm([order[start : start + self.batch_size] for start in starts], desc=title, disable=quiet)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **options) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
            requests: ((context, continuation), prompt ids, continuation ids) each.

        Returns: for each, the log probability of the continuation, and whether greedy decoding would produce it.
        """
        results = {}
        for part in self.batches(requests, lambda r: len(r[1]) + len(r[2]), "log probabilities", disable_tqdm):
            pairs = [requests[index][1:] for index in part]
            batch = self.collate(
                [make_feature(ids + new, 0) | {"labels": [-100] * len(ids) + new} for ids, new in pairs]
            )
            tokens = (batch[key] for key in ("input_ids", "attention_mask", "labels"))
            plan = plan_batch(*tokens, self.model.latent_token_id).to(self.device)
            cache = self.model.new_cache(batch["input_ids"].shape[1])
            ids, mask, positions = (
                batch[key].to(self.device) for key in ("input_ids", "attention_mask", "position_ids")
            )
            hidden, _ = self.model.think(ids, mask, positions, cache, plan.pass_starts)
            scores = self.model.logits(hidden[plan.rows, plan.columns]).log_softmax(-1)  # (supervised, vocabulary)
            own = scores.gather(1, plan.targets[:, None])[:, 0].split([len(new) for _, new in pairs])  # of each row
            greedy = (scores.argmax(1) == plan.targets).split([len(new) for _, new in pairs])
            for index, row, is_greedy in zip(part, own, greedy, strict=True):
                results[index] = (row.sum().item(), is_greedy.all().item())
        return [results[index] for index in range(len(requests))]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Generate greedily after each context and its thoughts, up to the first stop string."""
        for _, options in (request.args for request in requests):
            if options.get("do_sample"):
                raise UserError("do_sample: only greedy decoding is supported; remove it from generation_kwargs")
        contexts = [request.args[0] for request in requests]
        results = {}
        for part in self.batches(contexts, len, "answers", disable_tqdm):
            batch = model_args(self.collate([self.prompt(contexts[index]) for index in part]))
            options = [requests[index].args[1] for index in part]
            limit = max(o.get("max_gen_toks", self.checkpoint.config.answer_limit) for o in options)
            output = self.model.generate(**batch, max_new_tokens=limit)[:, batch["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
            for index, text, o in zip(part, texts, options, strict=True):
                results[index] = truncate(text, o.get("until") or [])
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Reject perplexity tasks: a whole text has no question for the thoughts to follow."""
        raise UserError("perplexity tasks (loglikelihood_rolling) are not supported: they have no question to follow")


def truncate(text: str, stop_strings: str | list[str]) -> str:
    """Truncate a text at the first stop string."""
    for stop in [stop_strings] if isinstance(stop_strings, str) else stop_strings:
        text = text.split(stop)[0] if stop else text
    return text


if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
