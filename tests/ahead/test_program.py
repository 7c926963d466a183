"""The parser of compiled programs against numbers worked out by hand."""

import pytest

from nanochat_jax.ahead.program import LAUNCH_SECS, Program, arrays, size

# A GPU whose kernels reach 1 FLOP or 1 byte a second: every second is counted.
TEXT = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_part (stack: bf16[8,100,10], at: s32[]) -> bf16[100,10] {
  %stack = bf16[8,100,10]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,100,10]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero)
  ROOT %flat = bf16[100,10]{1,0} bitcast(%one)
}

%fused_put (table: f32[1000], new: f32[10], at.1: s32[]) -> f32[1000] {
  %table = f32[1000]{0} parameter(0)
  %new = f32[10]{0} parameter(1)
  %at.1 = s32[] parameter(2)
  ROOT %put = f32[1000]{0} dynamic-update-slice(%table, %new, %at.1)
}

%body (state: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %state = (s32[], f32[1000]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %rows = f32[1000]{0} get-tuple-element(%state), index=1
  %doubled = f32[1000]{0} add(%rows, %rows)
  ROOT %next = (s32[], f32[1000]{0}) tuple(%i, %doubled)
}

%condition (state.1: (s32[], f32[1000])) -> pred[] {
  %state.1 = (s32[], f32[1000]{0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

%short (x: f32[1000]) -> f32[1000] {
  ROOT %x = f32[1000]{0} parameter(0)
}

%long (y: f32[1000]) -> f32[1000] {
  %y = f32[1000]{0} parameter(0)
  ROOT %minus = f32[1000]{0} negate(%y)
}

ENTRY %main (w: bf16[8,100,10], x.1: bf16[20,100], n: s32[], t: f32[1000], p: pred[]) -> f32[1000] {
  %w = bf16[8,100,10]{2,1,0} parameter(0)
  %x.1 = bf16[20,100]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %t = f32[1000]{0} parameter(3)
  %p = pred[] parameter(4)
  %start = (f32[1000]{0}, f32[8000]{0}) all-gather-start(%t), dimensions={0}
  %part_fusion = bf16[100,10]{1,0} fusion(%w, %n), kind=kLoop, calls=%fused_part
  %gathered = f32[8000]{0} all-gather-done(%start)
  %product = (bf16[20,10]{1,0}, s8[4096]{0}) custom-call(%x.1, /*index=1*/%part_fusion), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %summed = f32[1000]{0} all-reduce(%t), to_apply=%add
  %few = f32[10]{0} slice(%gathered), slice={[0:10]}
  %put_fusion = f32[1000]{0} fusion(%summed, %few, %n), kind=kLoop, calls=%fused_put
  %loop.0 = (s32[], f32[1000]{0}) tuple(%n, %put_fusion)
  %known = (s32[], f32[1000]{0}) while(%loop.0), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (s32[], f32[1000]{0}) while(%known), condition=%condition, body=%body
  %last = f32[1000]{0} get-tuple-element(%unknown), index=1
  ROOT %chosen = f32[1000]{0} conditional(%p, %last, %last), true_computation=%short, \
false_computation=%long
}
"""


@pytest.fixture(scope="module")
def program():
    return Program(TEXT, peak_flops=1.0, bandwidth=1.0)


def test_sizes_of_shapes():
    assert size("(bf16[2,3]{1,0}, s4[8]{0}, pred[])") == 12 + 4 + 1
    assert arrays("f8e4m3fn[16,32]{0,1}") == [("f8e4m3fn", [16, 32])]


def test_what_kernels_move(program):
    """A slice costs what it takes out; what is put into a table, twice its own size; a library's
    working memory, nothing."""
    moved = program.work().bytes
    assert moved["products bf16"] == 2 * (20 * 100 + 100 * 10 + 20 * 10)
    assert moved["updates in place"] == 2 * 4 * 10 + 4
    taken, a_slice = 2 * 2 * 1000 + 4, 2 * 4 * 10
    loops = (5 + 1) * 2 * 4 * 1000 + (5 + 1) * 4 * 1000  # add reads two arguments
    assert moved["element by element"] == taken + a_slice + loops + 2 * 4 * 1000


def test_kernels_are_counted_as_often_as_they_run(program):
    work = program.work()
    assert work.kernels["products bf16"] == work.kernels["updates in place"] == 1
    assert work.kernels["element by element"] == 2 + 5 + 1 + 1
    assert work.stops == {"while": 1, "conditional": 1}
    assert list(program.loops()) == [("body", 5), ("body", None)]
    assert program.work("body").kernels == {"element by element": 1}


def test_what_is_sent_and_whether_others_run_meanwhile(program):
    work = program.work()
    assert work.sent == {"all-gather": 32_000, "all-reduce": 2 * 4_000}
    assert work.collectives == {"all-gather": 1, "all-reduce": 1}
    assert work.beside == {"all-gather": pytest.approx((2 * 2 * 1000 + 4) / 0.85)}


def test_seconds_are_those_of_products_or_of_bytes_whichever_is_more():
    fast_memory = Program(TEXT, peak_flops=1.0, bandwidth=1e30).work().secs
    assert fast_memory["products bf16"] == pytest.approx(2 * 20 * 100 * 10 / 0.67)
    assert fast_memory["updates in place"] == LAUNCH_SECS
    slow_memory = Program(TEXT, peak_flops=1e30, bandwidth=1.0).work().secs
    assert slow_memory["products bf16"] == pytest.approx(6_400 / 0.85)


def test_products_in_batches_and_attention():
    """2 B M N K FLOPs; the lower half of the scores in causal attention, or what a window leaves of
    it; 2.5 times that back."""
    lines = """\
ENTRY %main (q: bf16[4,64,16,8], r: bf16[4,8,16]) -> bf16[4,64,16,8] {
  %q = bf16[4,64,16,8]{3,2,1,0} parameter(0)
  %r = f8e4m3fn[4,8,16]{2,1,0} parameter(1)
  %s = f8e4m3fn[4,16,8]{2,1,0} parameter(2)
  %batched = f32[4,8,8]{2,1,0} custom-call(%r, %s), custom_call_target="__cublas$lt$matmul$f8", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":["0"]}}}
  %there = (bf16[4,64,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %back = (bf16[4,64,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"sliding_window_length": 16}
}
"""
    secs = Program(lines, peak_flops=1.0, bandwidth=1e30).work().secs
    assert secs["products f8e4m3fn"] == pytest.approx(2 * 4 * 8 * 8 * 16 / (2 * 0.67))
    assert secs["attention forward"] == pytest.approx(2 * 4 * 16 * 8 * 64 * 64 / 0.55)
    assert secs["attention backward"] == pytest.approx(10 * 4 * 16 * 8 * 16 * (64 - 8) / 0.45)
