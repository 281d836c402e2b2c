import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fer_ray.config.model import model_config
from fer_ray.config.schema import OptimizerConfig, ScheduleConfig
from fer_ray.models import registry
from fer_ray.training import optimization

STEPS = 20


def rates(**settings) -> list[float]:
    """The learning rate of each step of ten epochs whose peak is 0.4."""
    schedule = ScheduleConfig(epochs=10, **settings)
    return [
        optimization.learning_rate(step, steps_per_epoch=STEPS, peak=0.4, schedule=schedule)
        for step in range(10 * STEPS)
    ]


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    found = rates(warmup_epochs=2)
    assert found[:40] == sorted(found[:40]) and found[40:] == sorted(found[40:], reverse=True)
    assert found[40] == pytest.approx(0.4) and max(found) == found[40]
    assert 0 < found[0] < 0.02 and found[-1] < 0.001
    assert found[120] == pytest.approx(0.4 * (1 + math.cos(math.pi / 2)) / 2)  # half-way


def test_without_warm_up_the_first_step_has_the_peak():
    assert rates(warmup_epochs=0)[0] == 0.4


def test_step_and_constant_keep_the_peak_and_step_divides_it_by_ten_twice():
    constant = rates(warmup_epochs=1, learning_rate_schedule="constant")
    assert constant[STEPS:] == [0.4] * 180 and constant[:STEPS] == sorted(constant[:STEPS])
    step = rates(warmup_epochs=1, learning_rate_schedule="step")
    assert step[STEPS:100] == [0.4] * 80
    assert step[100:150] == [pytest.approx(0.04)] * 50
    assert step[150:] == [pytest.approx(0.004)] * 50


def test_one_cycle_is_that_of_torch_up_to_its_end():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=10 * STEPS, final_div_factor=1e9, cycle_momentum=False
    )
    expected = []
    for _ in range(10 * STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()
    found = rates(warmup_epochs=0, learning_rate_schedule="one-cycle")
    # torch reaches its peak and its end a step earlier
    assert np.allclose(found[:60], expected[:60], atol=0.01)
    assert np.allclose(found, expected, atol=0.01) and max(found) == pytest.approx(0.4)
    longer = rates(warmup_epochs=5, learning_rate_schedule="one-cycle")
    assert np.argmax(longer) == 100


@given(st.lists(st.integers(0, 500), min_size=2, max_size=9).filter(any))
def test_class_weights_have_mean_one_over_the_images(counts):
    for kind in ("balanced", "capped"):
        weights = optimization.class_weights(counts, OptimizerConfig(class_weights=kind)).numpy()
        assert (weights * counts).sum() / sum(counts) == pytest.approx(1, rel=1e-4)
        assert np.isfinite(weights).all() and (weights[np.array(counts) == 0] == 0).all()
        assert kind == "balanced" or weights.max() <= OptimizerConfig().class_weight_cap * 1.0001


def test_class_weights_by_hand():
    balanced = optimization.class_weights([30, 10], OptimizerConfig(class_weights="balanced"))
    torch.testing.assert_close(balanced, torch.tensor([2 / 3, 2.0]))
    rare = OptimizerConfig(class_weights="capped", class_weight_cap=2.0)
    uncapped = optimization.class_weights([1000, 10], OptimizerConfig(class_weights="balanced"))
    capped = optimization.class_weights([1000, 10], rare)
    assert uncapped[1] / uncapped[0] == pytest.approx(100)
    torch.testing.assert_close(capped, torch.tensor([(1010 - 20) / 1000, 2.0]))
    assert optimization.class_weights([1, 2], OptimizerConfig()) is None


def test_the_loss_adds_up_over_the_images():
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    whole = optimization.summed_loss(logits, targets, label_smoothing=0.1, weights=None)
    parts = sum(
        optimization.summed_loss(
            logits[i : i + 2], targets[i : i + 2], label_smoothing=0.1, weights=None
        )
        for i in (0, 2, 4)
    )
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_leaves_biases_and_norms_alone(optimizer):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    config = OptimizerConfig(optimizer=optimizer, weight_decay=0.5, learning_rate=0.1)
    built = optimization.build_optimizer(model, config)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert changed == {"0.weight"}


def test_the_average_follows_by_hand_and_takes_batch_statistics_along():
    model = torch.nn.BatchNorm2d(1)
    average = optimization.WeightAverage(model, half_life=2)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(10.0)
        model.num_batches_tracked.fill_(4)
    average.update(step=10_000)  # long after the warm-up
    keep = 0.5**0.5  # two steps halve
    assert average.model.weight.item() == pytest.approx(keep * 1 + (1 - keep) * 3)
    assert average.model.running_mean.item() == pytest.approx((1 - keep) * 10)
    assert average.model.num_batches_tracked.item() == 4


def test_early_averages_forget_the_first_weights_soon():
    model = torch.nn.Linear(1, 1)
    average = optimization.WeightAverage(model, half_life=693)
    with torch.no_grad():
        model.weight.fill_(5.0)
    for step in range(20):
        average.update(step)
    assert average.model.weight.item() == pytest.approx(5.0, abs=0.01)


def test_decay_zero_follows_the_model():
    model = torch.nn.Linear(1, 1)
    average = optimization.WeightAverage(model, half_life=0)
    with torch.no_grad():
        model.weight.fill_(5.0)
    average.update(0)
    assert average.model.weight.item() == 5.0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_steps_are_those_of_plain_ones_in_any_memory_layout(name):
    """Fused kernels go through the memory of weights, gradients and state side by side."""
    config = OptimizerConfig(optimizer=name, learning_rate=0.05)
    networks = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = registry.build(model_config(width=4), num_classes=3, image_size=12)
        model = model.to(memory_format=torch.channels_last)
        optimizer = optimization.build_optimizer(model, config)
        for group in optimizer.param_groups:
            group["fused"] = fused
        for step in range(3):
            images = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(images.contiguous(memory_format=torch.channels_last)).square().sum().backward()
            optimizer.step()
        networks.append(model.state_dict())
    for key, value in networks[0].items():
        torch.testing.assert_close(value, networks[1][key], rtol=1e-3, atol=1e-4)
