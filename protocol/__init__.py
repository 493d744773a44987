"""The words that all actors share: messages, their codec, sockets, settings and errors.

Imports only the standard library, msgpack, numpy and pyzmq; never torch or transformers, never another folder.
"""
