#!/usr/bin/env python3
"""Writes a Hugging Face directory of a Llama-3.1-8B-shaped model with random weights: to measure
with, not to read.

    tools/make_random_model.py DIRECTORY [--layers 32]

The tokenizer knows bytes alone. Weights are cut from one block of random numbers. What writes to the
residual stream is scaled down by sqrt(2 * layers), as GPT-2 begins, and embeddings are not: as in a
trained model, a token's own direction lasts, and layers do not amplify what rounding did to it.
"""

import argparse
import json
import pathlib
import struct

import numpy as np

HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB = 4096, 32, 8, 128, 14336, 128256


def byte_alphabet() -> list[str]:
    """The characters that byte-level tokenizers write bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    (args.directory / "config.json").write_text(json.dumps({
        "model_type": "llama", "num_hidden_layers": args.layers, "hidden_size": HIDDEN,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
        "intermediate_size": FFN, "vocab_size": VOCAB, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16"}))
    vocab = {c: i for i, c in enumerate(byte_alphabet())}
    vocab.update({f"<{i}>": i for i in range(len(vocab), VOCAB - 2)})
    added = [{"id": VOCAB - 2 + i, "content": c, "special": True, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False}
             for i, c in enumerate(["<s>", "</s>"])]
    (args.directory / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    (args.directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))

    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,),
              "lm_head.weight": (VOCAB, HIDDEN)}
    for layer in range(args.layers):
        name = f"model.layers.{layer}."
        shapes |= {
            name + "input_layernorm.weight": (HIDDEN,),
            name + "post_attention_layernorm.weight": (HIDDEN,),
            name + "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
            name + "self_attn.k_proj.weight": (KV_HEADS * DIM, HIDDEN),
            name + "self_attn.v_proj.weight": (KV_HEADS * DIM, HIDDEN),
            name + "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
            name + "mlp.gate_proj.weight": (FFN, HIDDEN),
            name + "mlp.up_proj.weight": (FFN, HIDDEN),
            name + "mlp.down_proj.weight": (HIDDEN, FFN)}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal((1 << 25) + 1, dtype=np.float32)
    inner, outer = 1 / np.sqrt(HIDDEN), 1 / np.sqrt(2 * args.layers * HIDDEN)
    blocks = {scale: bf16(numbers * np.float32(scale)) for scale in (1, inner, outer)}
    ones = bf16(np.ones(HIDDEN))
    with open(args.directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            if len(shape) == 1:
                file.write(ones.tobytes())
                continue
            to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            block = blocks[1 if "embed" in name else outer if to_residual else inner]
            left = int(np.prod(shape))
            start = int(rng.integers(len(block)))
            while left > 0:
                part = block[start:start + left]
                file.write(part.data)
                left -= len(part)
                start = 0


if __name__ == "__main__":
    main()
