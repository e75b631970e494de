"""The small world: a toy data set and two base models, used if no others are there. Contents:

    world       the problems with their pictures, in ScienceQA's layout; the default of train.py
    drawing     how the pictures are drawn: colours, shapes, scenes, and two styles
    pretrain    makes the two base models, llama/ and ViT-tiny.pt
    corpus      the text that LLaMA is pre-trained on
    album       the pictures and captions that CLIP is pre-trained on
    shelf       the example pictures of the web page
"""
