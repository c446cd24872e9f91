"""What this package does, as torch ops: sampling, gather, enqueue, InfoNCE; the public functions stand beside them.

Ops live in the `pixcontrast` namespace and are not differentiable; an autograd Function stands around those that carry
a gradient.

    library.py    how an op is given to torch
    signature.py  what an op takes, checked at every call
    checks.py     what the public functions check before, in their users' words
"""
