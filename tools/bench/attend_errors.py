#!/usr/bin/env python3
"""Relative L2 errors of `passel attend` (docs/performance.md), as a Markdown table.

Each data set is one layer; errors are over all its heads, the root mean square over the sets of
projections and, for real keys, over the layers. `to exact`: LSH against exact attention in float64.
`int8 adds`: int8 against bf16 with the same projections. Needs numpy.
"""
import argparse
import json
import pathlib
import subprocess
import tempfile

import numpy as np

CASES = ((10, 150), (10, 170), (11, 300), (8, 75))


def to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def synthetic(clustered, n, heads=8, kv_heads=2, d=128):
    """q, k, v ~ N(0, 1); clustered: 0.75% of the keys at cosine 0.3 … 0.8 to one of their queries."""
    random = np.random.default_rng(1)
    q = random.standard_normal((heads, d))
    k, v = random.standard_normal((2, kv_heads, n, d))
    group = heads // kv_heads
    for head in range(kv_heads if clustered else 0):
        for i in np.flatnonzero(random.random(n) < 0.0075):
            direction = q[head * group + random.integers(group)]
            direction = direction / np.linalg.norm(direction)
            cosine, length = random.uniform(0.3, 0.8), np.linalg.norm(k[head, i])
            across = k[head, i] - (k[head, i] @ direction) * direction
            across /= np.linalg.norm(across)
            k[head, i] = length * (cosine * direction + np.sqrt(1 - cosine**2) * across)
    return to_bf16(q), to_bf16(k), to_bf16(v)


def exact(q, k, v):
    group = len(q) // len(k)
    out = np.empty(q.shape)
    for head, query in enumerate(q.astype(np.float64)):
        scores = k[head // group].astype(np.float64) @ query / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[head] = weights @ v[head // group] / weights.sum()
    return out


def distance(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class Attend:
    def __init__(self, passel, folder):
        self.passel, self.folder = passel, folder

    def __call__(self, layer, projections, k, l, kv_type):
        """The output [heads, d] and the sampled fraction."""
        names = dict(zip("qkv", layer), r=projections)
        for name, x in names.items():
            np.save(self.folder / f"{name}.npy", np.ascontiguousarray(x, np.float32))
        command = [self.passel, "attend", "--json", "--repeat", "1", "--out", self.folder / "o.npy"]
        for flag, name in (("--q", "q"), ("--k", "k"), ("--v", "v"), ("--projections", "r")):
            command += [flag, self.folder / f"{name}.npy"]
        for field in (f"k={k}", f"l={l}", f"kv_type={kv_type}", "estimator=LSH"):
            command += ["--set", f"attention.{field}"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return np.load(self.folder / "o.npy").astype(np.float64), report["sampled_fraction"]


def mean_square(errors):
    return float(np.sqrt(np.mean(np.square(errors))))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passel", default="build/release/passel")
    parser.add_argument("--tokens", type=int, default=16384, help="of the synthetic keys")
    parser.add_argument("--projections", type=int, default=3, help="sets of projections")
    parser.add_argument("--real", type=pathlib.Path, help="what real_keys.py wrote")
    args = parser.parse_args()

    sets = {"iid": [synthetic(False, args.tokens)], "clustered": [synthetic(True, args.tokens)]}
    if args.real:
        folders = sorted(args.real.glob("layer-*"), key=lambda path: int(path.name.split("-")[1]))
        layers = [[np.load(path / f"{x}.npy") for x in "qkv"] for path in folders]
        sets["real"] = [(q, to_bf16(k), to_bf16(v)) for q, k, v in layers]
    print("| keys | K, L | sampled | to exact, bf16 | to exact, int8 | int8 adds | worst layer |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        attend = Attend(args.passel, pathlib.Path(folder))
        for name, layers in sets.items():
            truths = [exact(*layer) for layer in layers]
            for k, l in CASES:
                bf16, int8, sampled, added = [], [], [], {}
                for number, (layer, truth) in enumerate(zip(layers, truths)):
                    for seed in range(args.projections):
                        shape = (layer[0].shape[1], k * l)
                        r = np.random.default_rng(100 + seed).standard_normal(shape)
                        a, fraction = attend(layer, r, k, l, "BF16")
                        b, _ = attend(layer, r, k, l, "INT8")
                        bf16.append(distance(a, truth))
                        int8.append(distance(b, truth))
                        sampled.append(fraction)
                        added.setdefault(number, []).append(distance(b, a))
                worst = max(mean_square(errors) for errors in added.values())
                adds = mean_square(sum(added.values(), []))
                print(
                    f"| {name} | {k}, {l} | {100 * np.mean(sampled):.2f}% | {mean_square(bf16):.3g} |"
                    f" {mean_square(int8):.3g} | {adds:.2g} | {worst:.2g} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
