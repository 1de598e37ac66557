"""A trained policy behind a websocket: openpi's protocol, with message checks, batching and a drain of its own.

`messages` is the wire format, `contract` says what a request may hold and what a reply holds, `batching` runs the model
on requests of many clients, `connections` is the server itself, `status` its counters and its pages.
"""
