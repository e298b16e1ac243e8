#!/usr/bin/env python3
"""Compares Passel's logits on a GPU with Hugging Face transformers', in float32 on the same GPU.

    tools/gpu_logits.py MODEL_LOGITS HF_DIRECTORY [--ranks 1 2] [--backends CUDA CPU]

MODEL_LOGITS is the program of that name (tests/model). Prints, for each backend and number of
tensor-parallel ranks, the relative errors (L2, over the vocabulary) of a prompt's last position and
of a continuation, beside those of transformers in bf16; ends with 1 where all together (RMS)
exceed 2e-2.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers


def report(what: str, got: np.ndarray, expected: np.ndarray) -> float:
    errors = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    rms = float(np.sqrt(np.mean(errors ** 2)))
    print(f"{what}: relative error {rms:.2e} over {len(errors)} positions, {errors.max():.2e} at "
          "most", flush=True)
    return rms


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("directory")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backends", nargs="+", default=["CUDA", "CPU"])
    parser.add_argument("--prompt", type=int, default=700)
    parser.add_argument("--then", type=int, default=12)
    args = parser.parse_args()

    def load(dtype: torch.dtype) -> torch.nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(args.directory,
                                                                 dtype=dtype).cuda().eval()

    model = load(torch.float32)
    vocabulary = model.config.vocab_size
    generator = np.random.default_rng(5)
    ids = generator.integers(0, vocabulary, args.prompt + args.then).tolist()

    def logits() -> np.ndarray:
        with torch.no_grad():
            rows = model(torch.tensor([ids], device="cuda")).logits[0, args.prompt - 1:]
        return rows.double().cpu().numpy()

    expected = logits()
    del model
    torch.cuda.empty_cache()
    model = load(torch.bfloat16)
    report("transformers in bf16", logits(), expected)
    del model
    torch.cuda.empty_cache()

    failed = False
    with tempfile.TemporaryDirectory() as work:
        tokens, out = os.path.join(work, "tokens.json"), os.path.join(work, "logits.f32")
        with open(tokens, "w", encoding="utf-8") as file:
            json.dump({"prompt": ids[:args.prompt], "then": ids[args.prompt:]}, file)
        for backend in args.backends:
            for ranks in args.ranks:
                subprocess.run(
                    ["mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1",
                     "--mca", "btl", "self,vader", "-np", str(ranks), args.program,
                     args.directory, tokens, out, backend],
                    check=True, env={**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1",
                                     "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
                got = np.fromfile(out, np.float32).reshape(-1, vocabulary).astype(np.float64)
                failed |= not report(f"{backend}, T = {ranks}", got, expected) <= 2e-2
    sys.exit(failed)


if __name__ == "__main__":
    main()
