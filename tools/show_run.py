#!/usr/bin/env python3
"""Prints what a run of `passel run` answered and what it took.

    tools/show_run.py OUT.jsonl SUMMARY.json [--prompts PROMPTS.jsonl]

The numbers are defined in docs/performance.md.
"""

import argparse
import json
import sys
import textwrap


def read_jsonl(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def prompt_texts(path: str) -> dict[str, str]:
    """custom_id → the prompt's text; a line without one is `line-N`, as the output names it."""
    texts = {}
    for number, request in enumerate(read_jsonl(path), start=1):
        body = request.get("body", request)
        messages = body.get("messages")
        text = messages[-1]["content"] if messages else body.get("prompt", "")
        texts[request.get("custom_id", f"line-{number}")] = str(text)
    return texts


def abridged(text: str, width: int = 160) -> str:
    """One line: the beginning and, of a long text, the end, where the question is."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[:width // 2]} … {line[-width // 2:]}"


def size(count: int) -> str:
    """A count of bytes, readable; 1 MiB is 2^20 bytes."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def show_answer(result: dict, prompts: dict[str, str]) -> None:
    name = result["custom_id"]
    print(f"[{name}]")
    if name in prompts:
        print(f"  prompt   {abridged(prompts[name])}")
    if result.get("error"):
        print(f"  error    {result['error']}")
        return
    body = result["response"]["body"]
    choice, usage = body["choices"][0], body["usage"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    answer = textwrap.indent("\n".join(text.strip().splitlines()), " " * 11).lstrip()
    print(f"  answer   {answer}")
    print(f"  tokens   {usage['prompt_tokens']} prompt, {usage['completion_tokens']} completion "
          f"({choice['finish_reason']}); sampled fraction {usage['sampled_fraction']:.4f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="the results, as `passel run -o` wrote them")
    parser.add_argument("summary", help="summary.json of the run directory")
    parser.add_argument("--prompts", help="the requests, to show beside the answers")
    arguments = parser.parse_args()

    prompts = prompt_texts(arguments.prompts) if arguments.prompts else {}
    results = read_jsonl(arguments.output)
    with open(arguments.summary, encoding="utf-8") as file:
        summary = json.load(file)

    for result in sorted(results, key=lambda r: list(prompts).index(r["custom_id"])
                         if r["custom_id"] in prompts else len(prompts)):
        show_answer(result, prompts)
        print()
    print(f"requests          {summary['requests_ok']} ok, {summary['requests_failed']} failed")
    print(f"sampled fraction  {summary['sampled_fraction']:.4f}")
    print(f"tokens/s          {summary['tokens_per_second']:.2f}")
    for host in summary["hosts"]:
        print(f"host rank {host['rank']:<7} KV {size(host['kv_bytes'])}, "
              f"tables {size(host['table_bytes'])}")
    return 0 if summary["requests_failed"] == 0 and len(results) >= len(prompts) else 1


if __name__ == "__main__":
    sys.exit(main())
