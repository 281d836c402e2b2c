"""The networks, one module each: a module here that registers a `ModelConfig` is a `--model`."""
