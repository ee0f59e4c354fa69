"""What the fake GPU cannot do, by the names of the tests that need it: they are skipped, and say so."""

import os

import pytest

REASONS = {
    "test_a_compiled_module": "the fake GPU has no inductor",
    "test_a_compiled_model": "the fake GPU has no inductor",
    "test_reduce_overhead_sees_the_next_assignment": "the fake GPU has no inductor",
    "test_gradients_are_those_of_the_unfolded_forward": "the fake GPU has no backward pass",
    "test_long_sides": "the interpreter takes seconds for it, and does so on the CPU too",
    "test_same_bits_from_run_to_run": "the interpreter takes seconds for it, and does so on the CPU too",
    "test_hundreds_of_tensors_in_one_launch": "the interpreter takes seconds for it, and does so on the CPU too",
    "test_kinds_on_the_device": "the interpreter takes minutes for it",
    "test_refuses_cpu_weights": "the fake GPU interprets kernels, which run on the CPU too",
}


def skip(items: list[pytest.Item]) -> None:
    """Skip them, where there is a fake GPU."""
    for item in items if "FASTLOCK_FAKE_GPU" in os.environ else []:
        if reason := REASONS.get(item.name.partition("[")[0]):
            item.add_marker(pytest.mark.skip(reason=reason))
