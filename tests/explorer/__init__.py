"""Races, explored: real sessions driven through the interleavings of their statements by one scheduler.

``actors`` runs code of the product on a session and stops before each statement; ``scheduler`` decides who goes on, and writes the
word that repeats it; ``search`` chooses the words; ``scene`` is what a schedule begins with and how it ends; ``audit`` holds the
invariants; ``flows`` are the workflows; ``worker`` runs them; ``races``,
``permits`` and ``timetables`` (of schedules) are the races, a function each; ``register`` knows them by name.
"""
