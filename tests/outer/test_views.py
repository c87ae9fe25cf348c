"""Live views: in-place reading and writing of a fragment, replaced tensors, residuals below float32."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_diloco.errors import ConfigurationError, LocalProtocolError
from lightning_diloco.outer import Fragment, FragmentView, TensorSlice, plan_layout


def view_of(module, **options):
    layout = plan_layout(module, num_fragments=1, merge="rda", mean_patterns=(), **options)
    return FragmentView(module, layout.fragments[0])


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)


def snapshot(view):
    flat = torch.full((view.num_params,), torch.nan)
    view.copy_to(flat)
    return flat


def random(seed, size, scale=1.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


# --- reading and writing ------------------------------------------------------------------------------------------------------------


def test_a_snapshot_holds_the_slices_one_after_the_other_in_row_major_order():
    net = model()
    expected = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert torch.equal(snapshot(view_of(net)), expected)


def test_what_is_copied_in_is_what_is_read_back():
    net = model()
    view = view_of(net)
    values = random(1, view.num_params)
    view.copy_from(values)
    assert torch.equal(snapshot(view), values)
    assert torch.equal(net[0].weight.detach().reshape(-1), values[:30])


def test_a_difference_is_added_in_place_without_touching_autograd():
    net = model()
    view = view_of(net)
    pointers = [p.data_ptr() for p in net.parameters()]
    before, delta = snapshot(view), random(2, view.num_params)
    net(torch.ones(1, 6)).sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    view.add_(view.split(delta))
    assert torch.equal(snapshot(view), before + delta)
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert all(p.requires_grad and p.is_leaf and torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))


def test_adding_to_float32_parameters_is_one_in_place_operation():
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    net = model()
    view = view_of(net)
    delta_views = view.split(random(3, view.num_params))
    called = []
    with Log():
        view.add_(delta_views)
    assert called == ["aten._foreach_add_.List"]


def test_float64_parameters_take_the_difference_in_float64():
    net = model(torch.float64)
    view = view_of(net)
    exact = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert torch.equal(snapshot(view), exact.float())
    delta = random(4, view.num_params, scale=1e-12)
    view.add_(view.split(delta))
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in net.parameters()]), exact + delta.double())
    assert not view.has_residual


def test_a_slice_of_a_tensor_reads_and_writes_only_its_run():
    net = nn.Linear(4, 2, bias=False)
    parts = [TensorSlice(name="weight", dtype="float32", global_shape=(2, 4), offset=o, length=n) for o, n in ((0, 3), (3, 5))]
    view = FragmentView(net, Fragment(fragment_id=0, kind="parameters", slices=tuple(parts)))
    view.copy_from(torch.arange(8.0))
    view.add_([torch.zeros(3), torch.full((5,), 10.0)])
    assert net.weight.detach().reshape(-1).tolist() == [0, 1, 2, 13, 14, 15, 16, 17]


def test_buffers_are_viewed_as_buffers():
    net = nn.BatchNorm1d(3)
    part = TensorSlice(name="running_mean", dtype="float32", global_shape=(3,), offset=0, length=3, merge="mean")
    view = FragmentView(net, Fragment(fragment_id=0, kind="buffers", slices=(part,)))
    view.copy_from(torch.tensor([1.0, 2.0, 3.0]))
    assert net.running_mean.tolist() == [1.0, 2.0, 3.0]


# --- a module that changes ----------------------------------------------------------------------------------------------------------


def test_writing_into_the_data_is_seen():
    net = model()
    view = view_of(net)
    net[0].weight.data.fill_(3.0)
    assert torch.equal(snapshot(view)[:30], torch.full((30,), 3.0))


def replace_data(net):
    net[0].weight.data = torch.full((5, 6), 7.0)


def replace_parameter(net):
    net[0].weight = nn.Parameter(torch.full((5, 6), 7.0))


def replace_by_state_dict(net):
    net.load_state_dict({name: torch.full_like(t, 7.0) for name, t in net.state_dict().items()}, assign=True)


@pytest.mark.parametrize("replace", [replace_data, replace_parameter, replace_by_state_dict])
def test_a_replaced_tensor_is_found_again(replace):
    net = model()
    view = view_of(net)
    replace(net)
    assert torch.equal(snapshot(view)[:30], torch.full((30,), 7.0))
    view.add_(view.split(torch.ones(view.num_params)))
    assert torch.equal(net[0].weight.detach(), torch.full((5, 6), 8.0))


def test_an_inner_optimizer_and_the_view_work_on_the_same_memory():
    net = model()
    view = view_of(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(1, 6)).sum().backward()
    before = snapshot(view)
    optimizer.step()
    assert not torch.equal(snapshot(view), before)
    assert torch.equal(snapshot(view), torch.cat([p.detach().reshape(-1) for p in net.parameters()]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda net: net.to(torch.float64), r"'0\.weight'.*float64"),
        (lambda net: setattr(net[0], "weight", nn.Parameter(torch.zeros(5, 7))), r"'0\.weight'.*\(5, 7\)"),
        (lambda net: setattr(net[0].weight, "data", torch.zeros(6, 5).T), r"'0\.weight' is not contiguous"),
        (lambda net: net[0]._parameters.pop("weight"), r"'0\.weight'.*nothing"),
    ],
)
def test_a_tensor_that_no_longer_fits_is_refused_by_name(change, sentence):
    net = model()
    view = view_of(net)
    change(net)
    with pytest.raises(ConfigurationError, match=sentence):
        snapshot(view)


def test_a_parameter_that_is_not_contiguous_is_refused_at_once():
    net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    with pytest.raises(ConfigurationError, match=r"'weight' is not contiguous .*channels_last"):
        view_of(net)


def test_another_module_is_refused():
    layout = plan_layout(model(), num_fragments=1, merge="rda", mean_patterns=())
    with pytest.raises(ConfigurationError, match=r"'0\.weight': this module has no such tensor"):
        FragmentView(nn.Linear(6, 5), layout.fragments[0])


def test_a_difference_of_another_size_is_refused_and_never_broadcast():
    view = view_of(model())
    before = snapshot(view)
    views = view.split(torch.ones(view.num_params))
    for wrong in (views[:-1], [torch.ones(1)] * 4, [*views[:-1], views[-1].view(-1, 1)]):
        with pytest.raises(LocalProtocolError, match="do not fit"):
            view.add_(wrong)
    with pytest.raises(LocalProtocolError, match="flat fragment is a"):
        view.copy_from(torch.ones(1))
    assert torch.equal(snapshot(view), before)


# --- residuals ----------------------------------------------------------------------------------------------------------------------

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW)
def test_adoption_below_float32_is_the_rule_to_the_bit(dtype):
    net = model(dtype)
    view = view_of(net)
    assert view.has_residual
    theta, r = torch.cat([p.detach().reshape(-1) for p in net.parameters()]), torch.zeros(view.num_params)
    for step in range(20):
        delta = random(50 + step, view.num_params, scale=1e-3)
        view.add_(view.split(delta))
        exact = (theta.float() + r) + delta
        theta = exact.to(dtype)
        r = exact - theta.float()
        assert torch.equal(torch.cat([p.detach().reshape(-1) for p in net.parameters()]), theta)
        assert torch.equal(view.residual(), r)
        assert torch.equal(snapshot(view), exact)


@pytest.mark.parametrize("dtype", LOW)
def test_the_inner_step_between_two_adoptions_is_part_of_the_snapshot(dtype):
    net = model(dtype)
    view = view_of(net)
    view.add_(view.split(random(5, view.num_params, scale=1e-4)))
    r = view.residual()
    net[0].weight.data.mul_(2)
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert torch.equal(snapshot(view), theta.float() + r)


def progress_kept(dtype, *, with_residual):
    """Share of 64 small published differences that is still there at the end."""
    torch.manual_seed(1)
    net = nn.Linear(64, 64, bias=False).to(dtype)
    net.weight.data.copy_(torch.randn(64, 64) * 0.05)
    view = view_of(net)
    start, total = snapshot(view), torch.zeros(view.num_params, dtype=torch.float64)
    # A steady direction, an 800th of the weights' size a round: below half a bfloat16 spacing for most.
    direction = random(6, view.num_params, scale=0.05 / 800)
    for round_index in range(64):
        delta = direction + random(100 + round_index, view.num_params, scale=0.05 / 3200)
        if with_residual:
            view.add_(view.split(delta))
        else:
            net.weight.data.copy_((net.weight.data.float().view(-1) + delta).view(64, 64))
        total += delta.double()
    moved = snapshot(view).double() - start.double()
    return float((moved @ total) / (total @ total)), float((moved - total).abs().max())


def test_without_a_residual_a_third_of_small_progress_is_lost_to_rounding():
    kept, _ = progress_kept(torch.bfloat16, with_residual=False)
    assert 0.56 < kept < 0.67


def test_with_the_residual_all_of_it_is_kept():
    kept, error = progress_kept(torch.bfloat16, with_residual=True)
    assert kept == pytest.approx(1.0, abs=1e-6)
    # 64 float32 sums of values below 0.5.
    assert error < 64 * 2.0**-25


def test_the_residual_is_replaced_and_stays_below_half_a_spacing():
    net = model(torch.bfloat16)
    view = view_of(net)
    for step in range(200):
        view.add_(view.split(random(step, view.num_params, scale=1e-3)))
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()]).float()
    assert bool((view.residual().abs() <= theta.abs() * 2.0**-8).all())


def test_an_overwrite_sets_the_residual_to_zero():
    net = model(torch.bfloat16)
    view = view_of(net)
    view.add_(view.split(random(7, view.num_params)))
    assert view.residual().abs().max() > 0
    values = random(8, view.num_params)
    view.copy_from(values)
    assert torch.equal(view.residual(), torch.zeros(view.num_params))
    assert torch.equal(snapshot(view), values.to(torch.bfloat16).float())


def test_a_residual_can_be_saved_and_put_back():
    net = model()
    net[1].to(torch.bfloat16)
    view = view_of(net)
    view.add_(view.split(random(9, view.num_params)))
    saved, before = view.residual(), snapshot(view)
    assert saved.shape == (24,)
    again = view_of(net)
    again.load_residual(saved)
    assert torch.equal(snapshot(again), before)
    saved.zero_()
    assert torch.equal(snapshot(again), before)
    again.load_residual(None)
    assert torch.equal(again.residual(), torch.zeros(24))
    with pytest.raises(LocalProtocolError, match="residual is a"):
        again.load_residual(torch.zeros(25))


def test_a_float32_fragment_has_no_residual():
    view = view_of(model())
    assert view.residual() is None
    view.load_residual(None)
    with pytest.raises(LocalProtocolError, match="residual is a"):
        view.load_residual(torch.zeros(1))


# --- other devices ------------------------------------------------------------------------------------------------------------------


def test_a_difference_is_moved_to_the_device_of_the_parameters():
    # The meta device has shapes and no values: moving there works, moving back is torch's error.
    net = nn.Linear(3, 2, device="meta")
    view = view_of(net)
    view.add_(view.split(torch.ones(8)))
    with pytest.raises(NotImplementedError, match="meta"):
        snapshot(view)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@pytest.mark.parametrize("delta_device", ["cpu", "cuda"])
def test_a_gpu_gets_the_same_bits_as_the_host(dtype, delta_device):
    host, device = model(dtype), model(dtype).cuda()
    views = view_of(host), view_of(device)
    for step in range(5):
        delta = random(step, views[0].num_params, scale=1e-3)
        views[0].add_(views[0].split(delta))
        views[1].add_(views[1].split(delta.to(delta_device)))
    on_device = torch.zeros(views[1].num_params, device="cuda")
    views[1].copy_to(on_device)
    assert torch.equal(snapshot(views[1]), snapshot(views[0]))
    assert torch.equal(on_device.cpu(), snapshot(views[0]))
    values = random(9, views[0].num_params)
    for view in views:
        view.copy_from(values)
    assert torch.equal(snapshot(views[1]), snapshot(views[0]))
