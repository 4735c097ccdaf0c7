"""The count of what a training step launches on a GPU."""

from __future__ import annotations

from benchmarks import train_step


def test_each_further_thought_launches_a_pass_of_one_column():
    counts = [train_step.count_launches(thoughts, layers=2) for thoughts in (0, 1, 2, 3)]
    assert counts[3].total() - counts[2].total() == counts[2].total() - counts[1].total()
    for counted, passes in zip(counts, (1, 2, 3, 4), strict=True):
        assert counted["_scaled_dot_product_efficient_attention"] == 2 * passes
        assert counted["native_layer_norm"] == (2 * 2 + 1) * passes
    parameters = 2 * 12 + 2 + 1  # those of the blocks and the final norm, and the positions
    assert counts[3]["add"] - counts[2]["add"] >= parameters  # a further gradient of each is added
