"""What is read from compiled programs, against texts written by hand and XLA's own counts."""

import jax
from jax import numpy as jnp
import pytest

from resnet_jax.distributed import batch_sharding, make_mesh, replicated
from resnet_jax.planning import hlo
from resnet_jax.planning.flops import matmul_flops, repeated_flops

# A fusion of 1000 cycles; a loop of five trips with one of 30 cycles and, inside it, a loop of three with one of 7.
LOOPS = """HloModule step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[8]{0:T(256)} negate(%p), backend_config={"window_config":{"estimated_cycles":"999999"}}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %small = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"7"}}
  %gradient = f32[8]{0} all-reduce(%small), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %gradient)
}

%inner_condition (state.1: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %bound = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

%outer_body (state.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.2 = (s32[], f32[8]{0}) parameter(0)
  %y = f32[8]{0} get-tuple-element(%state.2), index=1
  %middle = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"30"}}
  ROOT %inner = (s32[], f32[8]{0}) while(%state.2), condition=%inner_condition, body=%inner_body
}

%outer_condition (state.3: (s32[], f32[8])) -> pred[] {
  %state.3 = (s32[], f32[8]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %large = f32[8]{0} fusion(%w), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %first = (s32[], f32[8]{0}) tuple(%zero, %large)
  %outer = (s32[], f32[8]{0}) while(%first), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[8]{0} get-tuple-element(%outer), index=1
}
"""  # noqa: E501

# Four exchanges, of which two start here and end there: 400 and 2 x 16, 1000 each gathered from 250, 64 moved, 80 kept.
EXCHANGES = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattering (s: f32[80]) -> f32[20] {
  %s = f32[80]{0} parameter(0)
  ROOT %scattered = f32[20]{0} reduce-scatter(%s), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}

ENTRY %main (w: f32[100], v: bf16[8,1], g: u8[250], m: pred[64], s.1: f32[80]) -> f32[100] {
  %w = f32[100]{0} parameter(0)
  %v = bf16[8,1]{1,0:T(8,128)(2,1)} parameter(1)
  %g = u8[250]{0} parameter(2)
  %m = pred[64]{0} parameter(3)
  %s.1 = f32[80]{0} parameter(4)
  %both = (f32[100]{0:T(128)}, /*index=1*/bf16[8,1]{1,0:T(8,128)(2,1)S(1)}, bf16[8,1]{1,0}) all-reduce(%w, %v, %v), to_apply=%add
  %gather = (u8[250]{0}, u8[1000]{0}) all-gather-start(%g), dimensions={0}
  %gathered = u8[1000]{0} all-gather-done(%gather)
  %move = (pred[64]{0}, pred[64]{0}) collective-permute-start(%m), source_target_pairs={{0,1}}
  %moved = pred[64]{0} collective-permute-done(%move)
  %scatter = ((f32[80]{0}), f32[20]{0}) async-start(%s.1), calls=%scattering
  %kept = f32[20]{0} async-done(%scatter), calls=%scattering
  ROOT %result = f32[100]{0} get-tuple-element(%both), index=0
}
"""  # noqa: E501


def test_what_is_in_loops_counts_as_often_as_they_run():
    program = hlo.parse(LOOPS)
    assert program.entry == "main"
    assert hlo.estimated_cycles(program) == 1000 + 5 * (30 + 3 * 7)
    assert hlo.collectives(program) == [hlo.Collective("all-reduce", 32, 15)]


def test_a_program_without_estimates_has_no_cycles():
    assert hlo.estimated_cycles(hlo.parse(EXCHANGES)) is None


def test_exchanges_are_counted_once_with_the_bytes_they_move():
    found = {(c.kind, c.bytes, c.times) for c in hlo.collectives(hlo.parse(EXCHANGES))}
    assert found == {
        ("all-reduce", 400 + 2 * 16, 1),
        ("all-gather", 1000, 1),
        ("collective-permute", 64, 1),
        ("reduce-scatter", 320, 1),
    }


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30),
        ("(s32[2]{0}, (pred[7], f8e4m3fn[4]), token[])", 19),
        ("u4[5]", 3),
        ("f64[<=10]", 80),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert hlo.shape_bytes(shape) == size


def lowered(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def convolve(images, kernel, strides=(1, 1), padding="VALID", groups=1, **dilations):
    return jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        **dilations,
    )  # fmt: skip


def loss(kernel, images):
    return convolve(images, kernel, (2, 1), ((1, 1), (3, 0))).sum()


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: a @ b, [(5, 7), (7, 3)]),
        (lambda a, b: jnp.einsum("bik,bjk->bij", a, b), [(2, 5, 7), (2, 3, 7)]),
        (convolve, [(2, 9, 8, 3), (3, 3, 3, 4)]),
        (lambda x, k: convolve(x, k, (2, 2), ((3, 3), (3, 3))), [(2, 15, 14, 3), (7, 7, 3, 4)]),
        (lambda x, k: convolve(x, k, groups=2, rhs_dilation=(2, 1)), [(2, 9, 8, 6), (3, 3, 3, 4)]),
        (lambda k, x: jax.grad(loss)(k, x), [(3, 3, 3, 4), (2, 10, 9, 3)]),  # Dilated by the stride.
        (lambda k, x: jax.grad(loss, 1)(k, x), [(3, 3, 3, 4), (2, 10, 9, 3)]),
    ],
)
def test_products_are_counted_as_xla_counts_them(function, shapes):
    step = lowered(function, *shapes)
    program = hlo.parse(step.as_text(dialect="hlo"))
    counted = sum(matmul_flops(i, computation) * times for i, computation, times in hlo.instructions(program))
    others = 20 * sum(jnp.zeros(shape).size for shape in shapes)  # Sums and the like are XLA's too.
    assert counted > 0
    assert 0 <= step.cost_analysis()["flops"] - counted < others


def test_a_compiled_loop_counts_as_its_trips():
    mesh = make_mesh(jax.devices()[:4])
    w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=replicated(mesh))
    x = jax.ShapeDtypeStruct((6, 64, 32), jnp.float32, sharding=batch_sharding(mesh, 1))

    def step(w, x):
        def body(w, part):
            # What the next trip multiplies by needs the sum over the devices: it can't wait until after the loop.
            return w - jax.grad(lambda w: ((part @ w) ** 2).mean())(w), None

        return jax.lax.scan(body, w, x)[0]

    with jax.set_mesh(mesh):
        program = hlo.parse(jax.jit(step).lower(w, x).compile().as_text())
    found = hlo.collectives(program)
    assert {collective.kind for collective in found} == {"all-reduce"}
    assert sum(collective.times for collective in found) == 6
    assert sum(collective.times * collective.bytes for collective in found) == 6 * 32 * 32 * 4
    # A device has 16 rows of each part, in two products.
    assert repeated_flops(program) == 5 * 2 * (2 * 16 * 32 * 32)
