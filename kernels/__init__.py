"""The Triton kernels, a folder an op: tensors only, no locks and no models. Importing this alone needs no Triton."""
