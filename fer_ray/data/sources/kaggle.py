"""FER-2013's images as JPEG files, downloaded from Kaggle."""

from __future__ import annotations

from fer_ray.data.image_source import SOURCES, ImageSource, SourceOptions, SourceType
from fer_ray.data.sources import layouts
from fer_ray.data.sources.folders import FolderSource
from fer_ray.errors import UserError, first_line

HANDLE = "samaneheslamifar/facial-emotion-expressions"
"""Name of the dataset on Kaggle; it has train and validation folders."""


def download() -> str:
    """Downloads the dataset unless an earlier download is still cached.

    Returns:
        Path of the local folder.

    Raises:
        UserError: when it cannot be downloaded.
    """
    import kagglehub

    try:
        return kagglehub.dataset_download(HANDLE)
    except Exception as error:  # no network, no such version, wrong credentials: many types
        raise UserError(
            f"--source kaggle: the download failed ({first_line(error)[:120]}): download "
            f"https://www.kaggle.com/datasets/{HANDLE} on a machine with a network and give the "
            "zip: --source facial-emotion-expressions.zip"
        ) from error


def _open(source: str, options: SourceOptions) -> ImageSource:
    return layouts.open_layout(FolderSource(download()), source)


SOURCES.register("kaggle")(
    SourceType(
        description="kaggle (downloads FER-2013's images)",
        recognizes=lambda source: source == "kaggle",
        open=_open,
        is_path=False,
    )
)
