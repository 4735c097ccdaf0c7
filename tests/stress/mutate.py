"""Mutate single lines of the core, and check that a test notices each.

    python tests/stress/mutate.py               all, on one core: 5 minutes of its time
    python tests/stress/mutate.py train.py run  those whose file or text contains one of these words

Each mutation is made in a temporary copy of the tree, where its test runs in a process that is forked after the slow
imports. Prints a line per mutation: killed (its test fails) or SURVIVED. Exit code 1 if one survives, or if a test
fails without a mutation.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600  # seconds; a mutation that makes its test hang longer is killed, too

# A test, below it the mutations that it must notice: FILE: text that occurs in it exactly once => what replaces it.
TABLE = r"""
test_run.py::test_changed_data_files_are_noticed_on_resume
    train.py: evaluation.accuracy > state.best => evaluation.accuracy >= state.best
test_run.py::test_warmup_and_gradient_clipping
    train.py:  and totals.norm > config.max_grad_norm: => :
    train.py: (self.state.step + 1) / max(config => self.state.step / max(config
test_run.py::test_save_every_steps_leaves_the_last_step_of_an_epoch_to_its_validation
    train.py:  and unfinished: => :
test_run.py::test_links_that_a_crash_left_behind_are_set_back
    train.py: set_links(self.checkpoint, state.best_epoch) => None
test_train.py::test_filler_problems_are_in_no_count_or_message
    train.py: , "idx": -1} for => } for
    train.py:  if i >= 0]) => ])
    train.py:  if batch["idx"][0] >= 0) => )
components/test_parallelize.py::test_ranks_and_micro_batches_match_one_large_batch[2-8-1-ddp]
    train.py: (loss * self.processes.world_size).backward() => loss.backward()
components/test_parallelize.py::test_ranks_and_micro_batches_match_one_large_batch[2-2-4-fsdp]
    train.py: math.hypot(*norms) => norms[0]
test_run.py::test_reset_optimizer_at_stage_switch[True-steps1-True]
    train.py: entered, state.stage = state.stage != stage => entered, state.stage = state.stage < stage - 1
test_run.py::test_two_ranks_match_one_with_twice_the_batch[ddp-4-1]
    run.py: set_seed(config.seed, processes.rank) => set_seed(config.seed, 0)
test_evaluate.py::test_signal_ends_a_validation_after_its_batch
    evaluate.py: if self.stop.signal: => if False:
test_evaluate.py::test_answer_comparison_ignores_commas_and_whitespace
    evaluate.py: answer.replace(",", "") => answer
test_evaluate.py::test_extract_answer_returns_text_after_last_hash
    evaluate.py: normalize(text.split("#")[-1]) => normalize(text.split("#")[1])
test_evaluate.py::test_validation_loss_is_mean_over_supervised_tokens
    evaluate.py: loss.double() * supervised => loss.double()
test_evaluate.py::test_until_eos_cuts_after_first_eos
    evaluate.py: tokens[: tokens.index(eos) + 1] => tokens[: tokens.index(eos)]
test_coconut.py::test_loss_and_gradients_match_oracle[scattered-gpt2]
    coconut.py: hidden[-1][:, -1:], len => hidden[-1][:, :1], len
test_coconut.py::test_generation_stops_at_max_position_embeddings
    coconut.py: (position >= limit) => (position > limit)
test_coconut.py::test_batched_generation_matches_single_rows_and_oracle[mixed_left_padded-gpt2]
    coconut.py: (columns * attention_mask).argmax(1) => attention_mask.sum(1) - 1
test_coconut.py::test_finished_rows_are_dropped_from_the_decoding_batch
    coconut.py: 2 * len(unfinished) <= len(rows) => 2 * len(unfinished) < len(rows)
test_coconut.py::test_loss_and_gradients_match_oracle[thoughts_3-gpt2]
    coconut.py: labels[rows, columns + 1]) => labels[rows, columns])
    components/kv_cache.py: gradient[..., : ctx.start, :] if ctx.start else None => None
test_coconut.py::test_loss_and_gradients_match_oracle[mixed-gpt2]
    coconut.py: torch.where(is_latent[:, start, None, None], thought, columns[:, :1]) => thought
test_dataset.py::test_sequences_of_every_method_and_stage
    curriculum.py: stage >= last_stage(config) or => stage > last_stage(config) or
    curriculum.py: thoughts = min(thoughts, most) => thoughts = most
test_dataset.py::test_removed_tokens_of_icot_at_all_positions_equal_exact_fractions
    curriculum.py: int(round(progress * config.remove_per_epoch, 9)) => int(progress * config.remove_per_epoch)
test_run.py::test_length_check_leaves_out_stages_that_resume_skips
    curriculum.py: range(config.resume, config.num_epochs) => range(config.num_epochs)
test_dataset.py::test_uniform_prob_does_not_affect_icot
    dataset.py: steps == "by stage" and configs.uniform_prob and => configs.uniform_prob and
test_dataset.py::test_collator_aligns_first_latent_tokens
    dataset.py: 0 if first is None else column - first => column - (first or 0)
test_dataset.py::test_check_lengths_allows_exactly_max_positions
    dataset.py: too_long = tokens > limit => too_long = tokens >= limit
test_dataset.py::test_shuffle_is_a_permutation_seeded_by_seed_and_epoch
    dataset.py: f"order {configs.seed} {epoch}" => f"order {configs.seed}"
