"""What the plain code computes, but faster or in less memory. Contents:

    ops         fast forms of single operations, used by the core
    engine      generation with a cache of keys and values; continuous batching
    fold        merges the adapters into wq, wk and wv, for one modality
    quantize    the matrices of LLaMA's blocks in 8 or 4 bits, nothing else
    ranks       several GPUs. gradient_buffer: all gradients in one tensor, so that zeroing them,
                their norm and their sum over the ranks take one call each
"""
