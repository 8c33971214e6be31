# SPDX-License-Identifier: Apache-2.0
"""The functions that the demo corpus offers for tool calls, and calls of them.

Apart from ``tasks`` because descriptions, calls, results and reports of each belong together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.demo_model import words

if TYPE_CHECKING:
    from random import Random

__all__ = ["TOOLS", "Call", "call_text", "draw_call"]


def _tool(name: str, description: str, /, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in types.items()}
    schema = {"type": "object", "properties": properties, "required": list(types)}
    return {"name": name, "description": description, "parameters": schema}


TOOLS = {
    tool["name"]: tool
    for tool in (
        _tool("get_weather", "Current weather of a city", city="string"),
        _tool("get_time", "Local time of a city", city="string"),
        _tool("set_timer", "Start a timer", minutes="integer"),
        _tool("send_message", "Send a text to a person", name="string", text="string"),
        _tool("switch_light", "Switch a lamp", room="string", on="boolean"),
        _tool("search", "Search the library", query="string"),
    )
}
"""Function descriptions by name, as the ``function`` part of a tool definition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A question, the call that serves it, what the tool says and the closing answer."""

    name: str
    question: str
    text: str
    result: str
    report: str


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _draw_parts(
    rng: Random, name: str, person: str
) -> tuple[str, dict[str, Any], dict[str, Any], str]:
    """Question, arguments, result and report for the tool ``name``."""
    city = rng.choice(list(words.CAPITALS.values()))
    text = " ".join(rng.choices(words.WORDS, k=rng.randint(2, 4)))
    if name == "get_weather":
        degrees, sky = rng.randint(-9, 39), rng.choice(("sunny", "cloudy", "rainy", "windy"))
        question = rng.choice(("What is the weather in {}?", "How is the weather in {}?"))
        report = f"It is {sky} in {city}, {degrees} degrees."
        return question.format(city), {"city": city}, {"degrees": degrees, "sky": sky}, report
    if name == "get_time":
        clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        question = rng.choice(("What time is it in {}?", "Tell me the time in {}."))
        return (
            question.format(city),
            {"city": city},
            {"time": clock},
            f"It is {clock} in {city}.",
        )
    if name == "set_timer":
        minutes = rng.randint(2, 99)
        question = rng.choice(("Set a timer for {} minutes.", "Start a timer of {} minutes."))
        report = f"The timer runs for {minutes} minutes."
        return question.format(minutes), {"minutes": minutes}, {"ok": True}, report
    if name == "send_message":
        question = rng.choice(("Send {} a message: {}", "Write to {}: {}")).format(person, text)
        return question, {"name": person, "text": text}, {"ok": True}, f"I wrote to {person}."
    if name == "switch_light":
        room, on = (
            rng.choice(("kitchen", "garden", "bedroom", "hall", "office")),
            rng.random() < 0.5,
        )
        word = "on" if on else "off"
        question = f"Turn {word} the light in the {room}."
        report = f"The light in the {room} is {word}."
        return question, {"room": room, "on": on}, {"ok": True}, report
    found = rng.randint(2, 99)
    question = rng.choice(("Search for {}", "Look up {}")).format(text)
    return question, {"query": text}, {"found": found}, f"I found {found} results."


def draw_call(rng: Random, person: str) -> Call:
    """A call of one of ``TOOLS``; ``person`` is the name to write to."""
    name = rng.choice(list(TOOLS))
    question, arguments, result, report = _draw_parts(rng, name, person)
    return Call(name=name, question=question, text=call_text(name, arguments),
                result=json.dumps(result, ensure_ascii=False), report=report)  # fmt: skip