test_dataset.py::test_ranks_cover_each_example_once_in_equally_many_micro_batches
    dataset.py: step[rank::world_size] => step[rank * len(step) // world_size :]
test_config.py::test_a_mistake_in_the_config_is_refused
    config.py: config.resume >= config.num_epochs => config.resume > config.num_epochs
test_run.py::test_checkpoint_that_exists_is_not_written_again
    components/checkpoint.py: if processes.run_on_rank0(lambda: verify_manifest(directory)) is not None: => if True:
test_run.py::test_resume_after_crash_is_bit_identical[4-checkpoint_0_step_3]
    components/checkpoint.py: torch.set_rng_state(states[processes.rank]["cpu"]) => None
    components/metrics.py: keep_bytes) + 1  # => keep_bytes) + 2  #
test_run.py::test_changing_other_keys_is_allowed_on_resume
    components/checkpoint.py: if key not in FREE_KEYS and saved => if saved
test_run.py::test_optimizer_state_is_deleted_only_after_its_manifest_says_so
    components/checkpoint_manager.py: = read_manifest => = (checkpoint / OPTIMIZER_STATE).unlink() or read_manifest
test_run.py::test_checkpoints_are_listed_newest_first
    components/checkpoint_manager.py: (int(pair[0][1]), int(pair[0][2] or 0)) => pair[1].name
test_run.py::test_newest_two_checkpoints_keep_optimizer_state[options0-states0]
    components/checkpoint_manager.py: retained[OPTIMIZER_STATES_KEPT:] => retained[1:]
components/test_custom_generate.py::test_first_token_logits_match_coconut_forward
    components/custom_generate.py: attention_mask.cumsum(1) - 1 => torch.ones_like(attention_mask).cumsum(1) - 1
components/test_tokenization.py::test_the_first_process_of_each_node_tokenizes_and_all_raise_its_error
    components/distributed.py: error or next(iter(errors), None) => error
components/test_pretrained.py::test_cot_checkpoint_with_spare_rows_initializes_coconut_from_folder_or_hub
    components/export.py: if revision and not os.path.isdir(folder): => if False:
test_evaluate.py::test_atomic_directory_is_on_the_disk_before_it_is_renamed
    components/files.py: fsync(path) => None
test_run.py::test_loading_a_damaged_checkpoint_is_refused[model_id]
    components/files.py: file_digest(path) != expected => path.stat().st_size != expected["bytes"]
test_coconut.py::test_loss_and_gradients_match_oracle[mixed_left_padded-gpt2]
    components/kv_cache.py:  | (keys == queries) =>
test_run.py::test_tensorboard_hides_exactly_the_steps_that_a_resumed_run_repeats
    components/metrics.py: purge_step=steps + 1 => purge_step=steps
components/test_parallelize.py::test_number_of_collectives_per_step[fsdp]
    components/parallelize.py: unit.unshard() => None
test_run.py::test_directory_is_claimed_before_it_is_read
    components/run_directory.py: fcntl.LOCK_EX | fcntl.LOCK_NB => fcntl.LOCK_SH | fcntl.LOCK_NB
components/test_tokenization.py::test_other_content_tokenizer_size_or_rules_miss_the_cache
    components/tokenization.py: *how, tokenizer.eos_token_id, backend => *how, backend
components/test_tokenization.py::test_temporary_files_stay_until_every_process_has_opened_them
    components/tokenization.py: processes.all_gather_object(None) => None
"""


def mutations() -> list[tuple[str, str, str, str]]:
    """Return the rows of TABLE: test, file, old text, new text."""
    rows, test = [], ""
    for line in TABLE.strip().splitlines():
        if match := re.fullmatch(r"    (\S+): (.+) => ?(.*)", line):
            rows.append((test, *match.groups()))
        else:
            test = line
    return rows


def passes(tests: list[str], tree: Path) -> bool:
    """Run tests in a copy of the tree, in a forked process; return whether all pass."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tests, tree))
    process.start()
    process.join(LIMIT * len(tests))
    process.kill()
    process.join()
    if process.exitcode not in (0, 1, -9):  # pytest's codes for passed and failed tests; killed above
        raise SystemExit(f"{' '.join(tests)}: pytest exited with code {process.exitcode}")
    return process.exitcode == 0


def run_tests(tests: list[str], tree: Path) -> None:
    """Run tests in this process, silently."""
    import datasets
    import pytest

    datasets.config.HF_DATASETS_CACHE = tempfile.mkdtemp(dir=tree)  # tests/conftest.py sets it too late
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.chdir(tree)
    sys.exit(int(pytest.main(["-x", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)])))


def main(words: list[str]) -> int:
    """Run the tests without a mutation, then each of them with its mutations."""
    chosen = [row for row in mutations() if not words or any(word in part for part in row for word in words)]
    sys.path = [path for path in sys.path if Path(path).resolve() != ROOT / "tests" / "stress"]
    sys.dont_write_bytecode = True  # a mutation can leave a file's size and time as they were
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
    import datasets  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "checkpoints", "results")
        shutil.copytree(ROOT, tree, ignore=ignored)
        if not passes(list(dict.fromkeys(test for test, *_ in chosen)), tree):
            raise SystemExit("a test fails without a mutation")
        for number, (test, file, old, new) in enumerate(chosen, 1):
            path, text = tree / file, (tree / file).read_text(encoding="utf-8")
            path.write_text(text.replace(old, new), encoding="utf-8")
            lives = passes([test], tree)
            path.write_text(text, encoding="utf-8")
            survived += lives
            print(f"{number:2} {'SURVIVED' if lives else 'killed'}  {file}: {old} => {new}   {test}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations killed")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
