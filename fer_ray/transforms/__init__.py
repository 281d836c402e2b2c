"""What happens to the pixels: augmentation of grey images, then normalization of batches.

Augmentation takes and gives uint8, so that every normalization sees it the same way. Its
randomness is keyed by (seed, epoch, sample): it depends neither on the number of workers nor
on the order of the images, and a resumed run repeats it exactly.
"""

from fer_ray.transforms.albumentations_engine import LibraryAugmenter
from fer_ray.transforms.augmentation import DeviceAugmenter
from fer_ray.transforms.mixing import Mix, MixPlan
from fer_ray.transforms.mixing import draw as draw_mix
from fer_ray.transforms.normalization import Normalizer, histogram, moments, needs_statistics

__all__ = [
    "DeviceAugmenter",
    "LibraryAugmenter",
    "Mix",
    "MixPlan",
    "Normalizer",
    "draw_mix",
    "histogram",
    "moments",
    "needs_statistics",
]
