"""From grey bytes to the numbers that a network sees: one definition for training and after.

A normalization is a pixel stage (bytes to bytes: histogram equalization, or none) and a scaling
(bytes to float32). Both go image by image: an image's result is the same bit for bit whatever
else is in its batch, on the CPU and on a GPU. Sums are of whole numbers, so that they are exact
in any order; what is not a whole number goes pixel by pixel, each operation rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fer_ray.config.registries import NORMALIZATIONS

NUM_TILES = 3
"""Tiles of `clahe` along each side. At 48 pixels a tile is 16 by 16: about an eye or a mouth, and
as many pixels as grey levels, so that the clip limit is not rounded away (in tiles of 12 by 12
any limit up to 3.5 is 1 pixel). Checkpoints do not carry it: another value is another `clahe`."""
CLIP_LIMIT = 2.0
"""Largest fraction of a tile's pixels at one grey level, as a multiple of an even distribution;
what is above is spread over all levels, which limits how much noise is amplified. As fixed as the
tiles."""

_LEVELS = 256


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """One way to turn grey bytes into the network's input: a pixel stage, then a scaling."""

    scale: Callable[[torch.Tensor, float, float], torch.Tensor]
    """From (N, 1, H, W) float32 of whole numbers, 0 to 255, and the mean and standard deviation
    of the train split, in units of 1.0, to finite float32 of the same shape."""
    pixel_stage: Callable[[torch.Tensor], torch.Tensor] | None = None
    """From (N, H, W) uint8 to the same; None: the images stay as they are."""
    uses_statistics: bool = False
    """Whether the scaling uses the mean and the standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Turns grey bytes into the numbers that a network sees; it travels in the checkpoint."""

    normalization: str
    """One of the names in `NORMALIZATIONS`."""
    mean: float
    """Mean of the train split's pixels after the pixel stage, in units of 1.0; used where the
    normalization uses statistics."""
    std: float
    """Their standard deviation, in units of 1.0; one below 1e-6 counts as 1e-6."""

    def __post_init__(self) -> None:
        NORMALIZATIONS[self.normalization]  # raises UserError where there is none of that name

    def pixel_stage(self, images: torch.Tensor) -> torch.Tensor:
        """What of the normalization maps bytes to bytes: (N, H, W) uint8 to the same.

        The images themselves, not a copy, where the normalization has no such stage.
        """
        stage = NORMALIZATIONS[self.normalization].pixel_stage
        return images if stage is None else stage(images)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalizes a batch on the device it lies on; deterministic, image by image.

        Args:
            images: (N, H, W) uint8 of any strides; left as it is.

        Returns:
            (N, 1, H, W) float32, finite. ``none``, ``equalize``, ``clahe``: in [0, 1];
            ``minmax``: in [0, 1], touching both ends; ``standardize``: each image with mean 0
            and standard deviation 1 (biased). Those two give all zeros for a constant image.
            ``dataset`` and what ends in it: mean 0 and standard deviation 1 over the train split.
        """
        pixels = self.pixel_stage(images).unsqueeze(1).float()
        return NORMALIZATIONS[self.normalization].scale(pixels, self.mean, self.std)


def needs_statistics(normalization: str) -> bool:
    """Whether mean and standard deviation have to be computed after the pixel stage.

    Those of the pixels as they are, which ``dataset`` takes, lie in ``dataset.json``.
    """
    entry = NORMALIZATIONS[normalization]
    return entry.uses_statistics and entry.pixel_stage is not None


def histogram(images: torch.Tensor) -> torch.Tensor:
    """Pixels at each grey level: (256,) int64 of uint8 images of any shape, on their device.

    Those of parts of a data set add up to that of the whole, exactly and in any order.
    """
    return torch.bincount(images.flatten(), minlength=_LEVELS)


def moments(counts: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation (biased) of all pixels, in units of 1.0, from exact sums.

    `counts` is (256,) int64 from `histogram`, of one pixel or more.
    """
    levels: list[int] = counts.tolist()
    num = sum(levels)
    assert num > 0, "moments of no pixels"
    total = sum(level * count for level, count in enumerate(levels))
    squares = sum(level * level * count for level, count in enumerate(levels))
    return total / num / 255, math.sqrt(num * squares - total**2) / num / 255


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Spreads each image's grey levels so that all are about equally frequent.

    (N, H, W) uint8 to a new tensor of the same. The darkest becomes 0, the brightest 255, the
    others the fraction of the pixels above the darkest; a constant image stays as it is.
    Bit-equal to OpenCV's ``equalizeHist``.
    """
    bins = _bins(images, 1)
    ranks = _counts(bins, len(images)).cumsum(1, dtype=torch.int32)
    num_pixels = images.shape[1] * images.shape[2]
    darkest = ranks.masked_fill(ranks == 0, num_pixels).amin(1, keepdim=True)
    above = num_pixels - darkest
    # a division, where `255.0 / tensor` is a reciprocal and a product: rounded twice
    scale = torch.full_like(above, 255.0, dtype=torch.float32) / above.clamp(min=1)
    tables = ((ranks - darkest).clamp(min=0) * scale).round().to(torch.uint8)
    unchanged = torch.arange(_LEVELS, dtype=torch.uint8, device=images.device)
    return _look_up(torch.where(above == 0, unchanged, tables), bins)


def clahe(
    images: torch.Tensor, *, clip_limit: float = CLIP_LIMIT, num_tiles: int = NUM_TILES
) -> torch.Tensor:
    """Equalizes tile by tile, with limited contrast, and blends between the tiles' centres.

    (N, H, W) uint8 to a new tensor of the same; takes some 60 KiB an image of 48 pixels while
    it works. After Zuiderveld, Contrast limited adaptive histogram equalization, Graphics Gems
    IV, 1994. Bit-equal to OpenCV's ``createCLAHE(clip_limit, (num_tiles, num_tiles))`` on x86;
    sides that the tiles do not divide count as mirrored at the far edge until they do. Under
    the default limit a constant image stays at about its level; `clip_limit` 0 is no limit.
    """
    extended = _extend(images, num_tiles)
    height, width = (side // num_tiles for side in extended.shape[1:])
    tables = _clahe_tables(extended, clip_limit, num_tiles)
    top, bottom, down = _neighbours(images.shape[1], height, num_tiles, images.device)
    left, right, across = _neighbours(images.shape[2], width, num_tiles, images.device)
    bins = _bins(images, num_tiles**2)

    def line(row: torch.Tensor) -> torch.Tensor:
        tiles = ((row[:, None] * num_tiles + column) * _LEVELS for column in (left, right))
        one, other = (_look_up(tables, bins + tile).float() for tile in tiles)
        return one.mul_(1.0 - across).add_(other.mul_(across))

    result = line(top).mul_(1.0 - down[:, None]).add_(line(bottom).mul_(down[:, None]))
    return result.round_().to(torch.uint8)


def _clahe_tables(images: torch.Tensor, clip_limit: float, num_tiles: int) -> torch.Tensor:
    """What each grey level becomes in each tile: (N * tiles, 256) uint8.

    The pixels above the limit go to all levels alike; of the rest that does not go round, one
    goes to every `step`-th level from 0 on, until they are used up.
    """
    height, width = (side // num_tiles for side in images.shape[1:])
    levels = torch.arange(_LEVELS, dtype=torch.int32, device=images.device)
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[1:])
    tiles = (rows // height)[:, None] * num_tiles + columns // width
    bins = _bins(images, num_tiles**2).add_(tiles * _LEVELS)
    counts = _counts(bins, len(images) * num_tiles**2)
    num_pixels = height * width
    if clip_limit > 0:
        counts = counts.clamp_(max=max(int(clip_limit * num_pixels / _LEVELS), 1))
    ranks = counts.cumsum(1, dtype=torch.int32)
    excess = num_pixels - ranks[:, -1:]
    rest = excess % _LEVELS
    step = _LEVELS // rest.clamp(min=1)
    ranks += excess // _LEVELS * (levels + 1)
    # the quotient of floats, cut off, is exact this small, and five times as fast as `//`
    ranks += torch.minimum((levels / step).int() + 1, rest)
    return (ranks * (255.0 / num_pixels)).round_().to(torch.uint8)


def _neighbours(
    length: int, side: int, num_tiles: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tiles whose centres enclose each place along a side, and the second one's weight.

    (length,) int32, int32, float32. Beyond the outer centres both are the tile at the end.
    """
    path = torch.arange(length, dtype=torch.float32, device=device) * (1.0 / side) - 0.5
    before = path.floor()
    first, second = (tile.clamp(0, num_tiles - 1).int() for tile in (before, before + 1))
    return first, second, path - before


