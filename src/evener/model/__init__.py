"""THE MATHS: one decoder for every family, and beside it sharding and weight loading.

    families/            config -> ModelSpec, one small file per family
    source.py            open_model: where a model comes from; safetensors_source.py, gguf_source.py: its two bodies
    gguf_file.py         the file format; gguf_tokenizer.py: the tokenizer in its metadata
    weights.py           the tensors of one shard; packed_file.py: packed ones, kept and mapped
    inputs.py            the rows of one batch
    decoder.py           StageModel: embed, run_layers, logits; rope.py, kv.py: its tables and cache

Opening a model and its tokenizer needs no torch.
"""
