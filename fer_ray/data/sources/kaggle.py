"""The data set of the notebook that this project grew out of, from Kaggle."""

from __future__ import annotations

from fer_ray.errors import UserError, first_line

HANDLE = "samaneheslamifar/facial-emotion-expressions"
"""Its name on Kaggle: FER-2013's images as JPEG files in train and validation folders."""


def download() -> str:
    """Downloads the data set, or finds the copy of an earlier download.

    Returns:
        The local folder.

    Raises:
        UserError: when it cannot be downloaded, with what to do instead.
    """
    import kagglehub

    try:
        return kagglehub.dataset_download(HANDLE)
    except Exception as error:  # no network, no such version, wrong credentials: many types
        raise UserError(
            f"--source kaggle: the download failed ({first_line(error)[:120]}): download "
            f"https://www.kaggle.com/datasets/{HANDLE} where there is a network and give the "
            "zip: --source facial-emotion-expressions.zip"
        ) from error
