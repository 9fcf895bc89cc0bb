"""Predicted times: how a disassembly is counted, what a multiprocessor holds, which bytes must be moved."""

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.binaries import floors, sass, table
from benchmarks.gpu import logps, neurons, subspace

# A branch on a dtype, as nvcc writes it: two loads of 16 bits on one side, of 32 on the other, then a common end.
BRANCHES = """
        /*0000*/                   LDC.U8 R2, c[0x0][R0+0x268] ;       /* 0x00009a0000027b82 */
                                                                       /* 0x000e700000000000 */
        /*0010*/              @!P0 BRA 0x60 ;                          /* 0x0000000000348947 */
        /*0020*/                   LDG.E.U16 R4, desc[UR6][R8.64] ;    /* 0x00009a0000027b82 */
        /*0030*/              @!P1 LDG.E.U16 R5, desc[UR6][R8.64+2] ;  /* 0x00009a0000027b82 */
        /*0040*/              @P2  BRA 0x90 ;                          /* 0x00009a0000027b82 */
        /*0050*/                   BRA 0x80 ;                          /* 0x00009a0000027b82 */
        /*0060*/                   LDG.E R4, desc[UR6][R8.64] ;        /* 0x00009a0000027b82 */
        /*0070*/                   LDG.E R5, desc[UR6][R8.64+4] ;      /* 0x00009a0000027b82 */
        /*0080*/                   STG.E desc[UR6][R8.64], R4 ;        /* 0x00009a0000027b82 */
        /*0090*/                   EXIT ;                              /* 0x00009a0000027b82 */
        /*00a0*/                   BRA 0xa0;                           /* 0x00009a0000027b82 */
"""
LOOP = """
        /*0000*/                   S2R R0, SR_TID.X ;                  /* 0x0000000000027919 */
        /*0010*/                   LDG.E.128 R4, desc[UR6][R8.64] ;    /* 0x00009a0000027b82 */
        /*0020*/                   FADD R1, R4, R5 ;                   /* 0x00009a0000027b82 */
        /*0030*/                   ISETP.GT.AND P0, PT, R0, 0x1, PT ;  /* 0x00009a0000027b82 */
        /*0040*/               @P0 BRA 0x10 ;                          /* 0x00009a0000027b82 */
        /*0050*/                   EXIT ;                              /* 0x00009a0000027b82 */
"""


def test_a_kernel_that_branches_is_counted_along_the_path_of_the_width():
    code = sass.instructions(BRANCHES)
    assert len(code) == 11
    # LDC, BRA, two loads, a branch that is not taken, BRA to the store, the store, EXIT: the way with most accesses.
    assert sass.count(code, 2) == sass.Count(8, 4)
    assert sass.count(code, 4) == sass.Count(6, 8)
    assert sass.count(code, 2).per_element(2) == 4
    with pytest.raises(ValueError, match="no global load of 16 bytes"):
        sass.count(code, 16)


def test_a_kernel_with_a_loop_is_counted_by_its_body():
    counted = sass.count(sass.instructions(LOOP), 16)
    assert counted == sass.Count(4, 16)
    assert counted.per_element(2) == 0.5


def test_a_program_of_a_short_row_is_charged_with_what_it_does_once():
    code = sass.instructions(LOOP)
    # Four of the loop in each of three steps, and the two around it; 16 bytes a step.
    assert sass.row(code, 16, 1, 3) == sass.Count(14, 48)
    with pytest.raises(ValueError, match="1 loops load 16 bytes at a time, 2 expected"):
        sass.row(code, 16, 2, 3)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "warps"),
    # As CUDA's occupancy calculator has them for compute capability 9.0.
    [
        (32, 0, 256, 64),
        (40, 0, 128, 48),
        (64, 0, 256, 32),
        (128, 0, 128, 16),
        (255, 0, 128, 8),
        (32, 100 * 1024, 256, 16),
    ],
)
def test_the_warps_that_a_multiprocessor_holds(registers, shared, threads, warps):
    assert floors.Binary("any", registers, shared, threads, []).occupancy() == warps


@pytest.mark.parametrize("sector", [32, 64])
def test_the_sectors_that_are_expected_are_those_that_random_columns_touch(sector):
    columns = sector // 2
    drawn = [torch.randperm(floors.INTERMEDIATE)[: floors.SELECTED] // columns for _ in range(300)]
    mean = sum(d.unique().numel() for d in drawn) / len(drawn)
    expected = floors._touched(sector, 2) / sector / floors.LAYERS / floors.HIDDEN
    assert mean == pytest.approx(expected, rel=0.01)


def test_every_prediction_belongs_to_a_case_that_the_gpu_runner_times():
    cases = {("gpu_subspace_update", size.name) for size in subspace.SIZES}
    cases |= {("gpu_sequence_logps", f"{' x '.join(map(str, shape))} bfloat16") for shape in logps.LOGITS}
    cases |= {
        ("gpu_neurons", f"{name}, {tokens} tokens, {hidden} x {count} of {width}, bfloat16")
        for tokens, hidden, width, count, _ in neurons.CASES
        for name in ("update", "gradient")
    }
    cases |= {
        (
            "gpu_linear_sequence_logps",
            f"{rows} x {tokens} x {vocabulary}, width {width}{', head frozen' if frozen else ''}, bfloat16",
        )
        for rows, tokens, vocabulary, width, frozen in logps.HEADS
    }
    for work in floors.works():
        assert (work.suite, work.case) in cases
        assert work.parts or work.moved
    size = subspace.SIZES[0]
    assert (size.layers, size.hidden, size.intermediate) == (floors.LAYERS, floors.HIDDEN, floors.INTERMEDIATE)
    assert round(size.intermediate * size.percent / 100) == floors.SELECTED


def test_the_page_has_a_line_for_each_prediction_and_says_what_was_measured():
    document = table.DOCUMENT.read_text()
    for work in floors.works():
        ends = [
            line
            for line in document.splitlines()
            if line.startswith(f"| {work.title} | {'together' if work.parts else 'passes'}")
        ]
        assert len(ends) == 1, work.title
        assert ends[0].endswith(f"| {floors.measured(work)} |"), "run python -m benchmarks.binaries.table"
