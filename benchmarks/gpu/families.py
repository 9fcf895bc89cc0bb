"""The checks by what they are about. Each family runs in a process of its own, and lets its suites be timed or not."""

from __future__ import annotations

from benchmarks.gpu import checks, whole_checks
from benchmarks.gpu.checks import Check

FAMILIES: dict[str, tuple[Check, ...]] = {
    "subspace": (
        checks.update_equals_the_textbook,
        checks.update_repeats_to_the_bit,
        checks.scale_zero_writes_nothing,
        checks.norms_that_are_not_finite_skip_the_update,
    ),
    "neurons": (checks.neuron_operators_err_no_more_than_eager,),
    "cosine": (checks.cosine_equals_fp64,),
    "logps": (checks.logps_err_no_more_than_eager,),
    "head": (
        whole_checks.linear_logps_err_no_more_than_the_models_own,
        whole_checks.a_head_with_all_its_options_equals_fp64_and_repeats_to_the_bit,
        whole_checks.a_preference_loss_by_pairs_equals_fp64,
    ),
    "updates": (whole_checks.an_update_is_the_textbooks,),
    "streams": (
        checks.nothing_waits_for_the_device,
        checks.another_stream_sees_its_own_order,
        checks.a_captured_update_replays_on_new_gradients,
        checks.a_device_that_is_not_the_current_one_is_served,
    ),
    "large": (checks.offsets_beyond_32_bits_are_reached,),
    "compiled": (checks.operators_pass_opcheck, checks.a_compiled_forward_is_one_graph),
}
#: Those that have no reason to differ where there is no GPU.
ANYWHERE: tuple[Check, ...] = (
    *checks.ANYWHERE,
    whole_checks.linear_logps_err_no_more_than_the_models_own,
    whole_checks.a_head_with_all_its_options_equals_fp64_and_repeats_to_the_bit,
    whole_checks.a_preference_loss_by_pairs_equals_fp64,
    whole_checks.an_update_is_the_textbooks,
)
#: Small, and together through every kernel: what compute-sanitizer is to watch.
SANITIZED: tuple[Check, ...] = (
    *checks.SANITIZED,
    whole_checks.an_update_is_the_textbooks,
    whole_checks.a_preference_loss_by_pairs_equals_fp64,
    whole_checks.a_head_with_all_its_options_equals_fp64_and_repeats_to_the_bit,
)
