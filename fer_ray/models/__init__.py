"""The networks, how a batch goes through one, and checkpoints."""
