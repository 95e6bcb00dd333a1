"""A task of every kind, for tests of the engine."""

from pipeline.moondream.prompts import Caption, Detect, Point, Query, Task

MIX: list[Task] = [
    Query("What is it?", max_tokens=12),
    Caption("short", max_tokens=20),
    Query("Why?", reasoning=True, max_tokens=8),
    Detect("person", 3),
    Point("dog", 4),
    Query("How many people are there in the picture?", max_tokens=16),
]
