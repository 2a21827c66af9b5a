"""Thin routes: parse, hand to the engine, answer."""