def _extend(images: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """Mirrors images at their far edges (the edge itself once) to sides that the tiles divide.

    As in OpenCV, where one side has to grow, a divisible one does too, by `num_tiles`.
    """
    if not any(side % num_tiles for side in images.shape[1:]):
        return images
    for axis in (1, 2):
        length = images.shape[axis]
        period = max(2 * (length - 1), 1)
        extended = length + num_tiles - length % num_tiles
        places = torch.arange(extended, device=images.device) % period
        images = images.index_select(axis, torch.minimum(places, period - places))
    return images


def _bins(images: torch.Tensor, tables_per_image: int) -> torch.Tensor:
    """Where each pixel's level lies in its image's first table, all tables in a row: int32."""
    stride = tables_per_image * _LEVELS
    starts = torch.arange(len(images), dtype=torch.int32, device=images.device) * stride
    return images.int().add_(starts[:, None, None])


def _counts(bins: torch.Tensor, num_tables: int) -> torch.Tensor:
    """How often each bin occurs: (num_tables, 256) int32. Unlike bincount it never waits."""
    flat = bins.flatten()
    counts = torch.zeros(num_tables * _LEVELS, dtype=torch.int32, device=bins.device)
    return counts.index_add_(0, flat, torch.ones_like(flat)).view(num_tables, _LEVELS)


def _look_up(tables: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """The entries (uint8) of all tables in a row at `bins`, in the shape of `bins`."""
    return tables.flatten().index_select(0, bins.flatten()).view(bins.shape)


def _to_unit(pixels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return _divide(pixels, 255.0)


def _to_full_range(pixels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """The darkest pixel of each image is 0, the brightest 1."""
    low = pixels.amin(dim=(2, 3), keepdim=True)
    span = pixels.amax(dim=(2, 3), keepdim=True) - low
    return (pixels - low) / span.clamp(min=1.0)


def _by_dataset(pixels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over the train split."""
    return _divide(_divide(pixels, 255.0) - mean, max(std, 1e-6))


def _by_image(pixels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Mean 0 and standard deviation 1 for each image."""
    # whole numbers, so exact; the mean of what is left has the size of the standard deviation,
    # and so has what its rounding adds: 33 less 32.97 would keep few digits of the difference
    pixels = pixels - pixels[:, :, :1, :1]
    num = float(pixels.shape[2] * pixels.shape[3])
    total = pixels.sum(dim=(2, 3), keepdim=True, dtype=torch.float64)
    squares = pixels.square().sum(dim=(2, 3), keepdim=True, dtype=torch.float64)
    own_mean = _divide(total, num)
    own_std = _divide((num * squares - total.square()).sqrt(), num)
    return (pixels - own_mean.float()) / own_std.masked_fill(own_std == 0, 1.0).float()


def _divide(values: torch.Tensor, number: float) -> torch.Tensor:
    """A quotient rounded once: on a GPU, `values / number` is a product with the reciprocal."""
    return values / values.new_full((), number)


for _name, _entry in {
    "none": Normalization(scale=_to_unit),
    "minmax": Normalization(scale=_to_full_range),
    "standardize": Normalization(scale=_by_image),
    "dataset": Normalization(scale=_by_dataset, uses_statistics=True),
    "equalize": Normalization(pixel_stage=equalize, scale=_to_unit),
    "clahe": Normalization(pixel_stage=clahe, scale=_to_unit),
    "equalize+dataset": Normalization(
        pixel_stage=equalize, scale=_by_dataset, uses_statistics=True
    ),
    "clahe+dataset": Normalization(pixel_stage=clahe, scale=_by_dataset, uses_statistics=True),
}.items():
    NORMALIZATIONS.register(_name)(_entry)
