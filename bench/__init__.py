"""Scripts that measure speed, memory and accuracy. Contents:

    speed           training and generation: samples and tokens per second
    reference       answering a data set, compared with the authors' code
    memory          GPU memory of training and decoding, computed without a GPU
    peak_memory     the time and the memory of loading a LLaMA
    ablations       what each part of the method is worth in the small world
    probe           what the small world's CLIP sees
    asking          questions without choices
    recipe          a new skill, learned from 200 examples
"""
