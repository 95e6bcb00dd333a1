"""The Moondream2 vision-language model: our own batched implementation, in plain PyTorch."""
