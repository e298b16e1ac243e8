#!/usr/bin/env python3
"""Writes the prompts of tools/demo.sh: a long document with a question about it, and two short ones.

The document is the log of a lighthouse that never was, put together from phrases by a seeded
generator, so that it can be given away and made at any length. The fact that the question asks for
is noted in the log again and again, as a log would: the demo's model is small.

    tools/make_demo_prompts.py [-n ENTRIES] [-o FILE]

110 entries are about 4,900 tokens for SmolLM2; its context is 8,192.
"""

import argparse
import json
import random
import sys

SKY = ["a clear sky", "low cloud", "thin haze", "rain until noon", "fog at dawn", "a pale sun"]
WIND = ["from the north", "from the south-west", "light and steady", "strong in the evening"]
SIGHT = [
    "two herring boats went by", "a barque passed far out", "seals lay on the flat rocks",
    "geese flew over in a long line", "no ship was seen", "the ferry waved with its flag",
]
WORK = [
    "cleaned the great lens", "painted the west railing", "oiled the clockwork",
    "mended the garden wall", "carried coal up from the jetty", "wrote letters home",
    "patched the roof of the shed", "counted the spare wicks",
]
EVENING = [
    "The lamp was lit at dusk.", "The lamp burned well all night.", "We ate soup and bread.",
    "The keeper read aloud from an old book.", "The cat slept by the stove.",
]
FACT = "The keeper of the lighthouse is Thomas Gray."
QUESTION = "What is the name of the keeper of the lighthouse?"


def make_log(entries: int, seed: int) -> str:
    """The log: one paragraph a day, the fact on every seventh day and on the last."""
    pick = random.Random(seed).choice
    days = []
    for day in range(1, entries + 1):
        text = (f"Day {day}. We had {pick(SKY)}, the wind {pick(WIND)}. "
                f"In the morning we {pick(WORK)}, and {pick(SIGHT)}. ")
        text += FACT if day % 7 == 0 or day == entries else pick(EVENING)
        days.append(text)
    return "\n".join(days)


def make_prompts(entries: int) -> list[dict]:
    """One request in the OpenAI batch form with a long document, one short, one bare prompt."""

    def chat(custom_id: str, content: str, max_tokens: int) -> dict:
        return {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": max_tokens,
                "temperature": 0,
            },
        }

    document = make_log(entries, seed=7)
    return [
        chat("long-log", f"Here is the log of a lighthouse.\n\n{document}\n\n{QUESTION}", 48),
        chat("capital", "What is the capital of France?", 32),
        {"prompt": "Water boils when", "max_tokens": 32, "temperature": 0},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--entries", type=int, default=110, help="days of the log")
    parser.add_argument("-o", "--output", help="JSONL file (default: standard output)")
    arguments = parser.parse_args()
    lines = "".join(json.dumps(p) + "\n" for p in make_prompts(arguments.entries))
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(lines)
    else:
        sys.stdout.write(lines)


if __name__ == "__main__":
    main()
