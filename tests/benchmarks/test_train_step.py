"""The count of what a training step launches on a GPU."""

from __future__ import annotations

import pytest

from benchmarks import train_step


def test_each_further_thought_launches_a_pass_of_one_column():
    counts = [train_step.count_launches(thoughts, layers=2) for thoughts in (0, 1, 2, 3)]
    assert counts[3].total() - counts[2].total() == counts[2].total() - counts[1].total()
    for counted, passes in zip(counts, (1, 2, 3, 4), strict=True):
        assert counted["_scaled_dot_product_efficient_attention"] == 2 * passes
        assert counted["native_layer_norm"] == (2 * 2 + 1) * passes
    parameters = 2 * 12 + 2 + 1  # those of the blocks and the final norm, and the positions
    assert counts[3]["add"] - counts[2]["add"] >= parameters  # a further gradient of each is added


@pytest.mark.parametrize("thoughts", [0, 2])
def test_profiled_launches_are_those_that_a_dispatch_mode_counts(thoughts):
    """A dispatch mode would turn compiled passes into eager ones, so those are counted from a profile."""
    args = train_step.parse(["--layers", "2", "--width", "64", "--bf16"])
    lm, batch = train_step.make_model(args).train(), train_step.make_batch(4, 32, thoughts, 16)

    def step():
        return train_step.run_step(train_step.ours, lm, batch, args)

    with train_step.Launches() as mode:
        step()
    assert train_step.profile_launches(step).total() == mode.counts.total()
