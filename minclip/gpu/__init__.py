"""float16 on the GPU, and the way there.

device    arrays onto the GPU, or one line that says what is missing
steps     the float16 steps of minclip/model.py, by cuBLAS and the kernels
kernels.cu   the kernels, which minclip/fast/gpu.py uses too
"""
