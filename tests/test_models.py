import pytest
import torch

from fer_ray.config.model import model_config
from fer_ray.config.registries import MODELS
from fer_ray.errors import UserError
from fer_ray.models import registry


@pytest.mark.parametrize("name", MODELS.names)
@pytest.mark.parametrize(("size", "classes"), [(48, 7), (32, 3)])
def test_every_model_takes_grey_images_and_gives_a_logit_a_class(name, size, classes):
    model = registry.build(model_config(name=name), num_classes=classes, image_size=size).eval()
    assert model(torch.rand(2, 1, size, size)).shape == (2, classes)


def test_costs_by_hand():
    """Multiply-adds of sequential_cnn at 8 pixels, convolution by convolution."""
    model = registry.build(model_config(name="sequential_cnn"), num_classes=7, image_size=8)
    convolutions = 8 * 8 * 9 * 32 + 4 * 4 * 9 * 32 * 64 + 2 * 2 * 9 * 64 * 128
    cost = registry.cost(model, 8)
    assert cost.multiply_adds == convolutions + 128 * 128 + 128 * 7
    weights = 9 * 32 + 32 + 9 * 32 * 64 + 64 + 9 * 64 * 128 + 128
    assert cost.parameters == weights + 128 * 128 + 128 + 128 * 7 + 7


def test_the_table_has_every_model_and_setting_and_full_costs_more_than_small():
    table = {(name, size): cost for name, size, cost in registry.variants()}
    for name in MODELS:
        assert any(title.startswith(name) for title, _ in table)
    small, full = table["custom_cnn (small)", 48], table["custom_cnn (full)", 48]
    assert small.parameters < full.parameters and small.multiply_adds < full.multiply_adds


def test_width_and_depth_override_the_setting():
    def count(**settings):
        model = registry.build(model_config(**settings), num_classes=7, image_size=48)
        return registry.cost(model, 48).parameters

    assert count(width=32, depth=1) == count(setting="small")
    assert count(width=16) < count() < count(depth=2)


def test_the_hidden_head_adds_a_layer():
    plain = registry.build(model_config(name="efficientnet_b2"), num_classes=7, image_size=48)
    hidden = registry.build(
        model_config(name="efficientnet_b2", head="hidden"), num_classes=7, image_size=48
    )
    linear = [m for m in hidden.classifier if isinstance(m, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [256, 7]
    assert len([m for m in plain.classifier if isinstance(m, torch.nn.Linear)]) == 1


def test_depthwise_gradients_of_efficientnet_are_in_proportion_to_their_weights():
    """As torchvision initializes them, one step of AdamW at 0.001 moves them by a tenth."""
    torch.manual_seed(0)
    config = model_config(name="efficientnet_b2", stochastic_depth=0.0)
    model = registry.build(config, num_classes=7, image_size=48)
    torch.nn.functional.cross_entropy(
        model(torch.randn(16, 1, 48, 48)), torch.arange(16) % 7
    ).backward()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            expected = (2 / module.kernel_size[0] ** 2) ** 0.5
            assert 0.8 * expected < module.weight.std() < 1.2 * expected
            assert module.weight.grad.norm() < 2 * module.weight.norm()


def test_stochastic_depth_is_a_setting():
    from torchvision.ops import StochasticDepth

    for options, most in (({}, 0.2), *(({"stochastic_depth": p}, p) for p in (0.0, 0.5))):
        config = model_config(name="efficientnet_b2", **options)
        model = registry.build(config, num_classes=7, image_size=48)
        found = [m.p for m in model.modules() if isinstance(m, StochasticDepth)]
        assert most * 0.9 <= max(found) <= most


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_weights_give_what_they_give_for_three_equal_channels(tmp_path, suffix):
    from safetensors.torch import save_file
    from torchvision.models import efficientnet_b2

    published = efficientnet_b2().eval()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(published.state_dict(), path)
    else:
        save_file(published.state_dict(), path)
    config = model_config(name="efficientnet_b2", weights=str(path))
    model = registry.build(config, num_classes=7, image_size=64).eval()
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        expected = published.features(x.expand(2, 3, 64, 64))
        torch.testing.assert_close(model.features(x), expected, rtol=1e-3, atol=1e-4)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"other": torch.zeros(1)}, path)
    whole = path.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save(torch.zeros(1), tmp_path / "tensor.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("these are no weights")
    for weights in [*map(str, tmp_path.iterdir()), str(tmp_path / "absent.pth")]:
        with pytest.raises(UserError, match="--weights"):
            config = model_config(name="efficientnet_b2", weights=weights)
            registry.build(config, num_classes=7, image_size=48)


@pytest.mark.parametrize("size", [12, 20, 47, 50, 60])
def test_custom_cnn_takes_any_input_size(size):
    """Halving rounds up in both branches of a block: with 12 px one once was 1x1, one 2x2."""
    model = registry.build(model_config(width=4), num_classes=3, image_size=size).eval()
    shapes = []
    for block in model.stages:
        block.first.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
        block.shortcut.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    assert model(torch.rand(2, 1, size, size)).shape == (2, 3)
    assert shapes[::2] == shapes[1::2]


def test_check_finds_what_would_fail_in_a_worker():
    for wrong in (
        model_config(name="sequential_cnn", input_size=4),
        model_config(name="efficientnet_b2", weights="/absent.pth"),
    ):
        with pytest.raises(UserError):
            registry.check(wrong, num_classes=7, image_size=48)
    for name in MODELS:
        registry.check(model_config(name=name), num_classes=7, image_size=48)


def test_too_small_an_input_is_refused():
    with pytest.raises(UserError, match="--input-size: 4"):
        registry.build(
            model_config(name="sequential_cnn", input_size=4), num_classes=7, image_size=48
        )
