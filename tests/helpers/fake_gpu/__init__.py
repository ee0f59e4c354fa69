"""A GPU for tests where there is none: `make gpu` runs on it from start to finish, and what it computes is right.

To torch it is a CUDA device like any other: tensors say that they are on it, operators that mix it with the host are
refused, graphs are captured. All of it lies in the host's memory: operators are the CPU's (operators.py), Triton's
kernels are interpreted (kernels.py), and cubins are launched through fastlock's own code on the driver of
fake_driver.py. Nothing is as fast as anything. There is no inductor and no backward pass.

A process is given one by `processes.py`.
"""
