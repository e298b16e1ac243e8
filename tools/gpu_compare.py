#!/usr/bin/env python3
"""Holds the tokens of some runs to those of a first one.

    tools/gpu_compare.py BASE.jsonl OTHER.jsonl… [--error E]

Requests must be greedy, with logprobs ≥ 2 and return_token_ids. At each position where all tokens
before agree, the chosen token's log-probability may differ by E, and the token only where the
base's two best are closer than 2·E; behind such a fork nothing is compared. Exit code 1 where a
run does not hold.
"""

import argparse
import json
import sys


def choices(path: str) -> dict[str, dict]:
    found = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            result = json.loads(line)
            if result.get("error"):
                sys.exit(f"{path}: {result['custom_id']}: {result['error']}")
            found[result["custom_id"]] = result["response"]["body"]["choices"][0]
    return found


def compare(base: dict, other: dict, error: float) -> tuple[int, float, list[str]]:
    expected, got = base["logprobs"]["content"], other["logprobs"]["content"]
    compared, largest, faults = 0, 0.0, []
    for position, (e, g) in enumerate(zip(expected, got)):
        best = e["top_logprobs"]
        gap = best[0]["logprob"] - best[1]["logprob"]
        compared += 1
        if e["id"] != g["id"]:
            if gap >= 2 * error:
                faults.append(f"position {position}: token {g['id']} instead of {e['id']}, "
                              f"gap {gap:.3f}")
            break
        off = abs(e["logprob"] - g["logprob"])
        largest = max(largest, off)
        if off > error:
            faults.append(f"position {position}: log-probability off by {off:.3f}")
    return compared, largest, faults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("others", nargs="+")
    parser.add_argument("--error", type=float, default=0.1)
    args = parser.parse_args()
    base = choices(args.base)
    failed = False
    for path in args.others:
        other = choices(path)
        total = compared = 0
        largest = 0.0
        faults = []
        for name, choice in base.items():
            if name not in other:
                faults.append(f"{name}: no result")
                continue
            total += len(choice["logprobs"]["content"])
            count, off, found = compare(choice, other[name], args.error)
            compared += count
            largest = max(largest, off)
            faults += [f"{name}: {fault}" for fault in found]
        verdict = "FAILED" if faults else "ok"
        print(f"{path}: {verdict}; {compared} of {total} positions compared, log-probabilities "
              f"within {largest:.4f}")
        for fault in faults:
            print(f"  {fault}")
        failed = failed or bool(faults)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
