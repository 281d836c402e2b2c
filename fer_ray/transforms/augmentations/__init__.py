"""The augmentations: every module here registers some, and they are found without being listed."""
