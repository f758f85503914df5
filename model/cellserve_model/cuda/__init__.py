"""The stepper of NVIDIA GPUs: Triton kernels over a slab that they index themselves, launched as CUDA graphs.

In the order in which they build on each other: `tiles` (block sizes), `weights` (folded and packed), `slab`
(rows and how their numbers are stored), `cell_tiles` (the cells' mathematics on one tile), `kernels` (one step)
and `run_kernel` (many steps), `network` (launches), `stepper` (what the service drives).
"""
