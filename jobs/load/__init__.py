"""A bounded load on an OpenAI endpoint, every stream of it checked, and a report of how the endpoint bore it.

settings.py, asks.py    what to send: its rules, and prompts whose answers are known
sse.py, answer.py       one stream, read strictly
drive.py, watch.py      all streams at once, and the server meanwhile
record.py               what is kept of each request
summary.py, plots.py, report.py, compare.py    what it comes to
served.py               an endpoint of our own to put under load

Imports `jobs.sweeping` and what lies below it.
"""
