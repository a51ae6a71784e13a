"""Decoding: how tokens are drawn, one at a time or several at once."""
