"""Example pictures, and scripts. Contents:

    tour            the core on the small world's real objects, one screen per file
    easy_vqa        writes easy-VQA as training data
    smollm2         unpacks a real LLaMA with 135 million parameters; fifty questions for it
    own_words       a LLaMA's own answers without a picture, as training data
    architecture    draws the figure of README
    flags           writes docs/flags.md
"""
