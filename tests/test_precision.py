"""In which arithmetic networks compute, by device."""

import pytest
import small
import torch

from fer_ray.config.model import model_config
from fer_ray.models import precision, registry
from fer_ray.models.forward import Forward
from fer_ray.transforms.normalization import Normalizer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def set_capabilities(monkeypatch, **capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True), (False, False)])
def test_bfloat16_is_for_cpus_with_instructions_for_it(monkeypatch, amx, avx512):
    set_capabilities(monkeypatch, amx_tile=amx, avx512_bf16=avx512)
    for name in ("custom_cnn", "sequential_cnn"):
        assert precision.prefers_bfloat16(model_config(name=name), CPU) == (amx or avx512)
    assert not precision.prefers_bfloat16(model_config(name="efficientnet_b2"), CPU)


def test_a_torch_that_does_not_tell_its_capabilities_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not precision.prefers_bfloat16(model_config(), CPU)


@pytest.mark.parametrize(
    ("setting", "amx", "expected"),
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float32"),
        ("bfloat16", False, "bfloat16"),
        ("float32", True, "float32"),
        ("tf32", True, "float32"),
    ],
)
def test_a_setting_stands_for_one_arithmetic_on_a_cpu(monkeypatch, setting, amx, expected):
    set_capabilities(monkeypatch, amx_tile=amx)
    assert precision.for_training(setting, model_config(), CPU) == expected


def test_inference_avoids_bfloat16_where_the_device_is_slow_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for amx in (True, False):
        set_capabilities(monkeypatch, amx_tile=amx)
        on_cpu = precision.for_inference("bfloat16", model_config(), CPU)
        assert on_cpu == ("bfloat16" if amx else "float32")
        assert precision.for_inference("float32", model_config(), CPU) == "float32"
        assert precision.for_inference("tf32", model_config(), CPU) == "float32"
    for trained in precision.ORDER:
        assert precision.for_inference(trained, model_config(), GPU) == trained


def test_tf32_is_allowed_only_where_it_was_chosen():
    """PyTorch's default for convolutions is TensorFloat-32."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    for name, expected in (("tf32", "tf32"), ("bfloat16", "ieee"), ("float32", "ieee")):
        precision.set_tf32(name)
        assert [backend.fp32_precision for backend in backends] == [expected] * 2


def test_both_arithmetics_predict_nearly_the_same():
    """Probabilities differ by less than 0.03, which is what inference on another device may do."""
    torch.manual_seed(0)
    model = registry.build(model_config(width=16), num_classes=7, image_size=48)
    model.train()
    images = torch.from_numpy(small.split(64, size=48).images)
    normalizer = Normalizer(normalization="dataset", mean=0.3, std=0.25)
    results = []
    with torch.no_grad():
        model(normalizer(images))  # running statistics of these images
    for name in ("float32", "bfloat16"):
        forward = Forward(normalizer=normalizer, input_size=48, precision=name, flip_at_test=True)
        results.append(forward.probabilities(model.eval(), images))
    difference = (results[0] - results[1]).abs().max().item()
    assert 0 < difference < 0.03
