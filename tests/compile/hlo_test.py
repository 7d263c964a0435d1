"""Reading a compiled program: loops multiply, kinds are told apart, FLOPs and bytes are XLA's where no loop is."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from scalr_jax.compile import hlo, hlo_cost, predict
from scalr_jax.runtime import sharding
from scalr_jax.runtime.chips import CHIPS
from tests.support.checks import present

# Two nested loops: the outer one's trips XLA knows, the inner one's stand in its condition, as on TPUs.
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[16,64]) -> f32[16,16] {
  %input = f32[16,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[16,64]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={16,16}
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%inner_condition (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %wrapped = pred[] fusion(%i, %limit), kind=kLoop, calls=%less
}

%inner_body (p.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %all-reduce.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) all-reduce(%x.1, %x.1), \
channel_id=1, replica_groups=mesh['axis_0'=4] {'axis_0'}, to_apply=%add, metadata={op_name="jit(step)/while/body/sum"}
  %y.1 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.1), index=0
  ROOT %out = (s32[], bf16[8,128]{1,0}) tuple(%i.1, %y.1)
}

%outer_body (p.2: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.2 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %start = s32[] constant(0)
  %copied = s32[] copy(%start)
  %x.2 = bf16[8,128]{1,0} get-tuple-element(%p.2), index=1
  %state = (s32[], bf16[8,128]{1,0}) tuple(%copied, %x.2)
  ROOT %while.2 = (s32[], bf16[8,128]{1,0}) while(%state), condition=%inner_condition, body=%inner_body
}

ENTRY %main (arg: f32[16,64], half: bf16[8,128]) -> f32[16,16] {
  %arg = f32[16,64]{1,0} parameter(0)
  %half = bf16[8,128]{1,0} parameter(1)
  %start.1 = s32[] constant(0)
  %state.1 = (s32[], bf16[8,128]{1,0}) tuple(%start.1, %half)
  %while.1 = (s32[], bf16[8,128]{1,0}) while(%state.1), condition=%inner_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %all-gather-start = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%half), dimensions={0}
  %all-gather-done = bf16[32,128]{1,0} all-gather-done(%all-gather-start)
  %after = token[] after-all()
  %send.1 = (f32[16,64]{1,0}, u32[], token[]) send(%arg, %after), is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %fusion.1 = f32[16,16]{1,0} fusion(%arg), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_loops_multiply_and_kinds_are_told_apart():
    program = hlo.parse(TEXT)
    found = hlo.collectives(program)
    assert hlo.summary(found) == {
        "all-gather": {"count": 1, "bytes": 32 * 128 * 2},
        "all-reduce": {"count": 5 * 3, "bytes": 5 * 3 * 2 * 8 * 128 * 2},
        hlo.BETWEEN_SLICES: {"count": 1, "bytes": 16 * 64 * 4},
        "reduce-scatter": {"count": 1, "bytes": 16 * 64 * 4},
    }
    assert [c.source for c in found if c.kind == "all-reduce"] == ["jit(step)/while/body/sum"]


def test_a_loop_whose_first_round_was_moved_before_it_runs_once_less():
    program = hlo.parse(TEXT.replace("%start = s32[] constant(0)", "%start = s32[] constant(1)"))
    assert hlo.summary(hlo.collectives(program))["all-reduce"]["count"] == 5 * 2


def test_a_loop_of_the_datas_trips_says_how_many_they_are_about():
    scoped = TEXT.replace("body=%inner_body", 'body=%inner_body, metadata={op_name="jit(step)/about_7_trips/while"}')
    assert hlo.summary(hlo.collectives(hlo.parse(scoped)))["all-reduce"]["count"] == 5 * 7


def test_a_loop_that_does_not_go_from_one_constant_to_another_is_refused():
    with pytest.raises(ValueError, match=r"while\.2 does not start at a constant"):
        hlo.collectives(hlo.parse(TEXT.replace("%copied = s32[] copy(%start)", "%copied = s32[] negate(%start)")))
    with pytest.raises(ValueError, match="does not count up"):
        hlo.collectives(hlo.parse(TEXT.replace("direction=LT", "direction=GT")))
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule jit_step")


def compiled(function, *shapes, **settings):
    return jax.jit(function, **settings).lower(*shapes).compile()


def array(*shape, **settings):
    return jax.ShapeDtypeStruct(shape, jnp.float32, **settings)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: a @ b, (array(64, 96), array(96, 32))),
        (lambda a, b: jnp.einsum("bthd,bshd->bhts", a, b), (array(3, 20, 4, 16), array(3, 24, 4, 16))),
        (
            lambda a, b: jax.lax.conv_general_dilated(a, b, (2, 1), ((1, 2), (0, 1)), lhs_dilation=(1, 2)),
            (array(2, 8, 17, 19), array(12, 8, 3, 5)),
        ),
    ],
)
def test_flops_are_those_of_xla(function, shapes):
    program = compiled(function, *shapes)
    assert hlo_cost.flops(hlo.parse(present(program.as_text()))) == pytest.approx(
        present(program.cost_analysis())["flops"], rel=0.01
    )


def test_bytes_are_those_of_xla_without_loops():
    program = compiled(lambda a, b: (jnp.tanh(a @ b) * 2).sum(1), array(512, 256), array(256, 512))
    expected = present(program.cost_analysis())["bytes accessed"]
    assert hlo_cost.hbm_bytes(hlo.parse(present(program.as_text()))) == pytest.approx(expected, rel=0.1)


def test_flops_and_bytes_of_a_loop_count_every_trip():
    """Twelve more layers in a loop cost the same, whether they are the 5th to the 16th or the 17th to the 28th."""

    def measured(depth):
        def run(weights, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

        program = hlo.parse(present(compiled(run, array(depth, 64, 64), array(256, 64)).as_text()))
        return hlo_cost.flops(program), hlo_cost.hbm_bytes(program)

    (flops4, bytes4), (flops16, bytes16), (flops28, bytes28) = (measured(depth) for depth in (4, 16, 28))
    assert [flops4, flops16, flops28] == [depth * 2 * 256 * 64 * 64 for depth in (4, 16, 28)]
    assert bytes28 - bytes16 == bytes16 - bytes4
    # A layer reads its weights, reads and writes x, and perhaps copies it and keeps the product once more.
    least = 4 * (64 * 64 + 2 * 256 * 64)
    assert least <= (bytes16 - bytes4) / 12 <= 4 * least


def test_the_gradient_of_scanned_layers_is_reduced_once():
    """On eight devices, five layers in a loop: the bytes of the all-reduces are those of the weights."""
    mesh = sharding.make_mesh(8, 1)

    def loss(weights, x):
        return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2).mean()

    weights = array(5, 64, 64, sharding=sharding.replicated(mesh))
    x = array(128, 64, sharding=NamedSharding(mesh, P("data")))
    found = hlo.collectives(hlo.parse(present(compiled(jax.grad(loss), weights, x).as_text())))
    summary = hlo.summary(found)
    assert set(summary) == {"all-reduce"}
    assert summary["all-reduce"]["bytes"] == pytest.approx(5 * 64 * 64 * 4, rel=0.01)


def test_what_a_sparse_core_reduces_counts():
    """TPU7x runs collectives beside the step, as a call that is started and waited for."""
    text = """HloModule jit_step, is_scheduled=true

