#!/usr/bin/env python3
"""Real queries, keys and values for `passel attend`: one text through a llama model.

Writes DIR/layer-N/{q,k,v}.npy, float32: the queries of the last token [heads, d] and, of each
token between the sinks and the window, the keys after RoPE and the values [kv_heads, n, d].
Needs torch, transformers and, for a GGUF file, gguf.
"""
import argparse
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.llama import modeling_llama


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a directory or a GGUF file")
    parser.add_argument("--text", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", default="8,15,24")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()

    if args.model.is_file():
        where = {"pretrained_model_name_or_path": str(args.model.parent), "gguf_file": args.model.name}
    else:
        where = {"pretrained_model_name_or_path": str(args.model)}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in args.text)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens]
    if ids.shape[1] < args.tokens:
        parser.error(f"the text has {ids.shape[1]} tokens; expected {args.tokens}")

    rotated, values = [], []  # by layer, in the order of their evaluation
    rotate = modeling_llama.apply_rotary_pos_emb

    def record(*arguments, **named):
        q, k = rotate(*arguments, **named)
        rotated.append((q[0, :, -1].numpy().copy(), k[0].numpy().copy()))
        return q, k

    modeling_llama.apply_rotary_pos_emb = record
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(
            lambda _module, _inputs, output: values.append(output[0].numpy().copy())
        )
    with torch.no_grad():
        model.model(ids, use_cache=False)

    for number in map(int, args.layers.split(",")):
        q, k = rotated[number]
        heads = k.shape[0]
        v = values[number].reshape(args.tokens, heads, -1).transpose(1, 0, 2)
        kept = slice(args.sinks, args.tokens - args.window)
        out = args.out / f"layer-{number}"
        out.mkdir(parents=True, exist_ok=True)
        for name, x in (("q", q), ("k", k[:, kept]), ("v", v[:, kept])):
            np.save(out / f"{name}.npy", np.ascontiguousarray(x, dtype=np.float32))
        print(f"{out}: q {q.shape}, k {k[:, kept].shape}")


if __name__ == "__main__":
    main()
