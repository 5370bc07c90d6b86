"""Compiled kernels on a CPU: PTX that Triton or nvcc made for a GPU, run on CPU tensors and watched.

CONTRIBUTING.md tells how to use it; the modules, from the bottom up:

    parser                PTX text as kernels of instructions
    report                what was found
    numerics              arithmetic of a thread, on rows of numbers (one a thread)
    memory, races         global and shared memory: bounds, alignment, bytes that nobody wrote, who accessed them when
    thread_order          the same for each thread, where parts of a block wait for each other
    gates                 mbarriers
    asynchronous          copies and matrix products in flight
    tensor_cores          ldmatrix, stmatrix, mma and wgmma: which thread holds which number
    translation           instructions as Python on rows: operands, and the groups below
      scalar_instructions, memory_instructions, gate_instructions, warp_instructions, matrix_instructions
    program               a kernel cut at its branches and barriers, each piece a Python function
    block                 the threads of one thread block (CTA): who runs, waits, has ended
    launch                a grid: in which order its blocks run
    emulator              memory of tensors, launches, and their options
    triton_launches       Triton's launches, compiled for a device and run here
    cuda_launches         csrc/cuda, by nvcc, with its own launch code
    plugin                the ops' tests on all that
"""
