"""Arrays on an NVIDIA GPU, and float16 there.

device       copy arrays to the GPU, or name the missing library in one line
steps        the float16 steps of minclip/model.py, by cuBLAS and the kernels
kernels.cu   the kernels, in CUDA; minclip/fast/gpu.py launches them too

Read in this order. Only `steps` needs CuPy to be imported.
"""