%offloaded (p: f32[256,64]) -> f32[256,64] {
  %p = f32[256,64]{1,0} parameter(0)
  ROOT %all-reduce.1 = f32[256,64]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (x: f32[256,64]) -> f32[256,64] {
  %x = f32[256,64]{1,0} parameter(0)
  %all-reduce.2.call-start = ((f32[256,64]{1,0}), f32[256,64]{1,0}) call-start(%x), \
async_execution_thread="sparsecore", to_apply=%offloaded
  ROOT %all-reduce.2.call-done = f32[256,64]{1,0} call-done(%all-reduce.2.call-start)
}
"""
    assert hlo.summary(hlo.collectives(hlo.parse(text))) == {"all-reduce": {"count": 1, "bytes": 4 * 256 * 64}}


LIBRARIES = """HloModule jit_step

ENTRY %main (x: bf16[64,32], w: bf16[32,16], q: bf16[1,48,2,8]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,16]{1,0} parameter(1)
  %q = bf16[1,48,2,8]{3,2,1,0} parameter(2)
  %fwd = (bf16[1,2,48,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", \
metadata={op_name="jit(step)/Student/attention"}, backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["1", "2", "48", "48"]}, "max_seg_per_batch": 3}}
  %bwd = (bf16[1,2,48,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", metadata={op_name="jit(step)/Student/attention"}, backend_config=\
{"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"dimensions": ["1", "2", "48", "48"]}}}
  %gemm = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(step)/Student/head"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %y = bf16[64,16]{1,0} get-tuple-element(%gemm), index=0
}
"""


def test_products_and_attention_of_gpu_libraries_are_counted():
    """A product without its workspace; attention of three scenes in one table, and of one with its five products."""
    program = hlo.parse(LIBRARIES)
    pairs = 2 * 48 * 48 * 8
    assert hlo_cost.flops(program) == 2 * 64 * 32 * 16 + 4 * pairs // 3 + 10 * pairs
    found = predict.predict(program, CHIPS["h100"], 1, None)["categories"]
    assert found["products"]["bytes"] == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert found["attention"]["kernels"] == 2
    assert found["attention"]["bytes"] == 2 * 4 * 2 * 48 * 2 * 8


def test_a_prediction_is_the_slower_of_bytes_and_flops():
    """Twice the bandwidth halves what bytes decide; the share of a GPU's start stays."""
    program = hlo.parse(LIBRARIES)
    chip = CHIPS["h100"]
    at = lambda **given: predict.predict(program, chip._replace(**given), 1, None)["predicted_ms"]  # noqa: E731
    starts = 3 * 2e-3
    slow = at(bandwidth=1e6, flops=1e30)
    assert at(bandwidth=2e6, flops=1e30) - starts == pytest.approx((slow - starts) / 2)
    assert at(bandwidth=1e30, flops=1e30) == pytest.approx(starts)
    assert at(bandwidth=1e30, flops=1e6) > at(bandwidth=1e30, flops=2e6)
    work = predict.Useful(10**6, 3.0)
    found = predict.predict(program, chip, 2, work)
    assert found["scenes_per_s"] == pytest.approx(6 / (found["predicted_ms"] * 1e-3))
    assert found["predicted_mfu"] == pytest.approx(1e6 / (found["predicted_ms"] * 1e-3) / 989e12)


def test_the_tpu_compilers_cycles_count_every_trip():
    """The estimate is that of a v5p at 1.75 GHz; a GPU's program says none."""
    told = ', backend_config={"flag_configs":[],"estimated_cycles":"350","iteration_bounds":[]}'
    program = hlo.parse(TEXT.replace('metadata={op_name="jit(step)/while/body/sum"}', f"channel_id=2{told}"))
    assert hlo_cost.estimated_cycles(program) == 5 * 3 * 350
    assert predict.predict(program, CHIPS["v5p"], 1, None)["xla_ms"] == pytest.approx(3e-3)
    assert predict.predict(hlo.parse(LIBRARIES), CHIPS["h100"], 1, None)["xla_ms"] is None
