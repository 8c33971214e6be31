# SPDX-License-Identifier: Apache-2.0
"""Operations on the device give what they give on the host, whenever they run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from bedplate.errors import BackendUnavailableError, UnsupportedError
from bedplate_sim.races import RaceError
from bedplate_sim.tensor import SimTensor


def numbers(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def in_place(x, y):
    x[1, 2:] = 7
    x[:, 0].mul_(2).add_(y[:, 0])
    x.index_copy_(0, torch.tensor([2, 0], device=x.device), y[:2])
    x[torch.tensor([1], device=x.device), torch.tensor([3], device=x.device)] = 5
    return x


def room_was_made(x, y):
    out, values = x.new_empty(0), x.new_empty(0)
    places = torch.empty(0, dtype=torch.int64, device=x.device)
    torch.mul(x, y[:3, :1], out=out)
    torch.max(x, -1, out=(values, places))
    return torch.cat([out[0], values, places.float()])


def grown(x, _y):
    out = torch.empty_like(x)
    torch.mul(x, 2, out=out)
    torch._foreach_copy_([out[:1]], [x[1:2]])
    return out


OPERATIONS = {
    "arithmetic": lambda x, y: (x + y * 2 - 1) / y.abs().clamp(min=0.1),
    "product": lambda x, y: functional.linear(x, y, x[:, 0]),
    "softmax": lambda x, y: torch.softmax(x @ y.T, -1),
    "views": lambda x, y: x.T.reshape(2, -1)[:, 1:].expand(3, 2, -1).contiguous(),
    "transposed": lambda x, y: x.T + 1,
    "dtypes": lambda x, y: (x.to(torch.bfloat16) * y.bfloat16()).float().long(),
    "bits": lambda x, y: x.view(torch.int32) ^ y.view(torch.int32),
    "several results": lambda x, y: torch.cat([t.float() for t in x.max(-1)]),
    "in place": in_place,
    "given result": grown,
    "given result without room": room_was_made,
    "index": lambda x, y: x[torch.tensor([2, 0], device=x.device)],
    "index of the host": lambda x, y: x[torch.tensor([2, 0])],
    "values decide the shape": lambda x, y: x[x > 0],
    "positions of values": lambda x, y: (x > 0).nonzero(),
    "number of the host": lambda x, y: x * torch.tensor(3.0) + float(x[0, 0]),
    "factories": lambda x, y: torch.cat(
        [torch.arange(1, 7, 2, device=x.device), torch.full((2,), 4, device=x.device),
         torch.tensor([3, 4], device=x.device), x.new_zeros(2, dtype=torch.int64),
         torch.eye(3, 2, dtype=torch.int64, device=x.device).flatten()]
    ),
    "attention": lambda x, y: functional.scaled_dot_product_attention(
        x[None, None], y[None, None], y[None, None]
    ),
    "norm": lambda x, y: functional.rms_norm(x, (4,), y[0], 1e-6),
    "branch": lambda x, y: x if bool((x == x).all()) else y,
    "list": lambda x, y: torch.tensor(x[0].tolist()).to(x.device) + y[0],
    "copied": lambda x, y: copy.deepcopy(nn.Parameter(x, requires_grad=False)) + y,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(runtime, name):
    x, y = numbers(3, 4), numbers(4, 3).T.contiguous() + 1
    expected = OPERATIONS[name](x.clone(), y.clone())
    result = OPERATIONS[name](x.to(runtime.device), y.to(runtime.device))
    assert isinstance(result, SimTensor)
    assert result.device == runtime.device
    assert (result.shape, result.stride(), result.dtype) == (
        expected.shape, expected.stride(), expected.dtype,
    )  # fmt: skip
    torch.testing.assert_close(result.cpu(), expected, atol=1e-6, rtol=1e-6)


def test_nothing_runs_before_it_is_waited_for(lazy):
    x = numbers(3).to(lazy.device)
    y = x + 1
    assert lazy.simulated.home.done == 0
    lazy.synchronize()
    assert lazy.simulated.home.done == lazy.simulated.home.launched > 0
    assert torch.equal(y.backing, x.backing + 1)


def test_views_share_addresses_and_results_do_not(lazy):
    x = numbers(4, 4).to(lazy.device)
    assert x[1].data_ptr() == x.data_ptr() + 16
    assert x[1].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert (x + 0).data_ptr() != x.data_ptr()


def test_a_parameter_can_be_led_to_another_place(lazy):
    parameter = nn.Parameter(numbers(2, 4).to(lazy.device), requires_grad=False)
    merged = numbers(6, 4).to(lazy.device)
    parameter.data = merged.narrow(0, 2, 3)
    merged[2:].fill_(9)
    assert parameter.data_ptr() == merged.data_ptr() + 32
    assert isinstance(parameter, nn.Parameter)
    assert parameter.shape == (3, 4)
    assert parameter.sum().item() == 9 * 12


@pytest.mark.parametrize(
    ("dtype", "is_poison"),
    [
        (torch.float32, torch.isnan),
        (torch.bfloat16, torch.isnan),
        (torch.float16, torch.isnan),
        (torch.float64, torch.isnan),
        (torch.int64, lambda x: x > 2**62),
        (torch.int32, lambda x: x > 2**30),
    ],
)
def test_fresh_and_freed_memory_is_poisoned(runtime, dtype, is_poison):
    first = torch.empty(64, dtype=dtype, device=runtime.device)
    assert is_poison(first.cpu()).all()
    address = first.fill_(1).data_ptr()
    del first
    again = torch.empty(64, dtype=dtype, device=runtime.device)
    assert again.data_ptr() == address, "the cache gives it out again"
    assert is_poison(again.cpu()).all()


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3,), (1,)), ((0,), (1,)), ((2, 1), (1, 0)), ((2, 3), (1, 2)), ((), ())],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16])
def test_memory_of_any_shape_is_poisoned(lazy, shape, strides, dtype):
    x = torch.empty_strided(shape, strides, dtype=dtype, device=lazy.device).cpu()
    assert (
        (x != x).all() if dtype.is_floating_point else (x > torch.iinfo(dtype).max * 0.4).all()
    )


MISTAKES = {
    "another shape": (lambda x: x + x[:, :3], RuntimeError, "length 3"),
    "a copy that does not fit": (lambda x: x.copy_(x[:, :3]), RuntimeError, "expand"),
    "a tensor of the host": (lambda x: x + numbers(3, 4), UnsupportedError, "aten.add"),
    "a shape changed in place": (lambda x: x.unsqueeze_(0), UnsupportedError, "unsqueeze_"),
    "a given result of another shape": (lambda x: torch.mul(x, 2, out=x[0, :3].clone()),
                                        UnsupportedError, "aten.mul"),
    "no copy": (lambda x: x.numpy(), TypeError, ".cpu()"),
    "no device": (lambda x: torch.empty(1, device="privateuseone:9"), BackendUnavailableError,
                  "9"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_when_they_are_made(lazy, mistake):
    act, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words):
        act(numbers(3, 4).to(lazy.device))
    assert lazy.simulated.home.done == 0


WAITING = {
    "aten._local_scalar_dense": lambda x: x.sum().item(),
    "aten._to_copy": lambda x: x.cpu(),
    "aten.equal": lambda x: torch.equal(x, x),
    "aten.nonzero": lambda x: x.nonzero(),
    "aten.index": lambda x: x[x > 0],
    "aten.copy_": lambda x: torch.empty(3, 4).copy_(x, non_blocking=True),
}


def test_devices_are_not_mixed(take):
    first, second = take(0), take(1)
    x = numbers(2).to(first.device)
    for mix in (lambda: x + numbers(2).to(second.device), lambda: x.to(second.device)):
        with pytest.raises(UnsupportedError, match=r"\[0, 1\]"):
            mix()
    assert x.cpu().to(second.device).device.index == 1


@pytest.mark.parametrize("name", WAITING)
def test_host_reads_are_counted_or_refused_by_name(take, name):
    runtime = take(host_reads="refuse")
    x = numbers(3, 4).to(runtime.device)
    WAITING[name](x)
    assert any(name in why for why in runtime.simulated.waits)
    runtime.ready()
    with pytest.raises(RaceError, match=name):
        WAITING[name](x)


def test_a_seed_belongs_to_the_work_after_it(runtime):
    def draw():
        runtime.seed(3)
        return torch.rand(4, device=runtime.device)

    first, second = draw(), draw()
    assert torch.equal(first.cpu(), second.cpu())


def test_torch_does_not_take_it_for_an_accelerator(lazy):
    assert lazy.device.type == "privateuseone"
    assert not torch.accelerator.is_available()
