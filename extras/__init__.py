"""More ways in and out: other formats, data sets, scoring, chat, page. Contents:

Files that are read
    hf              Hugging Face folders. LLAMA_NAMES: their tensor names -> Meta's
    gguf            GGUF files: one file with a model's sizes, vocabulary and weights
    tokenizers      tokenizer.json
    torchscript     OpenAI's CLIP, an archive of code and tensors, read as data
    scienceqa       ScienceQA: load_sqa gives its problems as samples
    instructions    rows of JSON lines, Alpaca, LLaVA: samples_of_row. instruction_prompt writes
                    the prompt
    benchmarks      MME; captions for COCO's evaluation

A training run
    flags, values   every flag; the type and range of each value
    runs            the data (read_sources, hold_out), ablations (freeze), signals, log, loss.png
    resume          --resume. FIXED: the settings that may not change
    estimate        --dry-run --device cuda: memory and work, computed on a machine without a GPU
    board           --tensorboard
    neighbours      advice for training on a busy CPU

Answers and scores
    evaluate        answers to a whole data set; ScienceQA's table (sqa_scores)
    rows            exact match on rows of your own (is_right, score_table)
    choices         --score choices: the answer whose tokens, with EOS, have the highest summed
                    log-probability
    chat, serve     a conversation in the terminal, or on a web page

What is printed
    terminal        `run`: a user's error (LavinError, files.py) ends in one line
    plot            charts as PNG files
"""
