"""The Triton kernels: the fold (`fold`) and its ahead-of-time build (`build`). Importing this alone needs no triton."""
